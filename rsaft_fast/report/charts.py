"""Which curves a report shows, whatever draws them: each chart's lines, what it is, and what its axis counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rsaft_fast.figures.bands import BandPanel
from rsaft_fast.figures.curves import Curve
from rsaft_fast.report.sources import ERROR, HELD_OUT, REWARD, S1, Source

UPDATES = "updates"
AGREEMENT = "Agreement with the judges"
_WINDOW = 20
_MOST_POINTS = 1500
"""Of a line: more than the pixels that show it."""

_FEW = 60
"""Measurements that are marked one by one."""

_MOST_OTHERS = 24
COLOURS = 6
"""That a report tells apart, on white and on black."""

_Z95 = 1.96


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: in the chart's key.
        x, y: its points.
        half: half the width of a 95 % interval at each point; empty without.
        colour: number of its colour.
        dash: number of its dash pattern; 0 is an unbroken line.
        faint: drawn thin and pale, behind the others.
        points: marked one by one.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] = ()
    colour: int = 0
    dash: int = 0
    faint: bool = False
    points: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: what is shown.
        about: a sentence on what it is and how to read it.
        lines: of the chart, at least one.
        x_label: what the axis counts; charts over `UPDATES` are zoomed together.
        y_label: what the other axis is.
        marks: steps with a mark, and what happened there.
        keyed: whether it is said which line is which.
    """

    title: str
    about: str
    lines: Sequence[Line]
    x_label: str = UPDATES
    y_label: str = ""
    marks: Sequence[tuple[float, str]] = ()
    keyed: bool = True


def charts_of(sources: Sequence[Source]) -> dict[str, list[Chart]]:
    """Choose the charts of runs, by the heading they stand under; a chart without a point is left out."""
    marks = [(alarm.step, alarm.what) for source in sources for alarm in source.alarms]
    draw = _Drawer(sources, marks)
    first = [
        draw.rewards(),
        *draw.held_out(),
        draw.agreement(),
        draw.sharpness(),
    ]
    groups = {"What was learned": first}
    groups["Pictures and weights"] = [draw.evaluation(name) for name in draw.statistics()]
    groups["Speed"] = [draw.metric("seconds", "Seconds an update", "Time of each update; the first ones may warm up.")]
    known = {REWARD, S1, "seconds", "skipped", "step"}
    others = [n for n in dict.fromkeys(n for s in sources for n in s.names) if n not in known and "agreement" not in n]
    groups["Training in detail"] = [draw.metric(n, n, ABOUT.get(n, "")) for n in others[:_MOST_OTHERS]]
    # Of several runs one line alone must say whose it is.
    found = {
        name: [replace(chart, keyed=len(chart.lines) > 1 or draw.several) for chart in charts if chart.lines]
        for name, charts in groups.items()
    }
    return {name: charts for name, charts in found.items() if charts}


ABOUT = {
    "loss": "What the optimizer lowers.",
    "smoothed_reward": "The reward that the second pass climbs: at the worst nearby picture, of the perturbed weights.",
    "realised_drop": "How much of the fall that the perturbation was to cause it did cause; near 1 is as it should be.",
    "grad_norm": "Length of the update's gradient, before clipping.",
    "first_grad_norm": "Length of the gradient that the perturbation of the weights follows.",
    "eps_norm": "Length of the perturbation of the weights; 0 without parameter smoothing.",
    "projection": "Share of that perturbation that rounding leaves; below one half is too little.",
    "gradient_cosine": "Cosine of the second pass's gradient with the first's: 1 where smoothing changes nothing.",
    "gradient_change": "Distance of the second pass's gradient from the first's, over the first's length.",
    "similarity": "Mean weight of the samples: low where the gradient's leaps end far from where the sampler came.",
    "lr": "Learning rate.",
    "image/dark": "Share of pixels that are nearly black.",
    "image/saturated": "Share of pixels that are nearly white or at the end of a colour.",
    "image/contrast": "Spread of the brightness within a picture.",
    "image/edges": "Density of edges.",
    "image/entropy": "Entropy of the brightness, in bits.",
    "image/grid": "Regular patterns: what artefacts of a grid add to the spectrum.",
    "diversity": "How much the pictures of a prompt differ. A fall to 0 is mode collapse.",
    "prediction_norm": "Length of the network's prediction; compare prediction_norm_base, the untrained model's.",
    "lora_norm": "Length of what LoRA adds to the weights.",
}


@dataclass(frozen=True)
class _Drawer:
    """Makes lines of runs: a colour for each run where there are several, else for each quantity."""

    sources: Sequence[Source]
    marks: Sequence[tuple[float, str]]

    @property
    def several(self) -> bool:
        return len(self.sources) > 1

    def _line(
        self,
        source: int,
        quantity: int,
        name: str,
        curve: Curve,
        half: Sequence[float] = (),
        faint: bool = False,
        points: bool = False,
    ) -> list[Line]:
        if not curve.steps:
            return []
        label = self.sources[source].label
        colour, dash = (source, quantity) if self.several else (quantity, 0)
        shown = (f"{label}, {name}" if name else label) if self.several else name or label
        kept = _thinned(curve)
        return [Line(shown, kept.steps, kept.values, half, colour, dash, faint, points)]

    def _evaluated(self, source: int, quantity: int, name: str, shown: str) -> list[Line]:
        curve = self.sources[source].evaluated(name)
        errors = self.sources[source].evaluations
        half = [_Z95 * errors[int(step)].get(name + ERROR, math.nan) for step in curve.steps]
        if not all(map(math.isfinite, half)) or len(half) > _MOST_POINTS:
            half = []
        return self._line(source, quantity, shown, curve, half=half, points=len(curve.steps) <= _FEW)

    def _every(self, make: Callable[[int], Sequence[Line]]) -> list[Line]:
        return [line for index in range(len(self.sources)) for line in make(index)]

    def rewards(self) -> Chart:
        def of(index: int) -> list[Line]:
            logged = self.sources[index].logged(REWARD)
            mean = Curve(logged.steps, _running_mean(logged.values))
            lines = self._line(index, 0, "each update", logged, faint=True) if not self.several else []
            lines += self._line(index, 0, f"mean over {_WINDOW} updates", mean)
            return lines + self._evaluated(index, 1, REWARD, "on the fixed evaluation prompts")

        about = "What is trained on. That it rises says nothing of whether the pictures got better."
        return Chart("Trained reward", about, self._every(of), marks=self.marks)

    def held_out(self) -> list[Chart]:
        names = list(dict.fromkeys(n for source in self.sources for n in source.values if n.startswith(HELD_OUT)))
        charts = []
        for name in names:
            shown = name.removeprefix(HELD_OUT)
            about = (
                "Never trained on. Where it falls while the trained reward rises, the reward is being hacked. The band "
                "is a 95 % interval over the evaluation's pictures."
            )
            over = self._every(lambda index, name=name: self._evaluated(index, 0, name, ""))
            charts.append(Chart(f"Held out: {shown}", about, over, marks=self.marks))
            against = self._every(lambda index, name=name: self._against(index, name))
            about = (
                "The same against the trained reward, from left to right as training went on: at equal trained reward, "
                "higher is better; a curve that turns down has begun to hack."
            )
            charts.append(Chart(f"{shown} against the trained reward", about, against, REWARD, shown))
        return charts

    def _against(self, index: int, name: str) -> list[Line]:
        pairs = [(v[REWARD], v[name]) for v in self.sources[index].evaluations.values() if REWARD in v and name in v]
        return self._line(index, 0, "", Curve([x for x, _ in pairs], [y for _, y in pairs]), points=True)

    def agreement(self) -> Chart:
        prefix, error = "agreement/", "agreement_error/"

        def of(index: int) -> list[Line]:
            source, lines = self.sources[index], []
            for number, name in enumerate(name for name in source.names if name.startswith(prefix)):
                judge = name.removeprefix(prefix)
                curve = source.logged(name)
                errors = dict(zip(*(lambda c: (c.steps, c.values))(source.logged(error + judge))))
                half = [_Z95 * errors.get(step, math.nan) for step in curve.steps]
                half = half if all(map(math.isfinite, half)) and len(half) <= _MOST_POINTS else []
                lines += self._line(index, number, judge, curve, half=half, points=len(curve.steps) <= _FEW)
            return lines

        about = (
            "Cosine of the update's gradient with that of each judge, a reward that is not trained on. Below 0 the "
            "next update makes the pictures worse by that judge: the earliest sign of hacking that is known."
        )
        return Chart(AGREEMENT, about, self._every(of), marks=self.marks)

    def sharpness(self) -> Chart:
        def of(index: int) -> list[Line]:
            logged = self.sources[index].logged(S1)
            mean = Curve(logged.steps, _running_mean(logged.values))
            lines = self._line(index, 0, f"of the updates, mean over {_WINDOW}", mean)
            return lines + self._evaluated(index, 1, S1, "of the evaluation's pictures")

        about = (
            "How much the reward falls at the worst picture nearby. High: the reward can be climbed by changes that "
            "hardly show. Low is no proof: what is trained with smoothing hides in flat places."
        )
        return Chart("Sharpness S1", about, self._every(of), marks=self.marks)

    def statistics(self) -> list[str]:
        """Names of what was evaluated beside rewards, S1 and agreement, which have charts of their own."""
        names = dict.fromkeys(name for source in self.sources for name in source.values)
        own = (HELD_OUT, "agreement/", "agreement_error/")
        return [n for n in names if n not in (REWARD, S1, "prediction_norm_base") and not n.startswith(own)]

    def evaluation(self, name: str) -> Chart:
        def of(index: int) -> list[Line]:
            lines = self._evaluated(index, 0, name, "")
            if name == "prediction_norm":
                lines += self._evaluated(index, 1, "prediction_norm_base", "the untrained model's")
            return lines

        return Chart(name, ABOUT.get(name, ""), self._every(of), marks=self.marks)

    def metric(self, name: str, title: str, about: str) -> Chart:
        lines = self._every(lambda index: self._line(index, 0, "", self.sources[index].logged(name)))
        return Chart(title, about, lines)


def charts_of_bands(panels: Mapping[str, Sequence[BandPanel]]) -> dict[str, list[Chart]]:
    """Turn an experiment's bands over seeds into charts, by heading."""
    return {heading: [_chart_of(panel) for panel in own] for heading, own in panels.items()}


def _chart_of(panel: BandPanel) -> Chart:
    lines = []
    for index, (label, band) in enumerate(panel.bands.items()):
        half = band.half if all(map(math.isfinite, band.half)) else ()  # of one seed there is no interval
        lines.append(Line(label, band.x, band.y, half, index % COLOURS, index // COLOURS, points=True))
    title = panel.y if panel.x == UPDATES else f"{panel.y} against {panel.x}"
    return Chart(title, f"{panel.title}: means over seeds, with 95 % intervals.", lines, panel.x, panel.y)


def _running_mean(values: Sequence[float]) -> list[float]:
    sums, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - _WINDOW] if index >= _WINDOW else 0.0)
        sums.append(total / min(index + 1, _WINDOW))
    return sums


def _thinned(curve: Curve) -> Curve:
    """Keep at most `_MOST_POINTS` points, the last one among them."""
    stride = -(-len(curve.steps) // _MOST_POINTS)
    places = list(range(len(curve.steps) - 1, -1, -stride))[::-1]
    return Curve([curve.steps[i] for i in places], [curve.values[i] for i in places])
