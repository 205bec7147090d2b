"""Every measured figure that users read stands in the record of a command named beside it.

The record of a benchmark is its script's header, that of a `kdtl` command its recipe's docstring,
that of the demo also its chart. A figure may be rounded, and a share given in percent.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import DOCS, README, ROOT, WRITTEN

from kdtl_jax import cli

NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
# What makes a sentence a measurement: a number with a unit of time, memory or share, an interval,
# a ratio of speeds.
MEASURED = re.compile(
    rf"(?:{NUMBER}\s*(?:%|(?:MB|GB|ms|us|µs|s|seconds?|minutes?|hours?)\b))|\d\s*±\s*\d"
    rf"|(?:{NUMBER}|twice|half|third|quarter|two|three|four|five|ten)\s*(?:x|times)?\s+"
    r"(?:as\s+(?:fast|slow|quick|long)|faster|slower|the\s+(?:time|speed|memory))"
)
# Definitions and settings, which nobody measured.
DEFINED = re.compile(
    r"\b9[05]\s?%\s+(?:confidence\s+)?interval|(?:within|by less than) 1%|pieces of 4 MB"
)
COMMAND = re.compile(r"(?:python (benchmarks/\w+\.py)|(?:^|[`\s/])kdtl ((?:params )?[a-z]+))", re.M)


def numbers(text: str) -> list[str]:
    """Numbers as they stand, `1,409` as `1409`, `33%`; none of names such as `float32`."""
    matches = re.findall(rf"(?<![\w.,/-]){NUMBER}(?![\w/]|\.\d)%?", text)
    return [number.replace(",", "") for number in matches]


def is_recorded(number: str, record: set[float]) -> bool:
    """Whether a record has a number, to its own precision; of a percentage, also the share."""
    value, scales = number.rstrip("%"), (1, 100) if number.endswith("%") else (1,)
    half = 0.5 * 10 ** -len(value.partition(".")[2]) + 1e-9
    return any(abs(float(value) - scale * x) <= half for x in record for scale in scales)


def record(text: str) -> set[float]:
    """All numbers that the records of the commands in a text have."""
    results: set[float] = set()
    for script, command in COMMAND.findall(text):
        if script:
            header = ast.get_docstring(ast.parse((ROOT / script).read_text())) or ""
        else:
            header = _recipe(command)
            if command == "demo":
                drawn = (DOCS / "_static" / "demo-light.svg").read_text()
                header += " ".join(re.findall(r">([\d.]+)<", drawn))
        # `-0.0086`, `.0010`, `2048x2048` and `12-10` are numbers too.
        matches = re.findall(r"\d+(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+", header)
        results |= {float(number.replace(",", "")) for number in matches}
    return results


def _recipe(command: str) -> str:
    """The docstring of a command's recipe."""
    for known in cli.COMMANDS:
        if known.name == command.split()[0]:
            path = ROOT / (known.module.replace(".", "/") + ".py")
            return ast.get_docstring(ast.parse(path.read_text())) or "" if path.exists() else ""
    return ""


def passages(text: str) -> Iterator[tuple[str, str]]:
    """`(paragraph, what stands around it under its heading)`; items of lists by themselves."""
    for section in re.split(r"^#+ .*$", text, flags=re.MULTILINE):
        parts = re.split(r"\n[ \t]*\n|\n(?=- )", section)
        for i, part in enumerate(parts):
            if "```" not in part or part.startswith("```{image}"):
                yield part, "\n".join(parts[max(0, i - 3) : i + 4])


def unrecorded(text: str) -> list[str]:
    """Measured paragraphs of a text without a command, or with numbers that its record lacks."""
    wrong = []
    for part, around in passages(text):
        prose = re.sub(r"`[^`]*`", "", DEFINED.sub("", part))
        if not MEASURED.search(prose):
            continue
        known = record(part) or record(around)
        kept = re.sub(r"\b(?:jax|torch|numpy|transformers|Python) [\d.]+\d", "", prose)
        missing = [number for number in numbers(kept) if not is_recorded(number, known)]
        if not known:
            wrong.append(f"no command beside: {part.strip()[:100]!r}")
        elif missing:
            wrong.append(f"{missing} not in the record: {part.strip()[:100]!r}")
    return wrong


@pytest.mark.parametrize("path", [README, *WRITTEN], ids=lambda path: str(path.relative_to(ROOT)))
def test_measured_figures_of_a_page_are_recorded(path: Path) -> None:
    wrong = unrecorded(path.read_text())
    assert not wrong, "\n".join(wrong)


def test_measured_figures_of_docstrings_name_their_command() -> None:
    """Those of modules, classes and functions that the site shows."""
    wrong = []
    for path in sorted((ROOT / "kdtl_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
                continue
            text = ast.get_docstring(node) or ""
            if getattr(node, "name", "").startswith("_") or COMMAND.search(text):
                continue
            prose = re.sub(r"`[^`]*`", "", DEFINED.sub("", text))
            if match := MEASURED.search(prose):
                wrong.append(f"{path.relative_to(ROOT)} {getattr(node, 'name', '')}: {match[0]!r}")
    assert not wrong, "\n".join(wrong)


def test_benchmarks_record_command_machine_and_result() -> None:
    for path in sorted((ROOT / "benchmarks").glob("[!_]*.py")):
        header = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert f"python benchmarks/{path.name}" in header, path.name
        assert re.search(r"jax\s+0\.\d+", header) and re.search(r"cores", header), path.name


def test_figures_that_are_not_recorded_are_found() -> None:
    good = "Takes 42 seconds: `kdtl demo`.\n\n# Other\n\nIt has 95% intervals and 3 seeds.\n"
    assert unrecorded(good) == []
    for bad in (
        "Takes 43 seconds: `kdtl demo`.",
        "Takes 42 seconds.",
        "# A\n\nTakes 42 seconds.\n\n# B\n\n`kdtl demo`",
        "Sampling is 9.7 times as fast: `python benchmarks/language.py`",
        "By 34% at k = 16: `python benchmarks/language_gradients.py`",
    ):
        assert len(unrecorded(bad)) == 1, bad
