"""Which runs the experiment is made of, as data: a row a run, a set a question."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, ClassVar

from rsaft_fast import playground
from rsaft_fast.errors import UserError
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import find_recipe, load_config, overridden

RECIPE = "playground.yaml"
DRAFT, PLAIN, BOTH = "draft", "plain", "both"
BRITTLE = "brittle"
MEMBER = "ensemble-"
"""How the names begin of rewards that are made to be one ensemble."""

SELECTION_SEEDS = (100, 101)
SEEDS = (10, 11, 12, 13, 14)
"""Of what is reported: nobody chose anything on them."""

QUICK_SEEDS = (10, 11, 12)
COUNTING_SEEDS = (30, 31, 32)


@dataclass(frozen=True)
class Row:
    """One run: the playground's recipe, what is changed of it, and when it is evaluated.

    Attributes:
        set: the question it belongs to.
        proxy: the playground's reward that is trained on, or that would be, where a baseline trains on another.
        method, variant: what the reports call it.
        seed: of noise, plans and prompt order.
        updates: in all.
        every: updates between two evaluations; there is one before the first update and one after the last.
        pictures: of an evaluation.
        overrides: keys that replace the recipe's.
        scales: shares of the way from the start's weights to the last ones, at which it is evaluated in the end.
    """

    set: str
    proxy: str
    method: str
    variant: str
    seed: int
    updates: int
    every: int
    pictures: int
    overrides: tuple[str, ...]
    scales: tuple[float, ...] = ()

    recipe: ClassVar[str] = RECIPE

    @property
    def settings(self) -> list[str]:
        """What is changed of the recipe."""
        return [f"reward.path=playground/{self.proxy}", *_common(self), *self.overrides]

    @property
    def proxy_reward(self) -> tuple[str, str]:
        """Name the proxy's family and path."""
        return "clip", f"playground/{self.proxy}"

    @property
    def prompts(self) -> list[str]:
        """Return the prompts of an evaluation's pictures, one for each."""
        return playground.eval_prompts(self.pictures)

    @property
    def name(self) -> str:
        return f"{self.proxy}-{self.method}-{self.variant}-s{self.seed}"

    def path(self, folder: Path) -> Path:
        """Return where its results are written."""
        return folder / self.set / f"{self.name}.json"

    @property
    def evaluations(self) -> int:
        return -(-self.updates // self.every) + len(self.scales)

    @property
    def cost(self) -> float:
        """Roughly its time, in plain updates: a picture of an evaluation takes a tenth of one."""
        perturbs = not any(text in ("smoothing=null", "smoothing.parameters=null") for text in self.overrides)
        return self.updates * (2 if perturbs else 1) + self.evaluations * self.pictures / 10


class CountingRow(Row):
    """A run of the counting task, by a policy gradient: few objects are trained, more are judged too."""

    recipe: ClassVar[str] = "playground-grpo.yaml"

    @property
    def settings(self) -> list[str]:
        return [*_common(self), *_COUNTING, *self.overrides]

    @property
    def proxy_reward(self) -> tuple[str, str]:
        return "python", COUNTER

    @property
    def prompts(self) -> list[str]:
        prompts = [*playground.counting_prompts(), *playground.counting_prompts(held_out=True)]
        return prompts * (self.pictures // len(prompts))


@dataclass(frozen=True)
class Variant:
    """What is changed of the recipe. `$name` stands for the proxy, the judge, or a number that was chosen.

    Attributes:
        overrides: keys that replace the recipe's.
        longer: times as many updates.
        scales: see `Row`.
    """

    overrides: tuple[str, ...]
    longer: int = 1
    scales: tuple[float, ...] = ()


OFF = "smoothing=null"
SMOOTHINGS = {
    PLAIN: Variant((OFF,)),
    "image": Variant(("smoothing.image.radius=$image", "smoothing.parameters=null")),
    "parameter": Variant(("smoothing.image=null", "smoothing.parameters.rho=$rho")),
    BOTH: Variant(("smoothing.image.radius=$image", "smoothing.parameters.rho=$rho")),
}

# One loss for all, so that methods differ in the calls that carry gradient alone. ReFL's hinge, made for ImageReward,
# is past its margin on most of the playground's scores.
_LINEAR = ("loss.map=linear", "loss.scale=1.0")
METHODS = {
    DRAFT: (),
    "refl": ("method.name=refl", *_LINEAR),
    "draft_lv": ("method.name=draft_lv", *_LINEAR),
    "alignprop": ("method.name=alignprop", *_LINEAR),
    "drtune": ("method.name=drtune", *_LINEAR),
}

_BOTH_REWARDS = "parts: [{name: clip, path: playground/$proxy}, {name: clip, path: playground/$judge, label: judge}]"
_ENSEMBLE = "parts: [$ensemble]"
_SUM = f"reward={{name: combination, how: weighted, unit_gradients: true, {_BOTH_REWARDS}}}"
_LORA = ("parameters.train=lora", "parameters.lora.rank=8", "optimizer.lr=$lora_lr")
_JUDGES = "judges: {judge: {name: clip, path: playground/$judge}}"
_PATH = (0.25, 0.5, 0.75)
BASELINES = {
    "kl": Variant((OFF, "regularize.kl_to_base=$kl")),
    "small-lr": Variant((OFF, "optimizer.lr=2.0e-5")),
    "twice": Variant((OFF,), longer=2),
    "lora": Variant((OFF, *_LORA), scales=_PATH),
    "interpolated": Variant((OFF,), scales=_PATH),
    "worst": Variant((OFF, f"reward={{name: combination, how: worst, {_ENSEMBLE}}}")),
    "mean-std": Variant((OFF, f"reward={{name: combination, how: mean-std, {_ENSEMBLE}}}")),
    "judge": Variant((OFF, "reward.path=playground/$judge")),
    "sum": Variant((OFF, _SUM)),
    "sum-image": Variant(("smoothing.image.radius=$image", "smoothing.parameters=null", _SUM)),
    "gaussian": Variant(
        (*SMOOTHINGS["image"].overrides, "smoothing.image.kind=gaussian", "smoothing.image.samples=16")
    ),
    "oracle": Variant((OFF, "reward={name: python, path: 'rsaft_fast.playground:true_preference'}")),
}
"""What a practitioner would try instead, of the proxy that is hacked most easily. Early stopping needs no runs of its
own: it is read off the plain ones."""


def _more(kind: str, *overrides: str) -> Variant:
    return Variant((*SMOOTHINGS[kind].overrides, *overrides))


def _steered(kind: str, control: str, *more: str) -> Variant:
    keys = ", ".join((_JUDGES, f"control: {control}", *more))
    return Variant((*SMOOTHINGS[kind].overrides, f"agreement={{{keys}}}"))


CONTROLS = {
    PLAIN: SMOOTHINGS[PLAIN],
    "image": SMOOTHINGS["image"],
    BOTH: SMOOTHINGS[BOTH],
    "judge": BASELINES["judge"],
    "sum": BASELINES["sum"],
    "sum-image": BASELINES["sum-image"],
    "stop": _steered(PLAIN, "stop"),
    "project": _steered(PLAIN, "project"),
    "drop": _steered(PLAIN, "drop", "space: latent"),
    "weight": _steered(PLAIN, "weight", "space: latent"),
    "stop-image": _steered("image", "stop"),
    "project-image": _steered("image", "project"),
    "radius": _steered("image", "radius"),
    "radius-auto": Variant(
        ("smoothing.image.radius=auto", f"smoothing.radius_search={{{_JUDGES}}}", "smoothing.parameters=null")
    ),
}
"""What a held-out reward can be used for: training on it, or the agreement of its gradient with the update's."""

VARIANTS = {
    "graded-only": _more(BOTH, "smoothing.resample=graded_only"),
    "delta-perturbed": _more(BOTH, "smoothing.delta_from=perturbed"),
    "ascend-loss": _more(BOTH, "smoothing.ascend=loss"),
    "momentum": _more(BOTH, "smoothing.parameters.direction=momentum"),
    "friendly": _more(BOTH, "smoothing.parameters.direction=friendly"),
    "gsam": _more(BOTH, "smoothing.parameters.direction=gsam"),
    "reuse-5": _more(BOTH, "smoothing.parameters.reuse=5"),
    "steps-5": _more("image", "smoothing.image.steps=5"),
    "lowpass": _more("image", "smoothing.image.lowpass=1.0"),
    "annealed": _more("image", "smoothing.image.schedule=linear"),
    "per-sample": _more("image", "smoothing.image.per_sample=s1"),
    "only-where": _more(
        "image", "smoothing.image.only_where=0.3", f"reward={{name: combination, how: weighted, {_BOTH_REWARDS}}}"
    ),
    "lora-factor": _more(BOTH, *_LORA),
    "lora-full": _more(BOTH, *_LORA, "smoothing.parameters.space=full"),
}
"""Other ways to smooth, at the radii that were chosen for the usual one; of the proxy that is hacked most easily."""


COUNTING = "counting"
COUNTER = "rsaft_fast.experiments.counting:count_loosely"
FEATURES = "playground/brittle"
"""In which the diversity of pictures is measured, and weighed by GARDO. In those of fair all pictures are alike: the
distance within a prompt is 0.002, which as a weight would leave nothing of good pictures' advantages; here 0.07."""

_LOOSE = f"{{name: python, path: '{COUNTER}', label: proxy}}"
_AUXILIARIES = ", ".join(
    f"{{name: clip, path: playground/{name}, label: {name}, weight: 0}}" for name in ("mixed", "ensemble-0")
)
_COUNTING = (
    "data={prompts: playground-counting, prompts_per_iteration: 4, group_size: 8, batch_size: 32}",
    "sampler.steps=4",
    "optimizer.lr=3.0e-4",
    f"reward={{name: combination, parts: [{_LOOSE}, {_AUXILIARIES}]}}",
)
"""What all runs of the counting task change of the recipe: few pictures of few steps, a reward with auxiliary parts."""

POLICIES = {
    "grpo": "method={name: flow_grpo, window: {size: 1, last: 2}, draws: trained, kl_weight: 0}",
    "nft": "method={name: nft, timestep_fraction: 0.5, kl_weight: 0}",
}


def _gardo(kl_weight: float, kl_threshold: float) -> str:
    gate, diversity = "{share: 0.1, adapt: {window: 4}}", f"{{features: {FEATURES}, convention: code}}"
    keys = f"kl_weight: {kl_weight}, gate: {gate}, reference: {{kl_threshold: {kl_threshold}}}, diversity: {diversity}"
    return f"method.gardo={{{keys}}}"


# Weights at which the penalty's gradient has grown as long as the policy's after some three updates, and a KL that is
# reached before: what runs on other seeds showed. With three times the weight the first update's distance is all.
_GARDO, _NFT_GARDO = _gardo(0.1, 0.02), _gardo(0.3, 0.15)
_SAM = "smoothing={image: null, parameters: {rho: 0.02}}"
_MEASURED = "sharpness={radius: 0.3}"
COUNTED: dict[str, dict[str, tuple[str, ...]]] = {
    "grpo": {PLAIN: (), "kl": ("method.kl_weight=0.1",), "gardo": (_GARDO,)},
    "nft": {PLAIN: (), "gardo": (_NFT_GARDO,)},
}
"""Method, variant, and keys over those of `POLICIES`: what is compared over seeds."""

COUNTED_BESIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "grpo": {
        "gardo-no-gate": (_GARDO, "method.gardo.gate=null"),
        "gardo-fixed-reference": (_GARDO, "method.gardo.reference=null"),
        "gardo-no-diversity": (_GARDO, "method.gardo.diversity=null"),
        "gardo-raw-distance": (_GARDO, "method.gardo.diversity.convention=paper"),
        "gardo-std": (_GARDO, "method.gardo.advantage_std=group"),
        "sam": (_SAM,),
        "gardo-sam": (_GARDO, _SAM),
        "gardo-s1": (_GARDO, _MEASURED, "method.gardo.gate.signals={win_rate: 1, s1: 1}"),
        "gardo-agreement": (_GARDO, "method.gardo.gate.signals={win_rate: 0, agreement: 1}"),
        "gardo-norm": (_GARDO, "method.gardo.norm_weight=0.1"),
    },
    "nft": {"gardo-no-diversity": (_NFT_GARDO, "method.gardo.diversity=null"), "sam": (_SAM,)},
}
"""GARDO without each of its parts, and what neither paper has: one seed each."""


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
        filled = tuple(Template(text).substitute(known) for text in (*METHODS[method], *variant.overrides))
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
    yield from _product("methods", methods, (BRITTLE, judge_of(BRITTLE)), variants, seeds or SEEDS, choices)


def _baselines(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from _product("baselines", (DRAFT,), (BRITTLE,), BASELINES, seeds or SEEDS, choices)


def _controls(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    long = Size(updates=80, every=20)
    yield from _product("controls", (DRAFT,), (BRITTLE,), CONTROLS, seeds or SEEDS, choices, long)


def _variants(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from _product("variants", (DRAFT,), (BRITTLE,), VARIANTS, seeds or SEEDS, choices)


def _quick(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    two = (BRITTLE, judge_of(BRITTLE))
    usual = dict.fromkeys(two, recipe_numbers())
    yield from _product("quick", (DRAFT,), two, SMOOTHINGS, seeds or QUICK_SEEDS, usual, Size(updates=20, pictures=64))


def _counted(kinds: Mapping[str, Mapping[str, tuple[str, ...]]], seeds: Sequence[int]) -> Iterator[Row]:
    for seed, (method, variants) in itertools.product(seeds, kinds.items()):
        for name, overrides in variants.items():
            place = (COUNTING, "loose-counter", method, name, seed)
            yield CountingRow(*place, 24, 6, 96, (POLICIES[method], *overrides))


def _counting(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from _counted(COUNTED, seeds or COUNTING_SEEDS)
    yield from _counted(COUNTED_BESIDE, seeds or COUNTING_SEEDS[:1])


def _counting_more(choices: Choices, seeds: Sequence[int] | None) -> Iterator[Row | Waiting]:
    yield from _counted(COUNTED_BESIDE, seeds or COUNTING_SEEDS[1:])


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
    "baselines": Question("what else a practitioner would try, on the brittle proxy", _baselines),
    "controls": Question("what a held-out reward can do about over-optimisation, twice as long", _controls),
    "variants": Question("other ways to smooth, on the brittle proxy", _variants),
    "methods": Question("the other four methods, plain and smoothed, on two proxies", _methods),
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
    if unknown := [proxy for proxy in only or () if proxy not in proxies()]:
        raise UserError(f"--proxies {unknown[0]}: nothing is trained on it; there are {', '.join(proxies())}")
    found = [row for row in SETS[name].rows(choices, seeds) if only is None or row.proxy in only]
    return [row for row in found if isinstance(row, Row)], [row for row in found if isinstance(row, Waiting)]


def recipe_numbers() -> dict[str, float]:
    """Return the radii of the playground's recipe, by the grids' keys."""
    smoothing = load_config(find_recipe(RECIPE)).smoothing
    assert smoothing.image is not None and smoothing.parameters is not None
    return {"image": smoothing.image.number, "rho": smoothing.parameters.rho}


def config_of(row: Row, folder: Path) -> Config:
    """Return the recipe of a row, as a run in `folder`.

    Raises:
        UserError: a key that is not there, or a value that it does not take.
    """
    return load_config(find_recipe(row.recipe), [*row.settings, f"output_dir={folder}"])


def keys_of(row: Row) -> dict[str, Any]:
    """Return the recipe's keys with a row's over them: what its results follow from.

    A key of the recipe that every row replaces, such as a radius, may change without making results stale.
    """
    return overridden(find_recipe(row.recipe), row.settings)


def _common(row: Row) -> list[str]:
    """What every run changes of the recipe: when it is evaluated, and nothing written that nobody will look at."""
    return [
        f"seed={row.seed}",
        f"max_steps={row.updates}",
        f"checkpoint_every={row.updates}",
        f"samples.every={row.every}",
        "samples.count=1",
        "sharpness=null",
        "logging.tensorboard=false",
        "logging.diagnostics=false",
    ]
