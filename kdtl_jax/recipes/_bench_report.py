"""What `kdtl bench` writes and prints: bench.json, report.html, the table."""

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


def to_json(limits: measure.Ceilings, found: Sequence[Any]) -> dict[str, Any]:
    """The content of bench.json: ceilings, one record per pair, the environment."""
    return {
        "schema_version": SCHEMA_VERSION,
        "ceilings": limits._asdict(),
        "pairs": [_fields(one) for one in found],
        "environment": report.environment(),
    }


def rows(found: Sequence[Any]) -> list[list[str]]:
    """The table's cells under `HEADER`."""
    return [
        [
            one.preset,
            _digits(1e3 * one.seconds),
            f"{_digits(1e3 * one.steps.p10)}–{_digits(1e3 * one.steps.p90)}",
            f"{one.examples_per_second:,.0f}",
            f"{one.compile_seconds:.1f}",
            _scaled(one.cost.flops, 1e9),
            _scaled(one.memory.compiled(), 1e6),
            "–" if one.roofline is None else f"{100 * one.roofline.fraction:.0f}%",
            "–" if one.roofline is None else one.roofline.bound,
        ]
        for one in found
    ]


def html_page(limits: measure.Ceilings, found: Sequence[Any]) -> str:
    """The report: table, step times, roofline, scaling."""
    about = (
        f"{_ceilings(limits)}. Train steps of this library: teacher forward, student forward and "
        "backward, optimizer. "
        f"{'; '.join(f'{one.preset}: {one.about}, batch {one.batch_size}' for one in found)}."
    )
    note = (
        f"{TIMES} MB is the memory that the compiled step needs. Roofline: the shortest time that "
        "the ceilings allow, divided by the measured time."
    )
    times = [
        plots.Span(one.preset, *(1e3 * t for t in (o.p10, o.median, o.p90)))
        for one in found
        for o in [one.steps]
    ]
    axis = "milliseconds per step: median, 10th to 90th percentile"
    sections = [
        report.Section("Steps", [note], [report.table(HEADER, rows(found), narrow=4)]),
        report.Section("Step times", (), [plots.spans(times, unit="ms", axis=axis)]),
    ]
    worked = [
        plots.Worked(one.preset, one.cost.flops / one.cost.bytes, one.cost.flops / one.seconds)
        for one in found
        if one.cost.flops and one.cost.bytes
    ]
    if worked:
        counted = (
            "FLOPs and bytes are from XLA's cost analysis, which counts every operand of every "
            "operation: if data stay in a cache, a program looks more bandwidth-bound than it "
            "is."
        )
        chart = plots.roofline(worked, flops=limits.flops, bytes=limits.bytes)
        sections.append(report.Section("Roofline", [counted], [chart]))
    if any(one.scaling for one in found):
        sections.append(_scaling(found))
    return report.page("kdtl bench", [*sections, report.environment_section()], notes=[about])


def _scaling(found: Sequence[Any]) -> report.Section:
    lines = [
        plots.Line(
            one.preset, [s.devices for s in one.scaling], [s.efficiency for s in one.scaling]
        )
        for one in found
        if one.scaling
    ]
    cells = [
        [one.preset, str(s.devices), f"{1e3 * s.seconds:.3g}", f"{s.examples_per_second:,.0f}"]
        + [f"{100 * s.efficiency:.0f}%"]
        for one in found
        for s in one.scaling
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


def table(found: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """A terminal's table: a column per pair, to show every digit within 80 characters."""
    names, *measured = zip(*rows(found), strict=True)
    lines = [[label, *cells] for label, cells in zip(HEADER[1:], measured, strict=True)]
    return [HEADER[0], *names], lines


def show(limits: measure.Ceilings, found: Sequence[Any]) -> None:
    """Prints the machine's limits, the table of steps, and times by epoch and by devices."""
    print(_ceilings(limits))
    named = [zip(HEADER, row, strict=True) for row in rows(found)]
    lines = ["  ".join(f"{name} {cell}" for name, cell in row) for row in named]
    _tables.show(*table(found), lines)
    print(TIMES)
    for one in found:
        share = one.epoch_seconds / one.seconds
        path = "one program" if one.epoch_path == "scan" else "single steps"
        print(f"{one.preset}: an epoch as {path} takes {share:.2f} of the time per step")
        for s in one.scaling:
            print(
                f"{one.preset}: {s.devices} devices, {s.examples_per_second:,.0f} examples/s, "
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
    """NamedTuples as objects."""
    if hasattr(value, "_asdict"):
        return {name: _fields(found) for name, found in value._asdict().items()}
    return [_fields(found) for found in value] if isinstance(value, (list, tuple)) else value
