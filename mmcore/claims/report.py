"""The claims as a page with tables and figures, made from the results alone: every sentence that judges is computed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcore.claims import figures
from mmcore.claims.plan import (
    FIXED_BANDWIDTH,
    FIXED_DELAY,
    LONG_SHORT,
    MOSAIC,
    NO_GATES,
    RATES,
    SEEDS,
    TASKS,
    TRANSFORMER,
)
from mmcore.claims.trial import Trial

Runs = dict[str, dict[str, list[Mapping[str, Any]]]]
"""Task -> model -> its results, a seed each."""

EQUAL_LOSS = 0.02
"""Losses that differ by less are called equal."""
LEARNED = 0.9
"""In-distribution accuracy from which a model is said to have learned its task."""


def chosen(results: Mapping[Trial, Mapping[str, Any]], rates: Mapping[tuple[str, str], float]) -> Runs:
    """The results at each model's own learning rate."""
    runs: Runs = {}
    for (task, model), rate in rates.items():
        mine = [results[t] for t in results if (t.task, t.model, t.rate) == (task, model, rate) and t.seed in SEEDS]
        runs.setdefault(task, {})[model] = mine
    return runs


def write(
    results: Mapping[Trial, Mapping[str, Any]], rates: Mapping[tuple[str, str], float], about: Mapping[str, str], folder: Path
) -> Path:
    """Write README.md, figures and results.json into `folder`; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = chosen(results, rates)
    figures.draw_all(runs, folder)
    sections = [_head(runs, about), _equal_loss(runs), _new_knowledge(runs), _in_context(runs), _tuning(runs),
                _ablations(runs), _settings(results, rates, runs)]  # fmt: skip
    page = folder / "README.md"
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    rows = [{"task": t.task, "model": t.model, "rate": t.rate, "seed": t.seed, **found} for t, found in results.items()]
    (folder / "results.json").write_text(json.dumps({"about": about, "trials": rows}, indent=1) + "\n", encoding="utf-8")
    return page


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`mean (least-greatest)` over seeds."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def at(runs: Sequence[Mapping[str, Any]], size: int, key: str = "accuracy") -> list[float]:
    """A measure of every seed at one size; JSON has made strings of sizes."""
    return [run[key].get(size, run[key].get(str(size))) for run in runs]


def _head(runs: Runs, about: Mapping[str, str]) -> str:
    return f"""# The claims, on one laptop

*Memory Mosaics at scale* trains 10 billion parameters on a trillion tokens. This page asks which of its claims can be
seen with a hundred thousand, in {about["time"]} on {about["machine"]}. It is made by `make claims`, which trains
{about["trials"]} models from the recipes in `recipes/claims/` and writes every table, figure and verdict below from their
results (`results.json`).

Numbers are means over {len(SEEDS)} seeds, with the least and the greatest in brackets. The transformer twin of a mosaic is a Llama
trained by the same code on the same samples for as many steps, with its feed-forward layers widened until both have as many parameters. The
learning rate of either is the best of {", ".join(f"{rate:g}" for rate in RATES)} (the last for real text only) by held-out loss in the
training distribution (seed {SEEDS[0]}); ablations of the mosaic take the mosaic's, the long-short transformer the twin's."""


def _equal_loss(runs: Runs) -> str:
    text = runs["text"]
    losses = {model: [run["loss"] for run in found] for model, found in text.items()}
    gap = mean(losses[MOSAIC]) / mean(losses[TRANSFORMER]) - 1
    if abs(gap) < EQUAL_LOSS:
        verdict = f"**Shows.** The losses differ by {abs(gap):.1%}."
    else:
        ahead, behind = (MOSAIC, TRANSFORMER) if gap < 0 else (TRANSFORMER, MOSAIC)
        verdict = (
            f"**Does not show as equality at this size:** the {ahead}'s loss is {abs(gap):.1%} lower than the {behind}'s. "
            f"So few tokens measure how fast a model learns to use its context; the paper's claim is about models that "
            f"have long learned to."
        )
    rows = [
        [model, f"{found[0]['parameters']:,}", f"{found[0]['flops_per_token'] / 1e6:.2f}", spread(losses[model], 3),
         spread([run["bits_per_byte"] for run in found], 3)]
        for model, found in text.items()
    ]  # fmt: skip
    return f"""## 1. Equal loss on the training distribution

Real text: the sources, docstrings and help topics of Python's own library, {text[MOSAIC][0]["tokens"] / 1e6:.1f} M tokens of training, held-out
documents measured.

{table(["model", "parameters", "forward MFLOPs a token", "held-out loss, nats a token", "bits per byte"], rows)}

![Held-out loss over steps](text.svg)

{verdict}"""


def _sizes_table(runs: Mapping[str, Sequence[Mapping[str, Any]]], models: Sequence[str], sizes: Sequence[int], word: str) -> str:
    rows = [[model, *(spread(at(runs[model], size)) for size in sizes)] for model in models]
    return table(["model", *(f"{size} {word}" for size in sizes)], rows)


def _new_knowledge(runs: Runs) -> str:
    recall, task = runs["recall"], TASKS["recall"]
    sizes, trained = task.sizes, task.trained_size
    models = [MOSAIC, FIXED_DELAY, TRANSFORMER, LONG_SHORT]
    without = [f"{MOSAIC}, long-term memories removed",
               *(spread(at(recall[MOSAIC], size, "accuracy_without_long_term")) for size in sizes)]  # fmt: skip
    body = _sizes_table(recall, models, sizes, "facts") + "\n| " + " | ".join(without) + " |"
    mosaic, twin = ({s: mean(at(recall[model], s)) for s in sizes} for model in (MOSAIC, TRANSFORMER))
    steps = {model: _steps_to_learn(recall[model]) for model in models}
    learned = "; ".join(f"{model}: {words}" for model, words in steps.items())
    far = sizes[-1]
    shows = mosaic[far] - twin[far] > 0.1 and mosaic[far] > 0.5 * mosaic[trained]
    verdict = "**Shows.**" if shows else "**Does not show at this size.**"
    fair = (
        f"The twin does learn the task where it is trained ({twin[trained]:.2f})"
        if twin[trained] >= LEARNED
        else f"The twin has not fully learned the task where it is trained ({twin[trained]:.2f} of the questions), which its "
        f"other numbers must be read with"
    )
    return f"""## 2. New knowledge

{trained} facts at most in training, each a key and a value of random words among words that mean nothing; then questions. Nothing of
it can be known beforehand: what is right stands in the context alone, and a guess is right once in {task.language.words}. Accuracy on the last
questions of longer and longer contexts, without tuning ({sizes[0]} facts are the trained length of {runs["recall"][MOSAIC][0]["tokens"] // runs["recall"][MOSAIC][0]["steps"] // 16} tokens):

{body}

![Accuracy over the length of the context, and over training steps](recall.svg)

{verdict} At {far // trained} times the trained length the mosaic answers {mosaic[far]:.2f} of the questions and the transformer {twin[far]:.2f}. {fair}.
Steps until {LEARNED:.0%} of the questions at the trained length are right: {learned}. Without its long-term memories the mosaic
answers {mean(at(recall[MOSAIC], trained, "accuracy_without_long_term")):.2f}. {_delay_verdict(recall, far)}"""


def _delay_verdict(recall: Mapping[str, Sequence[Mapping[str, Any]]], far: int) -> str:
    drawn, fixed = (mean(at(recall[model], far)) for model in (MOSAIC, FIXED_DELAY))
    if abs(drawn - fixed) < 0.02:
        return (
            f"The random delay of training makes no difference here ({drawn:.2f} with it, {fixed:.2f} with the delay of "
            f"inference throughout): the paper's drop without it does not show on this task."
        )
    return f"With a fixed delay in training it answers {fixed:.2f} at the greatest length, with the random one {drawn:.2f}."


def _steps_to_learn(found: Sequence[Mapping[str, Any]]) -> str:
    """The first measured step of each seed at which the task is learned."""
    first = [next((p["step"] for p in run["curve"] if p["accuracy"] >= LEARNED), None) for run in found]
    if any(step is None for step in first):
        reached = [step for step in first if step is not None]
        return f"not within {found[0]['steps']:,} by {len(first) - len(reached)} of {len(first)} seeds"
    return f"{min(first):,}" if min(first) == max(first) else f"{min(first):,}-{max(first):,}"


def _in_context(runs: Runs) -> str:
    classes, task = runs["classes"], TASKS["classes"]
    language = task.language
    sizes = task.sizes
    mosaic, twin = ({s: mean(at(classes[model], s)) for s in sizes} for model in (MOSAIC, TRANSFORMER))
    grows = mosaic[sizes[-1]] > mosaic[sizes[0]]
    lead = mosaic[sizes[-1]] - twin[sizes[-1]]
    verdict = "**Shows.**" if grows and lead > 0.1 else "**Does not show at this size.**"
    automata, walks = runs["automata"], TASKS["automata"]
    first, last = walks.sizes[0], walks.sizes[-1]
    m, t = ({s: mean(at(automata[model], s)) for s in walks.sizes} for model in (MOSAIC, TRANSFORMER))
    language_verdict = "**Shows.**" if m[last] > m[first] and m[last] - t[last] > 0.1 else "**Does not show at this size.**"
    return f"""## 3. Learning a new task from examples

{language.classes} anonymous classes, drawn anew in every episode: each is {language.typical} words of {language.words} that its sentences prefer (a word in {1 / language.noise:.0f} is noise), and one of
{language.labels} labels that mean nothing. One shot is one example of every class. Trained with {language.shots} shots and asked after 1 to {sizes[-1]}; chance is
{1 / language.classes:.3f} among the labels of the episode.

{_sizes_table(classes, [MOSAIC, TRANSFORMER], sizes, "shots")}

![Accuracy over shots](classes.svg)

{verdict} From {sizes[0]} to {sizes[-1]} shots the mosaic goes from {mosaic[sizes[0]]:.2f} to {mosaic[sizes[-1]]:.2f}, the transformer from {twin[sizes[0]]:.2f} to {twin[sizes[-1]]:.2f}; within the trained
length (4 shots and a question) they are at {mosaic[4]:.2f} and {twin[4]:.2f}.

**In-context languages**, as in v1's experiment: every episode has a random automaton of {walks.language.states} states, with {walks.language.edges} edges each, over
{walks.language.symbols} symbols; the context is strings of {walks.language.length} symbols. Trained with {walks.language.strings} strings; the share of symbols of one more string at which the
likeliest prediction is one that the automaton allows (a guess: {walks.language.edges / walks.language.symbols:.2f}).

{_sizes_table(automata, [MOSAIC, TRANSFORMER], walks.sizes, "strings")}

![Legal symbols over strings read](automata.svg)

{language_verdict} From {first} to {last} strings the mosaic goes from {m[first]:.2f} to {m[last]:.2f}, the transformer from {t[first]:.2f} to {t[last]:.2f}. Held-out
loss in training, where the law itself costs {math.log(walks.language.edges):.3f} nats a symbol: {mean([r["loss"] for r in automata[MOSAIC]]):.3f} and {mean([r["loss"] for r in automata[TRANSFORMER]]):.3f}."""


def _tuning(runs: Runs) -> str:
    recall, task = runs["recall"], TASKS["recall"]
    models = [MOSAIC, FIXED_DELAY, TRANSFORMER, LONG_SHORT]
    steps = task.tuned_steps
    rows = [[model, *(spread(at(recall[model], step, "tuned")) for step in steps)] for model in models]
    gains = {model: [mean(at(recall[model], step, "tuned")) for step in steps] for model in models}
    words = "; ".join(f"{model} {g[0]:.2f} -> {g[1]:.2f} after one step, {g[-1]:.2f} after {steps[-1]}" for model, g in gains.items())
    return f"""## 4. Fine-tuning to a longer context

The models of claim 2, tuned for a few steps on samples {task.tuned_factor} times as long (as many tokens a step, a tenth of the peak rate);
accuracy at {task.trained_size * task.tuned_factor} facts.

{table(["model", *(f"{step} steps" for step in steps)], rows)}

![Accuracy over steps of fine-tuning](tuning.svg)

{words}."""


def _ablations(runs: Runs) -> str:
    recall, classes = runs["recall"], runs["classes"]
    far, shots = TASKS["recall"].sizes[-1], TASKS["classes"].sizes
    rows = []
    for model in (MOSAIC, FIXED_BANDWIDTH, NO_GATES, TRANSFORMER, LONG_SHORT):
        cells = [spread(at(recall[model], TASKS["recall"].trained_size)), spread(at(recall[model], far))]
        known = classes.get(model)
        cells += [spread(at(known, shots[0])), spread(at(known, shots[-1]))] if known else ["", ""]
        rows.append([model, *cells])
    base, fixed, plain = (mean(at(recall[model], far)) for model in (MOSAIC, FIXED_BANDWIDTH, NO_GATES))
    c_base, c_fixed, c_plain = (mean(at(classes[model], shots[-1])) for model in (MOSAIC, FIXED_BANDWIDTH, NO_GATES))
    return f"""## 5. Ablations

{table(["model", f"{TASKS['recall'].trained_size} facts", f"{far} facts", f"{shots[0]} shot", f"{shots[-1]} shots"], rows)}

![Ablations](ablations.svg)

Adaptive against fixed bandwidth: {base:.2f} and {fixed:.2f} of {far} facts, {c_base:.2f} and {c_fixed:.2f} after {shots[-1]} shots.
Gated keys against keys whose average is the same at every token: {base:.2f} and {plain:.2f}, {c_base:.2f} and {c_plain:.2f}.
Long and short attention in the transformer, which has {recall[LONG_SHORT][0]["parameters"] / recall[TRANSFORMER][0]["parameters"]:.2f} times the twin's parameters: {mean(at(recall[LONG_SHORT], far)):.2f} of {far} facts, where the plain one has
{mean(at(recall[TRANSFORMER], far)):.2f} and the mosaic {base:.2f}."""


def _settings(results: Mapping[Trial, Mapping[str, Any]], rates: Mapping[tuple[str, str], float], runs: Runs) -> str:
    rows = []
    for (task, model), rate in rates.items():
        swept = {t.rate: results[t]["loss"] for t in results if (t.task, t.model, t.seed) == (task, model, SEEDS[0])}
        found = runs[task][model]
        losses = [f"{swept[r]:.3f}" if r in swept else "" for r in RATES]
        rows.append([task, model, f"{found[0]['parameters']:,}", f"{found[0]['flops_per_token'] / 1e6:.3f}",
                     f"{found[0]['steps']:,}", f"{rate:g}", *losses, f"{mean([r['seconds'] for r in found]):.0f}"])  # fmt: skip
    head = ["task", "model", "parameters", "MFLOPs a token", "steps", "rate", *(f"loss at {r:g}" for r in RATES), "s a run"]
    return f"""## What was trained

Held-out losses in the training distribution (for generated languages of the answers alone) decide the rate; the first seed of the sweep
is one of the {len(SEEDS)}, so numbers at the chosen rate are a little kind to both sides. MFLOPs count the forward pass with its reads of
memory or attention at the trained length.

{table(head, rows)}"""
