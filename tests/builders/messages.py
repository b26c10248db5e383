"""Patterns for error messages that hold what a user needs (key, value, limit, way out), not the words between."""

import re


def says(*parts: object) -> re.Pattern[str]:
    """Pattern of a message that names every one of `parts`, in any order; for `match=` and for `.search(text)`.

    A number is looked for as a whole one (`says(1)` does not find 10, 1.5 or x1), a text as it is.
    """
    assert parts, "a pattern without parts fits every message"
    return re.compile(r"\A" + "".join(rf"(?=.*{_pattern(part)})" for part in parts), re.DOTALL)


def _pattern(part: object) -> str:
    if isinstance(part, str):
        assert part.strip(), "an empty part is in every message"
        return re.escape(part)
    return rf"(?<![\w.]){re.escape(str(part))}(?!\w|[.,]\d)"
