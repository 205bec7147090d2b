"""The gallery's notebooks run, here on few examples, and say what they are."""

import ast
import re
from pathlib import Path

import matplotlib
import pytest
from documents import DOCS

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.py"))
# The constants at the head of a notebook, as small as it runs with.
FEW = {
    "TEMPERATURES": "[1.0]",
    "ALPHAS": "[1.0]",
    "COUNTS": "[50]",
    "METHODS": "{'hint': methods.hint}",
    "SEEDS": "2",
    "EPOCHS": "1",
    "STEPS": "2",
    "EXAMPLES": "32",
}


def with_few_examples(text: str) -> ast.Module:
    """A notebook's code with its constants replaced by those of `FEW`."""
    tree = ast.parse(text)
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        names = [name.id for name in ast.walk(target) if isinstance(name, ast.Name)]
        if not all(name.isupper() for name in names):
            continue
        few = [FEW[name] for name in names]
        node.value = ast.parse(", ".join(few), mode="eval").body
    return ast.fix_missing_locations(tree)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("svg")
    from matplotlib import pyplot

    labels: list[str] = []

    def show() -> None:
        labels.extend(axes.get_ylabel() for axes in pyplot.gcf().axes)
        pyplot.close("all")

    monkeypatch.setattr(pyplot, "show", show)
    exec(compile(with_few_examples(path.read_text()), path.name, "exec"), {"__name__": path.stem})
    assert labels[-1] == "test accuracy, %"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_title_and_sections(path: Path) -> None:
    text = path.read_text()
    title, underline, *_ = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    assert len(title) == len(underline) and set(underline) == {"="}
    assert len(re.findall(r"^# %%$", text, re.MULTILINE)) >= 2
