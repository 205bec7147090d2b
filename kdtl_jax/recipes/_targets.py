"""Targets of a transfer: the source's weights copied into them, trained by every method.

Every method starts from the same copies, sees the same few examples per seed, and chooses its
learning rate (and the strength of its own term, where it has one) by mean validation accuracy over
seeds. All seeds and settings of a method run as one compiled program.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdtl_jax import objective, train, transferability, transforms, trees
from kdtl_jax._types import Params, Variables
from kdtl_jax.datasets import Dataset, Splits, per_class
from kdtl_jax.interop import model_files, networks
from kdtl_jax.interop.networks import Network
from kdtl_jax.recipes import _choice, _evidence, _optimizers, _training
from kdtl_jax.recipes import _measures as measures
from kdtl_jax.recipes import _transfer_methods as ways
from kdtl_jax.recipes._measures import Measure
from kdtl_jax.recipes._stored_results import NOWHERE, Finished, begun, once
from kdtl_jax.recipes._training import Experiment, Fitted, Point
from kdtl_jax.recipes._transfer_methods import Case, Method
from kdtl_jax.run import report
from kdtl_jax.train import sweep

FAMILY, BASELINE = "transfer", "scratch"
HEADS = rf"(params/)?{ways.HEAD}"
SOURCE_RATE, SOURCE_BATCH = 3e-3, 64


class Source(NamedTuple):
    """Weights to start from: `tree` with or without a leading axis of seeds."""

    tree: Any  # as `model_files.tree` lays variables out; extra leaves are asked about
    is_per_seed: bool
    is_classifier: bool = True  # its head can be read as probabilities of classes


class Surgery(NamedTuple):
    """How a source's leaves map to a target: arguments of `transforms.transfer`."""

    where: trees.Selector = trees.none_of(HEADS)
    rename: Sequence[tuple[str, str | None]] = ()
    on_mismatch: transforms.Policy = transforms.raise_on_mismatch


class Compared(NamedTuple):
    """What `compare` finds."""

    rows: list[report.Row]
    learning: dict[str, dict[str, list[float]]]
    surgery: transforms.Report
    scores: dict[str, report.Interval]  # of the source for the target, before any training
    models: dict[str, Variables]  # plain, by method, stacked over seeds
    named: dict[str, _evidence.Named]  # by method


def compare(
    net: Network,
    target: Splits,
    source: Source,
    chosen: Sequence[Method],
    settings: Any,  # `transfer.Settings`
    surgery: Surgery,
    say: Callable[[str], None],
    finished: Finished = NOWHERE,
    measure: Measure = measures.CLASSES,
) -> Compared:
    """Copies the source into targets of network `net`, and trains them by every method.

    Raises:
      ValueError: if the source does not fit (every leaf is named), a method needs the source's head
        and there is none, or a class has too few examples.
    """
    seeds, few, part = settings.seeds, settings.labels_per_class, target.train
    parts = [per_class(part, few, seed=s) if few else part for s in range(seeds)]
    data = _choice.stacked(parts)
    fresh, copied, heads, done = starts(net, source, surgery, data["inputs"][0, :1], seeds)
    check_head(heads, chosen)
    shared = {"data": data, "copied": copied, "heads": heads}
    classes = part.classes
    kind = measure.kind

    def scored(*one: Any) -> dict[str, Any]:
        return transfer_scores(net, classes, kind, *one)

    scores = jax.jit(jax.vmap(scored))(copied, heads, data["inputs"], data["labels"])
    measured = {name: report.interval(np.asarray(values)) for name, values in scores.items()}
    held = [_choice.on_device(part) for part in (target.validation, target.test)]
    size = data["labels"].shape[1]
    batch_size = min(settings.batch_size, size)
    steps = settings.epochs * (size // batch_size)
    patience = settings.early_stopping
    checks = settings.epochs if patience else _training.even_checks(settings.epochs)
    found = Compared([], {}, done, measured, {}, {})
    for method in chosen:
        say(method.name)
        learner = experiment(method, net, classes, steps, settings, measure)
        # From scratch and copied are one program: the start is an argument.
        read = {**shared, "begin": copied if method.is_copied else fresh}
        axes = {"learning_rate": settings.learning_rates}
        if method.term:
            axes[method.term] = settings.strengths or method.strengths
        points = _choice.columns(seeds, **axes)
        how = _training.Fitting(
            settings.epochs,
            batch_size,
            checks,
            keep=lambda state, method=method: Variables(
                method.finish(state.params), state.model_state
            ),
            patience=patience,
        )
        # Equally many settings per call, whatever the method's axes, so fewer programs compile.
        chunk = seeds * len(settings.learning_rates)
        program = sweep.vmap(_training.fit(learner, how), chunk=chunk)
        fitted, seconds = once(
            finished, method.name, functools.partial(program, points, read, *held)
        )
        choice = _choice.best(fitted, points)
        state = jax.eval_shape(learner.start, _training.pick(points, 0), read)
        described = {
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "optimizer": settings.optimizer,
            "llrd": settings.llrd,
            "trained_parameters": trees.count(state.params, method.trainable)
            + trees.count(state.connectors),
            **choice.setting,
        }
        if choice.fitted.epoch is not None:
            described["epochs_kept"] = np.asarray(choice.fitted.epoch).tolist()  # by seed
        params = _training.pick(choice.fitted.kept.params, 0)
        row = measures.row(
            measure, method.name, FAMILY, method.label, params, choice.fitted, seconds, described,
            targets=target.test.labels,
        )  # fmt: skip
        found.rows.append(row)
        found.learning[method.name] = _choice.learning_curve(
            choice.fitted, settings.epochs, measure.score_name
        )
        found.models[method.name] = choice.fitted.kept
        named = np.asarray(choice.fitted.named)
        found.named[method.name] = _evidence.Named(method.label, named)
    return found


def starts(
    net: Network, source: Source, surgery: Surgery, example: Any, seeds: int
) -> tuple[Variables, Variables, Any, transforms.Report]:
    """What targets start from, stacked over seeds: fresh, copied, and the source's heads.

    The heads are None if the source has none, or none for classes. The report is of one copy.
    """
    # Separate from the sources' seeds, so that no target starts as its source started.
    fresh = _choice.per_seed(
        lambda seed: net.init(_training.keys(seed).model, example), seeds, offset=1000
    )
    first = _training.pick(source.tree, 0) if source.is_per_seed else source.tree
    _, done = copy(first, _training.pick(fresh, 0), surgery)

    def copied_of(tree: Any, target: Variables) -> Variables:
        return copy(tree, target, surgery, check_finite=False)[0]

    over = 0 if source.is_per_seed else None
    copied = jax.jit(jax.vmap(copied_of, in_axes=(over, 0)))(
        jax.tree.map(jnp.asarray, source.tree), fresh
    )
    heads = source_head(source.tree) if source.is_classifier else None
    if heads is not None and not source.is_per_seed:
        heads = jax.tree.map(lambda x: jnp.stack([x] * seeds), heads)
    return fresh, copied, heads, done


def check(
    net: Network, example: Any, source: Any, chosen: Sequence[Method], surgery: Surgery
) -> None:
    """Raises ValueError if `compare` cannot copy a plain source, or its shapes, into `net`."""
    target = model_files.tree(networks.abstract(net, example))
    transforms.plan_transfer(source, target, **surgery._asdict())
    check_head(jax.eval_shape(source_head, source), chosen)


def check_head(head: Any, chosen: Sequence[Method]) -> None:
    """Raises ValueError if a method needs the source's head and there is none."""
    lacking = [method.name for method in chosen if method.needs_source_head and head is None]
    if lacking:
        raise ValueError(
            f"{', '.join(lacking)} train the source's head too, but the source has no "
            "head/kernel and head/bias. Leave these methods out (--methods)."
        )


def experiment(
    method: Method,
    net: Network,
    classes: int,
    steps: int,
    settings: Any,  # `_optimizers.Optimizing`, with `llrd`
    measure: Measure = measures.CLASSES,
) -> Experiment:
    """A target trained by one method; the data of its seed are in `shared`."""

    def case_of(point: Point, shared: Any) -> Case:
        own = _training.pick(shared, point["seed"])
        return Case(net, own["begin"], own["copied"], own["heads"], own["data"], classes, steps)

    def parts(point: Point, shared: Any) -> tuple[Case, Variables, Params, Any, Any]:
        case = case_of(point, shared)
        begin = case.begin
        params = method.start(begin.params, _training.keys(point["seed"]).connectors)
        glue = {"source_head": dict(case.source_head or {})} if method.needs_source_head else {}
        optimized = {"params": params, "connectors": glue} if glue else params
        then: list[optax.GradientTransformation] = []
        if settings.llrd < 1:
            then.append(ways.by_depth(begin.params, optimized, settings.llrd))
        if method.gate is not None:
            then.append(method.gate(case, params))
        rate, decay = point["learning_rate"], settings.weight_decay
        return case, begin, params, glue, _optimizers.optimizer(settings, rate, decay, steps, *then)

    def start(point: Point, shared: Any) -> train.TrainState:
        _, begin, params, glue, tx = parts(point, shared)
        return train.init_state(
            params, tx, key=_training.keys(point["seed"]).steps, connectors=glue,
            model_state=begin.model_state, trainable=method.trainable,
        )  # fmt: skip

    def step(state: Any, batch: Any, point: Point, shared: Any) -> Any:
        case, *_, tx = parts(point, shared)
        penalty = None if method.penalty is None else method.penalty(case)

        def terms(inputs: objective.Inputs) -> dict[str, Any]:
            own = {} if penalty is None else {method.term: penalty(inputs)}
            learned: Any = measure.task(inputs)
            return {**learned, **own}

        weights = {"task": 1.0} | ({method.term: point[method.term]} if method.term else {})
        model = method.apply(case)
        return train.make_step(model, terms, weights, tx, trainable=method.trainable)(state, batch)

    def logits(state: Any, inputs: Any, shared: Any) -> Any:
        return net.apply(method.finish(state.params), state.model_state, inputs)[0]["logits"]

    def data(point: Point, shared: Any) -> Any:
        """A seed's examples, with what the method records of the source's outputs on them."""
        case = case_of(point, shared)
        return {**case.data, **method.record(case)}

    return Experiment(start, step, logits, data, measure.judged)


def train_sources(
    net: Network, data: Any, held: Sequence[Any], *, seeds: int, epochs: int
) -> Fitted:
    """One model per seed, trained on all of a task; keeps their `Variables`."""
    tx = optax.adam(SOURCE_RATE)
    step = train.make_step(net.apply, objective.classification, {"task": 1.0}, tx)

    def start(point: Point, shared: Any) -> train.TrainState:
        keys = _training.keys(point["seed"])
        fresh = net.init(keys.model, shared["inputs"][:1])
        return train.init_state(fresh.params, tx, key=keys.steps, model_state=fresh.model_state)

    learner = Experiment(
        start,
        lambda state, batch, point, shared: step(state, batch),
        lambda state, x, shared: net.apply(state.params, state.model_state, x)[0]["logits"],
    )
    how = _training.Fitting(epochs, SOURCE_BATCH, keep=_training.variables)
    return sweep.vmap(_training.fit(learner, how))(_training.points(seeds), data, *held)


def sources_of(
    net: Network, part: Dataset, *, seeds: int, epochs: int, finished: Finished = NOWHERE
) -> Callable[[], Source]:
    """Starts training sources, whose own scores are not reported; the call waits for them."""
    data = _choice.on_device(part)
    few = {name: x[:1] for name, x in data.items()}
    ended = begun(
        finished,
        "source",
        lambda: train_sources(net, data, [few, few], seeds=seeds, epochs=epochs),
    )
    return lambda: Source(model_files.tree(ended()[0].kept), True)


def copy(
    source: Any, target: Variables, surgery: Surgery, *, check_finite: bool = True
) -> tuple[Variables, transforms.Report]:
    """The target's variables, filled from the source."""
    filled, done = transforms.transfer(
        source, model_files.tree(target), **surgery._asdict(), check_finite=check_finite
    )
    if target.model_state is None:
        return Variables(filled), done
    state = {name: filled[name] for name in target.model_state}
    return Variables(filled["params"], state), done


def source_head(tree: Any) -> dict[str, Any] | None:
    """The source's classifier, if it has one called `head`."""
    flat = trees.flatten(tree)
    for prefix in ("", "params/"):
        names = {name: f"{prefix}head/{name}" for name in ("kernel", "bias")}
        if all(path in flat for path in names.values()):
            return {name: jnp.asarray(flat[path]) for name, path in names.items()}
    return None


def transfer_scores(
    net: Network, classes: int, kind: str, copied: Variables, head: Any, inputs: Any, labels: Any
) -> dict[str, Any]:
    """Transferability by score, from the source's outputs on the target's training set."""
    if net.layout.last == "logits":  # the model is only a head, which is new
        return {}
    features = net.apply(*copied, inputs)[0][net.layout.last]
    if kind != "classes":
        return {"logme": transferability.logme(features, labels)}
    found = {
        "logme": transferability.logme(features, jax.nn.one_hot(labels, classes)),
        "h_score": transferability.regularized_h_score(features, labels, num_classes=classes),
    }
    if head is None:
        return found
    named = jax.nn.softmax(ways.on_head(features, head))
    found["leep"] = transferability.leep(named, labels, num_classes=classes)
    hard = jnp.argmax(named, axis=-1).astype(jnp.int32)
    found["nce"] = transferability.nce(
        hard, labels, num_source_classes=named.shape[-1], num_classes=classes
    )
    return found
