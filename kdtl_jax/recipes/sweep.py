"""A sweep of students: settings x seeds of several methods, each method as one program.

One teacher, its outputs computed once. Within a method everything is traced (seeds, temperatures,
weights, alpha, rates); methods are looped over. Settings are compared by their mean validation
accuracy over seeds; the test split is only read off. Run by `kdtl sweep`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import train
from kdtl_jax.datasets import Splits
from kdtl_jax.methods import Entry, Setup, no_memory
from kdtl_jax.recipes import _networks, _sweep_pair, _sweep_runs
from kdtl_jax.recipes._sweep_runs import Program, Shared
from kdtl_jax.recipes._training import Schedule
from kdtl_jax.train import sweep

PROBE_STEPS, PROBE_POINTS = 8, 16
Progress = Callable[[str], None]
Columns = Mapping[str, np.ndarray]


class Settings(NamedTuple):
    """What fixes the sweep, beside data, models, methods and axes."""

    seeds: int
    epochs: int
    batch_size: int
    optimizer: _sweep_runs.Optimizer
    fixed: Mapping[str, float]  # "rate" and "weight_decay" where they are not swept
    teachers: Schedule
    teacher_weights: Path | None = None
    memory: int | None = None  # bytes of one call; None: all points at once
    devices: Sequence[Any] | None = None
    rungs: int = 1  # more: after each share of the epochs the better half of the settings goes on
    runner: sweep.Runner | None = None  # None: the fastest, measured


class Swept(NamedTuple):
    """One method's results; K settings, S seeds. NaN after a setting was stopped."""

    method: str
    columns: dict[str, np.ndarray]  # [K] each, of the axes that the method has
    validation: np.ndarray  # [K, S]
    test: np.ndarray  # [K, S]
    loss: np.ndarray  # [K, S]
    epochs: np.ndarray  # [K], trained
    path: str
    chunk: int
    seconds: float
    probed: dict[str, float]  # seconds per point of each path, where they were measured


class Outcome(NamedTuple):
    """What a sweep found."""

    swept: list[Swept]
    notes: list[str]
    teacher_validation: float
    teacher_test: float


def run(
    splits: Splits,
    teacher: nn.Module,
    student: nn.Module,
    methods: Sequence[Entry],
    columns: Columns,
    settings: Settings,
    folder: Path,
    say: Progress,
) -> Outcome:
    """Trains the teacher and every student.

    Args:
      splits: standardized data.
      teacher: the large module.
      student: the small one.
      methods: those with connectors or memory are left out, with a note.
      columns: `{axis: [K]}`, the settings; axes are those of `_sweep_runs.AXES` and terms' names.
      settings: of the sweep.
      folder: for the teacher's checkpoints.
      say: progress.

    Raises:
      ValueError: if an axis is none of any method, no method is left, or data and models do not
        fit.
    """
    example = jnp.zeros((1, *splits.train.inputs.shape[1:]), jnp.float32)
    small, large = (_networks.network(module, example) for module in (student, teacher))
    shapes = jax.eval_shape(lambda: large.init(jax.random.key(0), example))
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    sizes = {"epochs": settings.epochs, "batch_size": settings.batch_size}
    setup = _sweep_pair.setup_of(small, large, blank, splits, **sizes, example=example)
    chosen, notes = _suitable(methods, setup)
    of_method = {m.name: _axes(m, setup, columns) for m in chosen}
    _known_axes(columns, of_method)
    if "alpha" in columns:  # what cannot work is said before anything is trained
        jax.eval_shape(
            lambda: _sweep_runs.scaled_start(
                blank.params, small.init(jax.random.key(0), example).params, jnp.float32(1)
            )
        )
    frozen = _sweep_pair.teacher_of(
        large, example, splits, settings.teachers, settings.teacher_weights, folder, say
    )
    setup = _sweep_pair.setup_of(small, large, frozen, splits, **sizes, example=example)
    shared = _sweep_pair.shared_arrays(splits, large, frozen, chosen)
    on_validation, on_test = _sweep_pair.accuracies(large, frozen, splits)

    swept: list[Swept] = []
    path: tuple[str, dict[str, float]] | None = None
    for i, method in enumerate(chosen):
        made = _sweep_runs.program(
            method,
            setup,
            small,
            settings.optimizer,
            settings.fixed,
            settings.batch_size,
            example,
        )
        count = len(next(iter(of_method[method.name].values()), [0]))
        say(f"{method.name} ({i + 1} of {len(chosen)}): {count} settings, {settings.seeds} seeds")
        found = _sweep(method.name, made, of_method[method.name], shared, settings, path, say)
        path = found.path, found.probed  # the pair decides, not the loss: measured once
        swept.append(found)
    return Outcome(swept, notes, on_validation, on_test)


def _sweep(
    name: str,
    made: Program,
    columns: dict[str, np.ndarray],
    shared: Shared,
    settings: Settings,
    path: tuple[str, dict[str, float]] | None,
    say: Progress,
) -> Swept:
    seeds = settings.seeds
    count = len(next(iter(columns.values()), [0]))
    points = {
        "seed": np.tile(np.arange(seeds, dtype=np.int32), count),
        **{axis: np.repeat(column, seeds).astype(np.float32) for axis, column in columns.items()},
    }
    begun = time.perf_counter()
    chosen, probed = _path(made, points, shared, settings, path, say)
    epochs = _shares(settings.epochs, settings.rungs)
    chunk = _chunk(made, points, shared, settings, chosen, epochs[0])
    shape = (settings.rungs, count, seeds)
    validation, test, loss = (np.full(shape[1:], np.nan) for _ in range(3))
    trained = np.zeros(count, np.int64)
    left, states = np.arange(count), None
    for rung, more in enumerate(epochs):
        here = {k: v.reshape(count, seeds)[left].reshape(-1) for k, v in points.items()}
        if states is not None:
            first = np.full(len(here["seed"]), sum(epochs[:rung]), np.int32)
            here |= {"state": states, "epoch": first}
        last = rung == len(epochs) - 1
        states, scores = _run(made, here, shared, settings, chosen, more, chunk, last)
        for whole, part in zip((validation, test, loss), scores, strict=True):
            whole[left] = np.asarray(part, np.float64).reshape(-1, seeds)
        trained[left] += more
        if not last:
            mean = validation[left].mean(axis=1)
            order = np.argsort(-np.where(np.isfinite(mean), mean, -np.inf), kind="stable")
            kept = np.sort(order[: max(1, -(-len(left) // 2))])
            rows = (kept[:, None] * seeds + np.arange(seeds)).reshape(-1)
            states = jax.tree.map(lambda x, rows=rows: x[rows], states)
            left = left[kept]
            say(f"{name}: {len(left)} settings go on after {sum(epochs[: rung + 1])} epochs")
    seconds = time.perf_counter() - begun
    path_name = chosen.__name__
    return Swept(name, columns, validation, test, loss, trained, path_name, chunk, seconds, probed)


def _run(
    made: Program,
    points: dict[str, Any],
    shared: Shared,
    settings: Settings,
    chosen: sweep.Runner,
    epochs: int,
    chunk: int,
    last: bool,
) -> tuple[Any, _sweep_runs.Scores]:
    """States (not after the last rung) and scores of all points."""
    whole = _sweep_runs.trained(made, epochs)
    runner = chosen
    if chosen.__name__ == "step_by_step":
        runner = _sweep_runs.step_by_step(made, epochs)
    elif last:

        def only_scores(point: Any, shared: Shared) -> Any:
            return None, whole(point, shared)[1]

        return sweep.run(
            only_scores, points, shared, chunk=chunk, runner=runner, devices=settings.devices
        )
    return sweep.run(whole, points, shared, chunk=chunk, runner=runner, devices=settings.devices)


def _path(
    made: Program,
    points: dict[str, Any],
    shared: Shared,
    settings: Settings,
    known: tuple[str, dict[str, float]] | None,
    say: Progress,
) -> tuple[sweep.Runner, dict[str, float]]:
    """The runner asked for, the one found for another method, or the fastest of all."""
    short = _sweep_runs.trained(made, 1, steps=PROBE_STEPS)
    single = _sweep_runs.step_by_step(made, 1, steps=PROBE_STEPS)
    candidates: list[sweep.Runner] = [sweep.vectorized, sweep.mapped, sweep.sequential]
    if _loses_in_loops(made, points, shared):
        candidates.append(single)
    if settings.runner is not None:
        return settings.runner, {}
    if known is not None:
        by_name = {runner.__name__: runner for runner in [*candidates, single]}
        return by_name[known[0]], known[1]
    if settings.devices is not None:  # only one program per chunk can be spread over devices
        return sweep.vectorized, {}
    # The probe reads the scores of few examples: it is the steps that are compared.
    few = shared._replace(
        validation=jax.tree.map(lambda x: x[:1], shared.validation),
        test=jax.tree.map(lambda x: x[:1], shared.test),
    )
    seconds = sweep.timings(
        short, points, few, candidates=candidates, probe=PROBE_POINTS, repeats=2
    )
    probed = {r.__name__: s for r, s in zip(candidates, seconds, strict=True)}
    chosen = candidates[int(np.argmin(seconds))]
    listed = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in probed.items())
    say(f"path: {chosen.__name__} (per student and {PROBE_STEPS} steps: {listed})")
    return chosen, probed


def _loses_in_loops(made: Program, points: dict[str, Any], shared: Shared) -> bool:
    """Whether single steps may be faster here than steps in a program's loop."""
    point = jax.tree.map(lambda x: jnp.asarray(x[0]), points)
    state = jax.eval_shape(made.start, point, shared)
    rows = jax.eval_shape(lambda: made.rows(point, 0))
    batch = jax.eval_shape(
        lambda s: train.take(s.arrays, jnp.zeros(rows.shape[1:], jnp.int32)), shared
    )
    return train.step_path(made.step(point), state, batch) == "steps"


def _chunk(
    made: Program,
    points: dict[str, Any],
    shared: Shared,
    settings: Settings,
    chosen: sweep.Runner,
    epochs: int,
) -> int:
    total = len(points["seed"])
    if settings.memory is None or chosen is not sweep.vectorized:
        return total
    experiment = _sweep_runs.trained(made, epochs)
    return sweep.chunk_for_memory(experiment, points, shared, bytes=settings.memory)


def _shares(epochs: int, rungs: int) -> list[int]:
    """The epochs of each rung."""
    if not 1 <= rungs <= epochs:
        raise ValueError(f"{rungs} rungs do not fit into {epochs} epochs.")
    ends = [round(epochs * (i + 1) / rungs) for i in range(rungs)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _suitable(methods: Sequence[Entry], setup: Setup) -> tuple[list[Entry], list[str]]:
    chosen, notes = [], []
    for method in methods:
        reason = method.applies(setup)
        if reason is None and method.needs == "networks":
            reason = "it differentiates the networks themselves, which a sweep does not offer"
        if reason is None:
            built = method.build(setup)
            if method.connector or built.memory is not no_memory or built.predict is not None:
                reason = "it trains or keeps more than the student; use kdtl distill"
        if reason is None:
            chosen.append(method)
        else:
            notes.append(f"{method.name} is left out: {reason}.")
    if not chosen:
        raise ValueError(f"no method is left. {' '.join(notes)}")
    return chosen, notes


def _axes(method: Entry, setup: Setup, columns: Columns) -> dict[str, np.ndarray]:
    """The axes that the method has, without settings that then are equal."""
    known = {*_sweep_runs.AXES, *_sweep_runs.terms_of(method, setup)}
    own = {name: np.asarray(column) for name, column in columns.items() if name in known}
    rows = list(zip(*own.values(), strict=True))
    first = [i for i, row in enumerate(rows) if row not in rows[:i]]
    return {name: column[first] for name, column in own.items()}


def _known_axes(columns: Columns, of_method: Mapping[str, Mapping[str, Any]]) -> None:
    unknown = [axis for axis in columns if not any(axis in own for own in of_method.values())]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no axis of {', '.join(of_method)}. Axes are "
            f"{', '.join(_sweep_runs.AXES)}, task, and the names of a method's terms."
        )
