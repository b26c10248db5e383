"""An algorithm of the user's own."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from rsaft_fast.methods.base import Method


class PythonMethod(Method):
    """An algorithm of your own: a class of `rsaft_fast.algorithms.Algorithm`, or what returns one.

    It runs code on this machine: name only what you wrote or read.

    Attributes:
        call: module:callable of a subclass of Algorithm, or of a function that is annotated to return one; nothing
            else is called. It is found in the current directory, on PYTHONPATH or among the installed packages, and
            takes backbone, reward, schedule, config and `arguments`.
        arguments: keywords for it. What smoothing.image, sharpness, loss and data.plan_scope say is its to read from
            config; smoothing.parameters holds for every algorithm.
    """

    needs_gradient: ClassVar[bool] = False

    name: Literal["python"]
    call: str
    arguments: dict[str, Any] = {}
