"""The README's Python runs as printed, in order, in one namespace; its table of losses is whole."""

import inspect
import re
from pathlib import Path

import pytest

from kdtl_jax import losses

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks("python")
    assert found, "the README has no Python example"
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(found):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    assert capsys.readouterr().out


def test_the_setup_commands_are_complete_lines() -> None:
    """Continuous integration runs the second one exactly as printed."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert sum(line.startswith("python3 -m venv .venv && ") for line in lines) == 2


# Public callables of kdtl_jax.losses that are pieces of a listed loss, and stand with it.
PIECES = {
    *("answers_first", "causal_shift", "head_logits", "token_log_probs"),  # aligning tokens
    *("soften_top_k", "stored_top_k", "top_k_buckets", "top_k_targets"),  # making top-k teachers
    *("unit_classes", "unit_features"),
    *("attention_map", "taid_start", "jacobian_matching_exact"),
}


def test_every_loss_has_a_line_in_the_table() -> None:
    named = set(re.findall(r"`([a-z_0-9]+)`", README.read_text()))
    public = {n for n, f in vars(losses).items() if inspect.isfunction(f) and n[0] != "_"}
    assert public - named - PIECES == set()
    assert not PIECES - public, "no longer public"
