"""The method table of the command line: every method's terms and gradients on small pairs."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from kdtl_jax import methods, objective
from kdtl_jax._types import Outputs, Params
from kdtl_jax.interop import linen
from kdtl_jax.methods._method import TASK, Built, Head, Method, Models, Options, Setup, build
from kdtl_jax.models import ViT
from kdtl_jax.objective import Inputs

BATCH, CLASSES, EXAMPLES, STEPS = 6, 5, 20, 240
# Compiling is all that these tests cost, and of it the default generator would be most.
KEYS = "unsafe_rbg"
QUICKLY: Any = {
    "compiler_options": {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
}

Model = Callable[[Params, Array], Outputs]


def dense(params: Mapping[str, Array], x: Array) -> Array:
    y = x @ params["kernel"]
    return y + jnp.broadcast_to(params["bias"], y.shape)


def mlp(params: Params, x: Array) -> Outputs:
    """Two hidden layers with their values before the activation."""
    outputs = {}
    for i in range(2):
        outputs[f"dense_{i}"] = dense(params[f"layer_{i}"], x)
        x = outputs[f"hidden_{i}"] = jax.nn.relu(outputs[f"dense_{i}"])
    return {**outputs, "logits": dense(params["head"], x)}


def cnn(params: Params, x: Array) -> Outputs:
    """Pixelwise layers and a 2x2 pool between them: maps of 4x4 and 2x2."""
    outputs = {}
    for i in range(2):
        if i:
            x = jnp.mean(x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1), (2, 4))
        outputs[f"conv_{i}"] = dense(params[f"layer_{i}"], x)
        x = outputs[f"block_{i}"] = jax.nn.relu(outputs[f"conv_{i}"])
    pooled = jnp.mean(x, axis=(1, 2))
    return {**outputs, "pooled": pooled, "logits": dense(params["head"], pooled)}


def layers(seed: int, *sizes: int) -> dict[str, dict[str, Array]]:
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    names = (*(f"layer_{i}" for i in range(len(sizes) - 2)), "head")
    return {
        name: {"kernel": jax.random.normal(key, (n, m)) / n**0.5, "bias": jnp.zeros((m,))}
        for name, key, n, m in zip(names, keys, sizes, sizes[1:], strict=False)
    }


def shapes_of(outputs: Outputs) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in outputs.items()}


class Pair(NamedTuple):
    """A student, its teacher's outputs, and one batch."""

    model: Model
    student: Params
    teacher: Outputs
    batch: dict[str, Array]
    setup: Setup


def pair_of(
    student_model: Model,
    teacher_model: Model,
    student: Params,
    teacher: Params,
    x: Array,
    **setup: Any,
) -> Pair:
    order = jnp.arange(BATCH, dtype=jnp.int32)
    batch = {"inputs": x, "labels": order % CLASSES, "index": order + 3}
    outputs = jax.jit(teacher_model)(teacher, x)
    described = Setup(
        classes=CLASSES,
        student=shapes_of(jax.eval_shape(student_model, student, x)),
        teacher=shapes_of(outputs),
        examples=EXAMPLES,
        steps=STEPS,
        teacher_head=Head(**teacher["head"]),
        student_head=lambda params: Head(**params["head"]),
        models=Models(student_model, lambda x: teacher_model(teacher, x)),
        **setup,
    )
    return Pair(student_model, student, dict(outputs), batch, described)


@pytest.fixture(scope="module")
def mlps() -> Pair:
    return pair_of(
        mlp,
        mlp,
        layers(0, 7, 8, 6, CLASSES),
        layers(1, 7, 10, 12, CLASSES),
        jax.random.normal(jax.random.key(2), (BATCH, 7)),
        pairs=(("hidden_0", "hidden_0"), ("hidden_1", "hidden_1")),
        last=("hidden_1", "hidden_1"),
        before_activation={"hidden_0": "dense_0", "hidden_1": "dense_1"},
    )


@pytest.fixture(scope="module")
def cnns() -> Pair:
    return pair_of(
        cnn,
        cnn,
        layers(0, 3, 4, 6, CLASSES),
        layers(1, 3, 5, 8, CLASSES),
        jax.random.normal(jax.random.key(2), (BATCH, 4, 4, 3)),
        pairs=(("block_0", "block_0"), ("block_1", "block_1")),
        last=("pooled", "pooled"),
        last_maps=("block_1", "block_1"),
        before_activation={"block_0": "conv_0", "block_1": "conv_1"},
    )


@pytest.fixture(scope="module")
def vits() -> Pair:
    """Equal heads and patches, unequal widths."""
    taps = (r"layers_\d", r"layers_\d/attention/(probs|query|key|value)")
    x = jax.random.normal(jax.random.key(2), (BATCH, 4, 4, 1))

    def vit(width: int, seed: int) -> tuple[Model, Params]:
        module = ViT(width=width, layers=2, heads=2, hidden=8, patch=2, classes=CLASSES)
        model = linen.model(module, taps=taps)

        def apply(params: Params, x: Array) -> Outputs:
            # The model's own promotions are not the subject here.
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                outputs, _ = model.apply(params, None, x)
            return {**outputs, "pooled": outputs["last_hidden"][:, 0]}

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return apply, jax.jit(model.init)(jax.random.key(seed), x).params

    (student_model, student), (teacher_model, teacher) = vit(4, 0), vit(6, 1)
    names = [f"layers_{i}" for i in range(2)]
    return pair_of(
        student_model,
        teacher_model,
        student,
        teacher,
        x,
        pairs=tuple((name, name) for name in names),
        last=("pooled", "pooled"),
        attention=tuple((f"{name}/attention", f"{name}/attention") for name in names),
    )


class Step(NamedTuple):
    """What one evaluation of a method gives."""

    terms: dict[str, Array]
    grads: Params
    connectors: Params
    memory: tuple[Any, Any]  # before, after


def start(pair: Pair, built: Built) -> tuple[Params, Any]:
    """Parameters with connectors, and memory."""
    keys = (jax.random.key(seed, impl=KEYS) for seed in (3, 4))
    init = jax.jit(lambda a, b: (built.connectors(a), built.memory(b)), **QUICKLY)
    connectors, memory = init(*keys)
    return {"student": pair.student, "connectors": connectors}, memory


def gradient(pair: Pair, built: Built) -> Callable[..., tuple[Params, Any]]:
    """`(params, memory, step) -> (gradient of the summed terms, (terms, memory))`."""

    def loss(params: Params, memory: Any, step: Array, teacher: Outputs, batch: Any, key: Array):
        student = pair.model(params["student"], batch["inputs"])
        returned = built.terms(
            Inputs(
                student,
                teacher,
                batch,
                params["student"],
                params["connectors"],
                memory=memory,
                step=step,
                key=key,
            )
        )
        named, after = returned if isinstance(returned, tuple) else (returned, memory)
        values = [objective.reduce(name, value).value() for name, value in named.items()]
        return sum(values[1:], values[0]), (named, after)

    return jax.grad(loss, has_aux=True)


def one_step(pair: Pair, method: Method, step: int = 0) -> Step:
    built = build(method, pair.setup)
    params, memory = start(pair, built)
    at, key = jnp.asarray(step, jnp.int32), jax.random.key(5, impl=KEYS)
    run = jax.jit(gradient(pair, built), **QUICKLY)
    grads, (named, after) = run(params, memory, at, pair.teacher, pair.batch, key)
    assert named.keys() == built.weights.keys() - {TASK}
    return Step(named, grads, params["connectors"], (memory, after))


def check(pair: Pair, method: Method) -> None:
    """The method teaches the pair, or says in words why it cannot."""
    reason = method.applies(pair.setup)
    if reason is not None:
        assert reason.startswith("needs ") and len(reason.split()) > 3
        with pytest.raises(ValueError, match=f"{method.name}: needs "):
            build(method, pair.setup)
        return
    done = one_step(pair, method)
    for name, values in done.terms.items():
        assert values.shape[:1] in ((), (BATCH,)), name
        assert jnp.all(jnp.isfinite(values)), name
    leaves = jax.tree.leaves(done.grads)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)
    assert any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(done.grads["student"]))
    assert method.connector == bool(jax.tree.leaves(done.connectors))
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), m) for m in done.memory)
    assert before == after


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)
def test_a_method_teaches_a_pair_of_mlps(method: Method, mlps: Pair) -> None:
    check(mlps, method)


OF_FEATURES = [m for m in methods.METHODS if m.needs in ("features", "maps", "networks")]
# What runs otherwise on maps than on vectors: pools, upsampling, margins, the head of an average.
ON_MAPS = [
    m for m in methods.METHODS if m.needs == "maps" or m.name in ("simkd", "ofd", "reviewkd")
]


@pytest.mark.parametrize("method", ON_MAPS, ids=lambda method: method.name)
def test_a_method_of_maps_teaches_a_pair_of_cnns(method: Method, cnns: Pair) -> None:
    assert method.applies(cnns.setup) is None
    check(cnns, method)


def traced(pair: Pair, method: Method) -> None:
    """The method's gradient on shapes alone."""
    built, key = build(method, pair.setup), jax.random.key(0, impl=KEYS)
    params = {"student": pair.student, "connectors": jax.eval_shape(built.connectors, key)}
    memory, at = jax.eval_shape(built.memory, key), jnp.zeros((), jnp.int32)
    jax.eval_shape(gradient(pair, built), params, memory, at, pair.teacher, pair.batch, key)


@pytest.mark.parametrize("method", OF_FEATURES, ids=lambda method: method.name)
def test_a_method_of_features_takes_maps_and_tokens(method: Method, cnns: Pair, vits: Pair) -> None:
    traced(cnns, method)
    if method.applies(vits.setup) is None:
        traced(vits, method)
    else:
        assert method.name in ("catkd", "ofd")


def test_methods_of_tokens_refuse_maps(cnns: Pair) -> None:
    assert all(m.applies(cnns.setup) is not None for m in methods.METHODS if m.needs == "tokens")


@pytest.mark.parametrize(
    "method", [m for m in methods.METHODS if m.needs == "tokens"], ids=lambda method: method.name
)
def test_a_method_of_tokens_teaches_a_pair_of_transformers(method: Method, vits: Pair) -> None:
    assert method.applies(vits.setup) is None
    check(vits, method)


# The issue's own list, by the name that each stands under here.
TIERS_1_AND_2 = """
forward_kl reverse_kl symmetric_kl js jsd_gkd jsd_continuous jsd_normalized skew_forward_kl
skew_reverse_kl total_variation adaptive_kl
kd logit_std dkd nkd dist wsld ttm wttm logit_mse mlld wkd_l wkd_f hinge_ranking logistic_ranking
label_smoothing tf_kd probability_shift mft hard_kd ctkd
hint cosine at ft ab nst fsp vid reviewkd ofd simkd cwd mgd srrl catkd ickd pkd srd jacobian
sp rkd pkt cc crd info_nce rrd ridge_hint
hidden_mse hidden_cosine patient_kd attention_kl attention_mse minilm minilm_v2 tinybert
"""


def test_every_method_of_the_first_two_tiers_is_in_the_table() -> None:
    assert set(TIERS_1_AND_2.split()) <= methods.BY_NAME.keys()


def test_names_are_unique_and_rows_fill_the_columns() -> None:
    names = [method.name for method in methods.METHODS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
    for row in methods.rows():
        assert len(row) == len(methods.COLUMNS) and all(row)
        assert re.search(r"\d{4}$", row[2]), "a paper ends with its year"


def test_only_methods_of_positions_and_tokens_refuse_vectors(mlps: Pair) -> None:
    refused = {method.name for method in methods.METHODS if method.applies(mlps.setup)}
    of_tokens = {method.name for method in methods.METHODS if method.needs == "tokens"}
    assert refused == of_tokens | {"at", "nst", "cwd", "wkd_f", "catkd"}


def test_what_is_missing_is_named(mlps: Pair) -> None:
    bare = mlps.setup._replace(teacher_head=None, models=None, before_activation={})
    reasons = {name: methods.BY_NAME[name].applies(bare) for name in ("simkd", "jacobian", "ofd")}
    assert "the teacher's classifier" in str(reasons["simkd"])
    assert "both networks" in str(reasons["jacobian"])
    assert "before the activation" in str(reasons["ofd"]) and "hidden_0" in str(reasons["ofd"])
    single = mlps.setup._replace(pairs=mlps.setup.pairs[:1])
    assert "2 matched layers" in str(methods.BY_NAME["fsp"].applies(single))


def test_the_user_overrides_weights_and_is_told_of_terms_that_are_not(mlps: Pair) -> None:
    kd = methods.BY_NAME["kd"]
    built = build(kd, mlps.setup, Options(weights={TASK: 0.5}))
    assert built.weights == {TASK: 0.5, "kd": 0.9}
    with pytest.raises(ValueError, match=r"kd: weights are for the terms \['kd', 'task'\].*'dkd'"):
        build(kd, mlps.setup, Options(weights={"dkd": 1.0}))


def test_the_user_overrides_the_temperature(mlps: Pair) -> None:
    student = mlp(mlps.student, mlps.batch["inputs"])
    inputs = Inputs(student, mlps.teacher, mlps.batch)

    def kd(options: Options) -> Array:
        built = build(methods.BY_NAME["kd"], mlps.setup, options)
        terms = built.terms(inputs)
        assert not isinstance(terms, tuple)
        return jnp.asarray(terms["kd"])

    assert jnp.array_equal(kd(Options()), kd(Options(temperature=4.0)))
    assert not jnp.allclose(kd(Options()), kd(Options(temperature=1.0)))


def test_schedules_of_weights(mlps: Pair, cnns: Pair) -> None:
    def at(name: str, step: int) -> dict[str, float]:
        weights = build(methods.BY_NAME[name], mlps.setup).weights
        resolved = objective.resolve(weights, jnp.asarray(step, jnp.int32))
        return {term: float(weight) for term, weight in resolved.items()}

    assert at("dkd", 0) == {TASK: 1, "dkd": 0}
    assert at("dkd", 10)["dkd"] == pytest.approx(0.5)
    assert at("dkd", 20)["dkd"] == at("dkd", STEPS)["dkd"] == 1
    assert at("ab", 0) == {"ab": 1, TASK: 0}
    assert at("ab", 26)["ab"] == 1
    assert at("ab", 27) == at("ab", STEPS) == {"ab": 0, TASK: 1}
    held = build(methods.BY_NAME["wkd_f"], cnns.setup).weights["wkd_f"]
    assert callable(held)
    values = [float(held(jnp.asarray(step, jnp.int32))) for step in (0, 150, 195, STEPS)]
    assert values == pytest.approx([0.08, 0.08, 0.04, 0], abs=1e-6)


def test_simkd_predicts_through_the_teachers_head(cnns: Pair) -> None:
    built = build(methods.BY_NAME["simkd"], cnns.setup)
    assert built.predict is not None and built.weights[TASK] == 0
    params, _ = start(cnns, built)
    student = cnn(cnns.student, cnns.batch["inputs"][:4])
    logits = built.predict(params, student)
    assert logits.shape == (4, CLASSES)
    assert not jnp.allclose(logits, student["logits"])


def test_crd_fixes_its_normalizer_with_the_first_batch(mlps: Pair) -> None:
    first, later = (one_step(mlps, methods.BY_NAME["crd"], step=step) for step in (0, 1))
    for side in ("student", "teacher"):
        start = first.memory[0][side].log_z
        assert first.memory[1][side].log_z != start
        assert later.memory[1][side].log_z == start
        touched = jnp.any(first.memory[0][side].rows != first.memory[1][side].rows, axis=1)
        assert jnp.array_equal(jnp.flatnonzero(touched), mlps.batch["index"])
