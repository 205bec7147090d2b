"""The plain notation of docstrings and tables, such as `Σ_{i≥l} γ^(i−l) r_i`, as MathML."""

import re
from html import escape

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "lambda": "λ",
    "mu": "μ", "rho": "ρ", "sigma": "σ", "tau": "τ", "theta": "θ", "phi": "φ", "pi": "π",
    "eta": "η", "sum": "∑", "inf": "∞",
}  # fmt: skip
SIGNS = {"*": "·", "-": "−", "->": "→", "<=": "≤", ">=": "≥", "||": "‖", "!=": "≠", "==": "="}
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀᵅᵝᵞ", "0123456789−⊤αβγ")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
SPACED = {"+", "-", "−", "*", "·", "/", "->", "→", "=", "==", "!=", "<=", ">=", "<", ">", "≤", "≥"}
CLOSING = {"(": ")", "{": "}"}
GREEK_LETTER = r"[α-ωΑ-Ω](?=[A-Za-z])"  # times what follows: `βp`
TOKEN = re.compile(
    rf"\s+|\d*\.?\d+(?:e-?\d+)?|{GREEK_LETTER}|[^\W\d_]+'*|->|<=|>=|!=|==|\|\||[_^]|.", re.DOTALL
)


def mathml(text: str) -> str:
    """Plain notation as a `<math>` element."""
    for mark, table in (("^", RAISED), ("_", LOWERED)):
        signs = "".join(map(chr, table))
        text = re.sub(f"([{signs}]+)", rf"{mark}{{\1}}", text).translate(table)
    inside, _ = _row(TOKEN.findall(text), 0)
    return f'<math class="plain">{inside}</math>'


def _row(tokens: list[str], i: int, closing: str = "") -> tuple[str, int]:
    """The elements up to `closing`, or to the end; and where what follows begins."""
    out: list[str] = []
    while i < len(tokens) and tokens[i] != closing:
        token = tokens[i]
        i += 1
        if token.isspace():
            beside = {tokens[i - 2] if i > 1 else "", tokens[i] if i < len(tokens) else ""}
            # Scripts are set tight; operators bring their own space.
            out += [] if closing or beside & SPACED else ['<mspace width="0.25em"/>']
        elif token in "_^":
            script, i = _script(tokens, i)
            kind = "msub" if token == "_" else "msup"
            base = out.pop() if out else "<mrow></mrow>"
            out.append(f"<{kind}>{base}{script}</{kind}>")
        elif closing and token in CLOSING:
            inner, i = _row(tokens, i, CLOSING[token])
            out += [_atom(token), inner, _atom(CLOSING[token])]
        else:
            out.append(_atom(token))
    return "".join(out), i + 1


def _script(tokens: list[str], i: int) -> tuple[str, int]:
    """What stands after `_` or `^`: a word, a number, or what brackets enclose."""
    sign = ""
    if i < len(tokens) and tokens[i] in "-−":
        sign, i = "<mo>−</mo>", i + 1
    if i >= len(tokens):
        inside = ""
    elif tokens[i] in CLOSING:
        inside, i = _row(tokens, i + 1, CLOSING[tokens[i]])
    else:
        inside, i = _atom(tokens[i]), i + 1
    return f"<mrow>{sign}{inside}</mrow>", i


def _atom(token: str) -> str:
    word = token.rstrip("'")
    if re.match(r"[\d.½¼]", word):
        return f"<mn>{token}</mn>"
    if word[:1].isalpha() or word == "⊤":
        shown = GREEK.get(word, word)
        tag = "mo" if shown == "∑" else "mi"
        return f"<{tag}>{escape(shown)}{'′' * (len(token) - len(word))}</{tag}>"
    sign = SIGNS.get(token, token)
    stretchy = ' stretchy="false"' if sign in "()[]{}|‖" else ""
    return f"<mo{stretchy}>{escape(sign)}</mo>"
