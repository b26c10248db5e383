"""What a recipe may say, read off the settings classes: the nearest valid key, error lines, and the help text."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import reprlib
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Set
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rsaft_fast.errors import UserError
from rsaft_fast.settings import Settings

# Where "larger than the limit" is not the whole mend.
_MENDS = {
    "smoothing.parameters.rho": "smoothing.parameters=null turns parameter smoothing off",
    "smoothing.image.radius": "auto finds it from judges, and smoothing.image=null turns image smoothing off",
    "ema.decay": "ema=null keeps no mean",
    "optimizer.max_grad_norm": "optimizer.max_grad_norm=null does not clip",
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "a string (quote it)",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "dict": "a section of keys",
    "model": "a section of keys",
}
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}

# Cuts a value before it is spelled out: ten lines of YAML can stand for more than memory holds.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 56
_SHORT.maxlevel = 3
_MOST_LINES = 20
# A key as it is written; another is shown between quotes.
_NAME = re.compile(r"[\w.\-]{1,60}")


def explain(error: ValidationError, root: type[BaseModel], where: str, commanded: Set[str]) -> list[str]:
    """One line for each thing that is wrong."""
    items = error.errors()
    lines = [_line(item, root, where, commanded) for item in items[:_MOST_LINES]]
    return lines + ([f"and {len(items) - len(lines)} more of {where}"] if len(items) > len(lines) else [])


def _line(item: Mapping[str, Any], root: type[BaseModel], where: str, commanded: Set[str]) -> str:
    key, level = _locate(root, item["loc"])
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        key = f"{key}.name" if key else "name"
    if any(
        key == given or key.startswith((f"{given}.", f"{given}[")) or given.startswith(f"{key}.") for given in commanded
    ):
        where = "on the command line"
    else:
        where = f"in {where}"
    if kind == "extra_forbidden":
        return f"unknown key {key} {where}; {_nearest(key, level, root)}"
    if kind == "missing" and isinstance(item["loc"][-1], int):
        return f"{key} is missing {where}; the list is too short"
    if kind == "missing":
        return f"missing key {key} {where}: {_first_sentence(_description_at(root, item['loc']))}"
    if kind == "union_tag_not_found":
        return f"missing key {key} {where}: one of {', '.join(_tags(level))}"
    if kind == "union_tag_invalid":
        tag = value.get("name") if isinstance(value, dict) else context["tag"]
        return f"{key} is {shown(tag)} {where}; {_choice(tag, _tags(level))}"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        return f"{key} is {shown(value)} {where}; {_choice(value, options)}"
    if kind == "string_too_long":
        return f"{key} is {shown(value)} {where}: {len(value)} characters; the limit is {context['max_length']}"
    if kind == "string_too_short":
        return f"{key} is empty {where}; give a value"
    if kind in ("too_short", "too_long"):
        limit = context.get("min_length", context.get("max_length"))
        return f"{key} has {context['actual_length']} entries {where}; the limit is {limit}"
    if kind == "string_unicode":
        return f"{key} is {shown(value)} {where}, which holds half a character; write it as UTF-8"
    if kind == "value_error":
        text = str(context["error"])
        if not key:  # of the whole
            return f"{where.removeprefix('in ')}: {text}"
        return f"{key} {where}: {text}" if isinstance(value, dict) else f"{key} is {shown(value)} {where}: {text}"
    mend = f"; {_MENDS[key]}" if key in _MENDS else ""
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        return f"{key} is {shown(value)} {where}; it must be {words} {context[name]:g}{mend}"
    wanted = next((words for prefix, words in _TYPES.items() if kind.startswith(prefix)), None)
    if kind.startswith(("model", "dict")):
        return f"{key} is {shown(value)} {where}; it must be a section of keys{_as_section(key, value, level)}{mend}"
    if wanted:
        return f"{key} is {shown(value)} {where}; it must be {wanted}{mend}"
    return f"{key} is {shown(value)} {where}: {item['msg']}{mend}"


def _as_section(key: str, value: Any, level: list[type[BaseModel]]) -> str:
    """What was meant by a value in the place of a section."""
    names = list(dict.fromkeys(name for model in level for name in model.model_fields))
    if isinstance(value, str) and _NAME.fullmatch(value) and "name" in names:
        return f"; did you mean {key}.name={value}?"
    return f": {', '.join(names)}" if names else ""


def _locate(root: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, list[type[BaseModel]]]:
    """A pydantic location as a dotted key, and the settings classes of the section where it ends."""
    level = inner = list(_sections(root))
    key, named = "", False
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
            continue
        part = part if _NAME.fullmatch(part) else shown(part)
        if named:  # a name of the user's own, whose sections are those of the key before it
            key, named = f"{key}.{part}", False
            continue
        tagged = [model for model in inner if part in _tags([model])]
        if tagged and not any(part in model.model_fields for model in inner):
            inner = level = tagged
            continue
        level = inner
        key = f"{key}.{part}" if key else part
        field = next((model.model_fields[part] for model in inner if part in model.model_fields), None)
        inner = list(_sections(field.annotation)) if field else []
        named = field is not None and _has_named_sections(field.annotation)
    return key, level if not inner else inner


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes that a value of an annotation may have."""
    for mentioned in _mentioned(annotation):
        yield from mentioned.kinds() if issubclass(mentioned, Settings) else (mentioned,)


def _mentioned(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _mentioned(argument)


def _has_named_sections(annotation: Any) -> bool:
    """Whether a key holds sections by names that the user gives."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    return origin is dict or (origin is Annotated and _has_named_sections(arguments[0]))


def _tags(models: list[type[BaseModel]]) -> list[str]:
    """The discriminating names of settings classes that have one."""
    fields = [model.model_fields["name"].annotation for model in models if "name" in model.model_fields]
    return [tag for field in fields if typing.get_origin(field) is Literal for tag in typing.get_args(field)]


def keys(root: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    """Every dotted key below a settings class, with the class that declares it; sections before their keys."""
    for kind in _sections(root):
        for name, field in kind.model_fields.items():
            key = prefix + name
            yield key, kind, field
            inner = f"{key}.NAME." if _has_named_sections(field.annotation) else f"{key}."
            for section in _mentioned(field.annotation):
                yield from keys(section, inner)


def _nearest(key: str, level: list[type[BaseModel]], root: type[BaseModel]) -> str:
    prefix, _, name = key.rpartition(".")
    here = [field for model in level for field in model.model_fields]
    dotted = {f"{prefix}.{field}" if prefix else field: field for field in here}
    if close := difflib.get_close_matches(key, dotted, 1, cutoff=0.6):
        return f"did you mean {close[0]}?"
    # The right name in the wrong section.
    for valid, _, _ in keys(root):
        if valid.rpartition(".")[2] == name:
            return f"did you mean {valid}?"
    return f"valid here: {', '.join(dict.fromkeys(dotted))}"


def _choice(value: Any, options: list[str]) -> str:
    text = value if isinstance(value, str) else shown(value)
    begun = [option for option in options if text and option.startswith(text)]
    close = begun or difflib.get_close_matches(text[:60], options, 1, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}it must be one of {', '.join(options)}"


def shown(value: Any) -> str:
    """A value as messages show it, in at most 60 characters, whatever is in it."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else _SHORT.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def text_kinds(root: type[BaseModel], key: str) -> set[str]:
    """Of a dotted key that holds text: {"text"}, and "null" where it may be null; of any other key nothing."""
    found: set[str] = set()
    for field in (field for name, _, field in keys(root) if name == key):
        kinds = set(_kinds(field.annotation))
        if not kinds <= {"text", "null"}:
            return set()
        found |= kinds
    return found if "text" in found else set()


def _kinds(annotation: Any) -> Iterator[str]:
    """What a key takes: "text", "null" or "other"."""
    arguments = typing.get_args(annotation)
    if annotation is str:
        yield "text"
    elif annotation is type(None):
        yield "null"
    elif typing.get_origin(annotation) is Literal:
        yield from ("text" if isinstance(choice, str) else "other" for choice in arguments)
    elif typing.get_origin(annotation) is Annotated:
        yield from _kinds(arguments[0])
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _kinds(argument)
    else:
        yield "other"


def describe(model: type[BaseModel], name: str) -> str:
    """A key's description: its field's own, else its lines under `Attributes:` in the class (or a base's) docstring."""
    if own := model.model_fields[name].description:
        return own
    for base in model.__mro__:
        if (text := _documented(base).get(name)) is not None:
            return text
    # A small section may say it all in its first sentence.
    return _summary(model)


def _summary(model: type[BaseModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _documented(model: type) -> dict[str, str]:
    lines = inspect.cleandoc(model.__doc__ or "").splitlines()
    if "Attributes:" not in lines:
        return {}
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines[lines.index("Attributes:") + 1 :]:
        if entry := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            current = [entry[2]]
            found |= {name: current for name in entry[1].split(", ")}
        elif line.startswith("        "):
            current.append(line.strip())
        elif line:
            break
    return {name: " ".join(words) for name, words in found.items()}


def _description_at(root: type[BaseModel], location: tuple[int | str, ...]) -> str:
    _, level = _locate(root, location[:-1])
    return next((describe(model, location[-1]) for model in level if location[-1] in model.model_fields), "")


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.;]) ", text)[0].rstrip(".;") or "it has no default"


def help_text(root: type[BaseModel], width: int = 110, key: str = "") -> str:
    """Every key with its default and its description, in a recipe's own order; of `key` alone where one is given.

    Raises:
        UserError: there is no such key.
    """
    if not key:
        return "\n".join(_help_lines(root, 0, width))
    owners = list(dict.fromkeys(model for name, model, _ in keys(root) if name == key))
    if not owners:
        known = [name for name, _, _ in keys(root)]
        near = difflib.get_close_matches(key, known, 1, 0.6) or [n for n in known if n.rpartition(".")[2] == key]
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(root.model_fields)}"
        raise UserError(f"there is no key {shown(key)}; {hint}")
    section, _, name = key.rpartition(".")
    lines = [f"# of {section}"] if section else []
    # Choices of one section may have the same key.
    told: dict[tuple[str, ...], list[type[BaseModel]]] = {}
    for model in owners:
        told.setdefault(tuple(_key_lines(model, name, 0, width, set())), []).append(model)
    for text, models in told.items():
        if tags := _tags(models):
            lines += _comment(f"with name: {', '.join(tags)}", 0, width)
        lines += text
    return "\n".join(lines)


def _help_lines(model: type[BaseModel], indent: int, width: int, told: Set[Told] = frozenset()) -> Iterator[str]:
    """Lines of a section.

    Args:
        told: what was said of keys in the sections around this one, and in earlier choices in its place.
    """
    tags = _tags([model])
    names = [name for name in model.model_fields if not (tags and name == "name")]
    known = [name for name in names if _told(model, name) in told]
    if tags:  # one choice of several classes, each of which says in its first sentence what it is
        yield from _comment(_summary(model), indent, width)
        yield f"{'  ' * indent}name: {' | '.join(tags)}"
    if known:
        yield from _comment(f"the keys above that fit: {', '.join(known)}.", indent, width)
    own = told | {_told(model, name) for name in names}
    for name in names:
        if name not in known:
            yield from _key_lines(model, name, indent, width, own)


def _key_lines(model: type[BaseModel], name: str, indent: int, width: int, told: Set[Told]) -> Iterator[str]:
    """Lines of a key, and of the section that it is."""
    pad, field = "  " * indent, model.model_fields[name]
    sections = list(_sections(field.annotation))
    yield from _comment(describe(model, name), indent, width)
    yield f"{pad}{name}: {_default(field, bool(sections))}".rstrip()
    alike: list[str] = []
    for number, section in enumerate(sections):
        keys = {_told(section, name) for name in section.model_fields if name != "name"}
        if number and keys <= told and not _summary(section):
            alike += _tags([section])
            continue
        if number:
            yield f"{pad}  # or"
        yield from _help_lines(section, indent + 1, width, told)
        told = told | keys
    if alike:
        yield from _comment(f"or with name: {' | '.join(alike)}, and the keys above that fit.", indent + 1, width)


Told = tuple[str, str, str]
"""Name, description and default of a key."""


def _told(model: type[BaseModel], name: str) -> Told:
    field = model.model_fields[name]
    return name, describe(model, name), _default(field, bool(list(_sections(field.annotation))))


def _comment(text: str, indent: int, width: int) -> list[str]:
    pad = "  " * indent
    return textwrap.wrap(text, width, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ", break_on_hyphens=False)


def _default(field: FieldInfo, is_section: bool) -> str:
    if is_section and _has_named_sections(field.annotation):
        return (
            "{}    # NAME: a section each, of"
            if not field.is_required()
            else "(required)    # NAME: a section each, of"
        )
    if is_section:
        if field.is_required() or isinstance(field.default, BaseModel):
            return ""
        return "null    # or" if field.default is None else "[]    # or a list of"
    if field.is_required():
        return "(required)"
    default = field.get_default(call_default_factory=True)
    text = f"[{', '.join(map(str, default))}]" if isinstance(default, tuple) else json.dumps(default)
    choices = [str(c) for literal in _literals(field.annotation) for c in typing.get_args(literal)]
    return f"{text}    # {' | '.join(choices)}" if len(choices) > 1 else text


def _literals(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Literal:
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _literals(argument)
