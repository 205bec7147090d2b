"""Targets of a transfer: copying the source's weights, and training by every method.

Every method starts from the same copies, sees the same few examples per seed, and chooses its
learning rate (and the strength of its own term, if it has one) by mean validation accuracy over
seeds. All seeds and settings of a method run in one compiled program.
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
from kdtl_jax.recipes import _transfer_methods as transfer_methods
from kdtl_jax.recipes._measures import Measure
from kdtl_jax.recipes._stored_results import Store, load_or_run, start_or_load
from kdtl_jax.recipes._training import Experiment, Fitted, Point
from kdtl_jax.recipes._transfer_methods import Case, TransferMethod
from kdtl_jax.run import report
from kdtl_jax.train import sweep

FAMILY, BASELINE = "transfer", "scratch"
HEADS = rf"(params/)?{transfer_methods.HEAD}"
SOURCE_RATE, SOURCE_BATCH = 3e-3, 64


class StartingWeights(NamedTuple):
    """Weights to start from: `tree` with or without a leading axis of seeds."""

    tree: Any  # in the layout of `model_files.tree`; surgery decides on extra leaves
    is_per_seed: bool
    is_classifier: bool = True  # whether its head predicts classes


class Surgery(NamedTuple):
    """How a source's leaves map to a target: the arguments of `transforms.transfer`."""

    where: trees.Selector = trees.none_of(HEADS)
    rename: Sequence[tuple[str, str | None]] = ()
    on_mismatch: transforms.Policy = transforms.raise_on_mismatch


class Comparison(NamedTuple):
    """The results of `compare`."""

    rows: list[report.Row]
    learning: dict[str, dict[str, list[float]]]
    surgery: transforms.Report
    scores: dict[str, report.Interval]  # of the source for the target, before any training
    models: dict[str, Variables]  # plain, by method, stacked over seeds
    predictions: dict[str, _evidence.Predictions]  # by method


def compare(
    net: Network,
    target: Splits,
    source: StartingWeights,
    chosen: Sequence[TransferMethod],
    settings: Any,  # `transfer.Settings`
    surgery: Surgery,
    say: Callable[[str], None],
    store: Store,
    measure: Measure = measures.CLASSES,
) -> Comparison:
    """Copies the source into targets of network `net` and trains them by every method.

    `check` has accepted source and methods.

    Raises:
      ValueError: if a class has too few examples.
    """
    seeds, labels_per_class, part = settings.seeds, settings.labels_per_class, target.train
    parts = [
        per_class(part, labels_per_class, seed=s) if labels_per_class else part
        for s in range(seeds)
    ]
    data = _choice.stacked(parts)
    new_variables, copied, heads, report_ = make_starts(
        net, source, surgery, data["inputs"][0, :1], seeds
    )
    shared = {"data": data, "copied": copied, "heads": heads}
    classes = part.classes
    score_seed = functools.partial(transfer_scores, net, classes, measure.kind)
    scores = jax.jit(jax.vmap(score_seed))(copied, heads, data["inputs"], data["labels"])
    intervals = {name: report.interval(np.asarray(values)) for name, values in scores.items()}
    splits = [_choice.on_device(part) for part in (target.validation, target.test)]
    size = data["labels"].shape[1]
    batch_size = min(settings.batch_size, size)
    steps = settings.epochs * (size // batch_size)
    patience = settings.early_stopping
    checks = settings.epochs if patience else _training.even_checks(settings.epochs)
    comparison = Comparison([], {}, report_, intervals, {}, {})
    for method in chosen:
        say(method.name)
        learner = make_experiment(method, net, classes, steps, settings, measure)
        # Training from scratch and from copies share a program: the start is an argument.
        shared_arrays = {**shared, "begin": copied if method.is_copied else new_variables}
        axes = {"learning_rate": settings.learning_rates}
        if method.term:
            axes[method.term] = settings.strengths or method.strengths
        points = _choice.columns(seeds, **axes)

        def keep(state: train.TrainState, method: TransferMethod = method) -> Variables:
            return Variables(method.finish(state.params), state.model_state)

        options = _training.FitOptions(settings.epochs, batch_size, checks, keep, patience=patience)
        # The same number of settings per call for every method, so fewer programs compile.
        chunk = seeds * len(settings.learning_rates)
        program = sweep.vmap(_training.fit(learner, options), chunk=chunk)
        fitted, seconds = load_or_run(
            store, method.name, functools.partial(program, points, shared_arrays, *splits)
        )
        setting, best = _choice.best(fitted, points)
        state = jax.eval_shape(learner.start, _training.pick(points, 0), shared_arrays)
        fields = {
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "optimizer": settings.optimizer,
            "llrd": settings.llrd,
            "trained_parameters": trees.count(state.params, method.trainable)
            + trees.count(state.connectors),
            **setting,
        }
        if best.epoch is not None:
            fields["epochs_kept"] = np.asarray(best.epoch).tolist()  # by seed
        row = measures.row(
            measure, method.name, FAMILY, method.label, best.variables.params, best, seconds,
            fields, targets=target.test.labels,
        )  # fmt: skip
        comparison.rows.append(row)
        comparison.learning[method.name] = _choice.learning_curve(
            best, settings.epochs, measure.score_name
        )
        comparison.models[method.name] = best.variables
        answers = np.asarray(best.answers)
        comparison.predictions[method.name] = _evidence.Predictions(method.label, answers)
    return comparison


def make_starts(
    net: Network, source: StartingWeights, surgery: Surgery, example: Any, seeds: int
) -> tuple[Variables, Variables, Any, transforms.Report]:
    """Initial targets, stacked over seeds: new, copied, and the source's heads.

    The heads are None if the source has none, or none for classes. The report is of one copy.
    """
    # Other seeds than the sources', so that no target starts as its source started.
    new_variables = _choice.per_seed(
        lambda seed: net.init(_training.keys(seed).model, example), seeds, offset=1000
    )
    first_source = _training.pick(source.tree, 0) if source.is_per_seed else source.tree
    _, report = copy_source(first_source, _training.pick(new_variables, 0), surgery)

    def copy_one(tree: Any, target: Variables) -> Variables:
        return copy_source(tree, target, surgery, check_finite=False)[0]

    source_axis = 0 if source.is_per_seed else None
    copied = jax.jit(jax.vmap(copy_one, in_axes=(source_axis, 0)))(
        jax.tree.map(jnp.asarray, source.tree), new_variables
    )
    heads = source_head(source.tree) if source.is_classifier else None
    if heads is not None and not source.is_per_seed:
        heads = jax.tree.map(lambda x: jnp.stack([x] * seeds), heads)
    return new_variables, copied, heads, report


def check(
    net: Network, example: Any, source: Any, chosen: Sequence[TransferMethod], surgery: Surgery
) -> None:
    """Raises ValueError before anything is trained.

    That is, if `compare` cannot copy a plain source, or its shapes, into `net`, or a method needs a
    head or features that are not there.
    """
    target = model_files.tree(networks.abstract(net, example))
    transforms.plan_transfer(source, target, **surgery._asdict())
    lacking = [method.name for method in chosen if method.needs_source_head]
    if lacking and jax.eval_shape(source_head, source) is None:
        raise ValueError(
            f"{', '.join(lacking)} train the source's head too, but the source has no head/kernel "
            "and head/bias. Leave these methods out (--methods)."
        )
    lacking = [method.name for method in chosen if method.needs_head]
    if lacking and not has_head(net, example):
        raise ValueError(
            f"{', '.join(lacking)} train the model's head in a way of its own, but the model has "
            "no parameters under head/. Call its last layer 'head', or leave these methods out "
            "(--methods)."
        )
    lacking = [method.name for method in chosen if not has_features(net, method)]
    if lacking:
        raise ValueError(
            f"{', '.join(lacking)} read features, but the model returns {_outputs(net)}. Return "
            "the head's input [B, width] too, as in {'logits': ..., 'hidden': ...}, or leave these "
            "methods out (--methods)."
        )


def has_features(net: Network, method: TransferMethod) -> bool:
    """Whether the model returns the features that a method reads."""
    has_all = net.layout.features or not method.needs_features
    return bool(has_all) and (net.layout.last != "logits" or not method.needs_last)


def _outputs(net: Network) -> str:
    return (
        f"no [B, width] but {list(net.layout.features)}" if net.layout.features else "logits alone"
    )


def has_head(net: Network, example: Any) -> bool:
    """Whether a top-level module of the model is a head by its name."""
    paths = trees.flatten(networks.abstract(net, example).params)
    return any(path.split("/")[0] in transfer_methods.HEADS for path in paths)


def make_experiment(
    method: TransferMethod,
    net: Network,
    classes: int,
    steps: int,
    settings: Any,  # `_optimizers.Optimizing`, with `llrd`
    measure: Measure = measures.CLASSES,
) -> Experiment:
    """A target trained by one method; `shared` holds the data of every seed."""

    def make_case(point: Point, shared: Any) -> Case:
        own = _training.pick(shared, point["seed"])  # the seed's
        return Case(net, own["begin"], own["copied"], own["heads"], own["data"], classes, steps)

    def build(point: Point, shared: Any) -> tuple[Case, Params, Any, Any]:
        case = make_case(point, shared)
        params = method.start(case.begin.params, _training.keys(point["seed"]).connectors)
        connectors = (
            {"source_head": dict(case.source_head or {})} if method.needs_source_head else {}
        )
        optimized = {"params": params, "connectors": connectors} if connectors else params
        transforms_: list[optax.GradientTransformation] = []
        if settings.llrd < 1:
            decay_by_depth = transfer_methods.by_depth(case.begin.params, optimized, settings.llrd)
            transforms_.append(decay_by_depth)
        if method.gate is not None:
            transforms_.append(method.gate(case, params))
        rate = point["learning_rate"]
        tx = _optimizers.optimizer(settings, steps, *transforms_, rate=rate)
        return case, params, connectors, tx

    def start(point: Point, shared: Any) -> train.TrainState:
        case, params, glue, tx = build(point, shared)
        return train.init_state(
            params, tx, key=_training.keys(point["seed"]).steps, connectors=glue,
            model_state=case.begin.model_state, trainable=method.trainable,
        )  # fmt: skip

    def step(state: Any, batch: Any, point: Point, shared: Any) -> Any:
        case, *_, tx = build(point, shared)
        penalty = None if method.penalty is None else method.penalty(case)

        def terms(inputs: objective.Inputs) -> dict[str, Any]:
            task_terms: Any = measure.task(inputs)
            return {**task_terms, **({} if penalty is None else {method.term: penalty(inputs)})}

        weights = {"task": 1.0} | ({method.term: point[method.term]} if method.term else {})
        model = method.apply(case)
        return train.make_step(model, terms, weights, tx, trainable=method.trainable)(state, batch)

    def logits(state: Any, inputs: Any, shared: Any) -> Any:
        state = state._replace(params=method.finish(state.params))
        return _training.logits(net, state, inputs)

    def data(point: Point, shared: Any) -> Any:
        """A seed's examples, with the source's outputs that the method records."""
        case = make_case(point, shared)
        return {**case.data, **method.record(case)}

    return Experiment(start, step, logits, data, measure.judge)


def train_sources(
    net: Network, data: Any, splits: Sequence[Any], *, seeds: int, epochs: int
) -> Fitted:
    """Trains one model per seed on all of a task; keeps their `Variables`."""
    tx = optax.adam(SOURCE_RATE)
    step = train.make_step(net.apply, objective.classification, {"task": 1.0}, tx)

    def start(point: Point, shared: Any) -> train.TrainState:
        keys = _training.keys(point["seed"])
        variables = net.init(keys.model, shared["inputs"][:1])
        return train.init_state(
            variables.params, tx, key=keys.steps, model_state=variables.model_state
        )

    learner = Experiment(
        start,
        lambda state, batch, point, shared: step(state, batch),
        lambda state, inputs, shared: _training.logits(net, state, inputs),
    )
    options = _training.FitOptions(epochs, SOURCE_BATCH, keep=_training.variables)
    return sweep.vmap(_training.fit(learner, options))(_training.points(seeds), data, *splits)


def start_sources(
    net: Network, part: Dataset, *, seeds: int, epochs: int, store: Store
) -> Callable[[], StartingWeights]:
    """Starts training sources, whose scores are not reported; calling the result waits for them."""
    data = _choice.on_device(part)
    placeholder = {name: x[:1] for name, x in data.items()}
    wait = start_or_load(
        store,
        "source",
        lambda: train_sources(net, data, [placeholder, placeholder], seeds=seeds, epochs=epochs),
    )
    return lambda: StartingWeights(model_files.tree(wait()[0].variables), True)


def copy_source(
    source: Any, target: Variables, surgery: Surgery, *, check_finite: bool = True
) -> tuple[Variables, transforms.Report]:
    """Fills the target's variables from the source."""
    params, report = transforms.transfer(
        source, model_files.tree(target), **surgery._asdict(), check_finite=check_finite
    )
    if target.model_state is None:
        return Variables(params), report
    state = {name: params[name] for name in target.model_state}
    return Variables(params["params"], state), report


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
    scores_ = {
        "logme": transferability.logme(features, jax.nn.one_hot(labels, classes)),
        "h_score": transferability.regularized_h_score(features, labels, num_classes=classes),
    }
    if head is None:
        return scores_
    probabilities = jax.nn.softmax(transfer_methods.head_logits(features, head))
    scores_["leep"] = transferability.leep(probabilities, labels, num_classes=classes)
    predicted = jnp.argmax(probabilities, axis=-1).astype(jnp.int32)
    scores_["nce"] = transferability.nce(
        predicted, labels, num_source_classes=probabilities.shape[-1], num_classes=classes
    )
    return scores_
