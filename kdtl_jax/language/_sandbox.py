"""The sandbox of chat templates: jinja2's immutable one, with bounds on time and memory.

jinja2's sandbox keeps a template from reaching outside; it does not keep one from looping for hours
or from making a text of terabytes. Here everything that a template does is charged to one budget:
each pass of a loop by the nodes of its body, each value by its length, and each filter, method and
comparison by what it reads. A value longer than any conversation is refused before it is made, and
a value so nested or shared that printing it would take ages is refused when it is built.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace

PASSES = 20_000  # of loops, macros and blocks, in one rendering
WORK = 32 * 2**20  # the largest total cost of a rendering, in characters
LONGEST = 8 * 2**20  # the largest cost of one value
WIDEST = 100_000  # the largest number that a filter or a method may be given
BITS = 10_000  # of an integer
ENTRY, NODE = 32, 64  # the cost of an entry of a list, and of a node of the template
_LAZY = 20_000  # entries that an iterator is assumed to have

# The results of these are at most a few characters longer than their arguments.
_ADDITIVE = {
    *("abs", "attr", "capitalize", "casefold", "copy", "count", "d", "default", "dictsort", "e"),
    *("encode", "endswith", "escape", "find", "first", "float", "forceescape", "get", "groupby"),
    *("index", "int", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier"),
    *("islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "items", "keys"),
    *("last", "length", "list", "lower", "lstrip", "map", "max", "min", "partition", "random"),
    *("reject", "rejectattr", "removeprefix", "removesuffix", "reverse", "rfind", "rindex"),
    *("round", "rpartition", "rsplit", "rstrip", "safe", "select", "selectattr", "sort", "split"),
    *("splitlines", "startswith", "string", "strip", "swapcase", "title", "tojson", "trim"),
    *("truncate", "unique", "upper", "values", "wordcount"),
    *TESTS,
}
# These read entries, but not their contents.
_SHALLOW = {
    *("attr", "copy", "count", "d", "default", "defined", "first", "get", "items", "keys", "last"),
    *("length", "list", "map", "mapping", "none", "reject", "rejectattr", "reverse", "select"),
    *("selectattr", "sequence", "iterable", "string", "undefined", "values", "boolean", "true"),
    *("false", "number", "integer", "callable"),
}
_QUADRATIC = {"pprint", "striptags", "urlize", "wordwrap", "xmlattr"}
_FIELD = re.compile(r"%|\{")
_WIDE_FIELD = re.compile(r"\d{5}|\*|\{[^{}]*\{")  # in a format's text


class _Generator(CodeGenerator):
    """Generates a template's Python code, which counts passes and weighs values as it runs."""

    def _counter(self, name: str, *args: int) -> nodes.Call:
        numbers: list[nodes.Expr] = [nodes.Const(arg) for arg in args]
        return nodes.Call(nodes.EnvironmentAttribute(name), numbers, [], None, None)

    def _count(self, body: list[nodes.Node]) -> list[nodes.Node]:
        return [nodes.Output([self._counter("count_pass", _nodes(body))]), *body]

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        for block in node.find_all(nodes.Block):
            block.body = self._count(block.body)
        super().visit_Template(node, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body = self._count(node.body)
        if node.test is not None:  # it also runs for entries that it excludes
            node.test = nodes.And(self._counter("count_test", _nodes([node.test])), node.test)
        super().visit_For(node, frame)

    def visit_Macro(self, node: nodes.Macro, frame: Frame) -> None:
        node.body = self._count(node.body)
        super().visit_Macro(node, frame)

    def visit_CallBlock(self, node: nodes.CallBlock, frame: Frame) -> None:
        node.body = self._count(node.body)
        super().visit_CallBlock(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._wrap_in_call("pay_value", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._wrap_in_call("pay_value", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._wrap_in_call("pay_value", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(")
        is_cheap = any(isinstance(x, nodes.Const) for x in (node.expr, *(o.expr for o in node.ops)))
        is_cheap = is_cheap and all(operand.op in ("eq", "ne") for operand in node.ops)
        for operand in (nodes.Operand("", node.expr), *node.ops):
            if operand.op:
                self.write(f" {_OPERATORS[operand.op]} ")
            if is_cheap:
                self.visit(operand.expr, frame)
            else:
                self._wrap_in_call("pay_operand", self.visit, operand.expr, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._wrap_in_call("pay_slice", self.visit, node.node, frame)
            self.write("[")
            self.visit(node.arg, frame)
            self.write("]")
        else:
            super().visit_Getitem(node, frame)

    def _wrap_in_call(
        self, name: str, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame
    ) -> None:
        self.write(f"environment.{name}(")
        visit(node, frame)
        self.write(")")


_OPERATORS = {
    "eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in",
    "notin": "not in",
}  # fmt: skip


def _nodes(body: Iterable[nodes.Node]) -> int:
    """The number of nodes run in one pass of a body, without bodies that are counted separately."""
    count, stack = 0, list(body)
    while stack:
        node = stack.pop()
        count += 1
        has_body = isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock))
        stack += node.iter_child_nodes(exclude=("body",) if has_body else ())
    return count


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(finalize=self.pay_printed, **options)
        self.passes, self.work = 0, 0
        self.filters |= filters
        self.filters = {name: self._pay_for(name, f) for name, f in self.filters.items()}
        self.tests = {name: self._pay_for(name, f) for name, f in self.tests.items()}
        del self.globals["lipsum"]

    def spend(self, cost: int) -> None:
        """Pays for work that is about to be done."""
        self.work += cost
        if self.work > WORK:
            raise SecurityError("more work than any conversation asks for")

    def count_pass(self, size: int) -> str:
        """Counts a pass of a body of `size` nodes; returns an empty text."""
        self.passes += 1
        if self.passes > PASSES:
            raise SecurityError(f"more than {PASSES:,} passes of its loops")
        self.spend(NODE * size)
        return ""

    def count_test(self, size: int) -> bool:
        """Pays for the condition of a loop; returns True."""
        self.spend(NODE * size)
        return True

    def pay_value(self, value: Any) -> Any:
        """Returns a value after paying for it and its contents."""
        self.spend(weight(value))
        return value

    def pay_operand(self, value: Any) -> Any:
        """An operand of a comparison. Looking up a key in a mapping is cheap."""
        self.spend(1 if isinstance(value, Mapping) else weight(value))
        return value

    def pay_slice(self, value: Any) -> Any:
        """A value that is sliced."""
        self.spend(_size(value))
        return value

    def pay_printed(self, value: Any) -> Any:
        """A value printed by `{{ }}`: in a container, a letter may take four characters."""
        if not isinstance(value, str):
            self.spend(4 * weight(value))
        return value

    def concat(self, parts: Iterable[str]) -> str:
        """The printed text."""
        return "".join(self._pay_parts(parts, len))

    def _pay_parts(self, parts: Iterable[Any], cost: Callable[[Any], int]) -> Iterator[Any]:
        for part in parts:
            self.spend(cost(part))
            yield part

    def concatenate(self, parts: tuple[Any, ...]) -> str:
        """`a ~ b`."""
        texts = [str(self.pay_printed(part)) for part in parts]
        self.spend(_check(sum(map(len, texts))))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operation, if its result would not be too long."""
        numbers = [x for x in (left, right) if isinstance(x, int)]
        for number in numbers:
            _check_integer(number.bit_length())
        if operator == "*" and len(numbers) == 2:
            _check_integer(left.bit_length() + right.bit_length())
        elif operator == "**" and len(numbers) == 2:
            _check_integer(left.bit_length() * abs(right))
        elif operator == "*":
            self.spend(_check(math.prod(
                max(0, x) if isinstance(x, int) else max(1, weight(x)) for x in (left, right)
            )))  # fmt: skip
        elif operator == "%" and isinstance(left, str):
            self.spend(_check_format(left, (right,)))
        elif not numbers:
            self.spend(_check(_size(left) + _size(right)))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a function or of a value's method."""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        __self.spend(NODE)
        if isinstance(owner, (str, bytes, int, float, list, tuple, dict)):
            __self._pay_call(getattr(method, "__name__", ""), (owner, *args), kwargs)
        elif not isinstance(__obj, Macro):  # a macro's body pays
            __self.spend(sum(map(weight, (*args, *kwargs.values()))))
        result = super().call(__context, __obj, *args, **kwargs)
        __self.spend(_size(result))
        return result

    def _pay_for(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or a test that pays for each of its calls."""
        first = int(hasattr(function, "jinja_pass_arg"))  # jinja2's own first argument

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._pay_call(name, args[first:], kwargs)
            result = function(*args, **kwargs)
            self.spend(_size(result))
            is_lazy = isinstance(result, Iterator)
            return self._pay_parts(result, lambda _: ENTRY) if is_lazy else result

        return call

    def _pay_call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pays for a filter, a test or a method, by what it reads and the most it can produce."""
        values = [*args, *kwargs.values()]
        for i, x in enumerate(values):
            if isinstance(x, int):
                _check_integer(x.bit_length())
                if i and abs(x) > WIDEST:
                    raise SecurityError(f"a number above {WIDEST:,} in {name}")
        weigh = _size if name in _SHALLOW else weight
        weights = [max(1, weigh(x)) for x in values]
        cost = sum(weights)
        if name in ("format", "format_map"):
            cost = _check_format(next((x for x in args if isinstance(x, str)), ""), values)
        elif name == "join" and len(values) > 1:  # either may be the separator
            cost += _entries(values[0]) * weights[1] + _entries(values[1]) * weights[0]
        elif name == "replace" and len(values) > 2 and isinstance(values[1], str):
            cost += str(values[0]).count(values[1]) * weights[2]
        elif name in _QUADRATIC or (name == "sum" and len(values) > 1):
            cost = math.prod(weights) + cost**2 // 64
        elif name not in _ADDITIVE:
            numbers = [abs(x) for x in values if isinstance(x, int)]
            cost = math.prod(weights) * math.prod(max(1, x) for x in numbers)
        self.spend(_check(cost))


def weight(value: Any) -> int:
    """The characters and entries of a value, with everything in it, counting repetitions.

    Raises:
      SecurityError: above `LONGEST`.
    """
    if isinstance(value, (str, bytes)):
        return len(value)
    total, stack = 0, [value]
    while stack:
        x = stack.pop()
        total += _size(x)
        if isinstance(x, Namespace):
            x = object.__getattribute__(x, "_Namespace__attrs")
            total += 4 * ENTRY + _size(x)
        if isinstance(x, Mapping):
            total += 4 * ENTRY
            stack += x.keys()
            stack += x.values()
        elif hasattr(x, "__len__") and not isinstance(x, (str, bytes, range)):
            total += ENTRY
            stack += x
        _check(total)
    return total


def _size(value: Any) -> int:
    """The characters or entries of a value, without their contents."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 8
    return ENTRY * len(value) if hasattr(value, "__len__") else 0


def _entries(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else _LAZY


def _check(cost: int) -> int:
    if cost > LONGEST:
        raise SecurityError(f"a value of {cost:,} characters or entries")
    return cost


def _check_integer(bits: int) -> None:
    if bits > BITS:
        raise SecurityError(f"an integer of {bits:,} bits, more characters than any number has")


def _check_format(text: str, values: Iterable[Any]) -> int:
    """The most characters that a format can make: each field the longest value and its width."""
    if _WIDE_FIELD.search(text):
        raise SecurityError("a field of a format is too wide")
    widest = max(re.findall(r"\d+", text), key=int, default="0")
    longest = 4 * sum(weight(x) for x in values if x is not text) + int(widest) + 32
    return _check(len(text) + len(_FIELD.findall(text)) * longest)
