"""`kdtl bench`: the train step of typical pairs against the machine's own ceilings."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from kdtl_jax import _files
from kdtl_jax.cli import _output
from kdtl_jax.cli._config import UsageError
from kdtl_jax.recipes import bench
from kdtl_jax.run import measure, report
from kdtl_jax.run.report import plots

NAMES = ("mlp", "resnet", "vit", "decoder")
DTYPES = ("float32", "bfloat16", "float16")
HEADER = (
    *("pair", "ms/step pipelined", "ms/step awaited, p10–p90", "examples/s", "compile s"),
    *("GFLOP", "MB", "roofline", "bound by"),
)
TIMES = (
    "Pipelined is the loop's rate, only the last step awaited; awaited are single steps, each "
    "until the device is done (10th to 90th percentile)."
)
SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl bench`."""
    _output.add_out(parser, "runs/bench")
    parser.add_argument(
        "--preset", choices=(*NAMES, "all"), default="all", help="which pair; default: all"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the arithmetic; default: float32"
    )
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="examples per step; default: the pair's"
    )
    parser.add_argument(
        "--steps", type=_positive, default=20, metavar="N", help="that count; default: 20"
    )
    parser.add_argument(
        "--devices",
        type=_positive,
        metavar="N",
        help="measure scaling on 1, 2, 4 … N devices; on a CPU, N virtual ones. Default: all",
    )
    parser.add_argument("--trace", metavar="FOLDER", help="write a jax.profiler trace here")
    parser.add_argument("--quick", action="store_true", help="tiny models, a smoke test")
    parser.epilog = (
        "Example: kdtl bench --preset resnet --dtype bfloat16\n"
        "Example: kdtl bench --preset mlp --devices 8 --trace runs/trace"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes bench.json and report.html; returns the exit code."""
    folder = _output.run_folder(args)
    devices = _devices(args.devices)
    progress = _output.progress()
    progress("ceilings")
    limits = measure.ceilings(jnp.dtype(args.dtype), quick=args.quick)
    chosen = bench.presets(quick=args.quick)
    found = []
    for name in NAMES if args.preset == "all" else (args.preset,):
        progress(name)
        found.append(
            bench.run(
                chosen[name],
                limits,
                dtype=jnp.dtype(args.dtype),
                batch_size=args.batch_size,
                steps=args.steps,
                devices=devices,
                trace=None if args.trace is None else str(Path(args.trace) / name),
            )
        )
    record = to_json(limits, found)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _files.write_atomic(folder / "bench.json", text.encode())
    _files.write_atomic(folder / "report.html", html_page(limits, found).encode())
    _print(limits, found)
    print(f"report: {folder / 'report.html'}")
    return 0


def to_json(limits: measure.Ceilings, found: Sequence[bench.Measured]) -> dict[str, Any]:
    """The content of bench.json: ceilings, one record per pair, the environment."""
    return {
        "schema_version": SCHEMA_VERSION,
        "ceilings": limits._asdict(),
        "pairs": [_plain(one) for one in found],
        "environment": report.environment(),
    }


def rows(found: Sequence[bench.Measured]) -> list[list[str]]:
    """The table's cells under `HEADER`."""
    return [
        [
            one.preset,
            _digits(1e3 * one.seconds),
            f"{_digits(1e3 * one.steps.p10)}–{_digits(1e3 * one.steps.p90)}",
            f"{one.examples_per_second:,.0f}",
            f"{one.compile_seconds:.1f}",
            _scaled(one.cost.flops, 1e9),
            _scaled(_bytes(one), 1e6),
            "–" if one.roofline is None else f"{100 * one.roofline.fraction:.0f} %",
            "–" if one.roofline is None else one.roofline.bound,
        ]
        for one in found
    ]


def html_page(limits: measure.Ceilings, found: Sequence[bench.Measured]) -> str:
    """The report: table, step times, roofline, scaling."""
    about = (
        f"{_ceilings(limits)}. Train steps of this library: teacher forward, student forward and "
        "backward, optimizer. "
        f"{'; '.join(f'{one.preset}: {one.about}, batch {one.batch_size}' for one in found)}."
    )
    note = (
        f"{TIMES} MB is what the compiled step needs. Roofline: the least time that the ceilings "
        "allow, over the measured time."
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
            "FLOPs and bytes by XLA's cost analysis, which counts every operand of every "
            "operation: what stays in a cache makes a program look more bound by bandwidth than "
            "it is."
        )
        chart = plots.roofline(worked, flops=limits.flops, bytes=limits.bytes)
        sections.append(report.Section("Roofline", [counted], [chart]))
    if any(one.scaling for one in found):
        sections.append(_scaling(found))
    return report.page("kdtl bench", [*sections, report.environment_section()], notes=[about])


def _scaling(found: Sequence[bench.Measured]) -> report.Section:
    lines = [
        plots.Line(
            one.preset, [s.devices for s in one.scaling], [s.efficiency for s in one.scaling]
        )
        for one in found
        if one.scaling
    ]
    cells = [
        [one.preset, str(s.devices), f"{1e3 * s.seconds:.3g}", f"{s.examples_per_second:,.0f}"]
        + [f"{100 * s.efficiency:.0f} %"]
        for one in found
        for s in one.scaling
    ]
    header = ("pair", "devices", "ms/step", "examples/s", "efficiency")
    note = (
        "Every device gets the same number of examples. "
        + ("Virtual devices share one processor: there, 1/N is the ideal. " if _virtual() else "")
        + "Efficiency is the rate per device against one device."
    )
    chart = plots.lines(lines, x_axis="devices", y_axis="efficiency, %")
    return report.Section("Scaling", [note], [report.table(header, cells), chart])


def table(found: Sequence[bench.Measured]) -> Table:
    """The table for a terminal: a column per pair, so that 80 characters hold every digit."""
    out = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    names, *measured = zip(*rows(found), strict=True)
    out.add_column(HEADER[0])
    for name in names:
        out.add_column(name, justify="right")
    for label, cells in zip(HEADER[1:], measured, strict=True):
        out.add_row(label, *cells)
    return out


def _print(limits: measure.Ceilings, found: Sequence[bench.Measured]) -> None:
    console = Console(highlight=False)
    print(_ceilings(limits))
    if console.is_terminal:
        console.print(table(found))
    else:
        for row in rows(found):
            print("  ".join(f"{name} {cell}" for name, cell in zip(HEADER, row, strict=True)))
    print(TIMES)
    for one in found:
        share = one.epoch_seconds / one.seconds
        path = "one program" if one.epoch_path == "scan" else "single steps"
        print(f"{one.preset}: an epoch as {path} takes {share:.2f} of the time per step")
        for s in one.scaling:
            print(
                f"{one.preset}: {s.devices} devices, {s.examples_per_second:,.0f} examples/s, "
                f"efficiency {100 * s.efficiency:.0f} %"
            )


def _ceilings(limits: measure.Ceilings) -> str:
    return (
        f"Ceilings here: {limits.flops / 1e9:,.0f} GFLOP/s (matmul, {limits.dtype}, "
        f"n = {limits.matmul_size}), {limits.bytes / 1e9:,.1f} GB/s (copy)"
    )


def _devices(asked: int | None) -> int:
    """How many devices to use; on a CPU as many virtual ones as asked for."""
    if asked is not None and asked > 1:
        try:
            jax.config.update("jax_num_cpu_devices", asked)
        except RuntimeError:
            pass  # the back end is up already, with as many devices as it has
    have = jax.device_count()
    if asked is not None and asked > have:
        raise UsageError(f"--devices {asked}: there are {have} devices here.")
    return have if asked is None else asked


def _virtual() -> bool:
    return jax.default_backend() == "cpu" and jax.device_count() > 1


def _bytes(one: bench.Measured) -> float | None:
    return one.memory.compiled()


def _scaled(value: float | None, unit: float) -> str:
    return "–" if value is None else _digits(value / unit)


def _digits(value: float) -> str:
    """Three significant digits; all of them before the point, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plain(value: Any) -> Any:
    """NamedTuples as objects, anything that is not finite as null."""
    if hasattr(value, "_asdict"):
        return {k: _plain(v) for k, v in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value
