"""A small tokenizer and text that every machine has: sources of Python's own library."""

import argparse
import inspect
import json.decoder
import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmcore.data import Tokenizer, train_sentencepiece


@pytest.fixture(scope="session")
def library_text() -> str:
    return inspect.getsource(argparse) + inspect.getsource(textwrap) + inspect.getsource(json.decoder)


@pytest.fixture(scope="session")
def small_tokenizer(library_text, tmp_path_factory) -> Tokenizer:
    """512 pieces, with chat tokens."""
    return train_sentencepiece([library_text], 512, tmp_path_factory.mktemp("tokenizer"), seed=0)


@pytest.fixture
def unprivileged_folder() -> Iterator[Path]:
    """A folder used by a user whom file permissions bind; root takes the identity of `nobody` for the test."""
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    if user == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if user == 0:
            os.seteuid(0)
        for part in [folder, *folder.rglob("*")]:
            part.chmod(0o700)
        shutil.rmtree(folder)
