"""Prompt sets by name or from files."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.prompt_sets import SETS, named_set, set_files

PLAYGROUND = "playground"
# Names of the prompt column in the public sets (PartiPrompts, GenEval, DrawBench, HPDv2), in order of preference.
COLUMNS = ("prompt", "prompts", "text", "caption")
MAX_CHARACTERS = 10_000
MAX_FILE_BYTES = 256 * 2**20

# (where it stands, text as read) for each prompt of a file.
Found = Iterator[tuple[str, Any]]


def load_prompts(source: str | Path, column: str | None = None) -> list[str]:
    """The prompts of a published set or of a UTF-8 file in order, duplicates kept; or the playground's for training.

    Args:
        source: a name of `prompt_sets.SETS` (from the hub's cache or the hub), NAME=PATH for a set that lies here, or
            a file: .txt (one prompt a line, empty lines skipped), .csv or .tsv (with a header), .json (a list of
            strings or objects, or an object whose `column` is such a list), .jsonl (a string or an object a line), or
            .parquet (needs pyarrow); or "playground".
        column: header or key of the prompt; without it the first of `COLUMNS` that is there, in any case.

    Raises:
        UserError: no such set or file, a hub that cannot be reached, another format, text that is not UTF-8, no such
            column, a prompt that is empty, no string or longer than `MAX_CHARACTERS`, or no prompt at all.
    """
    if str(source) == PLAYGROUND:
        from rsaft_fast import playground

        return playground.train_prompts()
    if (named := named_set(str(source))) is not None:
        return [prompt for file in set_files(*named) for prompt in _from_file(file, column, str(file))]
    return _from_file(Path(source).expanduser(), column, str(source))


def _nearest_set(source: str) -> str:
    near = difflib.get_close_matches(source.partition("=")[0], (PLAYGROUND, *SETS), 1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def _from_file(path: Path, column: str | None, source: str) -> list[str]:
    ending = path.suffix.lower()
    if not path.exists() and (hint := _nearest_set(source)):
        raise UserError(f"there is no prompt file {source!r}{hint}")
    if ending == ".parquet":
        found = _from_parquet(path, column)
    elif ending in READERS:
        found = READERS[ending](path, _read(path), column)
    else:
        endings = ", ".join((*READERS, ".parquet"))
        raise UserError(
            f"prompt file {source!r}: the ending must be one of {endings}, or give playground, one of the sets "
            f"{', '.join(SETS)}, or NAME=PATH for a set that lies here"
        )
    prompts = [_checked(path, place, text) for place, text in found]
    if not prompts:
        raise UserError(f"prompt file {str(path)!r} holds no prompt; give at least one")
    return prompts


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"prompt file {str(path)!r} has {size} bytes; the limit is {MAX_FILE_BYTES}: split it")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"prompt file {str(path)!r} cannot be read ({error.strerror}); check the path") from error


def _checked(path: Path, place: str, text: Any) -> str:
    where = f"prompt file {str(path)!r}, {place}"
    if not isinstance(text, str):
        raise UserError(f"{where}: the prompt is a {type(text).__name__}; it must be a string")
    text = text.strip()
    if not text:
        raise UserError(f"{where}: the prompt is empty; fill it in or remove the entry")
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where}: the prompt has {len(text)} characters; the limit is {MAX_CHARACTERS}")
    return text


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Lines that are not empty. Only newlines end one: a prompt may hold other separators."""
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line.strip():
            yield f"line {number}", line


def _from_txt(path: Path, text: str, column: str | None) -> Found:
    if column is not None:
        raise UserError(f"prompt file {str(path)!r} is plain text and has no column {column!r}; leave the column out")
    yield from _lines(text)


def _from_table(path: Path, text: str, column: str | None, **dialect) -> Found:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    try:
        header = next(rows, [])
        index = header.index(_column(path, header, column)) if header else 0
        for row in rows:
            if any(field.strip() for field in row):
                yield f"line {rows.line_num}", row[index] if index < len(row) else ""
    except csv.Error as error:
        raise UserError(f"prompt file {str(path)!r}, line {rows.line_num}: {error}; mend the quoting") from error


def _from_csv(path: Path, text: str, column: str | None) -> Found:
    return _from_table(path, text, column)


def _from_tsv(path: Path, text: str, column: str | None) -> Found:
    # Tab-separated sets quote nothing: a quotation mark belongs to the prompt.
    return _from_table(path, text, column, delimiter="\t", quoting=csv.QUOTE_NONE)


def _from_json(path: Path, text: str, column: str | None) -> Found:
    content = _parse(path, "", text) if text.strip() else []
    if isinstance(content, dict):
        content = content[_column(path, content, column)]
    if not isinstance(content, list):
        raise UserError(f"prompt file {str(path)!r} holds a {type(content).__name__}; expected a list of prompts")
    for number, entry in enumerate(content, 1):
        yield f"entry {number}", _of_entry(path, entry, column)


def _from_jsonl(path: Path, text: str, column: str | None) -> Found:
    for place, line in _lines(text):
        yield place, _of_entry(path, _parse(path, f", {place}", line), column)


def _from_parquet(path: Path, column: str | None) -> Found:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"prompt file {str(path)!r} needs pyarrow to be read: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        name = _column(path, file.schema_arrow.names, column)
        values = file.read(columns=[name]).column(name).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"prompt file {str(path)!r} cannot be read as parquet ({error}); export it anew") from error
    for number, value in enumerate(values, 1):
        yield f"row {number}", value


def _parse(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"prompt file {str(path)!r}{place} is not JSON ({error}); mend or re-export it") from error


def _of_entry(path: Path, entry: Any, column: str | None) -> Any:
    return entry[_column(path, entry, column)] if isinstance(entry, dict) else entry


def _column(path: Path, names: list[str] | dict[str, Any], column: str | None) -> str:
    if column is None:
        folded = {name.strip().casefold(): name for name in reversed(list(names))}
        for known in COLUMNS:
            if known in folded:
                return folded[known]
        wanted = f"none of the columns {', '.join(COLUMNS)}"
    elif column in names:
        return column
    else:
        wanted = f"no column {column!r}"
    shown = ", ".join(repr(name) for name in list(names)[:8])
    raise UserError(f"prompt file {str(path)!r} has {wanted}; it has {shown}: name the prompts' column")


READERS: dict[str, Callable[[Path, str, str | None], Found]] = {
    ".txt": _from_txt,
    ".csv": _from_csv,
    ".tsv": _from_tsv,
    ".json": _from_json,
    ".jsonl": _from_jsonl,
}
