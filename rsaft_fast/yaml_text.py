"""YAML as people write it: version 1.2's core schema over PyYAML, within limits, by the safe constructors alone.

PyYAML reads version 1.1, in which `on`, `no`, `12:30`, `010` and `2024-01-02` are not what stands there and `1e-4` is a
string. Here a plain scalar is null, true, false or a decimal, octal (0o17) or hexadecimal number, else its own text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from rsaft_fast.errors import printable
from rsaft_fast.paths import require_text

LARGEST_FILE = 2**17
"""Bytes; a recipe takes a few thousand, and PyYAML a second for so many."""

MOST_VALUES = 10_000
"""With every alias followed: ten lines of aliases can stand for a billion values."""

DEEPEST = 32
"""Levels of sections and lists."""

LONGEST_NUMBER = 400
"""Characters; Python refuses to print integers of more than 4300 digits."""

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SCALARS = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    # Of 1.1, for recipes that share a section between them.
    ("merge", re.compile(r"<<"), ["<"]),
)
_PATTERNS = {name: pattern for name, pattern, _ in _SCALARS}
_TAG = "tag:yaml.org,2002:"


class YAMLTextError(ValueError):
    """Text is not YAML, or more of it than a recipe has; one line."""


def parse_yaml(text: str) -> Any:
    """Parse a YAML document.

    Raises:
        YAMLTextError: another syntax, a key given twice or that is no text, an object of Python's, or more values,
            levels or digits than a recipe has.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise YAMLTextError(_one_line(error)) from error
    except RecursionError:
        raise YAMLTextError(f"it is nested too deeply; the limit is {DEEPEST} levels") from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, YAMLTextError):
            raise
        # PyYAML's scanner lets Python's own errors through, such as chr's for a character that there is not.
        raise YAMLTextError(_one_line(error)) from error


def dump_yaml(value: Any) -> str:
    """Write text from which `parse_yaml`, and readers of YAML 1.1, make the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _one_line(error: Exception) -> str:
    # PyYAML shows the text around the fault, whatever characters are in it.
    return printable(" ".join(str(error).split()) or type(error).__name__)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == f"{_TAG}merge":
                continue
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, str):
                kind = type(key).__name__
                raise ConstructorError(None, None, f"the key in line {line} is no text ({kind}); quote it")
            if key in seen:
                raise ConstructorError(None, None, f"key {key!r} is given twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        # int's own prefixes; without one, leading zeros count for nothing.
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    # Text that either version reads as something else is quoted.
    yaml_implicit_resolvers = {first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes line breaks other than its own between single quotes, and reads them as blanks.
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar(f"{_TAG}str", data, style)


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern.pattern})\Z"), _first)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_int)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_float)
_Loader.add_constructor(f"{_TAG}merge", _Loader.construct_yaml_str)  # where it stands as a value
_Dumper.add_representer(str, _Dumper.represent_text)


def _check(root: yaml.Node) -> None:
    """Refuse a document that is too large, too deep, or has a tag that no recipe has.

    More than `MOST_VALUES` values, deeper than `DEEPEST`, or with a tag that its text or a recipe does not have.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, level: int) -> int:
        if level > DEEPEST:
            raise YAMLTextError(f"it is nested too deeply, or holds itself; the limit is {DEEPEST} levels")
        if id(node) not in sizes:
            _check_node(node)
            sizes[id(node)] = 1 + sum(size(part, level + 1) for part in _inside(node))
        return sizes[id(node)]

    if (total := size(root, 0)) > MOST_VALUES:
        raise YAMLTextError(f"it holds {total} values, aliases followed; the limit is {MOST_VALUES}")


def _inside(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_node(node: yaml.Node) -> None:
    kind, line = node.tag.removeprefix(_TAG), node.start_mark.line + 1
    if not isinstance(node, yaml.ScalarNode):
        fits = kind == ("map" if isinstance(node, yaml.MappingNode) else "seq")
    elif fits := kind == "str" or (kind in _PATTERNS and _PATTERNS[kind].fullmatch(node.value) is not None):
        if kind in ("int", "float") and len(node.value) > LONGEST_NUMBER:
            raise YAMLTextError(
                f"line {line} holds a number of {len(node.value)} characters; the limit is {LONGEST_NUMBER}"
            )
    if isinstance(node, yaml.ScalarNode):
        try:
            require_text(node.value)
        except ValueError as error:
            raise YAMLTextError(f"line {line}: {error}") from error
    if not fits:
        raise YAMLTextError(f"line {line} is tagged {node.tag[:60]!r}, which it is not or a recipe does not have")
