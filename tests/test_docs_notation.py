"""Plain notation becomes the MathML that it means."""

import importlib
import re
import sys

import pytest
from documents import DOCS

sys.path.insert(0, str(DOCS / "_ext"))
mathml = importlib.import_module("notation").mathml  # beside the documentation, in no package


def short(text: str) -> str:
    """The elements without their fences, letters as they are: `<msub>(p)[S]` of `p_S`."""
    inside = re.sub(r"</?(?:mi|mo|mn|math|mrow)\b[^>]*>", "", mathml(text))
    return re.sub(r"<mspace[^>]*>", " ", inside)


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("p_S", "<msub>pS</msub>"),
        ("lambda_i x'", "<msub>λi</msub> x′"),
        ("T^2 KL", "<msup>T2</msup> KL"),
        ("T² (a)⁻¹d", "<msup>T2</msup> (a<msup>)−1</msup>d"),
        ("f₁ᵀf₂", "<msup><msub>f1</msub>⊤</msup><msub>f2</msub>"),
        ("G_S²", "<msup><msub>GS</msub>2</msup>"),
        ("e^{−(z_k − z_l)}", "<msup>e−(<msub>zk</msub>−<msub>zl</msub>)</msup>"),
        ("p^(1/(a b)) q", "<msup>p1/(ab)</msup> q"),
        ("2^{-l}", "<msup>2−l</msup>"),
        ("a <= b c", "a≤b c"),  # the operator brings its own space
        ("βp_S", "β<msub>pS</msub>"),
    ],
)
def test_notation(text: str, elements: str) -> None:
    assert short(text) == elements


def test_scripts_bind_one_group() -> None:
    assert mathml("x_{i}y") == (
        '<math class="plain"><msub><mi>x</mi><mrow><mi>i</mi></mrow></msub><mi>y</mi></math>'
    )
