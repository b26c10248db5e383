"""The figures of a run of passes as text: for the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rsaft_fast.benchmarks.floors import LAYOUTS, PASSES, floor
from rsaft_fast.benchmarks.providers import EAGER, IMAGE_PASS, OURS, PROVIDERS
from rsaft_fast.benchmarks.results import Row
from rsaft_fast.figures.tables import aligned

ORDER = (*PROVIDERS, EAGER)
NONE = "-"
LABELS = {
    "norm": "global norm",
    "perturb": "perturb",
    "step": "restore + AdamW",
    "update": "whole update",
    IMAGE_PASS: "image perturbation",
    "host-static": "host time of an update, gradients stay (promised)",
    "host-checked": "host time of an update, gradients stay (checked)",
    "host-moved": "host time of an update, gradients move",
}


def rank(provider: str) -> int:
    """The provider's place in every table; unknown ones (of an older run) come last."""
    return ORDER.index(provider) if provider in ORDER else len(ORDER)


class View:
    """Rows of a run by what they are."""

    def __init__(self, results: Row):
        self.results = results
        self.rows: list[Row] = results["rows"]
        self._found = {(r["what"], r["case"], r["dtype"], r["provider"]): r for r in self.rows}

    def get(self, what: str, case: str, dtype: str, provider: str) -> Row | None:
        """The row, if it was measured."""
        row = self._found.get((what, case, dtype, provider))
        return None if row is None or "missing" in row else row

    def ours(self, what: str, case: str, dtype: str) -> Row | None:
        """Ours on the first backend that was measured."""
        return next((row for name in OURS if (row := self.get(what, case, dtype, name))), None)

    def times_ours(self, row: Row | None) -> float | None:
        """Time over the time of ours."""
        ours = row and self.ours(row["what"], row["case"], row["dtype"])
        return row["ms_p50"] / ours["ms_p50"] if ours else None

    def groups(self) -> Iterator[tuple[str, str, str, list[Row]]]:
        """(case, dtype, what) in the order of measuring, with its rows in the providers' order."""
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for r in self.rows:
            if "missing" not in r:
                groups.setdefault((r["case"], r["dtype"], r["what"]), []).append(r)
        for key, rows in groups.items():
            yield *key, sorted(rows, key=lambda r: rank(r["provider"]))

    def missing(self) -> dict[str, str]:
        """Provider and where, to the reason."""
        lists: dict[tuple[str, str], list[str]] = {}
        for r in self.rows:
            if "missing" in r:
                lists.setdefault((r["provider"], r["missing"]), []).append(f"{r['case']} {r['dtype']}")
        return {f"{provider} ({', '.join(dict.fromkeys(where))})": why for (provider, why), where in lists.items()}


def terminal(results: Row) -> str:
    """All figures of a run, one block for each pass."""
    view, shown = View(results), None
    rates = (f"{kind} {results[f'{kind}_gbps']:,.0f} GB/s ({results[f'{kind}_way']})" for kind in ("copy", "read"))
    lines = [machine_line(results), f"the card's own bandwidth in this run: {', '.join(rates)}"]
    for case, dtype, what, rows in view.groups():
        if (case, dtype) != shown:
            shown, first = (case, dtype), rows[0]
            kind = f"parameters in {first['tensors']:,} tensors" if "tensors" in first else "elements"
            lines += ["", f"{case}, {dtype}: {first['parameters']:,} {kind}"]
        known = what in PASSES and dtype in LAYOUTS
        least = f", floor {floor(what, dtype):.4g} bytes a parameter" if known else ""
        lines += [f"  {LABELS[what]}{least}", *("    " + line for line in aligned(_columns(view, what, rows)))]
    notes = {(r["provider"], r["dtype"]): r["note"] for r in view.rows if r.get("note")}
    sections = {
        "notes": [f"{provider}, {dtype}: {note}" for (provider, dtype), note in notes.items()],
        "missing": [f"{name}: {why}" for name, why in view.missing().items()],
        "left out, the budget being spent": results.get("left_out", []),
    }
    for title, found in sections.items():
        lines += ["", f"{title}:", *(f"  {line}" for line in found)] if found else []
    return "\n".join(lines + (["", str(results["note"])] if results.get("note") else []))


def machine_line(results: Row) -> str:
    versions = [f"{name} {results[name]}" for name in ("driver", "torch", "triton") if results.get(name)]
    versions += [f"CUDA {results['cuda']}"] if results["cuda"] else []
    versions += [f"{name} {of}" for name, of in results.get("versions", {}).items() if of and name not in results]
    return f"{results['gpu']}: {', '.join(versions)}; commit {results['commit'] or 'unknown'}, {results['date']}"


def _columns(view: View, what: str, rows: Sequence[Row]) -> list[list[str]]:
    """Header and cells, without the columns that nobody has (launches and memory, on the CPU)."""
    of = "read" if what == "norm" else "copy"
    columns = {
        "provider": [r["provider"] for r in rows],
        "ms": [milliseconds(r["ms_p50"]) for r in rows],
        "p20 to p80": [f"{milliseconds(r['ms_p20'])} to {milliseconds(r['ms_p80'])}" for r in rows],
        "GB/s": [number(r.get("gbps"), ",.0f") for r in rows],
        f"of {of}": [percent(r.get(f"fraction_of_{of}")) for r in rows],
        "time/ours": [number(view.times_ours(r)) for r in rows],
        "launches": [number(r.get("launches"), ",") for r in rows],
        "copies": [number(r.get("copies"), ",") for r in rows],
        "extra": [size(r.get("extra_bytes")) for r in rows],
        "held": [size(r.get("held_bytes")) for r in rows],
    }
    kept = {name: cells for name, cells in columns.items() if set(cells) != {NONE}}
    return [list(kept), *map(list, zip(*kept.values()))]


def milliseconds(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.2f}"


def number(value: float | None, form: str = ".2f") -> str:
    """A figure, or a dash for None and NaN."""
    return NONE if value is None or value != value else f"{value:{form}}"


def percent(fraction: float | None) -> str:
    return NONE if fraction is None else number(100 * fraction, ".1f") + " %" * (fraction == fraction)


def size(count: int | None) -> str:
    """Bytes."""
    if count is None:
        return NONE
    factor, unit = next(((f, u) for f, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if abs(count) >= f), (1, "B"))
    return f"{count} B" if factor == 1 else f"{count / factor:.2f} {unit}"
