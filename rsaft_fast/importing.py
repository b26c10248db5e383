"""What is installed, and code of the user's own, named in a recipe as `module:callable`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable
from importlib import metadata
from typing import Any, TypeVar

import torch

from rsaft_fast.errors import UserError, describe_error

Made = TypeVar("Made")


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load_callable(named: str, key: str) -> Callable[..., Any]:
    """Import the callable that `module:callable` names, from the current folder, PYTHONPATH or an installed package.

    Args:
        key: of the recipe, for messages.

    Raises:
        UserError: no such module or name in it, the module fails as it is imported, or the thing cannot be called.
    """
    module_name, colon, attribute = named.partition(":")
    if not (colon and attribute and all(part.isidentifier() for part in module_name.split("."))):
        raise UserError(f"{key} is {named!r}; it must be module:callable, such as my_code:make")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last: a file of the user's hides no installed package
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(f"{key}: {module_name} needs {error.name!r}, which is not installed") from error
        raise UserError(
            f"{key}: there is no module {module_name!r} in {here}, on PYTHONPATH or among the installed packages"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: importing {module_name} fails ({type(error).__name__}: {error})") from error
    found: Any = module
    for name in attribute.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        what = "has nothing of that name" if found is None else f"has a {type(found).__name__} of that name"
        where = getattr(module, "__file__", None) or "built in"
        raise UserError(f"{key} is {named!r}, but {module_name} ({where}) {what}; name a function or class")
    return found


def makes(found: Any, base: type) -> bool:
    """Whether something is a subclass of `base`, or a function that is annotated to return one.

    Nothing else that a recipe names is called: it may be a stranger's, and could name any function of any module.
    """
    if inspect.isfunction(found):
        try:
            found = typing.get_type_hints(found).get("return")
        except (NameError, AttributeError, TypeError):  # names that only a type checker sees
            return False
    return inspect.isclass(found) and issubclass(found, base)


def make(found: Callable[..., Made], base: type[Made], named: str, /, **arguments: Any) -> Made:
    """Call what `makes` an object of `base`, and refuse whatever goes wrong in its code in one line.

    Args:
        named: the key and its value, for messages.
        arguments: keywords for it.

    Raises:
        UserError: it does not take them, raises anything else, or gives something else.
    """
    try:
        made = found(**arguments)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a stranger's code raises
        raise UserError(
            f"{named}: {describe_error(error)}; it is called with {', '.join(arguments) or 'nothing'}"
        ) from error
    if not isinstance(made, base):
        raise UserError(f"{named} returned a {type(made).__name__}; it must return a {base.__name__}")
    return made
