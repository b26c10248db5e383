"""Which runs the experiment is made of, as data: a row a run, a set a question."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Template

from rsaft_fast import playground
from rsaft_fast.errors import UserError
from rsaft_fast.experiments.counting_table import COUNTING, COUNTING_PROXY, counting_rows, more_counting_rows
from rsaft_fast.experiments.row import RECIPE, Row
from rsaft_fast.experiments.variants import (
    BASELINES,
    BOTH,
    CONTROLS,
    DRAFT,
    LORA_SPACES,
    METHODS,
    PLAIN,
    SMOOTHINGS,
    TRAJECTORIES,
    VARIANTS,
    WATCHED,
    Variant,
)
from rsaft_fast.recipe.load import find_recipe, load_config

BRITTLE = "brittle"
FAIR = "fair"
"""The proxy that is right at first, and over-optimised most in what follows."""

MEMBER = "ensemble-"
"""How the names begin of rewards that are made to be one ensemble."""

SELECTION_SEEDS = (100, 101)
SEEDS = (10, 11, 12, 13, 14)
"""Of what is reported: nobody chose anything on them."""

FEW_SEEDS = (10, 11, 12)


@dataclass(frozen=True)
class Grid:
    """Values of which one is chosen on the selection seeds.

    Attributes:
        key: what `$key` stands for elsewhere.
        overrides: of a run that tries one.
        values: what is tried.
        proxies: whose; None tries them on every proxy.
    """

    key: str
    overrides: tuple[str, ...]
    values: tuple[float, ...]
    proxies: tuple[str, ...] | None = None

    def variant(self, value: float) -> str:
        return f"{self.key}-{value:g}"


GRIDS = (
    Grid("image", SMOOTHINGS["image"].overrides, (0.03, 0.1, 0.3, 1.0)),
    Grid("rho", SMOOTHINGS["parameter"].overrides, (0.05, 0.2, 1.0)),
    Grid("kl", BASELINES["kl"].overrides, (0.1, 1.0, 10.0), (BRITTLE,)),
    Grid("lora_lr", BASELINES["lora"].overrides, (3e-4, 1e-3, 3e-3), (BRITTLE,)),
)

Choices = Mapping[str, Mapping[str, float]]
"""Proxy to what was chosen for it: a value for each grid's key."""


def judge_of(proxy: str) -> str:
    """Name the other proxy that baselines train on beside this one: one of mixed honesty, where there is one."""
    others = [name for name in playground.REWARDS if name != proxy]
    if not others:
        raise UserError(f"the playground has no reward beside {proxy}, and this baseline needs a judge")
    return next((name for name in others if name.startswith("mixed")), others[0])


def proxies() -> list[str]:
    """List the proxies that are trained on, the brittle one first; members of an ensemble only count together."""
    found = [name for name in playground.REWARDS if not name.startswith(MEMBER)]
    return sorted(found, key=lambda name: name != BRITTLE)


def ensemble_of(proxy: str) -> list[str]:
    """List the rewards that are an ensemble; of a playground that has none, the proxy and its judge."""
    members = [name for name in playground.REWARDS if name.startswith(MEMBER)]
    return members if len(members) > 1 else [proxy, judge_of(proxy)]


def grids_of(proxy: str) -> Iterator[Grid]:
    """Yield what is chosen for a proxy."""
    for grid in GRIDS:
        if grid.proxies is None or proxy in grid.proxies:
            yield grid


@dataclass(frozen=True)
class Waiting:
    """A row that cannot be made yet: a number in it has not been chosen."""

    name: str
    proxy: str
    key: str


@dataclass(frozen=True)
class Size:
    """How long the runs of a set are, and how they are evaluated; see `Row`."""

    updates: int = 40
    every: int = 10
    pictures: int = 256


COARSE, LONG = Size(every=20), Size(updates=80, every=20)


def _row(
    place: tuple[str, str, str, str, int], variant: Variant, numbers: Mapping[str, float], size: Size
) -> Row | Waiting:
    """Make a row of (set, proxy, method, name of the variant, seed)."""
    set_name, proxy, method, name, seed = place
    known = {key: f"{value:g}" for key, value in numbers.items()} | {"proxy": proxy}
    if any("$judge" in text for text in variant.overrides):
        known["judge"] = judge_of(proxy)
    if any("$ensemble" in text for text in variant.overrides):
        parts = (f"{{name: clip, path: playground/{name}, label: {name}}}" for name in ensemble_of(proxy))
        known["ensemble"] = ", ".join(parts)
    try:
        filled = tuple(
            Template(text).substitute(known) for text in (*(METHODS | TRAJECTORIES)[method], *variant.overrides)
        )
    except KeyError as missing:
        return Waiting(f"{set_name}/{proxy}-{method}-{name}-s{seed}", proxy, str(missing.args[0]))
    updates, every = size.updates * variant.longer, size.every * variant.longer
    return Row(*place, updates, every, size.pictures, filled, variant.scales)


def _product(
    set_name: str,
    methods: Sequence[str],
    proxies: Sequence[str],
    variants: Mapping[str, Variant],
    seeds: Sequence[int],
    choices: Choices,
    size: Size = Size(),
) -> Iterator[Row | Waiting]:
    """Every proxy x seed x method x variant: a seed is whole before the next begins, so that a table cut short is."""
    for proxy, seed, method in itertools.product(proxies, seeds, methods):
        for name, variant in variants.items():
            yield _row((set_name, proxy, method, name, seed), variant, choices.get(proxy, {}), size)


def _select(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    for proxy, seed in itertools.product(proxies(), seeds or SELECTION_SEEDS):
        for grid in grids_of(proxy):
            for value in grid.values:
                place = ("select", proxy, DRAFT, grid.variant(value), seed)
                yield _row(place, Variant(grid.overrides), {grid.key: value}, Size(every=20, pictures=128))


def _core(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from _product("core", (DRAFT,), proxies(), SMOOTHINGS, seeds or SEEDS, choices)


def _methods(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    methods = [method for method in METHODS if method != DRAFT]
    variants = {name: SMOOTHINGS[name] for name in (PLAIN, BOTH)}
    two = (BRITTLE, judge_of(BRITTLE))
    yield from _product("methods", methods, two, variants, seeds or SEEDS, choices, COARSE)


def _trajectory(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    variants = {name: SMOOTHINGS[name] for name in (PLAIN, "image", BOTH)}
    yield from _product("trajectory", tuple(TRAJECTORIES), (BRITTLE,), variants, seeds or FEW_SEEDS, choices)


def _baselines(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from _product("baselines", (DRAFT,), (BRITTLE,), BASELINES, seeds or SEEDS, choices)
    # Where weight smoothing helps: is it more than a smaller step?
    others = [proxy for proxy in proxies() if proxy != BRITTLE]
    slower = {"small-lr": BASELINES["small-lr"]}
    yield from _product("baselines", (DRAFT,), others, slower, seeds or SEEDS, choices)


def _controls(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from _product("controls", (DRAFT,), (BRITTLE,), CONTROLS, seeds or FEW_SEEDS, choices, LONG)


def _long(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from _product("long", (DRAFT,), (FAIR,), WATCHED, seeds or FEW_SEEDS, choices, LONG)


def _variants(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from _product("variants", (DRAFT,), (BRITTLE,), VARIANTS, seeds or FEW_SEEDS, choices, COARSE)


def _lora_space(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from _product("lora-space", (DRAFT,), (BRITTLE,), LORA_SPACES, seeds or FEW_SEEDS, choices)


def _quick(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    two = (BRITTLE, judge_of(BRITTLE))
    usual = dict.fromkeys(two, recipe_numbers())
    yield from _product("quick", (DRAFT,), two, SMOOTHINGS, seeds or FEW_SEEDS, usual, Size(updates=20, pictures=64))


def _counting(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from counting_rows(seeds)


def _counting_more(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from more_counting_rows(seeds)


@dataclass(frozen=True)
class Question:
    """A set of runs.

    Attributes:
        about: what it asks, for the user.
        rows: makes its rows of what was chosen, and of other seeds than its own.
        full: whether `--full` runs it.
    """

    about: str
    rows: Callable[[Choices, Sequence[int] | None], Iterator[Row | Waiting]]
    full: bool = True


SETS: dict[str, Question] = {
    "quick": Question("plain and smoothed at the recipe's own radii, short, on two proxies", _quick, full=False),
    "select": Question("which radii and weights, on seeds that nothing is reported on", _select),
    "core": Question("DRaFT-1, plain and smoothed, on every proxy", _core),
    "baselines": Question("what else a practitioner would try, on the brittle proxy; a small rate on all", _baselines),
    "controls": Question("what a held-out reward can do about over-optimisation, twice as long", _controls),
    "long": Question("does smoothing end over-optimisation or delay it? The fair proxy, twice as long", _long),
    "variants": Question("other ways to smooth, on the brittle proxy", _variants),
    "methods": Question("ReFL, DRaFT-LV, AlignProp and DRTune, plain and smoothed, on two proxies", _methods),
    "trajectory": Question("LeapAlign and FlowBP, plain and smoothed, on the brittle proxy", _trajectory),
    "lora-space": Question("where LoRA's weights are perturbed: factors, weight, a second adapter", _lora_space),
    COUNTING: Question("policy gradients that count few objects for a proxy that can be hacked", _counting),
    "counting-more": Question("the other seeds of what counting runs with one", _counting_more),
}


def rows_of(
    name: str, choices: Choices, seeds: Sequence[int] | None = None, only: Sequence[str] | None = None
) -> tuple[list[Row], list[Waiting]]:
    """Return a set's rows, and those that wait for a choice.

    Args:
        name: of the set.
        choices: what was chosen so far.
        seeds: in place of the set's own.
        only: the proxies whose rows are wanted; None for all.

    Raises:
        UserError: there is no such set, or no such proxy.
    """
    if name not in SETS:
        raise UserError(f"--set {name}: there is no such set; there are {', '.join(SETS)}")
    trained = [*proxies(), COUNTING_PROXY]
    if unknown := [proxy for proxy in only or () if proxy not in trained]:
        raise UserError(f"--proxies {unknown[0]}: nothing is trained on it; there are {', '.join(trained)}")
    found = [row for row in SETS[name].rows(choices, seeds) if only is None or row.proxy in only]
    return [row for row in found if isinstance(row, Row)], [row for row in found if isinstance(row, Waiting)]


def recipe_numbers() -> dict[str, float]:
    """Return the radii of the playground's recipe, by the grids' keys."""
    smoothing = load_config(find_recipe(RECIPE)).smoothing
    assert smoothing.image is not None and smoothing.parameters is not None
    return {"image": smoothing.image.number, "rho": smoothing.parameters.rho}
