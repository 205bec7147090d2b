"""Plausible slips at the door of the Python API: the message names the argument and the cause."""

# pyright: reportArgumentType=false
# The slips are of the wrong types on purpose.

import ast
import importlib
import pkgutil
import re
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import kdtl_jax
from kdtl_jax import connectors, datasets, interop, losses, methods, objective, train, transforms
from kdtl_jax.interop import linen
from kdtl_jax.run import checkpoint, data, loop, scores, sharding
from kdtl_jax.train import ensembles, fisher, mean_teachers, online

pytestmark = pytest.mark.usefixtures("standard_promotion")

MODEL = interop.function(lambda params, x: x @ params["w"])
PARAMS = {"w": jnp.eye(3)}
BATCH = {"inputs": jnp.ones((4, 3)), "labels": jnp.asarray([0, 1, 2, 0], jnp.int32)}
SGD, KEY = optax.sgd(0.1), jax.random.key(0)
LOGITS = jnp.ones((4, 3))


def one_step(
    terms: Any = objective.classification,
    *,
    weights: Any = None,
    batch: Any = BATCH,
    tx: Any = SGD,
    memory: Any = None,
    teacher: Any = None,
    microbatches: int = 1,
) -> Any:
    weights = {"task": 1.0} if weights is None else weights
    step = train.make_step(MODEL, terms, weights, tx, teacher=teacher, microbatches=microbatches)
    state = train.init_state(PARAMS, SGD, key=KEY, memory=memory)
    return jax.eval_shape(step, state, batch)


def taught(inputs: Any) -> dict[str, Any]:
    return {"task": losses.kd_kl(inputs.student["logits"], inputs.teacher["logits"])}


def remembering(inputs: Any) -> Any:
    return {"task": jnp.ones(4)}, jnp.ones(3)


def run(state: Any, source: Any, **options: Any) -> Any:
    step = train.make_step(MODEL, objective.classification, {"task": 1.0}, SGD)
    return loop.run(step, state, source, **{"steps": 1, **options})


SLIPS = {
    "weights in a list": (lambda: one_step(weights=[1.0]), "weights must be a dict .*got list"),
    "a weight as text": (lambda: one_step(weights={"task": "1"}), "weight of 'task' .*got '1'"),
    "a weight per example": (
        lambda: one_step(weights={"task": jnp.ones(4)}),
        r"weight of 'task' must be one number.*\[4\]",
    ),
    "a rate for an optimizer": (lambda: one_step(tx=0.1), "tx must be an optimizer, got 0.1"),
    "an optimizer not called": (
        lambda: one_step(tx=optax.adam),
        r"function adam.*Call it, as in optax\.adam",
    ),
    "no labels": (
        lambda: one_step(batch={"inputs": LOGITS}),
        r"read labels, which is not there.*batch has \['inputs'\]((?!no teacher).)*$",
    ),
    "no teacher": (lambda: one_step(taught), "read logits.*teacher has nothing.*pass teacher="),
    "no teacher's parameters": (
        lambda: one_step(taught, teacher=MODEL),
        r"teacher_params got none. Write step\(state, batch, teacher_params\)",
    ),
    "short example weights": (
        lambda: one_step(batch={**BATCH, "weights": jnp.ones(3)}),
        r"'weights' must be \[B\] = \[4\].*got \[3\]",
    ),
    "no microbatch": (lambda: one_step(microbatches=0), "microbatches must be at least 1, got 0"),
    "no memory": (lambda: one_step(remembering), r"terms return a different memory.*shape \[3\]"),
    "another memory": (
        lambda: one_step(remembering, memory=jnp.ones(4)),
        r"shape \[3\], was an array of shape \[4\]",
    ),
    "a seed for a key": (lambda: train.init_state(PARAMS, SGD, key=0), "key must be a PRNG key"),
    "the state of another optimizer": (
        lambda: one_step(tx=optax.adam(1.0)),
        "optimizer's state was made for other parameters",
    ),
    "lists for logits": (lambda: losses.kd_kl([[1.0]], [[1.0]]), "student_logits .*got list"),
    "a temperature as text": (
        lambda: losses.kd_kl(LOGITS, LOGITS, temperature="4"),
        "temperature must be a number, got '4'",
    ),
    "no labels for a loss": (lambda: losses.tckd(LOGITS, LOGITS, None), "labels .*got None"),
    "a class for a module": (lambda: linen.model(nn.Dense), r"got Dense: write Dense\(\.\.\.\)"),
    "parameters for a module": (lambda: linen.model(PARAMS), "module of Linen, got dict"),
    "no function": (lambda: interop.function(3), "f must be a function"),
    "a dict of renames": (
        lambda: transforms.transfer(PARAMS, PARAMS, rename={"w": "v"}),
        r"rename must be rules.*list\(rules\.items\(\)\)",
    ),
    "one width": (lambda: connectors.mlp(3), r"list of widths, got 3: write \[3\]"),
    "one teacher": (lambda: ensembles.stack_teachers(PARAMS), "list of parameter trees"),
    "a loss per batch": (
        lambda: fisher.empirical_fisher(lambda params, x: jnp.ones(4), PARAMS, LOGITS),
        r"one number for one example.*loss\[4\]",
    ),
    "batches in a list": (
        lambda: run(train.init_state(PARAMS, SGD, key=KEY), [BATCH]),
        "source .*got list",
    ),
    "parameters for a state": (
        lambda: run(PARAMS, data.resident(BATCH, 2, key=KEY)),
        "state must be a TrainState, got dict",
    ),
    "steps as text": (
        lambda: run(train.init_state(PARAMS, SGD, key=KEY), lambda at: iter([BATCH]), steps="3"),
        "steps must be an integer, got '3'",
    ),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_named(name: str):
    slip, says = SLIPS[name]
    with pytest.raises((TypeError, ValueError, KeyError)) as caught:
        slip()
    assert re.search(says, str(caught.value)), str(caught.value)


def test_negative_example_weights_are_named():
    step = train.make_step(MODEL, objective.classification, {"task": 1.0}, SGD)
    with pytest.raises(ValueError, match=r"batch's 'weights' must be finite and >= 0"):
        step(train.init_state(PARAMS, SGD, key=KEY), {**BATCH, "weights": -jnp.ones(4)})


ROOMS = (
    "losses transforms train methods connectors memory penalties projection objective trees "
    "augment temperatures normalization discrepancies transferability"
).split()
NAMED = re.compile(rf"(?<![\w.]){'(' + '|'.join(ROOMS) + ')'}\.(?!csv)([a-z]\w+)(?![\w/])")


def test_messages_name_only_what_exists():
    """Repairs such as `transforms.crop` in the texts of the package are names of the package."""
    root, missing = Path(kdtl_jax.__path__[0]), []
    modules = {room: importlib.import_module(f"kdtl_jax.{room}") for room in ROOMS}
    below = {
        room: {result.name for result in pkgutil.iter_modules(getattr(module, "__path__", []))}
        for room, module in modules.items()
    }
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            for room, name in NAMED.findall(node.value):
                if not hasattr(modules[room], name) and name not in below[room]:
                    missing.append(f"{file.name}: {room}.{name}")
    assert not missing


def any_(wrong: Any) -> Any:
    return wrong


def test_every_method_names_a_setup_that_is_none() -> None:
    for entry in methods.table():
        for wrong in (None, "kd", {}, methods.setup):
            with pytest.raises(TypeError, match=r"^setup must be what methods.setup"):
                entry.build(any_(wrong))


STEP = train.make_step(MODEL, objective.classification, {"task": 1.0}, SGD)
LABELS = BATCH["labels"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: STEP(any_(PARAMS), BATCH), "state must be what train.init_state.* got dict"),
        (lambda: mean_teachers.begin(any_(None)), "state must be what train.init_state"),
        (lambda: train.values(any_({"a": 1})), "metrics must be those that a step returns"),
        (lambda: train.values(any_(None)), "metrics must be those that a step returns"),
        (lambda: train.take(BATCH, any_(None)), "index must be an array, got NoneType"),
        (lambda: train.take(BATCH, any_(1.5)), "index must be integers"),
        (lambda: ensembles.stack_teachers(any_("ab")), "teachers must be a list of parameter"),
        (lambda: ensembles.gated_logits(LOGITS[None], any_(3.5)), "scores must be"),
        (lambda: online.teacher_chain([], any_(None)), "key must be a PRNG key"),
        (lambda: online.mutual_terms(LOGITS[None], LABELS, where=any_("a")), "at least two peers"),
        (lambda: losses.sp(LOGITS, LOGITS, where=any_("a")), "where must be an array, got str"),
        (lambda: losses.sp(LOGITS, LOGITS, where=any_([1] * 4)), "where must be bool, got int"),
        (lambda: train.balancing.remainder(any_(None), to="a"), "weights must be a dict by name"),
        (lambda: train.sweep.rows(any_(None), {}), "points must be a dict by name"),
        (lambda: train.precision.loss_scaling(any_(0.1)), "tx must be an optimizer"),
        (lambda: train.precision.compute_in(MODEL, any_("text")), "dtype must be floating point"),
        (
            lambda: fisher.batch_fisher(any_(jnp.sum), PARAMS, None, batch_size=2),
            "examples must be arrays with one row per example",
        ),
        (lambda: sharding.replicated(any_("data")), "mesh must be a mesh such as"),
        (lambda: sharding.place(PARAMS, any_(None)), "mesh must be a mesh such as"),
        (lambda: loop.read_metrics(any_(None)), "path must be the path of a file or folder"),
        (lambda: checkpoint.steps(any_(3.5)), "folder must be the path of a file or folder"),
        (lambda: data.open_arrays(any_(None)), "files must be a dict by name"),
        (lambda: data.unpad(any_("a")), "batch must be a dict by name"),
        (lambda: datasets.read_splits(any_(None)), "text must be the path of a file"),
        (lambda: datasets.read_splits("digits", seed=any_("a")), "seed must be an integer"),
        (lambda: datasets.prepared(any_(None)), "splits must be those of datasets.read_splits"),
        (
            lambda: datasets.read_splits(__file__, preprocessing=any_("a")),
            "preprocessing must be a model's Preprocessing",
        ),
        (
            lambda: datasets.from_arrays("a", BATCH["inputs"], None),
            "targets must hold one value per example, got None",
        ),
        (lambda: scores.predicted(any_(None)), "logits must be an array, got NoneType"),
    ],
)
def test_what_is_not_meant_is_named_at_the_door(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_errors_name_the_only_side_and_the_mask_that_is_no_where() -> None:
    whole = jnp.ones((2, 5), jnp.int32)
    for fn in (
        partial(losses.top_k_targets, k=2),
        partial(losses.top_k_at, indices=whole),
        partial(losses.random_sampling_draws, jax.random.key(0), num_draws=2),
        partial(losses.random_sampling_targets, draws=whole),
    ):
        with pytest.raises(TypeError, match="teacher_logits must be floating point"):
            fn(teacher_logits=whole)
        with pytest.raises(ValueError, match=r"teacher_logits is empty"):
            fn(teacher_logits=jnp.ones((0, 5)))
    logits = jnp.ones((2, 5))
    with pytest.raises(TypeError, match="classes must be bool, got int32. Use classes > 0"):
        losses.log_mass(logits, jnp.ones(5, jnp.int32))
    with pytest.raises(ValueError, match=r"positives must have shape \[2, 5\], got positives\[5\]"):
        losses.uniform_contrast(logits, jnp.ones(5, bool))
