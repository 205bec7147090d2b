"""The results of `kdtl language`, as JSON, as a page and as a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdtl_jax import _files
from kdtl_jax.recipes import _folders, _tables
from kdtl_jax.run import report
from kdtl_jax.run.report import plots


class LanguageRow(NamedTuple):
    """A model's scores on held-out text, size, speed and training."""

    name: str
    title: str
    measures: Mapping[str, float]
    parameters: int
    bytes: int
    tokens_per_second: float
    seconds: float
    trained: Mapping[str, Any]


class Sample(NamedTuple):
    """A prompt and each model's continuation."""

    prompt: str
    continuations: Mapping[str, str]


HEADER = (
    "", "bits/byte", "KL(T‖S)", "KL(S‖T)", "top-1 %", "overlap %", "entropy", "parameters", "MB",
    "tokens/s", "trained s",
)  # fmt: skip
NOTE = (
    "On held-out text, per token and in nats at temperature 1: KL(T‖S) is the forward KL from the "
    "teacher to the student, KL(S‖T) the reverse; top-1 is how often both agree on the most "
    "likely token; overlap is Σ min(p, q). tokens/s is for a forward pass, on this machine during "
    "this run."
)


def cells(row: LanguageRow) -> tuple[str, ...]:
    """The cells of a row under `HEADER`."""
    measures = row.measures
    return (
        row.title,
        f"{measures['bits_per_byte']:.4f}",
        f"{measures['forward_kl']:.4f}",
        f"{measures['reverse_kl']:.4f}",
        f"{100 * measures['agreement']:.1f}",
        f"{100 * measures['overlap']:.1f}",
        f"{measures['entropy']:.3f}",
        f"{row.parameters:,}",
        f"{row.bytes / 1e6:.1f}",
        f"{row.tokens_per_second:,.0f}",
        f"{row.seconds:.0f}" if row.seconds else "–",
    )


def write(
    folder: Path,
    title: str,
    about: Mapping[str, Any],
    rows: Sequence[LanguageRow],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    samples: Sequence[Sample],
    notes: Sequence[str],
) -> None:
    """Writes `results.json` and `report.html` and prints the table."""
    record = {
        "schema_version": 1,
        "task": title,
        "data": about,
        "rows": [row._asdict() for row in rows],
        "curves": curves,
        "samples": [sample._asdict() for sample in samples],
        "notes": notes,
        "environment": report.environment(),
    }
    _files.write_json(folder / "results.json", record)
    sections = [
        report.Section("Results", [NOTE], [report.table(HEADER, list(map(cells, rows)), narrow=5)])
    ]
    lines = [
        plots.Curve(name, [x["step"] for x in curve], [x["eval/agreement"] for x in curve])
        for name, curve in curves.items()
        if curve
    ]
    if lines:
        axis = "top-1 agreement with the teacher, %"
        chart = plots.lines(lines, x_axis="step", y_axis=axis)
        sections.append(report.Section("During training", [f"On held-out text: {axis}."], [chart]))
    if samples:
        sections.append(
            report.Section("Side by side", ["Each continues the same held-out prompt."])
        )
    for i, sample in enumerate(samples, 1):
        entries = [("prompt", sample.prompt), *sample.continuations.items()]
        sections.append(report.Section(f"Prompt {i}", (), [report.Definitions(entries)], level=3))
    settings = [
        (row.title, "; ".join(f"{k}: {v}" for k, v in row.trained.items()))
        for row in rows
        if row.trained
    ]
    sections.append(report.Section("Settings", (), [report.Definitions(settings)]))
    sections += report.run_sections(_folders.run_record(folder))
    html = report.page(title, sections, notes=list(notes))
    _files.write_atomic(folder / "report.html", html.encode(errors="replace"))
    print(_tables.aligned([HEADER, *map(cells, rows)]))
    for note in notes:
        print(f"note: {note}")
    print(f"report: {folder / 'report.html'}")
