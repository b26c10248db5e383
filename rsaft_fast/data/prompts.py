"""Prompts: sets by name or from files."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rsaft_fast.data.prompt_sets import SETS, named_set, set_files
from rsaft_fast.errors import UserError
from rsaft_fast.paths import require_text
from rsaft_fast.progress import watched
from rsaft_fast.reading import open_regular, read_text
from rsaft_fast.settings import LONGEST_TEXT

PLAYGROUND, COUNTING = "playground", "playground-counting"
STARTER = "starter"
# Names of the prompt column in the public sets (PartiPrompts, GenEval, DrawBench, HPDv2), in order of preference.
COLUMNS = ("prompt", "prompts", "text", "caption")
MAX_FILE_BYTES = 256 * 2**20
# Of a parquet file, whose bytes do not tell: a million equal rows take a few hundred.
MAX_ROWS = 10_000_000
WHAT = "prompt file"

# (where it stands, text as read) for each prompt of a file.
Found = Iterator[tuple[str, Any]]


def load_prompts(source: str | Path, column: str | None = None, held_out: bool = False) -> list[str]:
    """Load the prompts of a published set, of a UTF-8 file, or those that ship with the package.

    In order, duplicates kept.

    Args:
        source: a name of `prompt_sets.SETS` (from the hub's cache or the hub), NAME=PATH for a set that lies here, or
            a file: .txt (one prompt a line, empty lines skipped), .csv or .tsv (with a header, and every row as many
            fields), .json (a list of strings or objects, or an object whose `column` is such a list), .jsonl (a string
            or an object a line), or .parquet (needs pyarrow); or "playground", the scenes that its
            pipeline is trained on, "playground-counting", those of one or two objects of a kind, or "starter", varied
            ones for real models.
        held_out: of the playground, the scenes that it is judged on; of the counting ones, three or four objects.
        column: header or key of the prompt; without it the first of `COLUMNS` that is there, in any case. Objects all
            have the key that the first one has.

    Raises:
        UserError: no such set or file, a hub that cannot be reached, another format, text that is not UTF-8, a row
            that does not fit the header, no such column or several, a prompt that `checked_prompt` refuses, or none.
    """
    if str(source) == PLAYGROUND:
        from rsaft_fast import playground

        return playground.eval_prompts() if held_out else playground.train_prompts()
    if str(source) == COUNTING:
        from rsaft_fast import playground

        return playground.counting_prompts(held_out)
    if str(source) == STARTER:
        return _from_file(Path(str(resources.files("rsaft_fast.recipes") / f"{STARTER}.txt")), column, STARTER)
    if (named := named_set(str(source))) is not None:
        return _from_set(*named, column)
    return _from_file(Path(source), column, str(source))


def _from_set(name: str, path: str, column: str | None) -> list[str]:
    wanted, files = SETS[name], set_files(name, path)
    if wanted.one_a_file and not os.path.isfile(path):
        return [
            checked_prompt(read_text(file, WHAT, MAX_FILE_BYTES), f"prompt file {str(file)!r}")
            for file in watched(files, f"reading {name}", len(files), "file")
        ]
    return [prompt for file in files for prompt in _from_file(file, column or wanted.column, str(file))]


def _nearest_set(source: str) -> str:
    near = difflib.get_close_matches(source.partition("=")[0], (PLAYGROUND, COUNTING, STARTER, *SETS), 1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def _from_file(path: Path, column: str | None, source: str) -> list[str]:
    ending = path.suffix.lower()
    if not os.path.exists(path) and (hint := _nearest_set(source)):
        raise UserError(f"there is no prompt file {source!r}{hint}")
    if ending == ".parquet":
        found = _from_parquet(path, column)
    elif ending in READERS:
        found = READERS[ending](path, read_text(path, WHAT, MAX_FILE_BYTES), column)
    else:
        endings = ", ".join((*READERS, ".parquet"))
        raise UserError(
            f"prompt file {source!r}: the ending must be one of {endings}, or give {STARTER}, {PLAYGROUND}, one of "
            f"the sets {', '.join(SETS)}, or NAME=PATH for a set that lies here"
        )
    prompts = [checked_prompt(text, f"prompt file {str(path)!r}, {place}") for place, text in found]
    if not prompts:
        raise UserError(f"prompt file {str(path)!r} holds no prompt; give at least one")
    return prompts


def checked_prompt(text: Any, where: str) -> str:
    """Check a prompt or caption, and strip blanks and byte-order marks at its ends.

    Args:
        text: as it was found.
        where: that, for messages.

    Raises:
        UserError: no string, an empty one, one of more than `LONGEST_TEXT`, or with characters that no text has.
    """
    if not isinstance(text, str):
        raise UserError(f"{where}: the prompt is a {type(text).__name__}; it must be a string")
    # Files that were joined leave their marks in front of lines.
    text = text.strip().strip("\ufeff").strip()
    if not text:
        raise UserError(f"{where}: the prompt is empty; fill it in or remove the entry")
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{where}: the prompt has {len(text)} characters; the limit is {LONGEST_TEXT}")
    try:
        require_text(text)
    except ValueError as error:
        raise UserError(f"{where}: in the prompt, {error}") from error
    return text


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Give the lines that are not empty.

    Only newlines end one: a prompt may hold other separators.
    """
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line.strip():
            yield f"line {number}", line


def _from_txt(path: Path, text: str, column: str | None) -> Found:
    if column is not None:
        raise UserError(f"prompt file {str(path)!r} is plain text and has no column {column!r}; leave the column out")
    yield from _lines(text)


def _from_csv(path: Path, text: str, column: str | None) -> Found:
    return _from_table(path, _rows(path, text), column)


def _from_tsv(path: Path, text: str, column: str | None) -> Found:
    # Published tab-separated sets quote nothing: a quotation mark belongs to the prompt. Programs that write tables
    # quote the cells that hold one, a comma or a line's end, whole.
    rows = list(_rows(path, text, delimiter="\t", quoting=csv.QUOTE_NONE))
    cells = [cell for _, row in rows for cell in row]
    if any(_is_quoted(cell) for cell in cells) or _hold_lines(cells):
        return _from_table(path, _rows(path, text, delimiter="\t"), column)
    return _from_table(path, iter(rows), column)


def _is_quoted(cell: str) -> bool:
    """Tell whether text is quoted as programs do it: with quotation marks inside doubled, or for a comma's sake."""
    inside = cell[1:-1]
    whole = len(cell) > 2 and cell[0] == cell[-1] == '"' and '"' not in inside.replace('""', "")
    return whole and ('""' in inside or "," in inside)


def _hold_lines(cells: Sequence[str]) -> bool:
    """Tell whether a cell opens a quotation mark that a later one closes: both are one cell, of several lines."""
    odd = [cell for cell in cells if cell.count('"') % 2]
    opened = next((index for index, cell in enumerate(odd) if cell.startswith('"')), len(odd))
    return any(cell.endswith('"') for cell in odd[opened + 1 :])


def _rows(path: Path, text: str, **dialect) -> Iterator[tuple[int, list[str]]]:
    """Give line number and fields of the rows that hold something."""
    # A quotation mark quotes behind the blank that follows a comma, too.
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True, **dialect)
    line = 1
    try:
        for row in rows:
            if any(field.strip() for field in row):
                yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"prompt file {str(path)!r}, line {rows.line_num}: {error}; mend the quoting") from error


def _from_table(path: Path, rows: Iterator[tuple[int, list[str]]], column: str | None) -> Found:
    _, header = next(rows, (0, []))
    if not header:
        return
    index = header.index(_column(path, header, column))
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(
                f"prompt file {str(path)!r}, line {line}: {len(row)} as number of fields, the header's is "
                f"{len(header)}: where the prompt ends cannot be told; put it in quotation marks, or save the prompts "
                "as .txt, one a line"
            )
        yield f"line {line}", row[index]


class _JSONObject(dict):
    """JSON object, and the keys that it has more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs) if len(self) < len(pairs) else {}
        self.names = [*self, *(key for key, count in counts.items() if count > 1)]


def _from_json(path: Path, text: str, column: str | None) -> Found:
    content = _parse(path, "", text) if text.strip() else []
    if isinstance(content, _JSONObject):
        content, column = content[_column(path, content.names, column)], None
    if not isinstance(content, list):
        raise UserError(f"prompt file {str(path)!r} holds a {type(content).__name__}; expected a list of prompts")
    yield from _of_entries(path, ((f"entry {number}", entry) for number, entry in enumerate(content, 1)), column)


def _from_jsonl(path: Path, text: str, column: str | None) -> Found:
    return _of_entries(path, json_lines(path, text), column)


def json_lines(path: Path, text: str) -> Found:
    """Parse the lines of a .jsonl, each with where it stands; empty ones are left out.

    Raises:
        UserError: a line is not JSON.
    """
    for place, line in _lines(text):
        yield place, _parse(path, f", {place}", line)


def _of_entries(path: Path, entries: Found, column: str | None) -> Found:
    """Give the prompts of strings or objects; the first object says which of its keys holds those of all."""
    key = None
    for place, entry in entries:
        if not isinstance(entry, _JSONObject):
            if column is not None:
                raise UserError(
                    f"prompt file {str(path)!r}, {place} is a {type(entry).__name__} and has no column {column!r}; "
                    "leave the column out"
                )
            yield place, entry
            continue
        if key is None:
            key = _column(path, entry.names, column)
        elif entry.names.count(key) != 1:
            # Another key that might do would be another column.
            _column(path, entry.names, key, f", {place}")
        yield place, entry[key]


def _from_parquet(path: Path, column: str | None) -> Found:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"prompt file {str(path)!r} needs pyarrow to be read: pip install pyarrow") from error
    with open_regular(path, WHAT) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream)
            name = _column(path, file.schema_arrow.names, column)
            if file.metadata.num_rows > MAX_ROWS:
                raise UserError(
                    f"prompt file {str(path)!r} has {file.metadata.num_rows} rows; the limit is {MAX_ROWS}: split it"
                )
            values = file.read(columns=[name]).column(name).to_pylist()
        except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
            raise UserError(f"prompt file {str(path)!r} cannot be read as parquet ({error}); export it anew") from error
    for number, value in enumerate(values, 1):
        yield f"row {number}", value


def _parse(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_JSONObject)
    except (ValueError, RecursionError) as error:
        raise UserError(f"prompt file {str(path)!r}{place} is not JSON ({error}); mend or re-export it") from error


def _column(path: Path, names: Sequence[str], column: str | None, place: str = "") -> str:
    """Choose the one of `names` that holds the prompts."""
    for known in COLUMNS if column is None else (column,):
        if column is None:
            found = [name for name in names if name.strip().casefold() == known]
        else:
            found = [name for name in names if name == known] or [name for name in names if name.strip() == known]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"prompt file {str(path)!r}{place} has {len(found)} columns {', '.join(map(repr, found))}; which one "
                "holds the prompts cannot be told: rename the others"
            )
    wanted = f"none of the columns {', '.join(COLUMNS)}" if column is None else f"no column {column!r}"
    shown = ", ".join(repr(name) for name in names[:8]) or "none"
    raise UserError(f"prompt file {str(path)!r}{place} has {wanted}; it has {shown}: name the prompts' column")


READERS: dict[str, Callable[[Path, str, str | None], Found]] = {
    ".txt": _from_txt,
    ".csv": _from_csv,
    ".tsv": _from_tsv,
    ".json": _from_json,
    ".jsonl": _from_jsonl,
}


def first_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """Give `count` prompts, from the start again where there are fewer."""
    return [prompts[i % len(prompts)] for i in range(count)]
