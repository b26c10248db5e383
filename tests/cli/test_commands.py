"""The commands that work: help, doctor, sample; and that handlers and weights come back after a run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.messages import says
from builders.recipes import config, environment
from PIL import Image

from rsaft_fast import cli, process
from rsaft_fast.cli import main
from rsaft_fast.cli.parser import build_parser
from rsaft_fast.commands import doctor
from rsaft_fast.train.loop import train
from rsaft_fast.train.signals import StopSignals

COMMANDS = ("train", "demo", "experiment", "radius", "sharpness", "sample", "score", "eval", "push", "serve", "convert")
COMMANDS += ("estimate", "bench", "doctor", "report", "compare", "ab")


def test_help_needs_nothing_heavy_and_is_immediate(tmp_path):
    script = (
        "import sys, rsaft_fast.cli as c\n"
        "try: c.main(['train', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 5  # 0.1 s alone; other tests may hold the cores
    assert "resume=auto" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as raised:
        build_parser().parse_args([command, "--help"])
    assert raised.value.code == 0
    assert f"rsaft-fast {command}" in capsys.readouterr().out


def test_there_are_no_commands_that_do_nothing():
    actions = [action for action in build_parser()._actions if action.dest == "command"]
    assert set(actions[0].choices) == {*COMMANDS, "help"}


def test_every_key_is_printed(capsys):
    assert main(["train", "--help-config"]) == 0
    text = capsys.readouterr().out
    assert "smoothing:" in text and "rho: 0.01" in text and "checkpoint_every: 50" in text


def test_doctor_says_what_runs_and_why(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for words in ("torch " + torch.__version__, "versions:", "triton", "used on", "extras:", "advice:"):
        assert words in text
    monkeypatch.setenv("RSAFT_BACKEND", "metal")
    assert main(["doctor"]) == 0
    assert "RSAFT_BACKEND='metal'" in capsys.readouterr().out


def test_doctor_lists_every_extra_with_its_packages(capsys, monkeypatch):
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = declared["optional-dependencies"]
    assert list(doctor.EXTRAS) == list(declared)
    for extra, packages in doctor.extras().items():
        assert packages == [re.match(r"[\w.\-]+", package)[0] for package in declared[extra]]
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in ("ftfy", "uvicorn") else real(name))
    lines = {line.split()[0]: line for line in doctor._optional()}
    assert "none of it" in lines["hps"] and "pip install 'rsaft_fast[hps]'" in lines["hps"]
    assert says("uvicorn", "pip install 'rsaft_fast[server]'").search(lines["server"])


def test_doctor_has_advice_where_torch_has_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert any("without CUDA" in line for line in doctor._advice())


def test_help_names_every_method_before_its_keys_and_no_symbol_that_it_does_not_explain(capsys):
    assert main(["train", "--help-config", "method"]) == 0
    text = capsys.readouterr().out
    for name in ("refl", "draft", "draft_lv", "alignprop", "drtune", "flow_grpo"):
        assert re.search(rf"# .+\n  name: {name}\n", text)
    assert not re.search(r"# .*\bNone\b|# (M|of b)\b|window of m\b", text)


def test_doctor_notices_a_torchvision_of_another_build(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "version_of", lambda package: "0.28.0" if package == "torchvision" else None)
    assert any("torchvision 0.28.0" in fault and "nms" in fault for fault in doctor.faults())


@pytest.mark.parametrize("taken", [False, True])
def test_without_a_home_caches_go_to_a_folder_that_nobody_else_writes(taken, tmp_path, monkeypatch, capsys):
    for variable in ("HOME", "XDG_CACHE_HOME", "TRITON_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    monkeypatch.setattr(os, "getuid", lambda: 123456789)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = tmp_path / "rsaft_fast-123456789"
    # A folder made by this process has its real user id, not the one that it believes to have here.
    real = os.lstat(tmp_path)
    monkeypatch.setattr(
        Path, "lstat", lambda path: types.SimpleNamespace(st_mode=0o040700, st_uid=real.st_uid if taken else 123456789)
    )
    process.prepare_process(quieten=False)
    folder = Path(os.environ["XDG_CACHE_HOME"])
    assert folder.is_dir() and folder.parent == tmp_path and (folder != expected) == taken
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ["TRITON_HOME"] == os.environ["MPLCONFIGDIR"] == str(folder)
    assert str(folder) in capsys.readouterr().err


@pytest.fixture
def trained(tiny, out):
    settings = config(tiny, out, sampler={"steps": 3}, ema={"decay": 0.5}, optimizer__lr=0.1)
    train(settings)
    return out


def pictures(folder) -> dict[str, Image.Image]:
    return {p.name: Image.open(p).convert("RGB") for p in folder.glob("*.png")}


def test_sample_draws_what_a_run_trained(tiny, trained, tmp_path):
    common = [str(tiny.sd15), "--prompts", "a red circle", "one", "--seeds", "3", "4"]
    common += ["--steps", "3", "--guidance", "1"]
    for name, extra in {"base": [], "run": ["--run", str(trained)], "lora": ["--lora", str(trained / "lora")]}.items():
        assert main(["sample", *common, *extra, "--output", str(tmp_path / "drawn" / name)]) == 0
    base, run, lora = (pictures(tmp_path / "drawn" / name) for name in ("base", "run", "lora"))
    names = {f"{index:04d}_seed_{seed}.png" for index in (0, 1) for seed in (3, 4)}
    assert set(run) == names | {"grid.png"}
    assert all(run[name].size == (32, 32) for name in names)

    # The exported LoRA and the checkpoint are the same model, and not the untrained one. A loader multiplies factors
    # in another order than training: a pixel on the edge between two of the 256 levels may fall to the other side.
    def apart(one, other):
        return np.abs(np.stack([np.int16(one[name]) - np.int16(other[name]) for name in sorted(names)]))

    assert apart(run, lora).max() <= 1 and (apart(run, lora) > 0).mean() < 1e-3 and apart(run, base).max() > 8
    assert base["0000_seed_3.png"].tobytes() != base["0000_seed_4.png"].tobytes()
    listed = json.loads((tmp_path / "drawn/run/pictures.json").read_text())
    assert {entry["file"] for entry in listed} == names and listed[0]["prompt"] == "a red circle"


def test_a_picture_depends_on_its_prompt_and_seed_alone(tiny, tmp_path):
    common = [str(tiny.sd3), "--steps", "2", "--guidance", "3", "--negative", "ugly"]
    assert main(["sample", *common, "--prompts", "one", "--seeds", "7", "--output", str(tmp_path / "a")]) == 0
    more = ["--prompts", "two blue squares", "one", "--seeds", "1", "7", "--batch-size", "1"]
    assert main(["sample", *common, *more, "--output", str(tmp_path / "b")]) == 0
    assert (
        pictures(tmp_path / "a")["0000_seed_7.png"].tobytes() == pictures(tmp_path / "b")["0001_seed_7.png"].tobytes()
    )


def test_sample_without_an_output_takes_the_next_free_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["sample", str(tiny.sd15), "--prompts", "one", "--steps", "1"]) == 0
    assert (tmp_path / "samples/grid.png").is_file() and (tmp_path / "samples-2/grid.png").is_file()


def test_signal_handlers_come_back_after_a_run(tiny, out):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(config(tiny, out, max_steps=1))
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_a_second_interrupts(second):
    with StopSignals() as stop:
        stop.finishing = "finishing update 7, then saving"
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop and stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt) as raised:
            signal.raise_signal(second)
        assert raised.value.signal == second and stop.received == signal.SIGTERM


def test_a_signal_interrupts_at_once_while_there_is_nothing_to_finish():
    with StopSignals() as stop:
        stop.finishing = None
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_while_loading_nothing_is_written(tiny, out, monkeypatch, number, code):
    monkeypatch.setattr("rsaft_fast.train.loaders.load_reward", lambda settings: signal.raise_signal(number))
    outcome = train(config(tiny, out))
    assert outcome.exit_code == code and "nothing was written" in outcome.message
    assert not out.exists()


def test_stopped_during_the_baseline_nothing_is_written(tiny, out, monkeypatch):
    from rsaft_fast.train import trainer

    honest = trainer.sample_images

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return honest(*args, **kwargs)

    monkeypatch.setattr(trainer, "sample_images", interrupted)
    outcome = train(config(tiny, out, samples={"every": 1, "count": 4}))
    assert outcome.exit_code == 143 and "nothing was written" in outcome.message
    assert not out.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", [["--help"], pytest.param(["train", "--help-config"], marks=pytest.mark.slow)])
def test_a_full_standard_output_is_one_line(arguments, tmp_path):
    command = [sys.executable, "-m", "rsaft_fast", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("rsaft-fast: error:") and "ENOSPC" in line and "make room" in line


@pytest.mark.parametrize(("command", "kept"), [(["train", "x.yaml"], True), (["demo"], True), (["doctor"], False)])
def test_only_what_trains_speaks_of_a_checkpoint_when_interrupted(command, kept, capsys, monkeypatch):
    def stop(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stop)
    assert main(command) == 130
    error = capsys.readouterr().err
    assert "interrupted" in error and ("resume=auto" in error) == kept
