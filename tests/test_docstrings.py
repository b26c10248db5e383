"""Docstrings: everything public says in its first line what it is, in a sentence; names stand in single backticks."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("rsaft_fast", "kernels") for path in (ROOT / folder).rglob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def public(node: ast.AST, name: str, required: bool = True) -> Iterator[tuple[str, ast.AST, bool]]:
    """Module, classes, functions and methods by name, and whether a docstring is a must: methods may inherit theirs."""
    yield name, node, required
    for child in node.body:
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)) and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{name}.{child.name}")
            elif not isinstance(node, FUNCTIONS):
                yield f"{name}.{child.name}", child, isinstance(node, ast.Module)


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every comment, and of every string that stands alone: a docstring, also of an attribute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def faults(source: str, name: str) -> list[str]:
    found = []
    for where, node, required in public(ast.parse(source), name):
        text = ast.get_docstring(node)
        if text is None and required:
            found.append(f"{where} has no docstring")
        elif text is not None and not text.split("\n", 1)[0].endswith("."):
            found.append(f"{where}: the first line is no sentence that ends there")
    if "``" in source:  # rare, and tokens are slow
        found += [f"{name}:{line}: double backticks" for line, text in prose(source) if "``" in text]
    return found


def test_docstrings_begin_with_a_sentence_and_quote_with_single_backticks():
    assert len(FILES) > 150
    found = [fault for path in FILES for fault in faults(path.read_text(), str(path.relative_to(ROOT)))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("x = 1", "no docstring"),
        ('"""A module."""\ndef f():\n    pass', "f has no docstring"),
        ('"""A module."""\nclass C:\n    pass', "C has no docstring"),
        ('"""A module."""\ndef f():\n    """Do this and\n    that."""', "f: the first line"),
        ('"""A module."""\nclass C:\n    """A class."""\n    def f(self):\n        """do"""', "C.f: the first line"),
        ('"""A ``module``."""', "double backticks"),
        ('"""A module."""\nx = 1  # ``x``', "double backticks"),
    ],
)
def test_what_breaks_the_rule_is_found(source, fault):
    assert [found for found in faults(source, "m") if fault in found]


def test_what_keeps_the_rule_is_not_found():
    assert not faults(
        '"""A module."""\ndef _f():\n    pass\nclass C:\n    """A."""\n    def f(self):\n        pass', "m"
    )
    assert not faults('"""A module."""\ntext = "```python\\n``x``\\n```"', "m")
