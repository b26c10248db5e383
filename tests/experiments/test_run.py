"""Real runs of two updates on the shipped pipeline: the same bits, the same start, and the way back to it."""

from __future__ import annotations

import json

import pytest
import torch

from rsaft_fast import playground
from rsaft_fast.experiments.campaign import run_all
from rsaft_fast.experiments.counting_table import CountingRow
from rsaft_fast.experiments.records import is_done, read_record
from rsaft_fast.experiments.row import Row
from rsaft_fast.experiments.run import run_row
from rsaft_fast.experiments.table import GRIDS, rows_of
from rsaft_fast.experiments.variants import BASELINES, OFF

FULL = Row("quick", "brittle", "draft", "plain", 7, 2, 1, 4, (OFF,), (0.0,))
LORA = ("parameters.train=lora", "parameters.lora.rank=2", "optimizer.lr=1.0e-3")


def evaluations(path) -> list:
    return json.loads(path.read_text())["evaluations"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    work = tmp_path_factory.mktemp("work")
    return run_row(FULL, folder, work), work


@pytest.mark.slow
def test_a_run_again_has_the_same_bits_whether_or_not_its_start_is_kept(ran, tmp_path):
    path, work = ran
    assert [one["step"] for one in evaluations(path)] == [0, 1, 2, 2]
    again = run_row(Row(**vars(FULL) | {"seed": 7}), tmp_path, tmp_path / "work")
    assert evaluations(again) == evaluations(path) and is_done(FULL, tmp_path)
    # Nothing of a run stays but its results, and the start that others share.
    assert [place.name for place in work.iterdir()] == ["starts"] and len(list((work / "starts").iterdir())) == 1


@pytest.mark.slow
def test_the_start_is_the_same_for_every_seed_and_reached_by_going_all_the_way_back(ran, tmp_path):
    path, work = ran
    start, *_, back = evaluations(path)
    row = Row("quick", "brittle", "draft", "lora", 8, 2, 2, 4, (OFF, *LORA), (0.0,))
    lora = evaluations(run_row(row, tmp_path, work))
    for first, last in ((start, back), (lora[0], lora[-1])):
        assert last["pictures"] == first["pictures"] and last["picture_distance"] == 0
        assert last["means"] == first["means"]
    assert lora[0]["pictures"] == start["pictures"]  # fresh adapters change nothing
    run = read_record(path)
    assert run.points[1].weights_distance > 0 and run.points[2].picture_distance > 0
    assert set(run.points[0].means) >= {"r*", "proxy", "judge/fair", "S1@0.3", "fidelity"}


@pytest.mark.slow
def test_a_run_says_what_its_monitors_would_have_said(ran):
    start, first, second, back = evaluations(ran[0])
    judges = {f"judge/{name}" for name in playground.REWARDS if name != "brittle"}
    assert start["watched"] == dict.fromkeys(judges) and back["watched"] == {}  # nothing before; no moment of the run
    for name in judges:
        moved = first["means"][name] - start["means"][name]
        assert first["watched"][name] * moved > 0
        best = max(start["means"][name], first["means"][name])
        assert second["watched"][name] * (second["means"][name] - best) >= 0
    assert second["watched"].keys() - judges >= {"image/contrast", "image/entropy"}
    assert read_record(ran[0]).points[1].watched == first["watched"]


def test_prompts_of_the_evaluation_are_none_that_anybody_trained_on():
    prompts = playground.eval_prompts(256)
    assert len(set(prompts)) == 256 and not set(prompts) & set(playground.train_prompts())
    assert prompts[:32] == playground.eval_prompts() and prompts[:40] == playground.eval_prompts(40)


def test_no_time_begins_no_run(tmp_path):
    said = []
    ended = run_all([FULL], tmp_path, jobs=1, budget=0.0, log=said.append)
    assert ended.left == [FULL] and not ended.finished and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_was_killed_goes_on_with_the_same_bits_and_a_failure_stops_nobody_else(ran, tmp_path):
    broken = Row("quick", "brittle", "draft", "broken", 7, 2, 1, 4, (OFF, "reward.path=no/such/folder"))
    other = Row("quick", "brittle", "draft", "kl", 7, 2, 2, 4, (OFF, "regularize.kl_to_base=1.0"))
    rows, said = [broken, FULL, other], []
    ended = run_all(rows, tmp_path, jobs=1, log=said.append)
    assert ended.finished == [FULL, other] and [row for row, _ in ended.failed] == [broken]
    assert "no/such/folder" in ended.failed[0][1] and any("no/such/folder" in line for line in said)
    assert evaluations(FULL.path(tmp_path)) == evaluations(ran[0])
    other.path(tmp_path).unlink()
    ended = run_all([FULL, other], tmp_path, jobs=1, log=said.append)
    assert ended.finished == [other] and any("1 of 2" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BASELINES if name not in ("kl", "lora")])  # those train above
def test_every_baseline_trains(tmp_path, name):
    choices = {proxy: {grid.key: grid.values[0] for grid in GRIDS} for proxy in playground.REWARDS}
    row = next(row for row in rows_of("baselines", choices, [1])[0] if row.variant == name)
    small = {"updates": 1, "every": 1, "pictures": 2, "overrides": (*row.overrides, "data.batch_size=2")}
    short = Row(**vars(row) | small)
    run = read_record(run_row(short, tmp_path, tmp_path / "work"))
    assert run.points[1].weights_distance > 0
    assert all(torch.tensor(list(point.means.values())).isfinite().all() for point in run.points)


@pytest.mark.slow
def test_a_steered_run_keeps_what_its_judge_said(tmp_path):
    choices = {"brittle": {"image": 0.3, "rho": 0.2}}
    row = next(row for row in rows_of("controls", choices, [1])[0] if row.variant == "project")
    few = (*row.overrides, "data.batch_size=2", "agreement.pictures=8", "agreement.every=1")
    short = Row(**vars(row) | {"updates": 2, "every": 1, "pictures": 2, "overrides": few})
    said = read_record(run_row(short, tmp_path, tmp_path / "work")).steered
    assert [record["step"] for record in said] == [1, 2]
    assert all(-1 <= record["agreement/judge"] <= 1 and record["agreement_error/judge"] > 0 for record in said)


@pytest.mark.slow
def test_a_counting_run_is_judged_by_what_it_did_not_train_on(tmp_path):
    (gardo,) = (row for row in rows_of("counting", {}, [7])[0] if (row.method, row.variant) == ("grpo", "gardo"))
    row = CountingRow(**vars(gardo) | {"updates": 1, "every": 1})
    path = run_row(row, tmp_path, tmp_path / "work")
    assert is_done(row, tmp_path) and not is_done(gardo, tmp_path)
    start, end = read_record(path).points
    judged = {f"judge/{name}" for name in playground.REWARDS}
    assert set(end.means) >= judged | {"r*", "proxy", "exact, few", "exact, more", "r*, more", "diversity", "S1@0.3"}
    assert end.weights_distance > 0 and 0.1 < start.means["exact, more"] <= start.means["exact, few"] <= 1
    halves = (start.means["r*, few"] + start.means["r*, more"]) / 2
    assert halves == pytest.approx(start.truth, abs=1e-5)
