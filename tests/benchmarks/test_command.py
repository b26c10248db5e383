"""`rsaft-fast bench` as it is typed."""

import subprocess
import sys

from rsaft_fast.benchmarks import results
from rsaft_fast.benchmarks.suite import Suite
from rsaft_fast.cli import main


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rsaft_fast", "bench", *arguments], capture_output=True, text=True, timeout=240
    )


def test_the_tiny_case_is_measured_shown_and_recorded(tmp_path):
    providers = "ours-torch,ours-cuda,usual-fused,optimi"
    arguments = ("--cases", "tiny,images", "--dtypes", "fp32", "--providers", providers, "--quick", "--goals")
    run = bench(*arguments, "--results", str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "tiny, fp32:" in run.stdout and "whole update, floor 52 bytes a parameter" in run.stdout
    assert "ours-cuda (" in run.stdout.split("missing:")[1]
    (path,) = tmp_path.rglob("*.json")
    assert str(path) in run.stdout
    found = results.load(path)
    measured = [row for row in found["rows"] if "missing" not in row and row["what"] == "update"]
    assert {row["provider"] for row in measured} >= {"ours-torch", "usual-fused"}
    needed = {"what", "case", "dtype", "provider", "ms_p20", "ms_p50", "ms_p80", "gbps", "fraction_of_copy"}
    assert all(row.keys() >= needed | {"launches", "extra_bytes"} for row in measured)
    if found["cuda"] is None:
        assert all("not to be quoted" in text for text in (run.stderr, run.stdout, found["note"]))


def test_an_unknown_name_is_wrong_input(tmp_path):
    run = bench("--cases", "sdxl-ful", "--results", str(tmp_path))
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("rsaft-fast: error: no case 'sdxl-ful'; did you mean sdxl-full")
    assert len(run.stderr.splitlines()) == 1 and not list(tmp_path.iterdir()), "nothing is measured or written"


def test_help_and_list_teach():
    said = bench("--help").stdout
    assert said.count("  rsaft-fast bench ") >= 5 and "--budget SECONDS" in said
    said = bench("--list").stdout
    assert "sdxl-full: 2,567,463,684 parameters in 1,680 tensors" in said and "8bit: bf16 weights" in said


def test_whole_updates_are_listed_and_a_wrong_run_is_wrong_input():
    said = bench("--memory", "--list").stdout
    assert "flux-full: black-forest-labs/FLUX.1-dev at 1024, at most 74 GiB; peak" in said
    run = bench("--memory", "--cases", "flux-ful")
    assert run.returncode == 2 and "no run 'flux-ful'; did you mean flux-full" in run.stderr


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
    assert "the card's own bandwidth in this run" in said.out and "interrupted; what was measured" in said.err
