"""A trained model's weights on a new task with few labels, by every method of `_transfer_methods`.

Without `source` one source model per seed is trained on the source task first. Every method starts
from the same copies, sees the same few examples per seed, and chooses its learning rate (and the
strength of its own term, where it has one) by mean validation accuracy over seeds; the test split
is only read off. All seeds and settings of a method run as one compiled program. Run by
`kdtl transfer`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import objective, train, transferability, transforms, trees
from kdtl_jax._types import Params, Variables
from kdtl_jax.datasets import Dataset, Splits, per_class
from kdtl_jax.recipes import _fits, _networks
from kdtl_jax.recipes import _transfer_methods as ways
from kdtl_jax.recipes._networks import Network
from kdtl_jax.recipes._transfer_methods import Case, Method
from kdtl_jax.run import report
from kdtl_jax.train import sweep

FAMILY = "transfer"
HEADS = r"(params/)?head/.*"


class Settings(NamedTuple):
    """What fixes the experiment."""

    methods: tuple[str, ...] = ways.DEFAULT
    seeds: int = 8
    labels_per_class: int = 10  # 0: all of them
    epochs: int = 60
    batch_size: int = 25
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    strengths: tuple[float, ...] | None = None  # None: each method's own
    llrd: float = 1.0
    source_epochs: int = 20
    source_rate: float = 3e-3
    source_batch_size: int = 64


class Surgery(NamedTuple):
    """How a source's leaves find their places: arguments of `transforms.transfer`."""

    where: trees.Selector = trees.none_of(HEADS)
    rename: Sequence[tuple[str, str | None]] = ()
    on_mismatch: transforms.Policy = transforms.raise_on_mismatch


class Source(NamedTuple):
    """Weights to start from: `tree` with or without a leading axis of seeds."""

    tree: Any  # as `_networks.tree` lays variables out; extra leaves are asked about
    is_per_seed: bool


class Trained(NamedTuple):
    """All points of a method."""

    fitted: _fits.Fitted
    model_state: Any


class Outcome(NamedTuple):
    """What `kdtl transfer` takes from here."""

    rows: list[report.Row]
    learning: dict[str, dict[str, list[float]]]
    surgery: transforms.Report
    scores: dict[str, report.Interval]  # of the source for the target, before any training
    models: dict[str, Variables]  # by method, stacked over seeds


def run(
    net: Network,
    target: Splits,
    source: Source,
    settings: Settings,
    surgery: Surgery,
    progress: Callable[[str], None],
) -> Outcome:
    """Copies the source into targets and trains them by every method.

    Raises:
      ValueError: if the source does not fit (every leaf is named), a method needs the source's head
        and there is none, or a class has too few examples.
    """
    methods = [ways.BY_NAME[name] for name in settings.methods]
    seeds, data = range(settings.seeds), _few(target.train, settings)
    example = data["inputs"][0, :1]
    keys = jax.vmap(jax.random.key)(jnp.arange(1000, 1000 + settings.seeds, dtype=jnp.uint32))
    fresh = jax.jit(jax.vmap(lambda key: net.init(key, example)))(keys)
    first = source.tree if not source.is_per_seed else _row(source.tree, 0)
    _, done = _copy(first, _row(fresh, 0), surgery)
    head = _source_head(first)
    lacking = [method.name for method in methods if method.needs_source_head and head is None]
    if lacking:
        raise ValueError(
            f"{', '.join(lacking)} train the source's head too, and the source has no "
            "head/kernel and head/bias. Leave these methods out (--methods)."
        )
    over = 0 if source.is_per_seed else None
    quiet = jax.vmap(
        lambda tree, target: _copy(tree, target, surgery, check_finite=False)[0],
        in_axes=(over, 0),
    )
    copied = jax.jit(quiet)(jax.tree.map(jnp.asarray, source.tree), fresh)
    heads = None
    if head is not None:
        stack = (lambda x: x) if source.is_per_seed else (lambda x: jnp.stack([x] * len(seeds)))
        heads = jax.tree.map(stack, _source_head(source.tree))
    shared = (data, fresh, copied, heads, _fits.held(target.validation), _fits.held(target.test))

    scores = jax.jit(jax.vmap(lambda *seed: _scores(net, target.train.classes, *seed)))
    found = scores(copied, heads, data["inputs"], data["labels"])
    measured = {name: report.interval(np.asarray(values)) for name, values in found.items()}
    outcome = Outcome([], {}, done, measured, {})
    for method in methods:
        progress(method.name)
        _train(method, net, target.train.classes, shared, settings, outcome)
    return outcome


def train_sources(net: Network, part: Dataset, settings: Settings) -> Source:
    """One source model per seed, on the whole source task."""
    data = {"inputs": jnp.asarray(part.inputs), "labels": jnp.asarray(part.labels)}
    size = min(settings.source_batch_size, len(part.labels))
    tx = optax.adam(settings.source_rate)

    def fit(seed: Array, data: dict[str, Array]) -> Any:
        key = jax.random.key(seed)
        start = net.init(key, data["inputs"][:1])
        step = train.make_step(net.apply, objective.classification, {"task": 1.0}, tx)
        state = train.init_state(start.params, tx, key=key, model_state=start.model_state)
        epoch = train.scan_epoch(step)

        def one_epoch(state: train.TrainState, number: Array) -> tuple[train.TrainState, None]:
            index = train.epoch_index(key, number, len(part.labels), size)
            return epoch(state, data, index)[0], None

        numbers = jnp.arange(settings.source_epochs, dtype=jnp.int32)
        state, _ = jax.lax.scan(one_epoch, state, numbers)
        return _networks.tree(Variables(state.params, state.model_state))

    seeds = jnp.arange(settings.seeds, dtype=jnp.uint32)
    return Source(jax.jit(jax.vmap(fit, in_axes=(0, None)))(seeds, data), True)


def _few(part: Dataset, settings: Settings) -> dict[str, Any]:
    """Each seed's training set, stacked."""
    if not settings.labels_per_class:
        return _fits.stacked([part] * settings.seeds)
    count = settings.labels_per_class
    return _fits.stacked([per_class(part, count, seed=seed) for seed in range(settings.seeds)])


def _row(stacked: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def _copy(
    source: Any, target: Variables, surgery: Surgery, *, check_finite: bool = True
) -> tuple[Variables, transforms.Report]:
    filled, done = transforms.transfer(
        source, _networks.tree(target), **surgery._asdict(), check_finite=check_finite
    )
    if target.model_state is None:
        return Variables(filled), done
    state = {name: filled[name] for name in target.model_state}
    return Variables(filled["params"], state), done


def _source_head(tree: Any) -> dict[str, Any] | None:
    flat = trees.flatten(tree)
    for prefix in ("", "params/"):
        names = {name: f"{prefix}head/{name}" for name in ("kernel", "bias")}
        if all(path in flat for path in names.values()):
            return {name: jnp.asarray(flat[path]) for name, path in names.items()}
    return None


def _scores(net: Network, classes: int, copied: Variables, head: Any, x: Any, labels: Any) -> Any:
    """Transferability by what the source makes of the target's training set, by score."""
    if net.layout.last == "logits":  # the head is all there is, and it is fresh
        return {}
    outputs, _ = net.apply(*copied, x)
    features = outputs[net.layout.last]
    found = {
        "logme": transferability.logme(features, jax.nn.one_hot(labels, classes)),
        "h_score": transferability.regularized_h_score(features, labels, num_classes=classes),
    }
    if head is None:
        return found
    named = jax.nn.softmax(features @ head["kernel"] + head["bias"][None])
    found["leep"] = transferability.leep(named, labels, num_classes=classes)
    hard = jnp.argmax(named, axis=-1).astype(jnp.int32)
    sizes = {"num_source_classes": named.shape[-1], "num_classes": classes}
    found["nce"] = transferability.nce(hard, labels, **sizes)
    return found


def _train(
    method: Method,
    net: Network,
    classes: int,
    shared: tuple[Any, ...],
    settings: Settings,
    outcome: Outcome,
) -> None:
    """Trains one method at every seed and setting and adds what was chosen."""
    strengths = settings.strengths or method.strengths
    axes: dict[str, Sequence[float]] = {"rate": settings.rates}
    if method.term:
        axes[method.term] = strengths
    grid = {name: np.asarray(x, np.float32) for name, x in sweep.grid(**axes).items()}
    settings_count = len(grid["rate"])
    columns: dict[str, np.ndarray] = {
        name: np.repeat(column, settings.seeds) for name, column in grid.items()
    }
    columns["seed"] = np.tile(np.arange(settings.seeds, dtype=np.int32), settings_count)
    points = {name: jnp.asarray(column) for name, column in columns.items()}
    program = sweep.vectorized(_program(method, net, classes, settings))
    begun = time.perf_counter()
    fitted, states = jax.block_until_ready(program(points, *shared))
    seconds = time.perf_counter() - begun
    chosen = _fits.best(fitted, columns)
    picked = _fits.pick(fitted, chosen.rows)
    described = {
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "optimizer": "adam",
        "llrd": settings.llrd,
        "trained_parameters": _trained_parameters(method, net, classes, shared),
        **chosen.setting,
    }
    outcome.rows.append(_fits.row(method.name, FAMILY, method.label, picked, seconds, described))
    outcome.learning[method.name] = _fits.learning_curve(picked, settings.epochs)
    outcome.models[method.name] = Variables(picked.params, _rows(states, chosen.rows))


def _rows(stacked: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], stacked)


def _case(
    net: Network,
    classes: int,
    steps: int,
    seed: Any,
    data: Any,
    fresh: Any,
    copied: Any,
    heads: Any,
) -> Case:
    own = _row((data, fresh, copied, heads), seed)
    return Case(net, own[1], own[2], own[3], own[0], classes, steps)


def _trained_parameters(method: Method, net: Network, classes: int, shared: tuple[Any, ...]) -> int:
    def start(*stacks: Any) -> Params:
        case = _case(net, classes, 2, 0, *stacks)
        return method.start(case, case.copied.params, jax.random.key(0))

    return trees.count(jax.eval_shape(start, *shared[:4]), method.trainable)


def _program(
    method: Method, net: Network, classes: int, settings: Settings
) -> Callable[..., Trained]:
    """`fit(point, data, fresh, copied, heads, validation, test)` of one point."""
    checks = next(n for n in range(min(10, settings.epochs), 0, -1) if not settings.epochs % n)

    def fit(point: Mapping[str, Array], *shared: Any) -> Trained:
        *stacks, validation, test = shared
        examples = stacks[0]["labels"].shape[1]
        size = min(settings.batch_size, examples)
        steps = settings.epochs * (examples // size)
        case = _case(net, classes, steps, point["seed"], *stacks)
        begin = case.copied if method.is_copied else case.fresh
        key = jax.random.fold_in(jax.random.key(0), point["seed"])
        params = method.start(case, begin.params, jax.random.fold_in(key, 1))
        chain: list[optax.GradientTransformation] = [optax.adam(point["rate"])]
        if settings.llrd < 1:
            chain.append(ways.by_depth(begin.params, params, settings.llrd))
        if method.gate is not None:
            chain.append(method.gate(case, params))
        tx = optax.chain(*chain)
        weights = {"task": 1.0} | ({method.term: point[method.term]} if method.term else {})
        model = method.apply(case)
        step = train.make_step(
            model, ways.terms_of(method, case), weights, tx, trainable=method.trainable
        )
        state = train.init_state(
            params, tx, key=key, model_state=begin.model_state, trainable=method.trainable
        )
        rows = {**case.data, **method.record(case)}
        epoch = train.scan_epoch(step)

        def one_epoch(state: train.TrainState, number: Array) -> tuple[train.TrainState, None]:
            index = train.epoch_index(key, number, examples, size)
            return epoch(state, rows, index)[0], None

        def measure(state: train.TrainState, split: _fits.Held) -> tuple[Array, Array]:
            variables = Variables(method.finish(state.params), state.model_state)
            outputs, _ = net.apply(*variables, split.inputs)
            named = jnp.argmax(outputs["logits"], axis=-1).astype(jnp.int32)
            return jnp.mean((named == split.labels).astype(jnp.float32)), named

        def between(state: train.TrainState, numbers: Array) -> tuple[train.TrainState, Array]:
            state, _ = jax.lax.scan(one_epoch, state, numbers)
            return state, measure(state, validation)[0]

        numbers = jnp.arange(settings.epochs, dtype=jnp.int32).reshape(checks, -1)
        state, curve = jax.lax.scan(between, state, numbers)
        on_test, named = measure(state, test)
        params = method.finish(state.params)
        return Trained(_fits.Fitted(params, curve, curve[-1], on_test, named), state.model_state)

    return fit
