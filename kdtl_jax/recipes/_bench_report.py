"""The outputs of `kdtl bench`: bench.json, report.html, and the printed table."""

from collections.abc import Sequence
from typing import Any

import jax

from kdtl_jax.recipes import _tables
from kdtl_jax.run import measure, report
from kdtl_jax.run.report import plots

HEADER = (
    *("pair", "ms/step pipelined", "ms/step awaited, p10–p90", "examples/s", "compile s"),
    *("GFLOP", "MB", "roofline", "bound by"),
)
TIMES = (
    "Pipelined: the rate of a loop in which only the last step is awaited. Awaited: single steps, "
    "each timed until the device is done (10th to 90th percentile)."
)
SCHEMA_VERSION = 1


def to_json(limits: measure.Ceilings, results: Sequence[Any]) -> dict[str, Any]:
    """The content of bench.json: ceilings, one record per pair, the environment."""
    return {
        "schema_version": SCHEMA_VERSION,
        "ceilings": limits._asdict(),
        "pairs": [_fields(result) for result in results],
        "environment": report.environment(),
    }


def rows(results: Sequence[Any]) -> list[list[str]]:
    """The table's cells under `HEADER`."""
    return [
        [
            result.preset,
            _digits(1e3 * result.seconds),
            f"{_digits(1e3 * result.steps.p10)}–{_digits(1e3 * result.steps.p90)}",
            f"{result.examples_per_second:,.0f}",
            f"{result.compile_seconds:.1f}",
            _scaled(result.cost.flops, 1e9),
            _scaled(result.memory.compiled(), 1e6),
            "–" if result.roofline is None else f"{100 * result.roofline.fraction:.0f}%",
            "–" if result.roofline is None else result.roofline.bound,
        ]
        for result in results
    ]


def html_page(limits: measure.Ceilings, results: Sequence[Any]) -> str:
    """The report: table, step times, roofline, scaling."""
    about = (
        f"{_ceilings(limits)}. Train steps of this library: teacher forward, student forward and "
        "backward, optimizer. "
        f"{'; '.join(f'{r.preset}: {r.about}, batch {r.batch_size}' for r in results)}."
    )
    note = (
        f"{TIMES} MB is the memory that the compiled step needs. Roofline: the shortest time that "
        "the ceilings allow, divided by the measured time."
    )
    times = [
        plots.Span(result.preset, *(1e3 * seconds for seconds in (o.p10, o.median, o.p90)))
        for result in results
        for o in [result.steps]
    ]
    axis = "milliseconds per step: median, 10th to 90th percentile"
    sections = [
        report.Section("Steps", [note], [report.table(HEADER, rows(results), narrow=4)]),
        report.Section("Step times", (), [plots.spans(times, unit="ms", axis=axis)]),
    ]
    intensities = [
        plots.Worked(
            result.preset, result.cost.flops / result.cost.bytes, result.cost.flops / result.seconds
        )
        for result in results
        if result.cost.flops and result.cost.bytes
    ]
    if intensities:
        cost_note = (
            "FLOPs and bytes are from XLA's cost analysis, which counts every operand of every "
            "operation. If data stay in a cache, a program looks more bandwidth-bound than it is."
        )
        chart = plots.roofline(intensities, flops=limits.flops, bytes=limits.bytes)
        sections.append(report.Section("Roofline", [cost_note], [chart]))
    if any(result.scaling for result in results):
        sections.append(_scaling(results))
    return report.page("kdtl bench", [*sections, report.environment_section()], notes=[about])


def _scaling(results: Sequence[Any]) -> report.Section:
    lines = [
        plots.Curve(
            result.preset,
            [s.devices for s in result.scaling],
            [s.efficiency for s in result.scaling],
        )
        for result in results
        if result.scaling
    ]
    cells = [
        [result.preset, str(s.devices), f"{1e3 * s.seconds:.3g}", f"{s.examples_per_second:,.0f}"]
        + [f"{100 * s.efficiency:.0f}%"]
        for result in results
        for s in result.scaling
    ]
    header = ("pair", "devices", "ms/step", "examples/s", "efficiency")
    is_virtual = jax.default_backend() == "cpu" and jax.device_count() > 1
    note = (
        "Every device gets the same number of examples. "
        + ("Virtual devices share one processor, so 1/N is the ideal. " if is_virtual else "")
        + "Efficiency is the rate per device relative to one device."
    )
    chart = plots.lines(lines, x_axis="devices", y_axis="efficiency, %")
    return report.Section("Scaling", [note], [report.table(header, cells), chart])


def table(results: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """The table for a terminal: a column per pair, so that every digit fits in 80 characters."""
    names, *cells_by_column = zip(*rows(results), strict=True)
    lines = [[label, *cells] for label, cells in zip(HEADER[1:], cells_by_column, strict=True)]
    return [HEADER[0], *names], lines


def show(limits: measure.Ceilings, results: Sequence[Any]) -> None:
    """Prints the machine's limits, the table of steps, and times by epoch and by devices."""
    print(_ceilings(limits))
    labeled = [zip(HEADER, row, strict=True) for row in rows(results)]
    lines = ["  ".join(f"{name} {cell}" for name, cell in row) for row in labeled]
    _tables.show(*table(results), lines)
    print(TIMES)
    for result in results:
        share = result.epoch_seconds / result.seconds
        path = "one program" if result.epoch_path == "scan" else "single steps"
        print(f"{result.preset}: an epoch as {path} takes {share:.2f} of the time per step")
        for s in result.scaling:
            print(
                f"{result.preset}: {s.devices} devices, {s.examples_per_second:,.0f} examples/s, "
                f"efficiency {100 * s.efficiency:.0f}%"
            )


def _ceilings(limits: measure.Ceilings) -> str:
    return (
        f"Ceilings here: {limits.flops / 1e9:,.0f} GFLOP/s (matmul, {limits.dtype}, "
        f"n = {limits.matmul_size}), {limits.bytes / 1e9:,.1f} GB/s (copy)"
    )


def _scaled(value: float | None, unit: float) -> str:
    return "–" if value is None else _digits(value / unit)


def _digits(value: float) -> str:
    """Three significant digits, without an exponent; larger integers in full."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _fields(value: Any) -> Any:
    """NamedTuples as JSON objects."""
    if hasattr(value, "_asdict"):
        return {name: _fields(item) for name, item in value._asdict().items()}
    return [_fields(item) for item in value] if isinstance(value, (list, tuple)) else value
