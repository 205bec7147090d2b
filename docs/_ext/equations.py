r"""Equations as MathML, at build time: browsers draw them without a script or a network.

`$...$` is LaTeX. The role `formula` takes the plain notation of docstrings and tables, such as
{formula}`T^2 KL(p_T‖p_S)` or {formula}`mean (r(f_S) - f_T)^2`.
"""

import re
from html import escape
from typing import Any

import latex2mathml.converter
from docutils import nodes

GREEK = dict(
    alpha="α", beta="β", gamma="γ", delta="δ", epsilon="ε", lambda_="λ", mu="μ", rho="ρ",
    sigma="σ", tau="τ", theta="θ", phi="φ", pi="π", eta="η", sum="∑", inf="∞",
)  # fmt: skip
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀᵀᵅᵝᵞ", "0123456789−⊤⊤αβγ", strict=True))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
SIGNS = {"*": "·", "-": "−", "->": "→", "<=": "≤", ">=": "≥", "||": "‖", "!=": "≠", "==": "="}
TOKEN = re.compile(r"\s+|\d*\.?\d+(?:e-?\d+)?|[^\W\d_]+'*|->|<=|>=|!=|==|\|\||[_^]|.", re.DOTALL)


def mathml(text: str) -> str:
    """Plain notation as a `<math>` element."""
    tokens: list[str] = TOKEN.findall(text)
    out: list[str] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        i += 1
        if token.isspace():
            out.append('<mspace width="0.25em"/>')
            continue
        if token in "_^" and out:
            script, i = _script(tokens, i)
            kind = "msub" if token == "_" else "msup"
            out.append(f"<{kind}>{out.pop()}{script}</{kind}>")
            continue
        if (token[0] in RAISED or token[0] in LOWERED) and out:
            table, kind = (RAISED, "msup") if token[0] in RAISED else (LOWERED, "msub")
            inside = "".join(table.get(c, c) for c in token)
            out.append(f"<{kind}>{out.pop()}<mi>{inside}</mi></{kind}>")
            continue
        out.append(_atom(token))
    return f'<math class="plain">{"".join(out)}</math>'


def _script(tokens: list[str], i: int) -> tuple[str, int]:
    """What stands after `_` or `^`: a word, a number, or what brackets enclose."""
    sign = ""
    if i < len(tokens) and tokens[i] in "-−":
        sign, i = "<mo>−</mo>", i + 1
    if i >= len(tokens):
        return "<mrow></mrow>", i
    if tokens[i] not in "{(":
        return f"<mrow>{sign}{_atom(tokens[i])}</mrow>", i + 1
    closing = {"{": "}", "(": ")"}[tokens[i]]
    end = next((j for j in range(i, len(tokens)) if tokens[j] == closing), len(tokens))
    inside = "".join(_atom(token) for token in tokens[i + 1 : end] if not token.isspace())
    return f"<mrow>{sign}{inside}</mrow>", end + 1


def _atom(token: str) -> str:
    word = token.rstrip("'")
    primes = "′" * (len(token) - len(word))
    if word and (word[0].isalpha()):
        if word[-1] in RAISED and len(word) > 1:
            return f"<msup><mi>{word[:-1]}</mi><mi>{RAISED[word[-1]]}</mi></msup>"
        shown = GREEK.get(word, word)
        tag = "mo" if shown == "∑" else "mi"
        return f"<{tag}>{escape(shown)}{primes}</{tag}>"
    if re.match(r"[\d.]", token):
        return f"<mn>{token}</mn>"
    sign = SIGNS.get(token, token)
    stretchy = ' stretchy="false"' if sign in "()[]{}|‖" else ""
    return f"<mo{stretchy}>{escape(sign)}</mo>"


def formula(
    name: str, rawtext: str, text: str, lineno: int, inliner: Any, options: Any = None,
    content: Any = (),
) -> tuple[list[nodes.Node], list[Any]]:  # fmt: skip
    """The role `formula`."""
    return [nodes.raw("", mathml(text), format="html")], []


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def _display(self: Any, node: nodes.math_block) -> None:
    self.body.append(latex2mathml.converter.convert(node.astext(), display="block"))
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Registers the role and the renderer."""
    app.add_role("formula", formula)
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
