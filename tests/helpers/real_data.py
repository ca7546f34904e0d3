"""The folder of real text, tokenizers and models that some tests read; they are skipped where it is missing."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MM_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def needs_data(part: str) -> pytest.MarkDecorator:
    """Skip a test where `part` of the data folder is not there."""
    return pytest.mark.skipif(not (DATA / part).exists(), reason=f"{DATA / part} is missing: set MM_DATA to the data folder")
