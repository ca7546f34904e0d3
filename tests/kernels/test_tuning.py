"""Launches that are remembered, against Triton's own."""

import os
import subprocess
import sys

import pytest

from tests.helpers.forms import needs_triton


@pytest.mark.slow
@needs_triton
def test_a_remembered_launch_is_triton_s_own(tmp_path):
    program = [sys.executable, "-m", "tests.helpers.relaunch"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("192 cases")
