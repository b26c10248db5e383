"""Radii are chosen by the rule that is stated, once all their runs are there."""

from __future__ import annotations

import json

import pytest
from builders.experiment_runs import finish, run
from builders.messages import says

from rsaft_fast import playground
from rsaft_fast.errors import UserError
from rsaft_fast.experiments.selection import FILE, choices_in, choose, update_choices, worth
from rsaft_fast.experiments.table import rows_of


def test_worth_is_the_mean_after_the_start_and_the_best_wins():
    assert worth(run([0.1, 0.5, 0.3], [0, 1, 2])) == pytest.approx(0.4)
    assert choose({0.1: [0.4, 0.5], 0.3: [0.6, 0.35], 1.0: [0.1, 0.1]}) == 0.3
    assert choose({1.0: [0.4, 0.4], 0.3: [0.5, 0.3]}) == 0.3


def test_a_choice_is_made_when_every_run_of_its_grid_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(playground, "REWARDS", ("brittle", "fair"))
    rows, _ = rows_of("select", {})
    best = {"image-0.1", "rho-1", "kl-10", "lora_lr-0.001"}
    *most, last = rows
    for row in most:
        end = 0.6 if row.variant in best else 0.5
        finish(row, tmp_path, [0.4, 0.5, end], [0, 1, 2])
    assert choices_in(tmp_path) == {}
    chosen = update_choices(tmp_path)
    assert last.proxy == "fair" and last.variant == "rho-1"  # brittle comes first
    assert chosen == choices_in(tmp_path)
    assert chosen == {"brittle": {"image": 0.1, "rho": 1.0, "kl": 10.0, "lora_lr": 1e-3}, "fair": {"image": 0.1}}
    finish(last, tmp_path, [0.4, 0.5, 0.7], [0, 1, 2])
    assert update_choices(tmp_path)["fair"] == {"image": 0.1, "rho": 1.0}
    content = json.loads((tmp_path / FILE).read_text())
    assert content["rests_on"]["fair"]["rho"]["worth"]["1"] == [0.55, 0.6]
    assert content["rests_on"]["fair"]["rho"]["at_the_edge"] and not content["rests_on"]["fair"]["image"]["at_the_edge"]
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(UserError, match=says(FILE)):
        choices_in(tmp_path)
