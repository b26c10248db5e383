"""Tables in plain text and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rsaft_fast.errors import UserError

# A quantity of one run, before and after.
Change = tuple[float, float]


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return a line for each row, its cells padded to the width of their column.

    Args:
        rows: cells, as many in each row; at least one row.
        left: how many of the first columns begin at their left edge; the others end at their right edge.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def summary_table(runs: Mapping[str, Mapping[str, Change]], decimals: int = 3) -> str:
    """Write aligned plain text: a row for each run; for each quantity its value before, after, and the change.

    Args:
        runs: run label to quantity ("proxy reward", "true preference r*", "S1") to (before, after). A quantity that
            a run lacks, or a value that is not finite, is shown as "-".
        decimals: digits behind the point.

    Raises:
        UserError: no run.
    """
    if not runs:
        raise UserError("a summary table of no runs; give at least one")
    quantities = list(dict.fromkeys(name for changes in runs.values() for name in changes))
    lacking = (math.nan, math.nan)
    rows = [
        [label, *(cell for name in quantities for cell in _cells(changes.get(name, lacking), decimals))]
        for label, changes in runs.items()
    ]
    head = ["run", *(part for _ in quantities for part in ("before", "after", "change"))]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    # A quantity's name stands over its three columns, which widen to hold it.
    for i, name in enumerate(quantities):
        first = 1 + 3 * i
        widths[first] += max(0, len(name) - sum(widths[first : first + 3]) - 4)
    names = [" " * widths[0]]
    names += [name.ljust(sum(widths[1 + 3 * i : 4 + 3 * i]) + 4) for i, name in enumerate(quantities)]
    lines = [_SEPARATOR.join(names), _line(head, widths)]
    lines.append("-" * len(lines[1]))
    lines += [_line(row, widths) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


_SEPARATOR = "   "


def _cells(change: Change, decimals: int) -> list[str]:
    before, after = change
    texts = [f"{before:.{decimals}f}", f"{after:.{decimals}f}", f"{after - before:+.{decimals}f}"]
    return [text if math.isfinite(float(text)) else "-" for text in texts]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    label = row[0].ljust(widths[0])
    cells = [text.rjust(width) for text, width in zip(row[1:], widths[1:])]
    groups = ["  ".join(cells[i : i + 3]) for i in range(0, len(cells), 3)]
    return _SEPARATOR.join([label, *groups])
