"""Chat templates of strangers: what would take hours or terabytes is one clear line, at once."""

import pytest
from bounds import bounded, is_plain
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.filters import FILTERS
from jinja2.tests import TESTS

from kdtl_jax import language
from kdtl_jax.language import _sandbox

MESSAGES = [
    {"role": "user", "content": "2+2? \N{GRINNING FACE}"},
    {"role": "assistant", "content": "4"},
]
BYTES = language.byte_tokenizer()
BIG = "{% set b = 'x' * 90000 %}"
LOOP = "{% for i in range(19999) %}"
END = "{% endfor %}"


def n(value: str, body: str, after: str = "") -> str:
    """A loop that changes `n.x`, and what is done with it then."""
    return f"{{% set n = namespace(x={value}) %}}{LOOP}{body}{END}{after}"


def said(template: str) -> str:
    """What a template is refused with, or what it writes."""
    with bounded():
        try:
            return language.chat_text(BYTES._replace(chat_template=template), MESSAGES)
        except ValueError as error:
            assert type(error) is ValueError and str(error).startswith("chat_template: ")
            assert is_plain(str(error)) and len(str(error)) < 300
            return str(error)


def smaller(patched: pytest.MonkeyPatch) -> None:
    """The same bounds, reached sooner."""
    patched.setattr(_sandbox, "WORK", 2**19)
    patched.setattr(_sandbox, "LONGEST", 2**18)


COSTLY = {
    # Loops, in all the forms of one.
    "a long body": LOOP + "y" * 40_000 + END,
    "a body of many nodes": LOOP + "{{ i }}" * 300 + END,
    "a condition that no entry meets": LOOP + "{% for x in range(99999) if false %}" + END + END,
    "blocks": "{% set n = namespace(d=0) %}{% block a %}{% if n.d < 40 %}{% set n.d = n.d + 1 %}"
    "{{ self.a() }}{{ self.a() }}{% set n.d = n.d - 1 %}{% endif %}{% endblock %}",
    "callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}{% macro g(d) %}"
    "{% if d %}{% call f() %}{{ g(d - 1) }}{% endcall %}{% endif %}{% endmacro %}{{ g(40) }}",
    "recursive loops": "{% for x in [1, 1] recursive %}{% if loop.depth < 40 %}"
    "{{ loop([1, 1]) }}{% endif %}" + END,
    "loop.length": LOOP + "{% for x in range(99999) %}{{ loop.length }}{% break %}" + END + END,
    "lists of ranges": LOOP + "{{ range(99999) | list | length }}" + END,
    "sums of ranges": LOOP + "{{ range(99999) | map('abs') | sum }}" + END,
    # Many values, each of them within the bounds.
    "a list of texts": n("[]", "{% set n.x = n.x + ['x' * 9999] %}"),
    "printed texts": LOOP + "{{ 'x' * 9999 }}" + END,
    "set blocks": LOOP + "{% set z %}{{ 'x' * 9999 }}{% endset %}" + END,
    "filter blocks": LOOP + "{% filter upper %}{{ 'x' * 9999 }}{% endfilter %}" + END,
    "a default of a macro": "{% macro f(a='x' * 9999) %}{{ a | length }}{% endmacro %}"
    + LOOP + "{{ f() }}" + END,
    "arguments": "{% macro f() %}{{ varargs }}{% endmacro %}" + LOOP + "{{ f(*range(99)) }}" + END,
    "a growing text": n("''", "{% set n.x = n.x ~ 'x' * 99 %}"),
    "words": "{{ ('a ' * 90000).split() | length }}",
    "letters": "{{ ('ab' * 90000) | list | length }}",
    # What is shared takes ages to print, to compare and to hash.
    "lists": n("[1]", "{% set n.x = [n.x, n.x] %}", "{{ n.x }}"),
    "tuples as keys": n("1", "{% set n.x = (n.x, n.x) %}", "{{ {n.x: 1} }}"),
    "dict": n("1", "{% set n.x = dict(a=n.x, b=n.x) %}", "{{ n.x | tojson }}"),
    "namespaces": n("1", "{% set n.x = namespace(a=n.x, b=n.x) %}", "{{ n.x }}"),
    "repeated lists": n("[1]", "{% set n.x = [n.x] * 2 %}", "{{ n.x == [n.x] }}"),
    "itself": n("1", "", "{% set n.x = n %}{{ n }}"),
    # One value of terabytes.
    "join": "{{ ['x' * 9999] * 99999 | int | join }}",
    "joined": "{{ ''.join(['x' * 9999] * 9999) }}",
    "indent": "{{ ('\\n' * 9999) | indent(99999) }}",
    "wordwrap": BIG + "{{ b | wordwrap(1, wrapstring=b) }}",
    "fields": BIG + "{{ ('%(a)s' * 9999) % {'a': b} }}",
    "fields by name": BIG + "{{ ('{a}' * 9999).format(a=b) }}",
    "fields of a mapping": BIG + "{{ ('{a}' * 9999).format_map({'a': b}) }}",
    "fields of a filter": BIG + "{{ ('%s' * 99) | format(*([b] * 99)) }}",
    "a width in an argument": "{{ '{:{}}'.format(1, '1000000000') }}",
    "translate": BIG + "{{ b.translate({120: b}) }}",
    "expandtabs": "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "bytes": "{{ 'a'.encode().ljust(1000000000) }}",
    "bytes of a number": "{{ (1).to_bytes(1000000000, 'big') }}",
    "indented json": BIG + "{{ [1, 2] | tojson(indent=b) }}",
    "replaced": "{{ ('x' * 9999).replace('', 'y' * 9999) }}",
    "filled batches": "{{ [1] | batch(99999, 'x' * 9999) | list | length }}",
    "escaped": "{{ ('&' * 200000) | escape | escape }}",
    "a long date": "{{ strftime_now('%c' * 99999) }}",
    # One operation of hours.
    "a power": "{{ 3 ** 8000000 }}",
    "squares": n("7", "{% set n.x = n.x * n.x %}"),
    "a remainder": "{{ (('f' * 99999) | int(0, 16)) % 3 }}",
    "divisible": "{{ (('f' * 99999) | int(0, 16)) is divisibleby(3) }}",
    "in a text": BIG + LOOP + "{{ 'y' in b }}" + END,
    "in a list": "{% set b = [1] * 999 %}" + LOOP + "{{ 'y' not in b }}" + END,
    "equal": BIG + "{% set c = 'x' * 90000 %}" + LOOP + "{{ c == b }}" + END,
    "parts": BIG + LOOP + "{{ b[1:] | length }}" + END,
    "changes": BIG + LOOP + "{{ loop.changed(b) }}" + END,
    "tests": "{{ range(9999) | select('in', range(9999) | list) | list | length }}",
    "counts": BIG + LOOP + "{{ b.count('y') }}" + END,
    "tags": "{{ ('<!---->' * 9999) | striptags }}",
    "links": "{{ ('(http://a.b' * 9999) | urlize }}",
    "sums of lists": "{{ ([[1]] * 999) | sum(start=[]) | length }}",
}  # fmt: skip


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_template(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller(monkeypatch)
    assert said(COSTLY[name]).startswith("chat_template: ")


@pytest.mark.parametrize(
    "template",
    [
        n("[1]", "{% set n.x = [n.x, n.x] %}", "{{ n.x }}"),
        BIG + LOOP + "{{ b | title }}" + END,
    ],
)
def test_the_bounds_are_of_a_second_or_two(template: str) -> None:
    assert "more work" in said(template) or "entries" in said(template)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("x" * 50_001, "50,001 characters, more than 50,000"),
        ("{{ " + "(" * 20_000, "recursion"),
        ("{{ a" + "~ a" * 12_000 + " }}", "undefined"),
        ("{{ " + "9" * 40_000 + " }}", "4300 digits"),
        ("{{ raise_exception('\\x1b[2J\\n\\ud800' * 9999) }}", r"\\x1b\[2J\\n\\ud800"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ lipsum(9999) }}", "'lipsum' is undefined"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ],
)
def test_templates_that_are_too_long_or_reach_out(template: str, says: str) -> None:
    with bounded(), pytest.raises(ValueError, match=f"chat_template: .*{says}"):
        language.chat_text(BYTES._replace(chat_template=template), MESSAGES)


def test_a_long_conversation_is_no_attack() -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' ~ m.content | trim }}{% if '</think>' in "
        "m['content'] %}{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 200}] * 1000
    text = language.chat_text(BYTES._replace(chat_template=template), messages)
    assert len(text) == 1000 * (len("<|user|>") + 999)


NAMES = st.sampled_from(["messages", "m", "n.x", "n", "i", "loop", "self", "dict", "cycler", "b"])
CONSTANTS = st.sampled_from(
    ["0", "1", "-1", "3", "99999", "10**9", "1.5", "none", "true", "''", "'x'", "'%s{}'", "'\\n'",
     "'content'", "'%99d'", "[]", "{}", "()", "[1, 2]", "messages[0]", "range(99999)", "'&' * 999"]
)  # fmt: skip
OPERATORS = st.sampled_from(
    ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or"]
)
METHODS = sorted({name for of in ("", [], {}, (), 1, b"") for name in dir(of)} - {"mro"})
FILTER_NAMES, TEST_NAMES = sorted(FILTERS), sorted(name for name in TESTS if name.isalpha())


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    some = st.lists(inner, max_size=3).map(", ".join)
    return st.one_of(
        st.tuples(inner, OPERATORS, inner).map(lambda x: f"({' '.join(x)})"),
        st.tuples(inner, st.sampled_from(FILTER_NAMES), some).map(
            lambda x: f"({x[0]} | {x[1]}({x[2]}))"
        ),
        st.tuples(inner, st.sampled_from(TEST_NAMES), inner).map(
            lambda x: f"({x[0]} is {x[1]}({x[2]}))"
        ),
        st.tuples(inner, st.sampled_from(METHODS), some).map(lambda x: f"{x[0]}.{x[1]}({x[2]})"),
        st.tuples(NAMES, some).map(lambda x: f"{x[0]}({x[1]})"),
        st.tuples(inner, inner, inner).map(lambda x: f"{x[0]}[{x[1]}:{x[2]}]"),
        st.tuples(inner, inner).map(lambda x: f"{x[0]}[{x[1]}]"),
        st.tuples(inner, inner).map(lambda x: f"[{x[0]}, {x[1]}]"),
        st.tuples(inner, inner).map(lambda x: f"{{{x[0]}: {x[1]}}}"),
        st.tuples(inner, inner, inner).map(lambda x: f"({x[0]} if {x[1]} else {x[2]})"),
    )


EXPRESSIONS = st.recursive(NAMES | CONSTANTS, larger, max_leaves=8)


def nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    body = st.lists(inner, max_size=3).map("".join)
    return st.one_of(
        st.tuples(EXPRESSIONS, body).map(lambda x: f"{{% for i in {x[0]} %}}{x[1]}{{% endfor %}}"),
        st.tuples(EXPRESSIONS, EXPRESSIONS, body).map(
            lambda x: f"{{% for i in {x[0]} if {x[1]} recursive %}}{x[2]}{{% endfor %}}"
        ),
        body.map(lambda x: f"{{% for k in range(99999) %}}{x}{{% endfor %}}"),
        st.tuples(EXPRESSIONS, body).map(lambda x: f"{{% if {x[0]} %}}{x[1]}{{% endif %}}"),
        body.map(lambda x: f"{{% macro m(i) %}}{x}{{{{ m(i) }}}}{{% endmacro %}}{{{{ m(1) }}}}"),
        body.map(lambda x: f"{{% set b %}}{x}{{% endset %}}"),
        body.map(lambda x: f"{{% filter upper %}}{x}{{% endfilter %}}"),
        body.map(lambda x: f"{{% generation %}}{x}{{% endgeneration %}}"),
    )


LINES = st.one_of(
    EXPRESSIONS.map(lambda x: f"{{{{ {x} }}}}"),
    EXPRESSIONS.map(lambda x: f"{{% set n.x = {x} %}}"),
    EXPRESSIONS.map(lambda x: f"{{% set b = {x} %}}"),
    st.sampled_from(["text", "{% break %}", "{%", "}}", "{#", "{{ loop(i) }}", "\x1b[2J\ud800"]),
)
TEMPLATES = st.lists(st.recursive(LINES, nested, max_leaves=8), max_size=5).map(
    lambda x: "{% set n = namespace(x='x' * 999) %}" + "".join(x)
)


@given(TEMPLATES | st.text(max_size=50).map(lambda x: "{{" + x))
@settings(max_examples=60, deadline=None)
def test_any_template(template: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        smaller(patched)
        said(template)
