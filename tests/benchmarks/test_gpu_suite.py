"""The GPU suite walked through without a GPU: what it would run, for how long, and why that long."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
SCRIPT = TOP / "benchmarks" / "gpu_suite.sh"
PARTS = {
    "tests": ["build", "build-by-nvcc", "doctor", "tests", "memcheck", "memcheck-images", "racecheck"],
    "benchmarks": ["build", "build-by-nvcc", "doctor", "benchmarks", "plots"],
    "memory": ["build", "build-by-nvcc", "doctor", "memory", "rewards", "goals"],
}


def walked(part: str, out: Path, python: str = sys.executable) -> dict[str, tuple[int, str, str]]:
    """Limit, reason and command of each step."""
    environment = os.environ | {"DRY": "1", "PYTHON": python}
    done = subprocess.run([SCRIPT, out, part], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(r"^(\S+): at most (\d+) s: (.+)\n    (.+)$", done.stdout, re.MULTILINE)
    return {name: (int(limit), why, command) for name, limit, why, command in steps}


@pytest.mark.parametrize("part", PARTS)
def test_each_call_ends_in_nine_minutes(part, tmp_path):
    steps = walked(part, tmp_path / "out")
    assert list(steps) == PARTS[part]
    assert sum(limit for limit, _, _ in steps.values()) <= 540
    assert not (tmp_path / "out").exists(), "a walk leaves nothing behind"


def test_sanitizers_look_at_our_kernels_alone(tmp_path):
    steps = walked("tests", tmp_path)
    for name in ("memcheck", "memcheck-images", "racecheck"):
        assert "--kernel-name kernel_substring=rsaft" in steps[name][2]
    assert "-n 4 --dist loadfile" in steps["tests"][2]


def test_what_cannot_be_imported_is_left_out(tmp_path):
    """With a Python that has none of the packages: the failure of one file would hide the others'."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    command = walked("tests", tmp_path, str(python))["tests"][2]
    ignored = re.findall(r"--ignore=(\S+)", command)
    assert ignored and all((TOP / path).is_file() for path in ignored)
    assert "-n 4" not in command and command.endswith("tests/ops tests/triton_kernels tests/optim tests/benchmarks")


def test_an_unknown_part_is_refused(tmp_path):
    done = subprocess.run([SCRIPT, tmp_path / "out", "memories"], capture_output=True, text=True)
    assert done.returncode == 2 and "memories" in done.stderr and not (tmp_path / "out").exists()
