"""Where chat templates run: jinja2's immutable sandbox, with bounds on time and memory.

The sandbox keeps a template from reaching out; it does not keep one from looping for hours or from
making a text of terabytes. Here every pass of a loop and every call of a macro is counted, and what
would be longer than any conversation is refused before it is made.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

PASSES = 20_000  # of loops and macros, in one rendering
LONGEST = 16 * 2**20  # characters or entries of one value
WIDEST = 100_000  # a number that is given to a filter or a method
_WIDE_FIELD = re.compile(r"\d{6}|\*")  # in a format's text


class _Generator(CodeGenerator):
    """Python of a template, with a count at the head of every body that may run again."""

    def _count(self, body: list[nodes.Node]) -> list[nodes.Node]:
        counter = nodes.EnvironmentAttribute("counted")
        return [nodes.Output([nodes.Call(counter, [], [], None, None)]), *body]

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body = self._count(node.body)
        super().visit_For(node, frame)

    def visit_Macro(self, node: nodes.Macro, frame: Frame) -> None:
        node.body = self._count(node.body)
        super().visit_Macro(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.passes = 0
        self.filters = {name: _guarded(name, made) for name, made in self.filters.items()}

    def counted(self) -> str:
        """Counts a pass; the text of nothing."""
        self.passes += 1
        if self.passes > PASSES:
            raise SecurityError(f"more than {PASSES:,} passes of its loops")
        return ""

    def joined(self, parts: tuple[Any, ...]) -> str:
        """`a ~ b`."""
        texts = [str(part) for part in parts]
        _check(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operation whose result would not be too long."""
        sizes = [_size(left), _size(right)]
        numbers = [x for x in (left, right) if isinstance(x, int)]
        if operator == "+" and not numbers:
            _check(sum(sizes))
        elif operator == "*" and len(numbers) < 2:
            _check(math.prod(max(0, x) if isinstance(x, int) else _size(x) for x in (left, right)))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator in ("*", "**") and len(numbers) == 2:
            bits = left.bit_length() + right.bit_length()
            _check((left.bit_length() * abs(right) if operator == "**" else bits) // 8)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a function or of a value's method."""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        own = getattr(method, "__self__", None)
        if isinstance(own, (str, list, tuple, dict)):
            _check_call(getattr(method, "__name__", ""), (own, *args), kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _guarded(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    first = int(hasattr(made, "jinja_pass_arg"))  # jinja2's own first argument

    @functools.wraps(made)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        _check_call(name, args[first:], kwargs)
        return made(*args, **kwargs)

    return filtered


def _check_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [*args, *kwargs.values()]
    if any(isinstance(x, int) and abs(x) > WIDEST for x in given[1:]):
        raise SecurityError(f"a number above {WIDEST:,} in {name}")
    if name in ("format", "format_map"):
        _check_format(next((x for x in args if isinstance(x, str)), ""))
    sizes = [max(1, len(x)) if hasattr(x, "__len__") else WIDEST for x in given]
    if name == "join" and len(given) > 1:
        text_method = isinstance(given[0], str)  # ", ".join(list), or list | join(", ")
        _check(sizes[0] * sizes[1] if text_method or isinstance(given[1], str) else 0)
    elif name == "replace" and len(given) > 2:
        _check(sizes[0] * sizes[2] // sizes[1])


def _check_format(text: str) -> None:
    if _WIDE_FIELD.search(text):
        raise SecurityError("a field of a format is too wide")


def _size(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _check(size: int) -> None:
    if size > LONGEST:
        raise SecurityError(f"a value of {size:,} characters or entries")
