"""Errors a user can mend. The command line prints their text as one line and exits with code 2."""

from __future__ import annotations


class UserError(Exception):
    """Input that cannot be used; the text names the value, the limit and the mend."""


class NonFiniteRewardError(UserError):
    """The reward returned NaN or infinity; weights are as they were before the step."""
