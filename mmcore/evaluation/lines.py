"""A text's lines, as files have them."""

from __future__ import annotations

import io


def lines_of(text: str) -> list[str]:
    r"""Divided at \n, \r\n and \r. `str.splitlines` would also divide at marks that stand within texts, such as U+2028."""
    return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]
