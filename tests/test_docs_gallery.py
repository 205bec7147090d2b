"""The gallery's scripts run and write the figures that pages show, here on a few examples."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import DOCS

sys.path.insert(0, str(DOCS / "gallery"))
FEW: dict[str, dict[str, Any]] = {
    "temperatures": {"epochs": 1, "seeds": 2, "examples": 32},
    "scaled_start": {"epochs": 1, "seeds": 2, "examples": 32},
    "interpolation": {"epochs": 1, "seeds": 2, "examples": 32},
    "few_labels": {"steps": 2, "seeds": 2, "counts": [50]},
}


def test_every_script_is_run_here() -> None:
    scripts = {path.stem for path in (DOCS / "gallery").glob("*.py")}
    assert scripts - {"figure", "demo"} == FEW.keys()  # demo.py draws what kdtl demo found


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", FEW)
def test_a_script_writes_its_figure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module(name)
    if name == "few_labels":
        monkeypatch.setattr(script, "METHODS", {"hint": script.METHODS["hint"]})
    script.main(str(tmp_path / "figure.svg"), **FEW[name])
    drawn = (tmp_path / "figure.svg").read_text()
    assert "test accuracy, %" in drawn and drawn.rstrip().endswith("</svg>")
