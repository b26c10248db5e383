"""`rsaft-fast bench` as it is typed."""

import subprocess
import sys

import pytest

from rsaft_fast.benchmarks import gpu_memory, results
from rsaft_fast.benchmarks.suite import Suite
from rsaft_fast.cli import main


def test_the_tiny_case_is_measured_shown_and_recorded(tmp_path, capsys):
    providers = "ours-torch,ours-cuda,usual-fused,optimi"
    arguments = ("--cases", "tiny,images", "--dtypes", "fp32", "--providers", providers, "--quick", "--goals")
    assert main(["bench", *arguments, "--results", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "tiny, fp32:" in said.out and "whole update, floor 52 bytes a parameter" in said.out
    assert "ours-cuda (" in said.out.split("missing:")[1]
    (path,) = tmp_path.rglob("*.json")
    assert str(path) in said.out
    found = results.load(path, "speed")
    measured = [row for row in found["rows"] if "missing" not in row and row["what"] == "update"]
    assert {row["provider"] for row in measured} >= {"ours-torch", "usual-fused"}
    needed = {"what", "case", "dtype", "provider", "ms_p20", "ms_p50", "ms_p80", "gbps", "fraction_of_copy"}
    assert all(row.keys() >= needed | {"launches", "extra_bytes"} for row in measured)
    if found["cuda"] is None:
        assert all(results.CPU_NOTE in text for text in (said.err, said.out, found["note"]))


def test_an_unknown_name_is_wrong_input(tmp_path, capsys):
    assert main(["bench", "--cases", "sdxl-ful", "--results", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "'sdxl-ful'" in said.err and "sdxl-full" in said.err
    assert len(said.err.splitlines()) == 1 and not list(tmp_path.iterdir()), "nothing is measured or written"


def test_help_and_list_teach(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    said = capsys.readouterr().out
    assert said.count("  rsaft-fast bench ") >= 5 and "--budget SECONDS" in said
    assert main(["bench", "--list"]) == 0
    said = capsys.readouterr().out
    assert "sdxl-full: 2,567,463,684 parameters in 1,680 tensors" in said and "8bit: bf16 weights" in said
    assert gpu_memory.main(["--list"]) == 0
    assert "flux-full: black-forest-labs/FLUX.1-dev at 1024, at most 74 GiB; peak" in capsys.readouterr().out


def test_whole_updates_are_a_program_of_their_own(capfd):
    assert main(["bench", "--memory", "--cases", "flux-ful", "--budget", "5"]) == 2
    said = capfd.readouterr().err
    assert "'flux-ful'" in said and "flux-full" in said


def test_neither_diffusers_nor_transformers_is_needed():
    """The figures of a GPU machine do not wait for packages that the optimizer does not use."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('diffusers', 'transformers', 'pydantic', 'peft')));"
        "from rsaft_fast.cli import main; sys.exit(main(['bench', '--list']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "providers:" in run.stdout, run.stderr


def test_an_interruption_shows_what_was_measured(monkeypatch, capsys):
    def interrupt(self, job):
        raise KeyboardInterrupt

    monkeypatch.setattr(Suite, "run", interrupt)
    assert main(["bench", "--cases", "tiny"]) == 130
    said = capsys.readouterr()
    assert "the card's own bandwidth in this run" in said.out and "interrupted" in said.err
