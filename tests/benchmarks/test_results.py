"""A results file is whole at every moment, and says what is wrong with it when it is not one."""

import json

import pytest
from builders.benchmark_results import COPY, HEAD, READ, times
from builders.benchmark_results import results as synthetic_results
from builders.memory_results import MACHINE
from builders.memory_results import results as memory_results
from builders.memory_results import row as memory_row

from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks import results
from rsaft_fast.errors import UserError


def row(provider="ours-cuda", what="perturb", ms=2.0):
    return {"what": what, "case": "sdxl-full", "dtype": "fp32", "provider": provider} | times(ms)


def test_rows_get_their_bandwidths():
    found = results.Results("speed", HEAD)
    assert found.put(row(), 3e9)["gbps"] == pytest.approx(1500)
    assert found.rows[0]["fraction_of_copy"] == pytest.approx(1500 / COPY)
    assert found.put(row(what="norm"), 3e9)["fraction_of_read"] == pytest.approx(1500 / READ)
    found.put(row(ms=1.0), 3e9)
    assert len(found.rows) == 2 and found.rows[0]["gbps"] == pytest.approx(3000), "the same row once"


def test_each_row_is_on_the_disk_as_it_is_put(tmp_path):
    found = results.Results("speed", HEAD, tmp_path)
    for index in range(3):
        found.put(row(f"provider-{index}"), 1e9)
        assert results.load(found.path) == found.as_dict() and len(found.rows) == index + 1
    with pytest.raises(TypeError):
        found.put(row("foreach") | {"launches": object()}, 1e9)
    assert len(results.load(found.path)["rows"]) == 3, "a write that fails leaves what was there"
    assert [path.name for path in found.path.parent.iterdir()] == ["2026-01-02T03-04-05Z.json"]


def test_names_are_safe_for_any_tool(tmp_path):
    path = results.Results("speed", HEAD | {"gpu": "NVIDIA H100 (80GB) / HBM3"}, tmp_path).path
    assert path.relative_to(tmp_path).as_posix() == "NVIDIA-H100-80GB-HBM3/2026-01-02T03-04-05Z.json"


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--results {tmp_path / 'file'}"):
        results.Results("speed", HEAD, tmp_path / "file")


def test_what_is_no_results_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json"):
        results.load(tmp_path / "absent.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(UserError, match=r"text\.json"):
        results.load(tmp_path / "text.json")
    (tmp_path / "other.json").write_text(json.dumps({"gpu": "x", "rows": []}))
    with pytest.raises(UserError, match="driver, torch"):
        results.load(tmp_path / "other.json")
    path = memory_results(tmp_path, names=()).path
    with pytest.raises(UserError, match="'memory'.*'speed'"):
        results.load(path, "speed")


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"kind": "memory", "rows": []})])
def test_a_file_of_something_else_is_not_written_over(tmp_path, content):
    path = memory_results(tmp_path, names=()).path
    path.write_text(content)
    with pytest.raises(UserError, match=r"memory\.json"):
        memory_results(tmp_path)
    assert path.read_text() == content


def test_a_later_run_goes_on_with_the_rows_of_a_card(tmp_path):
    found = memory_results(tmp_path, names=("sdxl-lora",))
    again = results.Results("memory", MACHINE | {"commit": "new"}, tmp_path, "memory.json")
    assert again.rows == found.rows and results.load(found.path)["commit"] == "new"
    again.put(memory_row(runs.run_named("sdxl-lora"), runs.PEAK, missing="out of memory"))
    assert len(again.rows) == len(found.rows) and not again.measured(again.rows[1])


def test_newest_looks_at_dates_and_at_gpus(tmp_path):
    assert results.newest(tmp_path, "speed") is None
    (tmp_path / "other.json").write_text("[]")
    synthetic_results(tmp_path)
    synthetic_results(tmp_path, date="2026-02-01T00:00:00Z", gpu="NVIDIA H200")
    synthetic_results(tmp_path, date="2026-03-01T00:00:00Z", gpu="cpu x86_64", cuda=None, driver=None)
    assert results.newest(tmp_path, "speed")["gpu"] == "NVIDIA H200"
    memory_results(tmp_path, names=("sdxl-lora",))
    assert results.newest(tmp_path, "memory")["gpu"] == HEAD["gpu"]
