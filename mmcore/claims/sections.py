"""The five claims, one function each: what was asked, the numbers, and a verdict that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mmcore.claims.plan import FIXED_BANDWIDTH, FIXED_DELAY, LONG_SHORT, MOSAIC, NO_GATES, TASKS, TRANSFORMER
from mmcore.claims.tables import Found, at, by_size, mean, mean_at, paragraph, section, spread, table

EQUAL_LOSS = 0.02
"""Losses that differ by less are called equal."""
LEARNED = 0.9
"""In-distribution accuracy from which a model is said to have learned its task."""
LEAD = 0.1
"""A lead in accuracy that counts: the paper's ten points."""
SHOWS, NOT = "**Shows.**", "**Does not show at this size.**"

Task = Mapping[str, Found]


def equal_loss(runs: Mapping[str, Task]) -> str:
    text = runs["text"]
    gap = mean(text[MOSAIC], "loss") / mean(text[TRANSFORMER], "loss") - 1
    if abs(gap) < EQUAL_LOSS:
        verdict = f"{SHOWS} The losses differ by {abs(gap):.1%}."
    else:
        ahead, behind = (MOSAIC, TRANSFORMER) if gap < 0 else (TRANSFORMER, MOSAIC)
        verdict = (
            f"{NOT} The losses are not equal: the {ahead}'s is {abs(gap):.1%} lower than the {behind}'s. So few tokens "
            f"measure how fast a model learns to use its context; the paper's claim is about models that long have."
        )
    rows = [
        [model, f"{found[0]['parameters']:,}", f"{found[0]['flops_per_token'] / 1e6:.2f}",
         spread([run["loss"] for run in found], 3), spread([run["bits_per_byte"] for run in found], 3)]
        for model, found in text.items()
    ]  # fmt: skip
    return section(
        "1. Equal loss on the training distribution",
        paragraph(
            "Real text: the sources, docstrings and help topics of Python's own library,",
            f"{text[MOSAIC][0]['tokens'] / 1e6:.1f} M tokens of training; held-out documents are measured.",
        ),
        table(["model", "parameters", "forward MFLOPs a token", "held-out loss, nats a token", "bits per byte"], rows),
        "![Held-out loss over steps](text.svg)",
        paragraph(verdict),
    )


def new_knowledge(runs: Mapping[str, Task]) -> str:
    recall, task = runs["recall"], TASKS["recall"]
    sizes, trained, far, language = task.sizes, task.trained_size, task.sizes[-1], task.language
    models = [MOSAIC, FIXED_DELAY, TRANSFORMER, LONG_SHORT]
    removed = [spread(at(recall[MOSAIC], size, "accuracy_without_long_term")) for size in sizes]
    last = " | ".join(["mosaic, long-term memories removed", *removed])
    numbers = f"{by_size(recall, models, sizes, 'facts')}\n| {last} |"
    mosaic, twin = mean_at(recall[MOSAIC], far), mean_at(recall[TRANSFORMER], far)
    twin_learned = mean_at(recall[TRANSFORMER], trained)
    fair = (
        f"The twin does learn the task where it is trained ({twin_learned:.2f} of the questions)."
        if twin_learned >= LEARNED
        else f"The twin has not fully learned the task where it is trained ({twin_learned:.2f} of the questions), which its "
        f"other numbers must be read with."
    )
    shows = mosaic - twin > LEAD and mosaic > 0.5 * mean_at(recall[MOSAIC], trained)
    return section(
        "2. New knowledge",
        paragraph(
            f"At most {trained} facts in training, each a key and a value of random words among words that mean",
            "nothing; then",
            "questions. Nothing of it can be known beforehand: what is right stands in the context alone, and a",
            "guess is right",
            f"once in {language.words}. Accuracy on the questions at the end of longer and longer contexts, without tuning:",
        ),
        numbers,
        "![Accuracy over the length of the context, and over training steps](recall.svg)",
        paragraph(
            f"{SHOWS if shows else NOT} At {far // trained} times the trained length the mosaic answers {mosaic:.2f} of the",
            f"questions and the transformer {twin:.2f}. {fair} Steps until {LEARNED:.0%} of the questions at the",
            "trained length",
            f"are right: {'; '.join(f'{model} {_steps_to_learn(recall[model])}' for model in models)}. Without its",
            "long-term",
            f"memories the mosaic answers {mean_at(recall[MOSAIC], trained, 'accuracy_without_long_term'):.2f} at",
            "the trained",
            f"length. {_delay_verdict(recall, far)}",
        ),
    )


def _delay_verdict(recall: Task, far: int) -> str:
    drawn, fixed = mean_at(recall[MOSAIC], far), mean_at(recall[FIXED_DELAY], far)
    if abs(drawn - fixed) < 0.02:
        return (
            f"The random delay of training makes no difference here ({drawn:.2f} with it at the greatest length, "
            f"{fixed:.2f} with the delay of inference throughout): the paper's drop without it does not show on this task."
        )
    return f"With a fixed delay in training it answers {fixed:.2f} at the greatest length, with the random one {drawn:.2f}."


def _steps_to_learn(found: Found) -> str:
    """The first measured step of each seed at which the task is learned."""
    first = [next((point["step"] for point in run["curve"] if point["accuracy"] >= LEARNED), None) for run in found]
    reached = [step for step in first if step is not None]
    if len(reached) < len(first):
        return f"not within {found[0]['steps']:,} in {len(first) - len(reached)} of {len(first)} seeds"
    return f"{min(reached):,}" if min(reached) == max(reached) else f"{min(reached):,} to {max(reached):,}"


def in_context(runs: Mapping[str, Task]) -> str:
    classes, language = runs["classes"], TASKS["classes"].language
    automata, walks = runs["automata"], TASKS["automata"].language
    return section(
        "3. Learning a new task from examples",
        paragraph(
            f"**Anonymous classes.** {language.classes} classes, drawn anew in every episode: each is",
            f"{language.typical} words of",
            f"{language.words} that its sentences are made of (but for {language.noise:.0%} of noise), and one of",
            f"{language.labels} labels that mean nothing. One shot is one example of every class. Trained with",
            f"{language.shots}",
            f"shots. Accuracy, where one guess in {language.classes} among the episode's labels is right:",
        ),
        by_size(classes, [MOSAIC, TRANSFORMER], TASKS["classes"].sizes, "shots"),
        "![Accuracy over shots](classes.svg)",
        paragraph(_growth(classes, "classes", "shots")),
        paragraph(
            "**In-context languages**, as in v1's experiment. Every episode has a random automaton of",
            f"{walks.states} states with",
            f"{walks.edges} edges each over {walks.symbols} symbols; the context is strings of {walks.length}",
            "symbols. Trained with",
            f"{walks.strings} strings. Share of the symbols of one more string at which the likeliest prediction is",
            "one that the",
            f"automaton allows (a guess: {walks.edges / walks.symbols:.2f}):",
        ),
        by_size(automata, [MOSAIC, TRANSFORMER], TASKS["automata"].sizes, "strings"),
        "![Legal symbols over strings read](automata.svg)",
        paragraph(
            _growth(automata, "automata", "strings"),
            f"Held-out loss in training: {mean(automata[MOSAIC], 'loss'):.3f} and",
            f"{mean(automata[TRANSFORMER], 'loss'):.3f} nats a",
            f"symbol, where knowing the automaton would cost {math.log(walks.edges):.3f}.",
        ),
    )


def _growth(found: Task, name: str, word: str) -> str:
    task = TASKS[name]
    first, last, trained = task.sizes[0], task.sizes[-1], max(s for s in task.sizes if s <= task.trained_size)
    (m_first, m_trained, m_last), (t_first, t_trained, t_last) = (
        [mean_at(found[model], size) for size in (first, trained, last)] for model in (MOSAIC, TRANSFORMER)
    )
    shows = m_last > m_first and m_last - t_last > LEAD
    behind = "; the transformer has learned less of the task itself" if t_trained < m_trained - LEAD else ""
    return (
        f"{SHOWS if shows else NOT} From {first} to {last} {word} the mosaic goes from {m_first:.2f} to {m_last:.2f}, the "
        f"transformer from {t_first:.2f} to {t_last:.2f}. Within the trained length, at {trained}, they are at "
        f"{m_trained:.2f} and {t_trained:.2f}{behind}."
    )


def tuning(runs: Mapping[str, Task]) -> str:
    recall, task = runs["recall"], TASKS["recall"]
    models, steps = [MOSAIC, FIXED_DELAY, TRANSFORMER, LONG_SHORT], task.tuned_steps
    before, one, last = ({m: mean_at(recall[m], step, "tuned") for m in models} for step in (steps[0], steps[1], steps[-1]))
    words = (f"{m} {before[m]:.2f}, after one step {one[m]:.2f}, after {steps[-1]} {last[m]:.2f}" for m in models)
    room = before[MOSAIC] < LEARNED
    verdict = (
        SHOWS if room and one[MOSAIC] - before[MOSAIC] > 0.5 * (last[MOSAIC] - before[MOSAIC]) > 0
        else NOT if room
        else "**Cannot show here:** the mosaic needs no tuning on this task, so one step has nothing to gain."
    )  # fmt: skip
    return section(
        "4. Fine-tuning to a longer context",
        paragraph(
            f"The models of claim 2, tuned for a few steps on samples {task.tuned_factor} times as long (as many",
            "tokens a step, a",
            f"tenth of the peak rate). Accuracy at {task.trained_size * task.tuned_factor} facts:",
        ),
        by_size(recall, models, steps, "steps", "tuned"),
        "![Accuracy over steps of fine-tuning](tuning.svg)",
        paragraph(f"{verdict} {'; '.join(words)}."),
    )


def ablations(runs: Mapping[str, Task]) -> str:
    recall, classes = runs["recall"], runs["classes"]
    trained, far, shots = TASKS["recall"].trained_size, TASKS["recall"].sizes[-1], TASKS["classes"].sizes
    rows = []
    for model in (MOSAIC, FIXED_BANDWIDTH, NO_GATES, TRANSFORMER, LONG_SHORT):
        cells = [spread(at(recall[model], trained)), spread(at(recall[model], far))]
        known = classes.get(model)
        rows.append([model, *cells, *([spread(at(known, n)) for n in (shots[0], shots[-1])] if known else ["", ""])])
    larger = recall[LONG_SHORT][0]["parameters"] / recall[TRANSFORMER][0]["parameters"]
    return section(
        "5. Ablations",
        table(["model", f"{trained} facts", f"{far} facts", f"{shots[0]} shot", f"{shots[-1]} shots"], rows),
        "![Ablations](ablations.svg)",
        paragraph(
            _without("the adaptive bandwidth", runs, FIXED_BANDWIDTH),
            _without("gated keys (an average that is the same at every token instead)", runs, NO_GATES),
            f"Long and short attention in the transformer, which has {larger:.2f} times the twin's parameters:",
            f"{mean_at(recall[LONG_SHORT], far):.2f} of {far} facts, where the plain one has",
            f"{mean_at(recall[TRANSFORMER], far):.2f} and the mosaic {mean_at(recall[MOSAIC], far):.2f}.",
        ),
    )


def _without(what: str, runs: Mapping[str, Task], model: str) -> str:
    """What taking something away costs at the greatest sizes."""
    words, gone = [], []
    for name, word in (("recall", "facts"), ("classes", "shots")):
        size = TASKS[name].sizes[-1]
        with_it, without = mean_at(runs[name][MOSAIC], size), mean_at(runs[name][model], size)
        words.append(f"{with_it:.2f} with it and {without:.2f} without at {size} {word}")
        gone.append(with_it - without)
    verdict = SHOWS if max(gone) > 0.05 else "**Makes no difference that shows:**"
    return f"{verdict} Without {what}: {', '.join(words)}."
