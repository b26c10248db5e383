"""What a run tells: every stage, means instead of single batches, and never more than the terminal holds."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from builders.recipes import config, environment
from tqdm import tqdm

from rsaft_fast import progress
from rsaft_fast.progress import tell, watched
from rsaft_fast.train import bar
from rsaft_fast.train.bar import Progress
from rsaft_fast.train.loop import train


def record(step: int, reward: float | None = 21.4837) -> dict:
    return {"step": step, "reward": reward, "s1": 0.123456, "seconds": 12.345}


def test_the_reward_shown_is_the_mean_of_the_last_updates():
    lines = []
    told = Progress(0, 100, log=lines.append)
    for step in range(1, 31):
        told.update(record(step, float(step) if step != 30 else None))
    told.update(record(100, 50.0))
    mean = sum([*range(11, 30), 50]) / 20
    assert lines[0].startswith("update 1/100, reward 1 (mean of 1), 12.3 s/update, ")
    assert lines[-1].startswith(f"update 100/100, reward {mean:.4g} (mean of 20), ") and len(lines) == 2


def test_a_resumed_run_goes_on_with_the_means_before():
    lines = []
    told = Progress(2, 4, log=lines.append, earlier=[record(1, 1.0), record(2, 3.0), {"step": 2, "reward": "x"}])
    told.update(record(3, 5.0))
    assert "reward 3 (mean of 3)" in lines[0]


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
@pytest.mark.parametrize(("step", "total"), [(3, 60), (1234, 100_000)])
def test_the_bar_keeps_ten_cells_and_no_figure_is_cut(columns, step, total, monkeypatch):
    monkeypatch.setattr(bar, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    made, honest = [], tqdm.__init__
    monkeypatch.setattr(tqdm, "__init__", lambda self, *a, **k: (made.append(self), honest(self, *a, **k))[1])
    told = Progress(step - 2, total, "RSA-FT")
    told.update(record(step - 1))
    told.update(record(step))
    line = str(made[0])
    told.close()
    assert len(line) <= columns
    cells = re.search(r"\|(.*)\|", line)[1]
    assert len(cells) >= 10, line
    figures = line[: line.index(" |")].split(", ")
    assert figures[0] == f"RSA-FT {step}/{total}"
    whole = [r"reward 21.48 \(mean of 2\)", r"12.3 s/update", r"[\d:d ]+ left", "S1 0.1235"]
    assert all(re.fullmatch(form, figure) for form, figure in zip(whole, figures[1:]))
    assert len(figures) >= {40: 1, 60: 1, 80: 3, 120: 5}[columns]


def test_a_terminal_that_has_gone_ends_nothing(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    tell("a line")
    assert not isinstance(sys.stderr, Gone)
    tell("another")
    monkeypatch.setattr(sys, "stderr", None)
    tell("a third")


def test_a_file_hears_how_much_is_done_until_all_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    assert list(watched(iter("abc"), "reading", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == ["reading: 1 of 3", "reading: 2 of 3"]


@pytest.mark.slow
def test_every_stage_is_said_before_it_begins(tiny, out):
    said = []
    outcome = train(config(tiny, out, samples={"every": 2, "count": 3}, data__encoding_cache=None), log=said.append)
    stages = [line.partition("] ")[2] for line in said if line.startswith("[")]
    wanted = [
        "prompts' encodings", "loading the reward clip", "loading the text encoders: 4 of 4 prompts", "encoding 4",
        "takes in the prompts", "loading the denoiser", "untrained model: 3 pictures", "update 1 of 2 begins",
    ]  # fmt: skip
    assert len(stages) == len(wanted) and all(words in stage for words, stage in zip(wanted, stages)), stages
    assert said[-1].startswith("update 2/2, reward ")
    before, after = re.search(r"the 3 pictures of .*: (\S+) before, (\S+) after", outcome.further[0]).groups()
    assert float(before) != float(after)
    assert any(f"rsaft-fast sample --run {out}" in line for line in outcome.further)


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_bars_of_downloads_are_shown_on_a_terminal(terminal, tmp_path):
    script = (
        "from rsaft_fast.process import prepare_process; prepare_process()\n"
        "from huggingface_hub.utils import are_progress_bars_disabled as off\n"
        "from transformers.utils import logging; print(off(), logging.is_progress_bar_enabled())"
    )
    end, other = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True,
        stderr=other if terminal else subprocess.DEVNULL,
    )  # fmt: skip
    os.close(end)
    os.close(other)
    assert done.stdout.split() == [str(not terminal), "False"]
