"""Order, turns, budget, failures: what decides which rows a run has."""

import dataclasses
import math

import pytest
import torch
from builders.benchmark_results import HEAD

from rsaft_fast.benchmarks import providers, suite
from rsaft_fast.benchmarks.results import Results
from rsaft_fast.benchmarks.shapes import parameters_of
from rsaft_fast.benchmarks.suite import CPU_LISTS, HEADLINE, HOST, IMAGES, Job, Suite, plan
from rsaft_fast.benchmarks.timing import Part, Timer
from rsaft_fast.ops import backends, library

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def run():
    """A suite on the CPU, two calls a part."""
    return Suite(Timer(CPU), Results("speed", HEAD), repeats=4)


def test_a_budget_meets_the_headline_first():
    jobs = [[job.case, job.layout] for job in plan(CUDA)]
    assert jobs[: len(HEADLINE)] == HEADLINE and len(jobs) > len(HEADLINE)
    late = [job.providers for job in plan(CUDA) if set(job.providers) & {"torchao", "ours-torch"}]
    assert late and all(len(names) == 1 for names in late), "slow ones stand alone, at the end"
    assert {"torchao", "ours-torch"} & set(plan(CUDA)[-1].providers)
    assert not any(name in job.providers for job in plan(CUDA)[: -len(late)] for name in ("torchao", "ours-torch"))


def test_the_plan_follows_what_was_asked():
    assert [(j.case, j.layout) for j in plan(CPU, ["tiny"], ["bf16"])] == [("tiny", "bf16")]
    assert {j.layout for j in plan(CUDA, ["sdxl-lora32"])} == {"fp32", "bf16"}
    assert {j.layout for j in plan(CUDA, ["sdxl-lora32"], ["8bit"])} == {"8bit"}
    assert {j.case for j in plan(CPU, quick=True)} == {"tiny", IMAGES, HOST}
    real = [j for j in plan(CPU) if j.case in CPU_LISTS]
    assert {(j.case, j.layout) for j in real} >= {(case, layout) for case in CPU_LISTS for layout in ("fp32", "bf16")}
    assert ("plain-100m", "8bit") in {(j.case, j.layout) for j in real}
    ours = f"ours-{backends.choose(CPU)}"
    assert all(set(j.providers) == {ours, "usual-fused", "foreach", "bitsandbytes"} for j in real)
    assert "ours-torch" in plan(CPU, CPU_LISTS[:1], providers=["ours-torch"])[0].providers, "when asked for"
    assert all(j.providers == ("usual-fused",) for j in plan(CPU, providers=["usual-fused"]))
    assert plan(CPU, [HOST], ["bf16"]) == []


def test_every_call_is_prepared_and_two_are_not_counted():
    called = []
    times = Timer(CPU).times(Part(lambda: called.append("call"), lambda: called.append("-")), repeats=4)
    assert called == ["-", "call"] * 6 and len(times.ms) == len(times.host_ms) == 4
    row = times.row()
    assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["calls"] == 4


def test_a_slow_part_is_called_less_often():
    import time

    slow, quick = (Timer(CPU).times(Part(lambda s=s: time.sleep(s)), repeats=20, seconds=0.2) for s in (0.05, 0.0))
    assert 3 <= len(slow.ms) <= 4 and len(quick.ms) == 20
    assert 50 <= slow.row()["ms_p50"] < 100


def test_host_time_leaves_the_preparation_out():
    import time

    part = Part(lambda: None, lambda: time.sleep(0.01))
    assert Timer(CPU).times(part, repeats=5, host_alone=True).row()["ms_p50"] < 5


def test_a_job_measures_side_by_side(run):
    rows = run.run(Job("tiny", "fp32", ("ours-torch", "usual-fused", "adamw-alone", "bitsandbytes")))
    got = {(row["what"], row["provider"]) for row in rows}
    passes = {(what, name) for what in ("norm", "perturb", "step", "update") for name in ("ours-torch", "usual-fused")}
    assert got == passes | {("step", "adamw-alone")}, "no row for a layout that a provider does not have"
    assert all(row["calls"] == 4 for row in rows), "two blocks of two"
    update = next(row for row in rows if (row["what"], row["provider"]) == ("update", "ours-torch"))
    assert update["gbps"] == pytest.approx(52 * parameters_of("tiny") / update["ms_p50"] / 1e6)
    assert run.failed == [] and run.left_out == []


@pytest.mark.slow
def test_a_failing_provider_is_a_row_and_the_others_are_measured(run, monkeypatch):
    def fail(problem):
        raise ValueError("no such card\nmore")

    broken = dataclasses.replace(providers.PROVIDERS["usual-fused"], build=fail)
    ours = dataclasses.replace(providers.PROVIDERS["ours-torch"], build=fail)
    monkeypatch.setitem(providers.PROVIDERS, "usual-fused", broken)
    rows = run.run(Job("tiny", "fp32", ("usual-fused", "adamw-alone")))
    assert {row["provider"]: row.get("missing") for row in rows} == {
        "usual-fused": "failed: ValueError: no such card",
        "adamw-alone": None,
    }
    assert run.failed == [], "a peer may fail"
    monkeypatch.setitem(providers.PROVIDERS, "ours-torch", ours)
    run.run(Job("tiny", "fp32", ("ours-torch",)))
    assert run.failed == ["tiny fp32: ours-torch failed: ValueError: no such card"]


def test_a_part_that_fails_costs_only_its_own_rows(run, monkeypatch):
    class Broken:
        def __init__(self, problem):
            pass

        def parts(self):
            return {"step": Part(lambda: 1 / 0), "norm": Part(lambda: None)}

    monkeypatch.setitem(
        providers.PROVIDERS, "foreach", dataclasses.replace(providers.PROVIDERS["foreach"], build=Broken)
    )
    rows = run.run(Job("tiny", "fp32", ("foreach", "adamw-alone")))
    step = {row["provider"]: row.get("missing") for row in rows if row["what"] == "step"}
    assert step == {"foreach": "failed: ZeroDivisionError: division by zero", "adamw-alone": None}
    assert any(row["what"] == "norm" and "missing" not in row for row in rows)


def test_a_spent_budget_begins_nothing_and_says_what_is_left(tmp_path):
    results = Results("speed", HEAD, tmp_path)
    run = Suite(Timer(CPU), results, budget=-1.0)
    for job in plan(CPU):
        assert run.run(job) == []
    assert run.left_out == [str(job) for job in plan(CPU)]
    assert results.head["left_out"] == run.left_out and '"left_out"' in results.path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["usual-fused", "ours-torch"])
def test_what_does_not_fit_says_so_and_is_no_failure(run, monkeypatch, name):
    def too_much(problem):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nand more")

    monkeypatch.setitem(providers.PROVIDERS, name, dataclasses.replace(providers.PROVIDERS[name], build=too_much))
    rows = run.run(Job("tiny", "fp32", (name, "adamw-alone")))
    missing = {row["provider"]: row.get("missing") for row in rows}
    assert missing["adamw-alone"] is None and run.failed == []
    assert missing[name].startswith("does not fit: ") and missing[name].endswith("Tried to allocate 80 GiB")


@pytest.mark.slow
def test_providers_take_turns_one_at_a_time(run, monkeypatch):
    built, names = [], ("usual-fused", "adamw-alone")
    for name in names:
        provider = providers.PROVIDERS[name]
        build = lambda problem, name=name, build=provider.build: built.append(name) or build(problem)  # noqa: E731
        monkeypatch.setitem(providers.PROVIDERS, name, dataclasses.replace(provider, build=build))
    rows = run.run(Job("tiny", "fp32", names))
    assert built == [*names, *names]
    assert all(row["calls"] == 4 for row in rows)
    assert len({(row["what"], row["provider"]) for row in rows}) == len(rows) == 5


def test_images_rows(run):
    rows = run.run(Job(IMAGES, "bf16", ("ours-torch", "ours-cuda")))
    assert {row["provider"] for row in rows} == {"ours-torch", "ours-cuda", "eager"}
    measured = next(row for row in rows if row["provider"] == "eager")
    assert measured["gbps"] == pytest.approx(8 * 2 * 3 * 128 * 128 / measured["ms_p50"] / 1e6)


@pytest.mark.skipif(library.why_not("cpu") is not None, reason="no library for the CPU")
def test_host_time_without_a_gpu_is_python_alone(run):
    rows = run.run(Job(HOST, "fp32", ("ours-cuda", "ours-cpu", "ours-torch")))
    assert run.failed == [] and {row["provider"] for row in rows} == {"ours-cpu"}
    assert [row["what"] for row in rows][:3] == ["host-static", "host-checked", "host-moved"]
    assert {row["case"] for row in rows} == set(providers.HOST_LISTS)
    assert all("gbps" not in row and "no launches" in row["note"] for row in rows)
    ms = {(row["what"], row["case"]): row["ms_p50"] for row in rows}
    for case in providers.HOST_LISTS:
        assert ms["host-static", case] < ms["host-moved", case], "addresses of every tensor are read and uploaded"


def test_bandwidths_name_their_way():
    _, results = suite.start(CPU)
    head = results.head
    assert head["copy_gbps"] == max(head["copy_ways"].values()) == head["copy_ways"][head["copy_way"]]
    assert head["read_gbps"] == max(head["read_ways"].values()) and len(head["read_ways"]) >= 4
    assert all(math.isfinite(rate) and rate > 0 for rate in head["read_ways"].values())


def test_a_later_failure_does_not_hide_what_was_measured(run, monkeypatch):
    calls = []

    class FailsLater:
        def __init__(self, problem):
            calls.append(self)
            if len(calls) == 2:
                raise ValueError("later")

        def parts(self):
            return {"step": Part(lambda: None), "update": Part(lambda: None)}

    broken = dataclasses.replace(providers.PROVIDERS["foreach"], build=FailsLater)
    monkeypatch.setitem(providers.PROVIDERS, "foreach", broken)
    rows = run.run(Job("tiny", "fp32", ("foreach",)))
    assert [(row["what"], row["calls"]) for row in rows] == [("step", 2), ("update", 2)] and len(calls) == 2
