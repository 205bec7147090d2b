"""The README's Python runs as printed, in order, in one namespace."""

import re
from pathlib import Path

import pytest

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
