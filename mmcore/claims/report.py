"""The claims as a page with tables and figures, made from the results alone: every sentence that judges is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcore.claims import figures, sections
from mmcore.claims.plan import RATES, SEEDS
from mmcore.claims.tables import Found, mean, paragraph, section, table
from mmcore.claims.trial import Trial

Runs = dict[str, dict[str, Found]]
"""Task -> model -> its results at the chosen rate."""


def chosen(results: Mapping[Trial, Mapping[str, Any]], rates: Mapping[tuple[str, str], float]) -> Runs:
    """The results at each model's own learning rate."""
    runs: Runs = {}
    for (task, model), rate in rates.items():
        mine = [results[t] for t in results if (t.task, t.model, t.rate) == (task, model, rate) and t.seed in SEEDS]
        runs.setdefault(task, {})[model] = mine
    return runs


def write(
    results: Mapping[Trial, Mapping[str, Any]], rates: Mapping[tuple[str, str], float], about: Mapping[str, str],
    folder: Path,
) -> Path:
    """Write README.md, figures and results.json into `folder`; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = chosen(results, rates)
    figures.draw_all(runs, folder)
    parts = [_head(about), sections.equal_loss(runs), sections.new_knowledge(runs), sections.in_context(runs),
             sections.tuning(runs), sections.ablations(runs), _settings(results, rates, runs)]  # fmt: skip
    page = folder / "README.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    rows = [{"task": t.task, "model": t.model, "rate": t.rate, "seed": t.seed, **found} for t, found in results.items()]
    (folder / "results.json").write_text(json.dumps({"about": about, "trials": rows}, indent=1) + "\n", encoding="utf-8")
    return page


def _head(about: Mapping[str, str]) -> str:
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    return "\n\n".join([
        "# The claims, on one laptop",
        paragraph(
            "*Memory Mosaics at scale* trains 10 billion parameters on a trillion tokens. This page asks which of its",
            f"claims can be seen with a hundred thousand, in trials that took {about['time']} in all, each on one thread of",
            f"{about['machine']}. It is made by `make claims`, which trains {about['trials']} models from the recipes in",
            "`recipes/claims/` and writes every table, figure and verdict below from their results (`results.json`).",
        ),
        paragraph(
            f"Numbers are means over {len(SEEDS)} seeds, with the least and the greatest in brackets. The transformer twin",
            "of a mosaic is a Llama trained by the same code on the same samples for as many steps, with its feed-forward",
            "layers widened until both have as many parameters. The learning rate of either is the best of",
            f"{rates} (the last for real text only) by held-out loss in the training distribution, seed {SEEDS[0]};",
            "ablations of the mosaic take the mosaic's, other transformers the twin's.",
        ),
    ])  # fmt: skip


def _settings(results: Mapping[Trial, Mapping[str, Any]], rates: Mapping[tuple[str, str], float], runs: Runs) -> str:
    rows = []
    for (task, model), rate in rates.items():
        swept = {t.rate: results[t]["loss"] for t in results if (t.task, t.model, t.seed) == (task, model, SEEDS[0])}
        found = runs[task][model]
        losses = [f"{swept[r]:.3f}" if r in swept else "" for r in RATES]
        rows.append([task, model, f"{found[0]['parameters']:,}", f"{found[0]['flops_per_token'] / 1e6:.3f}",
                     f"{found[0]['steps']:,}", f"{rate:g}", *losses, f"{mean(found, 'seconds'):.0f}"])  # fmt: skip
    head = ["task", "model", "parameters", "MFLOPs a token", "steps", "rate", *(f"loss at {r:g}" for r in RATES), "s a run"]
    return section("What was trained", paragraph(
        "Held-out losses in the training distribution (for generated languages of the answers alone) decide the",
        "rate. The first",
        f"seed of the sweep is one of the {len(SEEDS)}, so numbers at the chosen rate are a little kind to both",
        "sides. MFLOPs",
        "count the forward pass with its reads of memory or attention at the trained length.",
    ), table(head, rows))  # fmt: skip
