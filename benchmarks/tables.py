"""Tables of figures as text: for the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rsaft_fast.benchmarks.results import Row
from rsaft_fast.figures.tables import aligned

NONE = "-"
GIB = 2**30


class Table(NamedTuple):
    """What stands above it, its columns' names, and its rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def table(title: str, items: Iterable[Any], columns: Mapping[str, Callable[[Any], str]]) -> Table:
    """A row for each item: what each column says of it."""
    return Table(title, list(columns), [[cell(item) for cell in columns.values()] for item in items])


def terminal(results: Row, head: Sequence[str], tables: Iterable[Table], lists: Mapping[str, Sequence[str]]) -> str:
    """Some lines, tables, then lists of lines under their titles; what is empty is left out."""
    lines = [machine_line(results), *head]
    for title, header, rows in tables:
        lines += ["", title, *("  " + line for line in aligned([header, *rows]))]
    for title, said in lists.items():
        lines += ["", f"{title}:", *(f"  {line}" for line in said)] if said else []
    return "\n".join(lines + (["", str(results["note"])] if results.get("note") else []))


def machine_line(results: Row) -> str:
    versions = [f"{name} {results[name]}" for name in ("driver", "torch", "triton") if results.get(name)]
    versions += [f"CUDA {results['cuda']}"] if results["cuda"] else []
    versions += [f"{name} {of}" for name, of in results.get("versions", {}).items() if of and name not in results]
    return f"{results['gpu']}: {', '.join(versions)}; commit {results['commit'] or 'unknown'}, {results['date']}"


def number(value: float | None, form: str = ".2f") -> str:
    """A figure, or a dash for None and NaN."""
    return NONE if value is None or value != value else f"{value:{form}}"


def milliseconds(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.2f}"


def percent(fraction: float | None) -> str:
    return NONE if fraction is None else number(100 * fraction, ".1f") + " %" * (fraction == fraction)


def gib(size: float | None) -> str:
    return number(None if size is None else size / GIB, ".2f" if size and size >= GIB / 100 else ".5f")
