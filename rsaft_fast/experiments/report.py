"""What the experiment found: tables in text and Markdown, and the over-optimisation curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.known_preference import TRUTH
from rsaft_fast.experiments import alarms
from rsaft_fast.experiments import groups as measure
from rsaft_fast.experiments.counting import DIVERSITY, EXACT, FEW, MORE
from rsaft_fast.experiments.counting_table import COUNTED, COUNTED_BESIDE, COUNTING, POLICIES
from rsaft_fast.experiments.groups import Key, Seeds, Summary
from rsaft_fast.experiments.records import PROXY, S1, Run
from rsaft_fast.experiments.selection import RULE, choices_in
from rsaft_fast.experiments.statistics import Interval, interval
from rsaft_fast.experiments.variants import DRAFT, PLAIN, SMOOTHINGS
from rsaft_fast.figures.bands import Band, BandPanel, band_figure
from rsaft_fast.figures.tables import aligned, markdown
from rsaft_fast.files import replace_between, write_atomically
from rsaft_fast.reading import read_text

BEGIN, END = "<!-- experiment:begin -->", "<!-- experiment:end -->"
"""Marker lines of a page; what lies between them is made from the results."""

NONE = "-"
_LONGEST_PAGE = 2**24
NOTHING = "No run is finished yet: `rsaft-fast experiment --full` makes them."
Sets = Mapping[str, Mapping[Key, Seeds]]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]

HEAD = ("run", "seeds", "r* best", "at", "r* end", "proxy end", "best less plain", "end less plain", "at equal proxy")
LEGEND = (
    "r*: true preference, 0 to 1; best: its highest evaluation, on average at that update; at equal proxy: r* less "
    "plain's, where the proxy first reaches the highest level that both reach. Means over seeds, with 95 % "
    "t-intervals; differences are paired by seed. A star: the interval does not hold 0."
)


COUNTING_HEAD = (
    "run",
    "seeds",
    "proxy",
    "r*",
    "r* less plain",
    "r* at equal proxy",
    "r*, few",
    "r*, more",
    "exact, few",
    "exact, more",
    "diversity",
    "S1",
)
COUNTING_LEGEND = (
    "After the last update, of all pictures; few: one and two objects, which are trained; more: three and four, which "
    "are not. Exact: share of pictures with just as many objects as the prompt says; diversity: cosine distance to the "
    "prompt's other picture; S1: of the proxy, at radius "
)


def shown(found: Interval | None, sign: bool = False, digits: int = 3) -> str:
    """Write a mean and its interval."""
    if found is None:
        return NONE
    mean = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    if math.isinf(found.half):
        return mean
    return f"{mean} ±{found.half:.{digits}f}" + ("*" if sign and found.sign else "")


def line_of(found: Summary) -> list[str]:
    """Write a summary's cells, under `HEAD`."""
    return [
        found.label,
        str(found.seeds),
        shown(found.best),
        f"{found.best_at:.0f}",
        shown(found.end),
        shown(found.proxy, digits=2),
        shown(found.best_gain, sign=True),
        shown(found.end_gain, sign=True),
        shown(found.level_gain, sign=True),
    ]


def sections(sets: Sets) -> list[tuple[str, Table]]:
    """Make every table of whatever is there: its title, head and rows."""
    made: list[tuple[str, Table]] = []
    for name in ("quick", "core"):
        for proxy in _proxies(sets.get(name, {})):
            made.append((f"{name}: the {proxy} proxy, DRaFT-1", _kinds(_of_proxy(sets[name], proxy))))
    for name in ("methods", "trajectory"):
        for proxy in _proxies(sets.get(name, {})):
            made.append((f"{name}: the {proxy} proxy", _kinds(_of_proxy(sets[name], proxy), methods=True)))
    for proxy in _proxies(sets.get("lora-space", {})):
        made.append((f"lora-space: the {proxy} proxy, LoRA, DRaFT-1", _kinds(_of_proxy(sets["lora-space"], proxy))))
    for name, table_of in (("baselines", _baselines), ("variants", _variants)):
        for proxy in _proxies(sets.get(name, {})):
            made.append((f"{name}: the {proxy} proxy, DRaFT-1", table_of(sets, proxy)))
    for name in ("controls", "long"):
        for proxy in _proxies(sets.get(name, {})):
            title = f"{name}: the {proxy} proxy, DRaFT-1, twice as long"
            made.append((title, _kinds(_of_proxy(sets[name], proxy))))
    if COUNTING in sets:
        made.append((f"{COUNTING}: few objects are trained, more are judged too", _counting(sets[COUNTING])))
    for name in ("quick", "core"):
        for proxy in _proxies(sets.get(name, {})):
            own = _of_proxy(sets[name], proxy)
            made.append((f"{name}: sharpness and r* within a checkpoint, {proxy}", _within(own)))
            made.append((f"{name}: sharpness and r* across runs, {proxy}", _across(own)))
    return made


def _proxies(found: Mapping[Key, Seeds]) -> list[str]:
    return list(dict.fromkeys(proxy for proxy, _, _ in found))


def _of_proxy(found: Mapping[Key, Seeds], proxy: str) -> dict[Key, Seeds]:
    """A proxy's kinds, plain first and then in the order of the smoothings."""
    order = list(SMOOTHINGS)
    own = {key: seeds for key, seeds in found.items() if key[0] == proxy}
    place = lambda key: (key[1], order.index(key[2]) if key[2] in order else len(order))  # noqa: E731
    return {key: own[key] for key in sorted(own, key=place)}


def verdicts(sets: Sets) -> list[str]:
    """Put into words what the intervals say of each proxy, whichever way it came out."""
    lines = []
    for name in ("quick", "core"):
        for proxy in _proxies(sets.get(name, {})):
            lines.append(_verdict(f"{name}, {proxy}", _of_proxy(sets[name], proxy), proxy, DRAFT))
    for method in POLICIES:
        own = {key: seeds for key, seeds in _in_order(sets.get(COUNTING, {})).items() if key[1] == method}
        lines += [_verdict(f"{COUNTING}, {method}", own, key[0], method) for key in list(own)[:1]]
    return lines


def _verdict(title: str, own: Mapping[Key, Seeds], proxy: str, method: str) -> str:
    plain = measure.plain_of(own, proxy, method)
    # Of one seed there is no interval, and nothing to say.
    several = {key[2]: seeds for key, seeds in own.items() if key[2] != PLAIN and len(seeds) > 1}
    found = {label: measure.summary(label, seeds, plain) for label, seeds in several.items()}
    start = next(iter(next(iter(own.values())).values())).points[0].truth
    said = [f"{title}: r* is {start:.3f} before any update"]
    if plain:
        end = measure.summary(PLAIN, plain, None)
        said += [f"at the end of plain runs {end.end.mean:.3f}"] if method in POLICIES else []
    for what, gain in (
        ("at equal proxy", lambda one: one.level_gain),
        ("at the end", lambda one: one.end_gain),
    ):
        said += [f"{what} {_in_words({label: gain(one) for label, one in found.items()})}"] if found else []
    return "; ".join(said) + "."


def _counting(found: Mapping[Key, Seeds]) -> Table:
    """The base model, which every run begins with, and each kind after its last update."""
    found = _in_order(found)
    runs = [run for seeds in found.values() for run in seeds.values()]
    radius = _radius_of(runs[0])
    columns = (TRUTH + FEW, TRUTH + MORE, EXACT + FEW, EXACT + MORE, DIVERSITY, radius)

    def cells(points: Sequence[measure.Point], gains: Sequence[str]) -> list[str]:
        mean = lambda name: shown(interval([point.means[name] for point in points]))  # noqa: E731
        return [mean(PROXY), mean(TRUTH), *gains, *map(mean, columns)]

    rows = [["base", NONE, *cells([runs[0].points[0]], [NONE, NONE])]]
    for (proxy, method, variant), seeds in found.items():
        plain = None if variant == PLAIN else measure.plain_of(found, proxy, method)
        own = measure.summary(variant, seeds, plain)
        gains = [shown(own.end_gain, sign=True), shown(own.level_gain, sign=True)]
        ends = [run.points[-1] for run in seeds.values()]
        rows.append([f"{method} {variant}", str(len(seeds)), *cells(ends, gains)])
    return COUNTING_HEAD, rows


def _in_order(found: Mapping[Key, Seeds]) -> dict[Key, Seeds]:
    """Kinds of the counting task as the table of runs has them."""
    order = [(method, name) for kinds in (COUNTED, COUNTED_BESIDE) for method in kinds for name in kinds[method]]
    place = lambda key: order.index(key[1:]) if key[1:] in order else len(order)  # noqa: E731
    return {key: found[key] for key in sorted(found, key=place)}


def _radius_of(run: Run) -> str:
    """The middle one of the radii at which S1 is measured."""
    radii = measure.radii_of(run)
    return radii[len(radii) // 2]


def _in_words(gains: Mapping[str, Interval | None]) -> str:
    words = {1: "higher than plain", -1: "lower than plain", 0: "not told apart from plain"}
    named = {sign: [label for label, gain in gains.items() if gain and gain.sign == sign] for sign in words}
    return ", ".join(f"{' and '.join(named[sign])} {text}" for sign, text in words.items() if named[sign]) or NONE


def _kinds(found: Mapping[Key, Seeds], methods: bool = False) -> Table:
    rows = []
    for (proxy, method, variant), seeds in found.items():
        plain = None if variant == PLAIN else measure.plain_of(found, proxy, method)
        rows.append(line_of(measure.summary(f"{method} {variant}" if methods else variant, seeds, plain)))
    if methods:
        return HEAD, rows
    common = measure.at_common_level({variant: seeds for (_, _, variant), seeds in found.items()})
    head = (*HEAD, "r* at the level all reach")
    return head, [[*row, shown(common.get(key[2]))] for row, key in zip(rows, found)]


def _baselines(sets: Sets, proxy: str) -> Table:
    """What else one would try, under the kinds of the core, with what is read off runs without training more."""
    core = _of_proxy(sets.get("core", {}), proxy)
    plain = measure.plain_of(core, proxy, DRAFT)
    kinds: dict[str, Seeds] = {variant: seeds for (_, _, variant), seeds in core.items()}
    for judge in measure.judges_of({key: core[key] for key in core if key[2] == PLAIN}):
        stopped = {seed: measure.stopped_by(run, judge) for seed, run in (plain or {}).items()}
        kinds[f"{PLAIN}, stopped by {judge}"] = stopped
    for (_, _, variant), seeds in _of_proxy(sets["baselines"], proxy).items():
        kinds[variant] = seeds
        scaled = {seed: measure.path_back(run) for seed, run in seeds.items() if run.scaled}
        if scaled:
            kinds[f"{variant}, scaled back"] = scaled
    return _against_plain(kinds, plain)


def _variants(sets: Sets, proxy: str) -> Table:
    """Other ways to smooth, under the kinds of the core at the same seeds and evaluations."""
    own = _of_proxy(sets["variants"], proxy)
    runs = [run for seeds in own.values() for run in seeds.values()]
    steps, seeds = {point.step for run in runs for point in run.points}, {run.seed for run in runs}
    core = {
        key[2]: {seed: measure.thinned(run, steps) for seed, run in found.items() if seed in seeds}
        for key, found in _of_proxy(sets.get("core", {}), proxy).items()
    }
    kinds = {label: found for label, found in core.items() if found} | {key[2]: found for key, found in own.items()}
    return _against_plain(kinds, kinds.get(PLAIN))


def _against_plain(kinds: Mapping[str, Seeds], plain: Seeds | None) -> Table:
    return HEAD, [
        line_of(measure.summary(label, seeds, None if label == PLAIN else plain)) for label, seeds in kinds.items()
    ]


def _within(found: Mapping[Key, Seeds]) -> Table:
    radii = measure.radii_of(next(iter(next(iter(found.values())).values())))
    places: dict[str, Callable[[Run], measure.Point]] = {
        "start": lambda run: run.points[0],
        "end": lambda run: run.points[-1],
    }
    head = ["run", *(f"{_ball(name)}, {place}" for name in radii for place in places)]
    columns = [(name, at) for name in radii for at in places.values()]
    rows = []
    for (_, _, variant), seeds in found.items():
        cells = [measure.across_pictures(seeds, name, at) for name, at in columns]
        rows.append([variant, *(shown(cell, sign=True, digits=2) for cell in cells)])
    return head, rows


def _across(found: Mapping[Key, Seeds]) -> Table:
    runs = [run for seeds in found.values() for run in seeds.values()]
    radii = measure.radii_of(runs[0])
    cells: dict[str, dict[str, str]] = {}
    for name in radii:
        for step, count, value in measure.across_runs(runs, name):
            cells.setdefault(f"at update {step} ({count} runs)", {})[name] = f"{value:+.2f}"
        together = measure.pooled(runs, name)
        label = "all updates pooled (time confounds)"
        cells.setdefault(label, {})[name] = NONE if together is None else f"{together:+.2f}"
    labels = sorted(cells, key=lambda label: (label.startswith("all"), len(label), label))
    return ["", *map(_ball, radii)], [[label, *(cells[label].get(name, NONE) for name in radii)] for label in labels]


def _ball(name: str) -> str:
    return f"S1 at {name.removeprefix(S1)}"


def as_text(sets: Sets) -> str:
    """Write every table in plain text; no times, so that the same runs give the same text to the bit."""
    if not sets:
        return NOTHING
    blocks = [f"{title}\n" + "\n".join(aligned([head, *rows])) for title, (head, rows) in sections(sets)]
    return "\n\n".join([*blocks, "\n".join(verdicts(sets)), *_legends(sets)])


def as_page(sets: Sets, folder: Path, pictures: Mapping[str, str]) -> str:
    """Write every table in Markdown, with what was chosen and the pictures.

    Args:
        folder: of the results.
        pictures: a set's name to where its picture lies, as the page links to it.
    """
    if not sets:
        return NOTHING
    blocks = ["\n".join(f"- {line}" for line in verdicts(sets)), *_legends(sets)]
    if set(sets) - {COUNTING}:
        blocks += _chosen(folder)
    blocks += [f"![{name}: r* and what goes with it]({place})" for name, place in pictures.items()]
    blocks += [f"### {_capital(title)}\n\n{markdown(head, rows)}" for title, (head, rows) in sections(sets)]
    return "\n\n".join(blocks)


def as_alarms(sets: Sets) -> str:
    """Write how often monitors would have warned, in Markdown."""
    runs = _all_runs(sets)
    if not runs:
        return NOTHING
    watched = [run for run in runs if run.points[-1].watched]
    blocks = [f"{len(runs)} runs.", markdown(*alarms.table(runs)), alarms.LEGEND]
    if watched:
        by_threshold = [
            f"{len(watched)} of them hold what the exact rule needs.",
            markdown(*alarms.calibration(watched)),
        ]
        blocks += ["#### By threshold", *by_threshold, alarms.CALIBRATION_LEGEND]
    return "\n\n".join(blocks)


def _all_runs(sets: Sets) -> list[Run]:
    runs = [run for kinds in sets.values() for seeds in kinds.values() for run in seeds.values()]
    return alarms.trained_alone(runs)


def _legends(sets: Sets) -> list[str]:
    if COUNTING not in sets:
        return [LEGEND]
    run = next(iter(next(iter(sets[COUNTING].values())).values()))
    return [LEGEND, f"{COUNTING_LEGEND}{_radius_of(run).removeprefix(S1)}."]


def as_readme(sets: Sets) -> str:
    """Write the one table of the README: the core set, every proxy, or the quick one where there is no core."""
    name = next((name for name in ("core", "quick") if name in sets), None)
    if name is None:
        return NOTHING
    head = ("proxy, DRaFT-1", *HEAD[1:])
    rows = []
    for proxy in _proxies(sets[name]):
        _, lines = _kinds(_of_proxy(sets[name], proxy))
        rows += [[f"{proxy}, {line[0]}", *line[1 : len(HEAD)]] for line in lines]
    said = [line for line in verdicts(sets) if line.startswith(name)]
    return "\n\n".join([markdown(head, rows), LEGEND, "\n".join(f"- {line}" for line in said)])


def _chosen(folder: Path) -> list[str]:
    chosen = choices_in(folder)
    if not chosen:
        return []
    keys = list(dict.fromkeys(key for own in chosen.values() for key in own))
    rows = [[proxy, *(f"{own[key]:g}" if key in own else NONE for key in keys)] for proxy, own in chosen.items()]
    return [f"Chosen on seeds of their own: {RULE}.", markdown(["proxy", *keys], rows)]


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def draw(sets: Sets, folder: Path) -> dict[str, Path]:
    """Draw the over-optimisation curves of each set that has any: `<set>.png` under `folder`."""
    drawn = {}
    for name, found in sets.items():
        if name in ("quick", "core", "methods", "trajectory", "long"):
            rows = [_panels(proxy, _of_proxy(found, proxy)) for proxy in _proxies(found)]
            drawn[name] = band_figure(folder / f"{name}.png", rows, f"{name}: mean over seeds, 95 % interval")
        if name == COUNTING:
            drawn[name] = band_figure(
                folder / f"{name}.png", _counting_panels(found), f"{name}: mean over seeds, 95 % interval"
            )
    return drawn


def panels_of(sets: Sets) -> dict[str, list[BandPanel]]:
    """Make the over-optimisation curves of every set and proxy, by a heading."""
    return {
        f"{name}: the {proxy} proxy": _panels(proxy, _of_proxy(found, proxy))
        for name, found in sets.items()
        for proxy in _proxies(found)
    }


def _counting_panels(found: Mapping[Key, Seeds]) -> list[list[BandPanel]]:
    """Curves of the kinds that have several seeds, over updates, and r* over the proxy."""
    most = max(len(seeds) for seeds in found.values())
    kinds = {
        f"{key[1]} {key[2]}": list(seeds.values()) for key, seeds in _in_order(found).items() if len(seeds) == most
    }
    steps: Callable[[measure.Point], float] = lambda point: point.step  # noqa: E731

    def panel(x: str, of_x: Callable[[measure.Point], float], name: str) -> BandPanel:
        of_y = lambda point: point.means[name]  # noqa: E731
        return BandPanel(name, x, name, {label: _band(runs, of_x, of_y) for label, runs in kinds.items()})

    rows = [(PROXY, TRUTH, TRUTH + MORE), (EXACT + FEW, EXACT + MORE, DIVERSITY)]
    panels = [[panel("updates", steps, name) for name in names] for names in rows]
    panels[0].append(panel("proxy", lambda point: point.proxy, TRUTH))
    panels[1].append(panel("updates", steps, _radius_of(next(iter(kinds.values()))[0])))
    return panels


def _panels(proxy: str, found: Mapping[Key, Seeds]) -> list[BandPanel]:
    several = len({key[1] for key in found}) > 1
    labelled = {f"{key[1]} {key[2]}" if several else key[2]: list(seeds.values()) for key, seeds in found.items()}
    axes: dict[str, Callable[[measure.Point], float]] = {
        "proxy reward": lambda point: point.proxy,
        "L2 distance of the weights from the start": lambda point: point.weights_distance,
        "updates": lambda point: point.step,
    }
    return [
        BandPanel(f"{proxy} proxy", name, TRUTH, {label: _band(runs, x) for label, runs in labelled.items()})
        for name, x in axes.items()
    ]


def _band(
    runs: Sequence[Run],
    x: Callable[[measure.Point], float],
    y: Callable[[measure.Point], float] = lambda point: point.truth,
) -> Band:
    moments = list(zip(*(run.points for run in runs)))
    across = [interval([y(point) for point in points]) for points in moments]
    middles = [interval([x(point) for point in points]) for points in moments]
    return Band(
        [one.mean for one in middles if one], [one.mean for one in across if one], [one.half for one in across if one]
    )


def read_page(path: Path) -> str:
    """Read a page that has a place between its marker lines.

    Raises:
        UserError: the page cannot be read, or its markers are not there.
    """
    if not path.is_file():
        raise UserError(f"there is no page {str(path)!r} to write between {BEGIN} and {END}")
    text = read_text(path, "page", _LONGEST_PAGE)
    replace_between(text, BEGIN, END, "", str(path))
    return text


def write_page(path: Path, said: str) -> None:
    """Put what was made between the marker lines of a page.

    Raises:
        UserError: see `read_page`.
    """
    write_atomically(path, replace_between(read_page(path), BEGIN, END, said, str(path)))
