"""Every `kdtl` command that the documentation shows is understood: its name, flags and values."""

import re
import shlex
from pathlib import Path

import pytest
from documents import README, ROOT, WRITTEN

from kdtl_jax import cli
from kdtl_jax.cli import _parser
from kdtl_jax.recipes.settings import UsageError

PAGES = [README, *WRITTEN, *sorted((ROOT / "examples").glob("*.md"))]


def shown(text: str) -> list[str]:
    """Commands on lines of their own, and in code spans."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^(?:    )?(?:\S*/)?(kdtl [^`\n]*)$", joined, re.MULTILINE)
    spans = re.findall(r"(?<!`)`(kdtl [a-z][^`]*)`(?!`)", joined)
    results = [line.partition(" #")[0].strip() for line in lines + spans]
    return [command for command in results if not re.search(r"\b(?:COMMAND|ACTION)\b", command)]


def understood(command: str) -> str | None:
    """None, or what is wrong with a command; files need not exist."""
    words = shlex.split(command)[1:]
    if "--config" in words:
        place = words.index("--config")
        del words[place : place + 2]
    try:
        result = cli.find(words)
        if result is not None:
            _parser.parse(*result)
    except UsageError as error:
        return f"{command}: {error}"
    return None


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_a_page_are_understood(path: Path) -> None:
    wrong = [message for command in shown(path.read_text()) if (message := understood(command))]
    assert not wrong, "\n".join(wrong)


def test_commands_that_are_wrong_are_found() -> None:
    text = (
        "    kdtl distill --seeds 2 \\\n        --lr 0.1\nas `kdtl distil` and\n`kdtl env --no`\n"
    )
    first, *others = shown(text)
    assert first == "kdtl distill --seeds 2 --lr 0.1" and understood(first) is None
    assert len(others) == 2 and all(understood(command) for command in others)
