"""Errors a user can mend, and words for those of libraries.

The command line prints a `UserError` as one line and exits with code 2.
"""

from __future__ import annotations

_LONGEST = 200


class UserError(Exception):
    """Input that cannot be used; the text names the value, the limit and the mend."""


class NonFiniteRewardError(UserError):
    """The reward returned NaN or infinity; weights are as they were before the step."""


class UnreachableError(UserError):
    """A server that is waited for no longer; what was asked of it can be asked again when it is back."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or the name of its type where it has none.

    Of a library's exception at most 200 characters are kept, without advice about options of that library; a line that
    ends in a colon takes the next one along. A `UserError` is not cut.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, UserError):
        return lines[0]
    first = lines[0].partition(". If you want")[0]
    if first.endswith(":") and len(lines) > 1:
        first += " " + lines[1].strip()
    return first if len(first) <= _LONGEST else first[:_LONGEST] + "..."


def describe_error(error: BaseException) -> str:
    """Return an exception's kind and the first line of its text, such as "KeyError: 'step'"."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def printable(text: str, instead: str | None = None) -> str:
    """Replace what moves a terminal's cursor, colours it or has no glyph: names come from files of others.

    Args:
        instead: put in place of each such character; None writes its number, such as \\x1b.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] if instead is None else instead for c in text)
