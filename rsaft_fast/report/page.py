"""The report: one HTML file for a run, several runs, or an experiment, which holds all that it shows."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rsaft_fast import __version__
from rsaft_fast.files import write_atomically
from rsaft_fast.report.charts import Chart, charts_of
from rsaft_fast.report.drawing import colour_of, dash_of, data_of, runtime, runtime_name, still
from rsaft_fast.report.pictures import BEFORE, Gallery, data_address, gallery
from rsaft_fast.report.sources import BEST, HELD_OUT, REWARD, S1, Source, read_run, shown_name

REPORT = "report.html"
"""Of a run folder: its report."""

NONE = "-"
_SVG_DASHES = {"solid": "", "dashed": "6 4", "dotted": "2 4", "dashdot": "6 4 2 4"}
_NO_SCRIPTS = ("What was learned",)
"""Headings whose charts are also there as pictures; drawing more would take seconds."""

_CLOSED = ("Training in detail",)


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        name: of its place in the page.
        title: over it.
        head, rows: cells, as text.
        about: a sentence under the title.
        left: how many of the first columns hold names.
        closed: whether it has to be opened to be seen.
    """

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    about: str = ""
    left: int = 1
    closed: bool = False


def write_run_report(folder: Path) -> list[str]:
    """Write a run's report into its folder.

    Returns:
        a line for the user: where the page is.

    Raises:
        UserError, OSError: the run cannot be read, or the report not be written.
    """
    source = read_run(folder)
    path = folder / REPORT
    write_atomically(path, report_of([source], f"Fine-tuning run {source.label}"))
    return [f"all of it on one page: {path}"]


def report_of(sources: Sequence[Source], title: str, lines: Sequence[str] = ()) -> str:
    """Make the report of runs.

    Args:
        sources: at least one.
        title: of the page.
        lines: what is said below it.

    Returns:
        HTML, whole.
    """
    several = len(sources) > 1
    alarms = [
        {"where": f"{source.label}, " if several else "", "step": alarm.step, "what": alarm.what, "text": alarm.text}
        for source in sources
        for alarm in source.alarms
    ]
    told = f"{len(sources)} runs" if several else str(sources[0].folder)
    kept = [
        f"{f'{source.label}: ' if several else ''}best by {shown_name(best.score)}: {best.value:.4g} after update "
        f"{best.step}; that model is in {source.folder / BEST}"
        for source in sources
        if (best := source.best) is not None
    ]
    return render(
        title=title,
        subtitle=f"{told}; last update {max(source.last_step for source in sources)}; {now()}",
        lines=[*lines, *kept],
        charts=charts_of(sources),
        tables=[t for t in (_summary(sources), *_evaluations(sources)) if t.rows],
        pictures=gallery({source.label: source.grids for source in sources}),
        alarms=alarms,
        phases=[_phases(source, several) for source in sources if source.facts.seconds],
        configs=[
            {"label": source.label, "text": source.config, "software": _software(source)}
            for source in sources
            if source.config
        ],
    )


def render(
    *,
    title: str,
    subtitle: str,
    lines: Sequence[str],
    charts: Mapping[str, Sequence[Chart]],
    tables: Sequence[Table],
    pictures: Gallery | None = None,
    alarms: Sequence[Mapping[str, Any]] = (),
    phases: Sequence[Mapping[str, Any]] = (),
    configs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Put a page together."""
    data, sections = {}, []
    for number, (name, own) in enumerate(charts.items()):
        places = [(f"chart-{number}-{index}", chart) for index, chart in enumerate(own)]
        data |= {place: data_of(chart) for place, chart in places}
        drawn = name in _NO_SCRIPTS or name not in _STANDARD
        sections.append(
            {
                "id": f"charts-{number}",
                "name": name,
                "closed": name in _CLOSED,
                "still": data_address(still(own), "image/png") if drawn else None,
                "charts": [
                    {
                        "id": place,
                        "title": chart.title,
                        "about": chart.about,
                        "described": _described(chart),
                        "legend": _legend(chart),
                    }
                    for place, chart in places
                ],
            }
        )
    shown = _Shown(pictures) if pictures else None
    parts = [("alarms", "Alarms")] if alarms else []
    parts += [(table.name, table.title) for table in tables if not table.closed]
    named = [(section["id"], section["name"]) for section in sections]
    parts += [*named[:1], *([("pictures", "Pictures")] if shown else []), *named[1:]]
    parts += [(table.name, "Every evaluation") for table in tables if table.closed][:1]
    parts += [("time", "Time and memory")] if phases else []
    parts += [("config", "Recipe and versions")] if configs else []
    return render_template(
        "report.html",
        title=title,
        subtitle=subtitle,
        contents=[{"id": place, "name": name} for place, name in parts],
        alarms=alarms,
        lines=lines,
        tables=[{"id": t.name, **vars(t)} for t in tables],
        gallery=shown,
        sections=sections,
        phases=phases,
        configs=configs,
        version=__version__,
        runtime_name=runtime_name(),
        css=Markup(page_file("page.css")),
        chart_data=data,
        gallery_data=shown.data if shown else {},
        scripts=[script(text) for text in (*(runtime() if data else []), page_file("report.js"))],
    )


_STANDARD = ("What was learned", "Pictures and weights", "Speed", "Training in detail")


class _Shown:
    """A gallery as the template wants it: what is seen first in the page itself, the rest as data for the slider."""

    def __init__(self, pictures: Gallery):
        self.steps, self.prompts = list(pictures.steps), list(pictures.prompts)
        self.pixelated, self.left_out, self.size = pictures.pixelated, pictures.left_out, pictures.size
        newest = {label: max(own) for label, own in pictures.columns.items()}
        self.cells = [
            [{"label": label, "src": own[newest[label]][row]} for label, own in pictures.columns.items()]
            for row in range(len(self.prompts))
        ]
        rest = {
            label: {step: images for step, images in own.items() if step != newest[label]}
            for label, own in pictures.columns.items()
        }
        self.data = {
            "before": BEFORE,
            "steps": self.steps,
            "columns": rest,
            "shown": {label: self.steps.index(step) for label, step in newest.items()},
        }


def render_template(name: str, **values: Any) -> str:
    """Fill a template of pages/; `json` in it writes what may stand in a script element."""
    environment = Environment(
        loader=PackageLoader("rsaft_fast.report", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = _as_json
    return environment.get_template(name).render(**values)


def page_file(name: str) -> str:
    """Read what stands beside the templates."""
    return (resources.files("rsaft_fast.report") / "pages" / name).read_text(encoding="utf-8")


def _as_json(content: Any) -> Markup:
    """Write JSON in which no text can end the script element around it."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def script(text: str) -> Markup:
    """Mark our own, or a library's, code as what a script element holds."""
    return Markup(text.replace("</script", "<\\/script"))


def _legend(chart: Chart) -> list[dict[str, Any]]:
    keys = [
        {"label": one.label, "colour": colour_of(one), "dashes": _SVG_DASHES[dash_of(one)], "faint": one.faint}
        for one in chart.lines
    ]
    return keys if chart.keyed else []


def _described(chart: Chart) -> str:
    """Say a chart in words, for whoever cannot see it."""
    ends = [f"{one.label} from {one.y[0]:.4g} to {one.y[-1]:.4g}" for one in chart.lines if one.y and not one.faint]
    return f"{chart.title} over {chart.x_label}: {', '.join(ends)}"


def _summary(sources: Sequence[Source]) -> Table:
    """What each run changed; of a held-out reward also its best value, and where."""
    rows = []
    for source in sources:
        where = [source.label] if len(sources) > 1 else []
        for name in [n for n in source.values if n in (REWARD, S1) or n.startswith(HELD_OUT)]:
            curve = source.evaluated(name)
            first, last = curve.values[0], curve.values[-1]
            cells = [shown_name(name), f"{first:.4g}", f"{last:.4g}", f"{last - first:+.4g}"]
            best = max(range(len(curve.values)), key=curve.values.__getitem__)
            is_held_out = name.startswith(HELD_OUT)
            cells += [f"{curve.values[best]:.4g} at {curve.steps[best]}" if is_held_out else NONE]
            rows.append([*where, *cells])
        if not source.evaluations:
            for name, (first, last) in source.changes().items():
                rows.append([*where, name, f"{first:.4g}", f"{last:.4g}", f"{last - first:+.4g}", NONE])
    head = (*(["run"] if len(sources) > 1 else []), "quantity", "before", "after", "change", "best")
    return Table("summary", "Before and after", head, rows, left=len(head) - 4)


def _evaluations(sources: Sequence[Source]) -> list[Table]:
    tables = []
    for number, source in enumerate(sources):
        names = source.values
        rows = [
            [str(step), *(f"{values[name]:.4g}" if name in values else NONE for name in names)]
            for step, values in source.evaluations.items()
        ]
        where = f" of {source.label}" if len(sources) > 1 else ""
        head = ("update", *map(shown_name, names))
        tables.append(Table(f"values-{number}", f"Every evaluation{where}", head, rows, closed=True))
    return tables


def _phases(source: Source, several: bool) -> dict[str, Any]:
    facts = source.facts
    total = sum(facts.seconds.values()) or 1.0
    peak = f"; peak memory {facts.peak / 2**30:.2f} GiB{'' if facts.peaks else ' of the process'}" if facts.peak else ""
    return {
        "label": source.label if several else "",
        "told": f"{total:.0f} s on {facts.device}{peak}",
        "peaks": bool(facts.peaks),
        "rows": [
            {
                "name": name,
                "seconds": f"{seconds:.1f}",
                "share": f"{100 * seconds / total:.0f}",
                "peak": f"{facts.peaks[name] / 2**30:.2f}" if name in facts.peaks else NONE,
            }
            for name, seconds in sorted(facts.seconds.items(), key=lambda item: -item[1])
        ],
    }


def _software(source: Source) -> str:
    return ", ".join(f"{name} {version}" for name, version in source.facts.software.items()) or "versions not recorded"


def now() -> str:
    """Return the time of day, as pages say when they were made."""
    return time.strftime("%Y-%m-%d %H:%M")
