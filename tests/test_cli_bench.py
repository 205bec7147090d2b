"""`kdtl bench` and the measurements beneath it: what they count, not how fast it is."""

import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from kdtl_jax.cli import main
from kdtl_jax.recipes import _bench_report, _tables, bench
from kdtl_jax.run import measure

LIMITS = measure.Ceilings(1e9, 1e8, "float32", 1024, 2**28)


def test_the_compiler_counts_a_matmul() -> None:
    x = jnp.ones((64, 32), jnp.float32)
    program, seconds = measure.compiled(jax.jit(lambda x: x @ x.T), x)
    cost, memory = measure.cost(program), measure.memory(program)
    assert cost.flops == pytest.approx(2 * 64 * 64 * 32, rel=0.05)
    assert cost.bytes is not None and cost.bytes >= 4 * (64 * 32 + 64 * 64)
    assert (memory.arguments, memory.outputs) == (4 * 64 * 32, 4 * 64 * 64)
    assert memory.compiled() == 4 * (64 * 32 + 64 * 64) + (memory.temporaries or 0)
    assert seconds > 0


def test_the_roofline_names_what_binds() -> None:
    compute = measure.roofline(measure.Cost(1e9, 1e7), 2.0, LIMITS)
    assert compute == measure.Roofline(1.0, 0.1, "compute", 0.5)
    bandwidth = measure.roofline(measure.Cost(1e8, 1e8), 4.0, LIMITS)
    assert bandwidth == measure.Roofline(0.1, 1.0, "bandwidth", 0.25)
    assert measure.roofline(measure.Cost(None, 1e8), 4.0, LIMITS) is None


def test_step_times_leave_the_warm_up_out() -> None:
    calls: list[int] = []

    def once() -> jax.Array:
        calls.append(1)
        return jnp.zeros(())

    actual = measure.step_times(once, 5, warmup=2)
    assert len(calls) == 7 and actual.runs == 5
    assert 0 < actual.p10 <= actual.median <= actual.p90 <= actual.maximum
    assert measure.throughput(once, 4, warmup=1, rounds=2) > 0 and len(calls) == 12
    assert measure.distribution([1.0, 2.0, 3.0]).median == 2.0
    with pytest.raises(ValueError, match="steps must be at least 1"):
        measure.step_times(once, 0)


def test_devices_double_up_to_the_last() -> None:
    assert bench.device_counts(1) == [1] and bench.device_counts(8) == [1, 2, 4, 8]
    assert bench.device_counts(6) == [1, 2, 4, 6]


def test_every_pair_is_larger_on_the_teacher_s_side() -> None:
    for quick in (True, False):
        for preset in bench.presets(quick=quick).values():
            example = jax.ShapeDtypeStruct(
                (1, *preset.shape), jnp.int32 if preset.name == "decoder" else jnp.float32
            )
            sizes = [
                sum(x.size for x in jax.tree.leaves(jax.eval_shape(m.init, KEY, example)))
                for m in (preset.teacher, preset.student)
            ]
            assert sizes[0] > 1.5 * sizes[1], preset.name


KEY = jax.random.key(0)


def measured(preset: str, scale: float) -> bench.Measured:
    """Made-up measurements, in seconds and bytes times `scale`."""
    median, p10, p90, most = (scale * t for t in (1.234e-3, 1.0526e-3, 1.855e-3, 2e-3))
    return bench.Measured(
        preset=preset,
        about="",
        dtype="float32",
        batch_size=64,
        teacher_parameters=1,
        student_parameters=1,
        compile_seconds=1.2 * scale,
        steps=measure.Distribution(median, p10, p90, most, 20),
        seconds=1.0369e-3 * scale,
        examples_per_second=1e6 / scale,
        epoch_path="scan",
        epoch_seconds=1e-3,
        cost=measure.Cost(1e9 * scale, 1e9),
        memory=measure.Memory(10**6, 10**6, 10**6, None),
        roofline=measure.Roofline(1.0, 2.0, "bandwidth", 1.0),
        scaling=(),
    )


def test_a_terminal_of_80_columns_shows_every_digit() -> None:
    results = [measured("mlp", 0.1), measured("resnet", 1e3), measured("vit", 2e3)]
    results.append(measured("decoder", 1.0))
    screen = io.StringIO()
    Console(width=80, file=screen).print(_tables.table(*_bench_report.table(results)))
    text = screen.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for row in _bench_report.rows(results):
        assert all(cell in text for cell in row)
    assert "1,053–1,855" in text and "ms/step awaited, p10–p90" in text


@pytest.mark.usefixtures("standard_promotion")
def test_bench_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, trace = tmp_path / "run", tmp_path / "trace"
    command = ["bench", "--quick", "--preset", "mlp", "--steps", "2", "--batch-size", "8"]
    assert main([*command, "--devices", "2", "--trace", str(trace), "--out", str(out)]) == 0
    record = json.loads((out / "bench.json").read_text())
    (pair,) = record["pairs"]
    assert pair["batch_size"] == 8 and pair["teacher_parameters"] == 32 * 64 + 64 + 640 + 10
    assert pair["epoch_path"] == "scan" and pair["epoch_seconds"] > 0
    assert [s["devices"] for s in pair["scaling"]] == [1, 2]
    # Both forwards and the student's backward, nothing else of size.
    student, teacher = 32 * 16 + 16 * 10, 32 * 64 + 64 * 10
    least = 2 * 8 * (teacher + 2 * student + 16 * 10)
    assert least <= pair["cost"]["flops"] <= 3 * least
    assert pair["roofline"]["bound"] in ("compute", "bandwidth")
    assert record["ceilings"]["flops"] > 1e8
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "http" not in page
    assert list(trace.rglob("*.xplane.pb"))
    printed = capsys.readouterr().out
    assert "Ceilings here" in printed and "2 devices" in printed
