"""Runs the ``triton-interpreter`` cases of tests/ops and tests/optim in a process that interprets throughout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_through_the_interpreter():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("already interpreting: these tests are in this very run")
    folders = [TESTS / "ops", TESTS / "optim"]
    command = [sys.executable, "-m", "pytest", *folders, "-k", "triton-interpreter", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, "-q"], env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # With -q twice over (the configuration has one) pytest prints dots only.
    dots = "".join(re.findall(r"^([.s]+) +\[ *\d+%\]$", done.stdout, re.MULTILINE))
    assert dots.count(".") > 100, done.stdout[-2000:]
