"""The API reference says what a reader needs: of every name what it is, shapes, and errors."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from documents import DOCS

from kdtl_jax import losses

sys.path.insert(0, str(DOCS / "_ext"))
SHAPES = re.compile(r"\[[^\]]*\]|[Aa]ny shape|[Aa]ny floating point array|scalar|schedule")
ARRAYS = re.compile(r"\bArray\b")
# Arrays that are not data: random keys, a state's own copies, weights of examples and of members.
NOT_DATA = {"key", "keys", "projections", "example_weights", "weights", "scale", "threshold"}


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The generator of the reference, which is no package."""
    return importlib.import_module("reference")


def described(reference: ModuleType) -> Iterator[tuple[str, ast.AST, str, str]]:
    """`(name, syntax, its docstring or comment, what its page says above it)` of every entry."""
    for module in reference.modules():
        page = inspect.getdoc(importlib.import_module(module)) or ""
        for entry in reference.entries(module):
            node, above = entry.node, f"{page}\n{entry.module.__doc__ or ''}"
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield entry.name, node, entry.comment, above
                continue
            text = ast.get_docstring(node) or ""
            yield entry.name, node, text, above
            for member in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    docstring = ast.get_docstring(member) or ""
                    yield f"{entry.name}.{member.name}", member, docstring, f"{above}\n{text}"


def refuses(node: ast.AST) -> bool:
    """Whether a function raises, by itself or through a check of its arguments."""
    for part in ast.walk(node):
        if isinstance(part, ast.Raise) and part.exc is not None:
            return True
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            whose = part.func.value
            is_check = isinstance(whose, ast.Name) and whose.id == "_checks"
            if is_check and part.func.attr not in ("concrete", "described", "is_key"):
                return True
    return False


def data_of(node: Any) -> list[str]:
    """Parameters that are arrays of data."""
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return [
        result.arg
        for result in arguments
        if result.annotation is not None
        and ARRAYS.search(ast.unparse(result.annotation).replace("| Array", ""))
        and result.arg not in NOT_DATA
    ]


def lacking(name: str, node: ast.AST, text: str, above: str) -> str | None:
    """What an entry does not say, or None."""
    if not text:
        return f"{name}: nothing is said of it"
    if isinstance(node, ast.FunctionDef):
        if refuses(node) and not re.search(r"Error|Raises", f"{text}\n{above}"):
            return f"{name}: its errors"
        if data_of(node) and not SHAPES.search(f"{text}\n{above}"):
            return f"{name}: the shapes of {', '.join(data_of(node))}"
    return None


def test_every_entry_says_what_it_is_its_shapes_and_its_errors(reference: ModuleType) -> None:
    missing = [message for result in described(reference) if (message := lacking(*result))]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("def f(x: int) -> None:\n    'Does.'\n", None),
        ("def f(x: int) -> None: ...\n", "nothing"),
        ("def f(x: int) -> None:\n    'Does.'\n    raise ValueError(x)\n", "errors"),
        ("def f(x: int) -> None:\n    'Does.'\n    _checks.positive(x=x)\n", "errors"),
        ("def f(x: Array) -> Array:\n    'Does.'\n    return x\n", "shapes of x"),
        ("def f(x: Array) -> Array:\n    'Of `[B]`.'\n    return x\n", None),
        ("def f(key: Array) -> Array:\n    'Draws.'\n    return key\n", None),
    ],
)
def test_what_an_entry_lacks_is_found(source: str, missing: str | None) -> None:
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    message = lacking("f", node, ast.get_docstring(node) or "", "")
    assert message is None if missing is None else missing in (message or "")


def test_a_loss_gives_its_shapes_itself() -> None:
    """`help(losses.kd_kl)` shows the docstring and not what its file's functions share."""
    shape = re.compile(r"`\[(?:\]|\.\.\.|[A-Z]\b|[a-z_]+\])")
    functions = inspect.getmembers(losses, inspect.isfunction)
    lacking = [name for name, function in functions if not shape.search(function.__doc__ or "")]
    assert functions and lacking == []
