"""The figures of the passes (`bench`), and what follows from them: for the terminal and the README."""

from __future__ import annotations

from collections.abc import Iterator

from rsaft_fast.benchmarks.providers import EAGER, IMAGE_PASS, OURS, PROVIDERS
from rsaft_fast.benchmarks.results import Row
from rsaft_fast.benchmarks.shapes import LAYOUTS, PASSES, floor
from rsaft_fast.benchmarks.tables import NONE, Table, gib, machine_line, milliseconds, number, percent, table
from rsaft_fast.benchmarks.tables import terminal as as_text
from rsaft_fast.figures.tables import markdown

RANK = {name: place for place, name in enumerate((*PROVIDERS, EAGER))}
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
NOTHING = (
    "No GPU figures have been recorded yet. `rsaft-fast bench --results benchmarks/results` measures this machine;\n"
    "`benchmarks/gpu_suite.sh OUT` builds and tests it within 9 minutes, and `benchmarks/gpu_suite.sh OUT benchmarks`\n"
    "measures within another 9."
)
README_CASES = ("sdxl-full", "sdxl-lora32", "flux1-full", "flux1-lora32")
README_PEERS = ("usual-fused", "foreach", "bitsandbytes", "pytorch_optimizer", "torchao", "optimi")


class View:
    """Rows of a run by what they are."""

    def __init__(self, results: Row):
        self.results = results
        self.rows: list[Row] = results["rows"]
        self._found = {(r["what"], r["case"], r["dtype"], r["provider"]): r for r in self.rows if "missing" not in r}

    def get(self, what: str, case: str, dtype: str, provider: str) -> Row | None:
        """The row, if it was measured."""
        return self._found.get((what, case, dtype, provider))

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
        for r in self._found.values():
            groups.setdefault((r["case"], r["dtype"], r["what"]), []).append(r)
        for key, rows in groups.items():
            yield *key, sorted(rows, key=lambda r: RANK.get(r["provider"], len(RANK)))  # of an older run: last


def terminal(results: Row) -> str:
    """All figures of a run, a table for each pass."""
    view = View(results)
    rates = (f"{kind} {results[f'{kind}_gbps']:,.0f} GB/s ({results[f'{kind}_way']})" for kind in ("copy", "read"))
    head = [f"the card's own bandwidth in this run: {', '.join(rates)}"]
    notes = {f"{r['provider']}, {r['dtype']}: {r['note']}": None for r in view.rows if r.get("note")}
    missing: dict[tuple[str, str], dict[str, None]] = {}
    for r in view.rows:
        if "missing" in r:
            missing.setdefault((r["provider"], r["missing"]), {})[f"{r['case']} {r['dtype']}"] = None
    lists = {
        "notes": list(notes),
        "missing": [f"{provider} ({', '.join(where)}): {why}" for (provider, why), where in missing.items()],
        "left out, the budget being spent": results.get("left_out", []),
    }
    return as_text(results, head, (_measured(view, *group) for group in view.groups()), lists)


def section(results: Row | None) -> str:
    """The README's section in Markdown: how the card was, our passes beside the usual loop, the update beside peers."""
    if results is None:
        return f"## Speed\n\n{NOTHING}"
    copy, read = results["copy_gbps"], results["read_gbps"]
    head = (
        f"{machine_line(results)}.\n"
        f"In the same run the card copies {copy:,.0f} GB/s and reads {read:,.0f} GB/s.\n"
        "*Of copy* is what a pass reaches of it with the bytes that it must move; peers are shown as time over ours.\n"
        "How it is measured: `benchmarks/README.md`."
    )
    note, view = f"**{results['note']}.**" if results.get("note") else "", View(results)
    blocks = ["## Speed", head, note, _passes(view), _updates(view), _images(view)]
    return "\n\n".join(block for block in blocks if block)


def _measured(view: View, case: str, dtype: str, what: str, rows: list[Row]) -> Table:
    """A pass of a list, without the columns that nobody has (launches and memory, on the CPU)."""
    of, first = "read" if what == "norm" else "copy", rows[0]
    kind = f"parameters in {first['tensors']:,} tensors" if "tensors" in first else "elements"
    least = f", floor {floor(what, dtype):.4g} bytes a parameter" if what in PASSES and dtype in LAYOUTS else ""
    columns = {
        "provider": lambda r: r["provider"],
        "ms": lambda r: milliseconds(r["ms_p50"]),
        "p20 to p80": lambda r: f"{milliseconds(r['ms_p20'])} to {milliseconds(r['ms_p80'])}",
        "GB/s": lambda r: number(r.get("gbps"), ",.0f"),
        f"of {of}": lambda r: percent(r.get(f"fraction_of_{of}")),
        "time/ours": lambda r: number(view.times_ours(r)),
        "launches": lambda r: number(r.get("launches"), ","),
        "copies": lambda r: number(r.get("copies"), ","),
        "extra, GiB": lambda r: gib(r.get("extra_bytes")),
        "held, GiB": lambda r: gib(r.get("held_bytes")),
    }
    columns = {name: cell for name, cell in columns.items() if {cell(r) for r in rows} != {NONE}}
    return table(f"{case}, {dtype}: {first['parameters']:,} {kind}: {LABELS[what]}{least}", rows, columns)


def _passes(view: View) -> str:
    columns = "list, layout: pass|bytes a parameter|ours, ms|of copy|launches|usual loop, ms|launches"
    rows = []
    for case, dtype, what, _ in view.groups():
        ours = view.ours(what, case, dtype)
        if what in PASSES and case in README_CASES and ours is not None:
            usual = view.get(what, case, dtype, "usual-fused") or view.get(what, case, dtype, "bitsandbytes")
            of_read = what == "norm"
            reached = percent(ours["fraction_of_read" if of_read else "fraction_of_copy"]) + " (of read)" * of_read
            cells = (f"{floor(what, dtype):.4g}", milliseconds(ours["ms_p50"]), reached, _launched(ours))
            peer = milliseconds(usual["ms_p50"]) if usual else NONE
            rows.append((f"{case}, {dtype}: {LABELS[what]}", *cells, peer, _launched(usual)))
    return markdown(columns.split("|"), rows) if rows else ""


def _updates(view: View) -> str:
    pairs = [(case, dtype) for case, dtype, what, _ in view.groups() if what == "update" and case in README_CASES]
    rows = [(name, *(_times(view, "update", *pair, name) for pair in pairs)) for name in README_PEERS]
    rows = [row for row in rows if set(row[1:]) - {NONE}]
    return markdown(("whole update, time over ours", *map(", ".join, pairs)), rows) if rows else ""


def _images(view: View) -> str:
    rows = []
    for case, dtype, what, _ in view.groups():
        ours = view.ours(what, case, dtype)
        if what == IMAGE_PASS and ours is not None:
            cells = (milliseconds(ours["ms_p50"]), percent(ours["fraction_of_copy"]))
            rows.append((f"{case}, {dtype}", *cells, _times(view, IMAGE_PASS, case, dtype, EAGER)))
    return markdown(("image perturbation", "ours, ms", "of copy", "eager torch, time over ours"), rows) if rows else ""


def _times(view: View, *place: str) -> str:
    return number(view.times_ours(view.get(*place)))


def _launched(row: Row | None) -> str:
    counted = row is not None and row.get("launches") is not None
    return f"{row['launches'] + row['copies']:,}" if counted else NONE
