"""The one trainer: pretraining, fine-tuning, on a CPU or a GPU, with a terminal or without.

A run is a pure function of its recipe: the learning rate and the long-term delay depend on the step, the samples
on one global index. So a checkpoint holds weights, the optimizer's state and a handful of numbers, and a resumed
run makes the very updates that the unbroken one would have made.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmcore.checkpoint.store import CheckpointWriter, load_state
from mmcore.data.loader import Loader
from mmcore.distributed.reduce import highest
from mmcore.training import events
from mmcore.training.checks import may_keep_one_more
from mmcore.training.converted import is_converted
from mmcore.training.events import Event, Listener
from mmcore.training.faults import Faults
from mmcore.training.health import measure
from mmcore.training.interrupt import Interrupts
from mmcore.training.job import Job, Outcome
from mmcore.training.memory import explain_memory
from mmcore.training.metrics import Smoothed
from mmcore.training.optimizer import (
    build_optimizer,
    load_optimizer,
    optimizer_steps,
    optimizer_tensors,
    set_learning_rate,
)
from mmcore.training.restoring import check_goes_on, load_weights
from mmcore.training.run_folder import recipe_text
from mmcore.training.schedule import learning_rate, long_term_delay
from mmcore.training.step import StepResult, accumulate, clip
from mmcore.training.throughput import Meter, memory_in_use, peak_flops, synchronize
from mmcore.training.validation import bits_per_byte, held_out_loss
from mmcore.training.watching import SAVING, NotWatching, watch_ranks


class Trainer:
    """Trains `job.model` to the recipe's last step. `fit` may be called once.

    Everything that happens is told to `listeners` (events.py).
    """

    def __init__(self, job: Job, listeners: Iterable[Listener] = ()):
        self.job, self.listeners = job, list(listeners)
        self.resources = contextlib.ExitStack()
        """Closed when `fit` ends, however it ends."""
        self.recipe, self.model = job.recipe, job.model
        self.total_steps = job.recipe.training.total_steps
        self.optimizer = build_optimizer(job.model, job.recipe.training)
        self.step = 0
        """Updates made."""
        self.position = 0
        """Global number of the next sample."""
        self.tokens = 0
        self.smoothed, self.meter = Smoothed(), Meter()
        self.faults = Faults(job.recipe.training, job.world)
        self._watch = NotWatching()
        self.checkpoint: Path | None = None
        """The newest one of this run."""
        self.resumed_from: Path | None = None
        keep = job.recipe.checkpoint
        self.writer = CheckpointWriter(
            job.recipe.run_folder, job.world, keep_last=keep.keep_last, keep_every=keep.keep_every,
            asynchronous=keep.asynchronous,
        )  # fmt: skip
        self.resources.callback(self.writer.close)
        self._validated_step = 0
        self._saved_step: int | None = 0
        """The step of the newest save; None where that has to be written again."""
        self._validation_seconds = 0.0
        self._last_loss: float | None = None
        self._stop: signal.Signals | None = None
        """What the ranks have agreed to stop for."""
        self._last_validation: tuple[float, float | None] | None = None

    def fit(self) -> Outcome:
        """Train until the last step, or until a signal asks any rank to stop: then the current step is finished and saved.

        Raises NonFiniteError before an update that is not finite, SpikeError where the loss jumps too often, and
        HardwareError where memory does not suffice.
        """
        began = time.perf_counter()
        self._interrupts = interrupts = Interrupts(
            on_first=lambda number: self._emit(events.Stopping(number.name)),
            on_second=lambda: self._emit(events.Quitting()),
        )
        with self.resources, explain_memory(self.recipe), interrupts:
            for listener in self.listeners:
                self.resources.callback(getattr(listener, "close", _nothing))
            self._watch = self.resources.enter_context(
                watch_ranks(self.job.world, self.recipe, self._hang, lambda: interrupts.ask(signal.SIGTERM))
            )
            self._emit(self._started())
            self._run()
            finished = self.step >= self.total_steps and not self._validation_due()
            outcome = Outcome("done" if finished else "interrupted", self.step, self.checkpoint, self._stop)
            self._emit(self._ended(outcome, time.perf_counter() - began))
        return outcome

    def _stopping(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it at the same points."""
        own = self._interrupts.received
        number = highest(int(own or 0), self.job.world)
        if number and self._stop is None:
            self._stop = signal.Signals(number)
            if own is None:
                self._emit(events.Stopping(f"{self._stop.name} on another rank"))
        return self._stop is not None

    def _run(self) -> None:
        self.model.train()
        self._peak = peak_flops(self.job.device, self.job.precision) * self.job.world.size
        if self._validation_due():  # the run was stopped after a step whose validation was still to come
            self._validate()
        while self.step < self.total_steps and not self._stopping():
            with self._loader() as loader:
                self._steps(iter(loader))
        self.save()

    def _steps(self, batches: Iterator[Sequence]) -> None:
        """Steps until the last one, a stop, or a roll-back, after which the samples go on elsewhere."""
        every, health = self.recipe.checkpoint.every, self.recipe.training.health_every
        while self.step < self.total_steps and not self._stopping():
            if not self._train_step(batches):
                return
            self._published(self.writer.poll())
            if health and self.step % health == 0:
                self._measure_health()
            if self._validation_due() and not self._stopping():
                self._validate()
            if self.step % every == 0 or self.step == self.total_steps:
                self.save(wait=self.step == self.total_steps)

    def _loader(self) -> Loader:
        training, world = self.recipe.training, self.job.world
        return Loader(
            self.job.samples,
            training.batch_size,
            training.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            start=self.position,
            stop=self.position + (self.total_steps - self.step) * training.batch_size,
        )

    def _train_step(self, batches: Iterator[Sequence]) -> bool:
        """One update, or a step passed over; False where the run went back to a checkpoint instead.

        Nothing of the trainer changes where the loss or the gradient is not finite and the recipe does not skip.
        """
        training, step = self.recipe.training, self.step + 1
        rate = learning_rate(training, step)
        delay = long_term_delay(self.recipe.model.long_term_delay_range, training.seed, step)
        self.meter.start()
        self._watch.beat(step, "waiting for data")
        micro_batches = next(batches)
        self._watch.beat(step, "forward and backward")
        self.optimizer.zero_grad(set_to_none=True)
        job = self.job
        result = accumulate(
            self.model, micro_batches, delay, job.device, job.precision, job.world, self.recipe.distributed
        )
        self._watch.beat(step, "updating")
        if not result.is_finite:
            self._pass_over(result, step, rate)
            return True
        if self.faults.spikes.is_spike(result.loss) and self._roll_back(result.loss):
            return False
        clip(self.model, result.gradient_norm, training.gradient_clip)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        synchronize(self.job.device)
        self.meter.stop(training.tokens_per_step)
        self._count_step()
        self.faults.step_done(result.loss if result.trained_tokens else None)
        self._emit(self._step_done(result, rate, delay))
        return True

    def _count_step(self) -> None:
        self.step += 1
        self.position += self.recipe.training.batch_size
        self.tokens += self.recipe.training.tokens_per_step

    def _pass_over(self, result: StepResult, step: int, rate: float) -> None:
        """Go on without an update, on every rank, or raise NonFiniteError."""
        self._published(self.writer.wait())  # the sentence to come names the newest whole checkpoint
        whole = range(self.position, self.position + self.recipe.training.batch_size)
        reason = self.faults.what_is_not_finite(result, self.model, self._samples_of_step(), whole)
        self.faults.skip(step, reason, whole, self.checkpoint, rate)
        self.optimizer.zero_grad(set_to_none=True)
        self._count_step()
        counts = self.faults.counts
        self._emit(events.Skipped(step, (whole.start, whole.stop), reason, counts.in_a_row, counts.skipped_steps))

    def _roll_back(self, loss: float) -> bool:
        """Go back to the newest checkpoint and leave out the samples since; False where there is none yet.

        The checkpoint is written again with what is left out, so that whoever resumes from it leaves the same out.
        """
        self._published(self.writer.wait())
        step, end, smoothed = self.step + 1, self.position + self.recipe.training.batch_size, self.smoothed.value
        if self.checkpoint is None or is_converted(load_state(self.checkpoint).state):
            self._emit(events.Notice(f"the loss of step {step} is a spike, and there is no checkpoint yet to go back to"))
            return False
        self.faults.go_back(step, loss)
        seconds, protected = self.meter.seconds, self.resumed_from
        self.optimizer.zero_grad(set_to_none=True)
        self.restore(self.checkpoint)
        samples, self.position = range(self.position, end), end
        self.meter.seconds, self.resumed_from = seconds, protected
        self.faults.went_back(samples)
        self._saved_step = None
        self.save()
        self._emit(events.RolledBack(
            self.step, step, loss, smoothed, (samples.start, samples.stop), self.faults.counts.rollbacks
        ))  # fmt: skip
        return True

    def _measure_health(self) -> None:
        """Look into the memories; all ranks compute, since their weights may be shared out among them."""
        self._watch.beat(self.step, "measuring the memories")
        start = time.perf_counter()
        memories = measure(self.model, self.job.samples, self.job.device, self.job.precision)
        if memories:
            self._emit(events.Health(self.step, memories, time.perf_counter() - start))

    def _hang(self, text: str) -> None:
        """A rank makes no progress: said from the watching thread, since this one may be the stuck one."""
        self._emit(events.Hung(text))

    def _samples_of_step(self) -> range:
        """This rank's global sample numbers in the step that is being made."""
        share = self.recipe.training.batch_size // self.job.world.size
        first = self.position + self.job.world.rank * share
        return range(first, first + share)

    def _step_done(self, result: StepResult, rate: float, delay: int) -> events.StepDone:
        if result.trained_tokens:
            self._last_loss = result.loss
            self.smoothed.update(result.loss)
        speed = self.meter.tokens_per_second
        return events.StepDone(
            step=self.step,
            total_steps=self.total_steps,
            loss=result.loss if result.trained_tokens else math.nan,
            smoothed_loss=self.smoothed.value,
            learning_rate=rate,
            gradient_norm=result.gradient_norm,
            long_term_delay=delay,
            trained_tokens=result.trained_tokens,
            tokens=self.tokens,
            tokens_per_second=speed,
            mfu=speed * self.job.flops_per_token / self._peak,
            memory_bytes=memory_in_use(self.job.device),
            elapsed_seconds=self.meter.seconds,
            seconds_left=self._seconds_left(),
        )

    def _seconds_left(self) -> float:
        steps = self.total_steps - self.step
        every = self.recipe.training.validation_every
        validations = (self.total_steps // every - self.step // every if every else 1) if self.job.validation else 0
        return steps * self.meter.seconds_per_step + validations * self._validation_seconds

    def _validation_due(self) -> bool:
        every = self.recipe.training.validation_every
        due = self.step == self.total_steps or (every > 0 and self.step > 0 and self.step % every == 0)
        return bool(self.job.validation) and due and self._validated_step < self.step

    def _validate(self) -> None:
        start = time.perf_counter()
        total = sum(batch.tokens.numel() for batch in self.job.validation)

        def progress(done: int) -> None:
            self._watch.beat(self.step, "validating")
            self._emit(events.Validating(done, total))

        found = held_out_loss(
            self.model,
            self.job.validation,
            self.job.device,
            self.job.precision,
            stop=self._stopping,
            progress=progress,
            world=self.job.world,
        )
        if found is None:
            return
        loss, tokens = found
        self._validated_step, self._validation_seconds = self.step, time.perf_counter() - start
        self._last_validation = (loss, bits_per_byte(loss, self.job.bytes_per_token))
        self._emit(events.Validated(self.step, *self._last_validation, tokens, self._validation_seconds))

    def save(self, wait: bool = True) -> Path | None:
        """Write a checkpoint of the present step, unless that is done; the newest checkpoint, None before any.

        wait=False returns once the tensors are copied, and `checkpoint` changes when it is whole; with
        checkpoint.asynchronous off that is the same.
        """
        self._watch.beat(self.step, SAVING)
        self._published(self.writer.wait() if wait or self.step != self._saved_step else None)
        if self.step in (0, self._saved_step):
            return self.checkpoint
        self._emit(events.Saving(self.step))
        model_only = self.recipe.checkpoint.final == "model" and self.step == self.total_steps
        self.writer.save(
            self.step,
            model=dict(self.model.named_parameters()),
            optimizer={} if model_only else optimizer_tensors(self.model, self.optimizer),
            state=self._state(),
            config=self.job.config_json,
            files={**self.job.files, "recipe.yaml": recipe_text(self.recipe).encode()},
            protect=(self.resumed_from,) if self.resumed_from and may_keep_one_more(self.recipe) else (),
            wait=wait,
        )
        self._saved_step = self.step
        self._published(self.writer.poll())
        return self.checkpoint

    def _published(self, path: Path | None) -> None:
        """Take note of a checkpoint that has become whole."""
        if path is not None:
            timing = self.writer.timing
            seconds = timing.stalled_seconds + timing.background_seconds
            self.checkpoint = path
            self._emit(events.Saved(timing.step, path, seconds, timing.stalled_seconds))

    def _state(self) -> dict[str, Any]:
        """What trainer.json holds: all that `restore` needs beside weights and optimizer."""
        return {
            "stage": self.job.stage,
            "precision": self.job.precision,
            "step": self.step,
            "sample_position": self.position,
            "tokens": self.tokens,
            "smoothed_loss": self.smoothed.state(),
            "training_seconds": self.meter.seconds,
            "optimizer_steps": optimizer_steps(self.model, self.optimizer),
            "validated_step": self._validated_step,
            "validation": self._last_validation,
            "data_identity": self.job.data_identity,
            "faults": self.faults.state(),
        }

    def restore(self, checkpoint: Path) -> None:
        """Go on from a whole training checkpoint of this run.

        Raises CheckpointError where it does not fit the model, DataError where the data are not those it saw.
        """
        saved = load_state(checkpoint)
        state = saved.state
        if is_converted(state):
            load_weights(self.model, saved.model, checkpoint)
            self.checkpoint = self.resumed_from = checkpoint
            return
        check_goes_on(saved, checkpoint, self.job.data_identity, self.total_steps)
        load_weights(self.model, saved.model, checkpoint)
        load_optimizer(self.model, self.optimizer, saved.optimizer, state["optimizer_steps"])
        self.step, self.position, self.tokens = state["step"], state["sample_position"], state["tokens"]
        self.smoothed.load(state["smoothed_loss"])
        self.meter.seconds = state["training_seconds"]
        self._validated_step = state["validated_step"]
        self._last_validation = tuple(state["validation"]) if state["validation"] else None
        if "faults" in state:  # checkpoints of earlier versions know of none
            self.faults.load(state["faults"])
        self.checkpoint = self.resumed_from = checkpoint
        self._saved_step = self.step

    def _started(self) -> events.Started:
        return events.Started(
            run_folder=self.recipe.run_folder,
            step=self.step,
            total_steps=self.total_steps,
            tokens_per_step=self.recipe.training.tokens_per_step,
            parameters=sum(p.numel() for p in self.model.parameters()),
            device=str(self.job.device),
            precision=self.job.precision,
            training_tokens=self.job.training_tokens,
            resumed_from=self.resumed_from,
        )

    def _ended(self, outcome: Outcome, seconds: float) -> events.Ended:
        validation_loss, bits = self._last_validation or (None, None)
        return events.Ended(
            self.step, self.total_steps, outcome.status, self.checkpoint, self._last_loss, validation_loss, bits, seconds
        )

    def _emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)


def _nothing() -> None:
    """What a listener without `close` does in the end."""
