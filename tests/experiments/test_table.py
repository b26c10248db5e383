"""The table of runs: every row is a recipe, none is there twice, and what waits for a choice says so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from builders.messages import says

from rsaft_fast import playground
from rsaft_fast.data.prompts import load_prompts
from rsaft_fast.errors import UserError
from rsaft_fast.experiments import counting_table, table
from rsaft_fast.experiments.row import Row, config_of
from rsaft_fast.experiments.run import require_rows
from rsaft_fast.experiments.table import GRIDS, SEEDS, SELECTION_SEEDS, SETS, rows_of

CHOICES = {name: {grid.key: grid.values[0] for grid in GRIDS} for name in table.proxies()}


@pytest.mark.parametrize("name", SETS)
def test_every_row_is_a_recipe_of_its_own(name):
    rows, waiting = rows_of(name, CHOICES, [11])
    assert rows and not waiting
    assert max(Counter(row.path(Path("x")) for row in rows).values()) == 1
    for row in rows:
        config = config_of(row, Path("run"))
        assert (config.seed, config.max_steps, config.samples.every) == (11, row.updates, row.every)
        assert row.updates % row.every == 0 and row.cost > row.updates
    require_rows(rows)


def test_the_core_is_the_full_product_on_seeds_that_chose_nothing():
    rows, _ = rows_of("core", CHOICES)
    kinds = {(row.proxy, row.variant, row.seed) for row in rows}
    assert kinds == {
        (proxy, variant, seed)
        for proxy in table.proxies()
        for variant in ("plain", "image", "parameter", "both")
        for seed in SEEDS
    }
    assert not set(SEEDS) & set(SELECTION_SEEDS)
    assert {row.seed for row in rows_of("select", {})[0]} == set(SELECTION_SEEDS)
    both = next(row for row in rows if row.variant == "both")
    config = config_of(both, Path("run"))
    assert config.smoothing.image.radius == CHOICES[both.proxy]["image"]
    assert config.smoothing.parameters.rho == CHOICES[both.proxy]["rho"]
    plain = config_of(next(row for row in rows if row.variant == "plain"), Path("run"))
    assert plain.smoothing.image is None and plain.smoothing.parameters is None


def test_a_row_waits_for_what_nobody_has_chosen():
    rows, waiting = rows_of("core", {"brittle": {"image": 0.3}}, [1])
    assert {row.variant for row in rows} == {"plain", "image"}
    assert ("core/brittle-draft-both-s1", "rho") in {(row.name, row.key) for row in waiting}
    assert {row.variant for row in rows if row.proxy != "brittle"} == {"plain"}


def test_twice_is_twice_as_long_and_the_judge_is_another_proxy(monkeypatch):
    rows = {row.variant: row for row in rows_of("baselines", CHOICES, [1], ["brittle"])[0]}
    assert {row.variant for row in rows_of("baselines", CHOICES, [1], ["fair"])[0]} == {"small-lr"}
    assert (rows["twice"].updates, rows["twice"].every) == (2 * rows["sum"].updates, 2 * rows["sum"].every)
    assert rows["twice"].evaluations == rows["sum"].evaluations
    assert config_of(rows["sum"], Path("run")).reward.parts[1].path == f"playground/{table.judge_of('brittle')}"
    monkeypatch.setattr(playground, "REWARDS", ("fair", "brittle", "mixed-2", "mixed-3"))
    assert table.judge_of("brittle") == "mixed-2" and table.judge_of("mixed-2") == "mixed-3"
    assert table.ensemble_of("brittle") == ["brittle", "mixed-2"]
    monkeypatch.setattr(playground, "REWARDS", ("brittle", "ensemble-0", "mixed", "ensemble-1"))
    assert table.ensemble_of("brittle") == ["ensemble-0", "ensemble-1"] and table.proxies() == ["brittle", "mixed"]
    worst = next(row for row in rows_of("baselines", CHOICES, [1])[0] if row.variant == "worst")
    assert [part.path for part in config_of(worst, Path("run")).reward.parts] == [
        "playground/ensemble-0",
        "playground/ensemble-1",
    ]


def test_what_cannot_be_run_is_named_before_anything_is():
    row = Row("core", "brittle", "draft", "odd", 1, 4, 2, 4, ("smoothing.image.radios=1",))
    with pytest.raises(UserError, match=says("core/brittle-draft-odd-s1", "smoothing.image.radios")):
        require_rows([row])
    with pytest.raises(UserError, match=says("--set", "cores", "core", "baselines")):
        rows_of("cores", {})
    with pytest.raises(UserError, match=says("--proxies", "honest", "brittle", "fair")):
        rows_of("core", CHOICES, only=["brittle", "honest"])


def test_rows_of_some_proxies_are_those_of_all():
    everything = rows_of("core", {"brittle": {"image": 0.3}}, [1])
    some = rows_of("core", {"brittle": {"image": 0.3}}, [1], ["brittle", "mixed"])
    for all_of_a_kind, kept in zip(everything, some, strict=True):
        assert kept == [row for row in all_of_a_kind if row.proxy in ("brittle", "mixed")] != []


def test_counting_trains_few_objects_and_judges_more():
    rows = [row for name in ("counting", "counting-more") for row in rows_of(name, {})[0]]
    assert max(Counter(row.path(Path("x")) for row in rows).values()) == 1 and {row.set for row in rows} == {"counting"}
    seeds = {kind: {row.seed for row in rows if (row.method, row.variant) == kind} for kind in _kinds(rows)}
    main = {("grpo", "plain"), ("grpo", "kl"), ("grpo", "gardo"), ("nft", "plain"), ("nft", "gardo")}
    for kind, own in seeds.items():
        assert own == set(counting_table.COUNTING_SEEDS if kind in main else counting_table.BESIDE_SEEDS), kind
    first, _ = rows_of("counting", {})
    assert len(first) == len(main) * len(counting_table.COUNTING_SEEDS) + len(seeds) - len(main)
    row = next(row for row in first if row.variant == "gardo-no-gate")
    config = config_of(row, Path("run"))
    assert config.method.gardo.gate is None and config.method.gardo.diversity.features == counting_table.FEATURES
    trained = load_prompts(config.data.prompts)
    assert len(trained) == 24 and all(text.startswith(("a ", "two ")) for text in trained)
    assert len(row.prompts) == row.pictures and set(row.prompts[:24]) == set(trained)
    assert {text.split()[0] for text in set(row.prompts) - set(trained)} == {"three", "four"}
    assert [part.weight for part in config.reward.parts] == [1, 0, 0]


def _kinds(rows):
    return {(row.method, row.variant) for row in rows}


def test_a_row_costs_what_its_passes_take():
    rows = {row.variant: row for row in rows_of("variants", CHOICES, [1])[0]}
    training = {name: row.cost - row.evaluations * row.pictures / 10 for name, row in rows.items()}
    passes = {name: round(cost / rows[name].updates, 3) for name, cost in training.items()}
    assert (passes["friendly"], passes["momentum"], passes["reuse-5"], passes["lowpass"]) == (2, 1, 1.2, 1)
    assert {row.proxy for row in rows_of("counting", {}, [30], ["loose-counter"])[0]} == {"loose-counter"}
    assert rows_of("core", CHOICES, [1], ["loose-counter"]) == ([], [])
