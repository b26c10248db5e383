"""Run folders read back: every figure at its step, what is damaged left out and said, runs told apart."""

from __future__ import annotations

import json
import math
import random

import pytest
from builders.messages import says
from builders.run_folders import write_run

from rsaft_fast.errors import UserError
from rsaft_fast.report.charts import charts_of
from rsaft_fast.report.page import report_of
from rsaft_fast.report.sources import add_evaluations, find_runs, read_run


def test_what_a_run_left_is_found_at_its_steps(tmp_path):
    values = {0: {"reward": 1.0, "held_out/x": 4.0}, 7: {"reward": 2.5, "held_out/x": 3.0, "s1": 0.5}}
    run = write_run(tmp_path / "a", [1.0, math.nan, 3.0], values, [0, 3], [(7, "held out", "x fell")], lr=[1, 2, 3])
    (run / "samples" / "grid.png").write_bytes(b"none of ours")
    (run / "best").mkdir()
    (run / "best" / "evaluation.json").write_text('{"score": "held_out/x", "step": 7, "value": 3.0}')
    source = read_run(run)
    assert source.label == "a" and source.logged("reward").steps == [1, 3] and source.logged("lr").values == [1, 2, 3]
    assert source.evaluated("held_out/x").values == [4.0, 3.0] and source.evaluated("s1").steps == [7]
    assert [(a.step, a.what, a.text) for a in source.alarms] == [(7, "held out", "x fell")]
    assert list(source.grids) == [0, 3] and "seed: 3" in source.config and source.facts.device == "a toaster"
    assert source.last_step == 7 and (source.best.score, source.best.step, source.best.value) == ("held_out/x", 7, 3.0)
    assert "best by x (held out): 3 after update 7" in report_of([source], "t")
    assert source.changes() == {"trained reward": (1.0, 2.5), "x (held out)": (4.0, 3.0)}


def test_without_evaluations_the_change_is_that_of_the_first_and_last_updates(tmp_path):
    rewards = [random.random() for _ in range(57)]
    ((before, after),) = read_run(write_run(tmp_path / "a", rewards)).changes().values()
    assert (before, after) == pytest.approx((sum(rewards[:20]) / 20, sum(rewards[-20:]) / 20))


def test_damaged_evaluations_are_left_out_and_a_repeated_one_replaces_the_first(tmp_path):
    run = write_run(tmp_path / "a", [1.0])
    good = [json.dumps({"step": s, "values": {"reward": v, "odd": "text", "none": None}}) for s, v in ((5, 1), (5, 2))]
    alarm = json.dumps({"step": 9, "values": {}, "alarms": [{"step": 9, "what": "s1", "text": "t"}] * 2})
    lines = [good[0], "[]", '{"step": "x"}', good[1], alarm, '{"step": 12, "val']
    (run / "evaluations.jsonl").write_text("\n".join(lines))
    said = []
    source = read_run(run, log=said.append)
    assert source.evaluations == {5: {"reward": 2.0}, 9: {}} and len(source.alarms) == 1
    assert [bool(says("evaluations.jsonl", n).search(line)) for line, n in zip(said, (2, 3))] == [True, True]
    assert len(said) == 2


def test_values_are_added_to_the_evaluations_that_are_there(tmp_path):
    run = write_run(tmp_path / "a", [1.0], {0: {"s1": 3.0}}, alarms=[(0, "w", "t")])
    add_evaluations(run, {4: {"reward": 1.5}, 0: {"reward": 0.5}})
    source = read_run(run)
    assert source.evaluations == {0: {"s1": 3.0, "reward": 0.5}, 4: {"reward": 1.5}} and len(source.alarms) == 1


def test_runs_are_found_in_folders_and_told_apart(tmp_path):
    for name in ("x/plain", "y/plain", "x/other"):
        write_run(tmp_path / name, [1.0])
    (tmp_path / "x/empty").mkdir()
    found = find_runs([str(tmp_path / "x"), str(tmp_path / "y/plain")])
    assert [source.label for source in found] == ["x/other", "x/plain", "y/plain"]
    with pytest.raises(UserError, match=says("x/empty", "metrics.jsonl", "output_dir")):
        find_runs([str(tmp_path / "x/empty")])
    with pytest.raises(UserError, match=says("nowhere", "no such")):
        find_runs([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=says("plain", "twice")):
        find_runs([str(tmp_path / "y"), str(tmp_path / "y/plain")])


def test_charts_show_the_figures_and_their_intervals(tmp_path):
    count, judges = 1601, ("a", "b")
    rewards = [random.gauss(0, 1) for _ in range(count)]
    values = {
        step: {
            "reward": random.random(),
            "held_out/h": random.random(),
            "held_out/h_se": random.random(),
            "diversity": 1,
        }
        for step in (0, 10, 30)
    }
    more = {f"agreement__{name}": [random.random() for _ in range(count)] for name in judges}
    runs = [
        write_run(tmp_path / "one", rewards, values, alarms=[(30, "what", "text")], seconds=[1.0] * count, **more),
        write_run(tmp_path / "two", rewards[:5]),
    ]
    one = {chart.title: chart for charts in charts_of(find_runs([str(runs[0])])).values() for chart in charts}
    each, mean, fixed = one["Trained reward"].lines
    assert each.faint and each.x[-1] == count and len(each.x) <= 1500
    for index in (0, 5, len(mean.x) - 1):
        step = int(mean.x[index])
        window = rewards[max(0, step - 20) : step]
        assert mean.y[index] == pytest.approx(sum(window) / len(window))
    assert list(fixed.y) == [v["reward"] for v in values.values()] and one["Trained reward"].marks == [(30, "what")]
    (line,) = one["Held out: h"].lines
    assert list(line.half) == pytest.approx([1.96 * v["held_out/h_se"] for v in values.values()])
    (against,) = one["h against the trained reward"].lines
    assert list(zip(against.x, against.y)) == [(v["reward"], v["held_out/h"]) for v in values.values()]
    assert [line.label for line in one["Agreement with the judges"].lines] == list(judges)
    assert {"diversity", "Seconds an update"} <= set(one) and "Sharpness S1" not in one
    both = {chart.title: chart for charts in charts_of(find_runs([str(tmp_path)])).values() for chart in charts}
    assert [(line.colour, line.dash) for line in both["Trained reward"].lines] == [(0, 0), (0, 1), (1, 0)]
    # One line alone says whose it is where there are several runs, and only there.
    assert both["Seconds an update"].keyed and not one["Seconds an update"].keyed and one["Trained reward"].keyed
