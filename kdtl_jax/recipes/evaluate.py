"""How good a student is on labeled data: accuracy, per class, confusion and calibration.

kdtl evaluate runs/distill/students/kd.safetensors test.npz --out scores.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtl_jax import _files
from kdtl_jax.recipes import _inputs, _output, _scoring
from kdtl_jax.recipes.settings import setting

MOST = 20  # classes whose confusion is printed
EXAMPLES = """
  kdtl evaluate runs/distill/students/kd.safetensors digits
  kdtl evaluate runs/distill/students/kd.safetensors test.npz --out scores.json

On the data that the student was trained on, the examples held out for the test are scored.
"""


@dataclass(frozen=True)
class Settings(_inputs.Used, _inputs.Written):
    """What `kdtl evaluate` reads and writes."""

    data: str | None = setting(
        None, "labeled examples, as for kdtl distill", positional=True
    )  # fmt: skip
    out: str | None = setting(None, "write all numbers to this JSON file", metavar="FILE")


def run(settings: Settings) -> int:
    """Prints the scores, and writes them."""
    example = EXAMPLES.strip().splitlines()[0]
    _inputs.check_out(settings)
    model, found = _inputs.used(settings, example, with_labels=True)
    assert found.labels is not None
    names = _inputs.class_names(model)
    logits, kind = model.predict(found.inputs), _inputs.kind(model)
    if kind == "numbers":
        result = _scoring.of_numbers(_inputs.numbers(model, logits), found.labels)
    elif kind == "labels":
        result = _scoring.of_labels(logits, found.labels, names)
    else:
        result = _scoring.of_classes(logits, found.labels, names)
    print(f"{settings.student}: {found.said}", file=sys.stderr)
    print("\n".join(_scoring.lines(result)))
    show(result, names)
    if settings.out is not None:
        known = {"student": settings.student, "data": settings.data, "classes": list(names)}
        _files.write_json(Path(settings.out), {**known, **result})
    return 0


def show(result: dict[str, Any], names: tuple[str, ...]) -> None:
    """The tables of classes."""
    rows = result.get("per_class")
    if not rows:
        return
    header = list(rows[0])
    _output.show(header, [[_cell(value) for value in row.values()] for row in rows])
    if "confusion" in result and len(names) <= MOST:
        counts = [
            [name, *map(str, row)] for name, row in zip(names, result["confusion"], strict=True)
        ]
        lines = [
            f"of class {name}: " + ", ".join(f"{n} named {other}" for n, other in zip(
                row, names, strict=True) if n)
            for name, row in zip(names, result["confusion"], strict=True)
        ]  # fmt: skip
        _output.show(["is \\ named", *names], counts, lines)


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
