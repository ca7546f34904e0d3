"""`mm eval --inspect` and `/why` in a conversation: what every head reads at one token of a text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHADES = " ▁▂▃▄▅▆▇█"
STRONGEST = 5
"""Tokens kept for each head."""
MOST_HEADS = 48
"""Heads that `/why` shows."""


def run_inspection(
    checkpoint: Path, file: Path, token: int, without: Sequence[str], device: str, dtype: str | None,
    tokenizer: str | None, out: Path | None, as_json: bool,
) -> None:
    """Show what every head reads at one token of a text, and draw it."""
    import mmcore
    from mmcore.checkpoint.load import weight_format
    from mmcore.errors import DataError
    from mmcore.evaluation import folders, inspection, runner

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text ({error}): give a UTF-8 text file") from None
    where = runner.pick_device(device)
    model = mmcore.load_model(checkpoint, dtype=dtype and weight_format(dtype), device=str(where), without=without)
    words = mmcore.load_tokenizer(checkpoint, tokenizer)
    words.check_fits(model.config.vocab_size)
    begin, _ = words.frame()
    ids = [begin, *words.encode(text)]
    reads = inspection.inspect(model, ids, token)
    place = token + len(ids) if token < 0 else token
    pieces = [_piece(words, one) for one in ids]
    folder = out or folders.claim(folders.default_folder(checkpoint))
    title = f"{checkpoint}: what is read at token {place:,} ({pieces[place]!r}) of {file.name}"
    values = {"checkpoint": str(checkpoint), "file": str(file), "token": place, "text": pieces[place],
              "without": sorted(model.knocked_out), "reads": inspection.as_json(reads, place, pieces, STRONGEST)}
    with folders.drafted(folder, last="inspection.json") as draft:
        inspection.plot(reads, place, title, [draft / f"inspection.{ending}" for ending in ("png", "svg")])
        written = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (draft / "inspection.json").write_text(written, encoding="utf-8")
    if as_json:
        print(json.dumps(values | {"folder": str(folder)}, indent=2))
        return
    print(f"Token {place:,} of {len(ids) - 1:,}: {pieces[place]!r}.")
    print("\n".join(head_lines(values["reads"], shutil.get_terminal_size().columns)))
    print(f"Picture: {folder / 'inspection.png'} (and .svg; figures in inspection.json)")


def why(conversation: Any, rest: str) -> list[str]:
    """What the heads read when the last token of a conversation was chosen, or the one `rest` places from its end, as
    lines. Raises ConfigError for a token that is not there."""
    from mmcore.config.words import whole_number
    from mmcore.errors import ConfigError
    from mmcore.evaluation import inspection

    history, model = conversation.session.history, conversation.session.model
    back = whole_number(rest.lstrip("-")) or 0 if rest else 1
    if not 1 <= back < len(history):
        last = max(1, len(history) - 1)
        raise ConfigError(
            f"/why {rest}".rstrip() + f": there is no such token; /why takes how many tokens from the end, 1 to {last:,}"
            if len(history) > 1 else "/why: nothing has been said yet"
        )
    read = history[: len(history) - back]
    pieces = [_piece(conversation.tokenizer, one) for one in history]
    place = len(read) - 1
    reads = inspection.as_json(inspection.inspect(model, read), place, pieces, STRONGEST)
    lines = [f"Before {pieces[place + 1]!r} (token {place + 1:,}), at {pieces[place]!r}, the heads read:"]
    left_out = len(reads) - MOST_HEADS
    if left_out > 0:  # the sharpest say most
        sharpest = sorted(reads, key=lambda one: -max((part["weight"] for part in one["strongest"]), default=0))[:MOST_HEADS]
        reads = [one for one in reads if one in sharpest]
    lines += head_lines(reads, shutil.get_terminal_size().columns)
    return lines + ([f"({left_out:,} heads that spread their weight more evenly are not shown; mm eval --inspect shows all)"]
                    if left_out > 0 else [])


def head_lines(reads: list[dict[str, Any]], width: int) -> list[str]:
    """A picture in text: heads by distance, a block for each memory, and the tokens that each head reads most.

    `reads` as inspection.as_json gives them. A line has as many tokens as fit into `width` columns.
    """
    bins = max((read["by_distance"] for read in reads), key=len, default=[])
    # Every other bin is named: three columns do not set 256 apart from 512.
    axis = "".join(f"{_short(part['from']) if number % 2 or not number else '':<3}" for number, part in enumerate(bins))
    lines = ["n: pairs in the memory; beta: bandwidth; bars: share of the head's weight at each distance in tokens; last: "
             "the tokens with the greatest weights, and how far back they are."]
    for memory in dict.fromkeys(read["memory"] for read in reads):
        lines.append(f"{memory.replace('_', '-'):<16}{'n':>6}{'beta':>8}  {axis} weight token distance")
        for read in (read for read in reads if read["memory"] == memory):
            name = f"  layer {read['layer']} head {read['head']}"
            if not read["size"]:
                lines.append(f"{name:<16}{0:>6}  the memory is empty")
                continue
            bars = "".join(SHADES[min(8, round(8 * part["weight"]))] * 2 + " " for part in read["by_distance"])
            line = f"{name:<16}{read['size']:>6,}{read['bandwidth']:>8.2f}  {bars:<{len(axis)}}"
            for number, one in enumerate(read["strongest"]):
                more = f" {one['weight']:.2f} {one['token']!r} {-one['distance']}"
                if number and len(line) + len(more) > width:
                    break
                line += more
            lines.append(line)
    return lines


def _short(distance: int) -> str:
    """A distance in at most three characters."""
    return f"{distance}" if distance < 1000 else f"{distance // 1024}k"


def _piece(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token], special=True, continues=True)
