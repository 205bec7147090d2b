"""The README's Python runs as printed, in order, in one namespace; its numbers are measured."""

import ast
import re

import pytest
from documents import README, ROOT, blocks


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    actual = blocks(README.read_text(), "python")
    assert actual, "the README has no Python example"
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(actual):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    assert capsys.readouterr().out


def test_the_setup_commands_are_complete_lines() -> None:
    """Continuous integration runs the second one exactly as printed."""
    lines = [line for block in blocks(README.read_text(), "sh") for line in block.splitlines()]
    assert sum(line.startswith("python3 -m venv .venv && ") for line in lines) == 2


def numbers(text: str) -> set[str]:
    """Numbers as text, `1,409` as `1409`; none of names such as `float32`."""
    matches = re.findall(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?![\d,]*\d)", text)
    return {number.replace(",", "") for number in matches}


def test_measured_numbers_stand_in_the_headers_of_their_scripts() -> None:
    _, _, section = README.read_text().partition("\n## Measured\n")
    bullets = re.findall(
        r"^- (.*?):\s+`python (\S+\.py)", section.partition("\n## ")[0], re.S | re.M
    )
    assert len(bullets) == section.partition("\n## ")[0].count("\n- ") > 0
    for text, script in bullets:
        header = numbers(ast.get_docstring(ast.parse((ROOT / script).read_text())) or "")
        assert numbers(text) <= header, f"{script}: {sorted(numbers(text) - header)}"
