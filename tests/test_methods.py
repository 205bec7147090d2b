"""Published methods: every one's terms and gradients on small pairs, weights, what they refuse."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import method_pairs
import pytest
from jax import Array
from method_pairs import BATCH, CLASSES, KEYS, QUICKLY, STEPS, Pair, cnn, mlp

from kdtl_jax import methods, objective
from kdtl_jax._types import Outputs, Params
from kdtl_jax.methods import Entry, Method
from kdtl_jax.objective import Inputs


@pytest.fixture(scope="module")
def mlps() -> Pair:
    return method_pairs.mlps()


@pytest.fixture(scope="module")
def cnns() -> Pair:
    return method_pairs.cnns()


@pytest.fixture(scope="module")
def vits() -> Pair:
    return method_pairs.vits()


class Step(NamedTuple):
    """What one evaluation of a method gives."""

    terms: dict[str, Array]
    grads: Params
    connectors: Params
    memory: tuple[Any, Any]  # before, after


def start(method: Method) -> tuple[Params, Any]:
    """Connectors and memory."""
    keys = (jax.random.key(seed, impl=KEYS) for seed in (3, 4))
    return jax.jit(lambda a, b: (method.connectors(a), method.memory(b)), **QUICKLY)(*keys)


def gradient(pair: Pair, method: Method) -> Callable[..., tuple[Params, Any]]:
    """`((params, connectors), memory, step) -> (gradient of the summed terms, (terms, memory))`."""

    def loss(trained: Params, memory: Any, step: Array, teacher: Outputs, batch: Any, key: Array):
        params, connectors = trained
        student = pair.model(params, batch["inputs"])
        inputs = Inputs(
            student, teacher, batch, params, connectors, memory=memory, step=step, key=key
        )
        returned = method.terms(inputs)
        named, after = returned if isinstance(returned, tuple) else (returned, memory)
        own = {name: value for name, value in named.items() if name != "task"}
        values = [objective.reduce(name, value).value() for name, value in own.items()]
        return sum(values[1:], values[0]), (named, after)

    return jax.grad(loss, has_aux=True)


def one_step(pair: Pair, entry: Entry, step: int = 0) -> Step:
    method = entry.build(pair.setup)
    connectors, memory = start(method)
    at, key = jnp.asarray(step, jnp.int32), jax.random.key(5, impl=KEYS)
    run = jax.jit(gradient(pair, method), **QUICKLY)
    trained = pair.student, connectors
    grads, (named, after) = run(trained, memory, at, pair.teacher, pair.batch, key)
    assert named.keys() == method.weights.keys()
    assert unstated_weights(entry, method) == []
    return Step(named, grads, connectors, (memory, after))


def unstated_weights(entry: Entry, method: Method) -> list[str]:
    """Terms whose weights, of schedules the larger end, are not those of the docstring."""
    doc, missing = " ".join((entry.build.__doc__ or "").split()), []
    for term, weight in method.weights.items():
        ends = [weight(jnp.int32(step)) for step in (0, STEPS)] if callable(weight) else [weight]
        matches = re.findall(rf"\b{term} ([\d.e-]*\d)(?: / (\d+))?", doc, re.IGNORECASE)
        # Divergences share the sentence of their module.
        if "ask" not in doc and entry.build.__module__.endswith("_classes"):
            matches = [("0.5", "")]
        top = pytest.approx(max(map(float, ends)))
        if not any(float(value) / float(over or 1) == top for value, over in matches):
            missing.append(f"{entry.name}: {term} {top}, in the docstring {matches}")
    return missing


def check(pair: Pair, entry: Entry) -> None:
    """The method teaches the pair, or says in words why it cannot."""
    reason = entry.applies(pair.setup)
    if reason is not None:
        assert reason.startswith("needs ") and len(reason.split()) > 3
        with pytest.raises(ValueError, match="needs "):
            entry.build(pair.setup)
        return
    done = one_step(pair, entry)
    for name, values in done.terms.items():
        assert values.shape[:1] in ((), (BATCH,)), name
        assert jnp.all(jnp.isfinite(values)), name
    leaves = jax.tree.leaves(done.grads)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)
    assert any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(done.grads[0]))
    assert entry.connector == bool(jax.tree.leaves(done.connectors))
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), m) for m in done.memory)
    assert before == after


TABLE = methods.table()
NAMED = {entry.name: entry for entry in TABLE}


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_a_method_teaches_a_pair_of_mlps(entry: Entry, mlps: Pair) -> None:
    check(mlps, entry)


OF_FEATURES = [m for m in TABLE if m.needs in ("features", "maps", "networks")]
# What runs otherwise on maps than on vectors: pools, upsampling, margins, the head of an average.
ON_MAPS = [m for m in TABLE if m.needs == "maps" or m.name in ("simkd", "ofd", "review")]


@pytest.mark.parametrize("entry", ON_MAPS, ids=lambda entry: entry.name)
def test_a_method_of_maps_teaches_a_pair_of_cnns(entry: Entry, cnns: Pair) -> None:
    assert entry.applies(cnns.setup) is None
    check(cnns, entry)


def traced(pair: Pair, entry: Entry) -> None:
    """The method's gradient on shapes alone."""
    method, key = entry.build(pair.setup), jax.random.key(0, impl=KEYS)
    trained = pair.student, jax.eval_shape(method.connectors, key)
    memory, at = jax.eval_shape(method.memory, key), jnp.zeros((), jnp.int32)
    jax.eval_shape(gradient(pair, method), trained, memory, at, pair.teacher, pair.batch, key)


@pytest.mark.parametrize("entry", OF_FEATURES, ids=lambda entry: entry.name)
def test_a_method_of_features_takes_maps_and_tokens(entry: Entry, cnns: Pair, vits: Pair) -> None:
    traced(cnns, entry)
    if entry.applies(vits.setup) is None:
        traced(vits, entry)
    else:
        assert entry.name in ("catkd", "ofd")


def test_methods_of_tokens_refuse_maps(cnns: Pair) -> None:
    assert all(m.applies(cnns.setup) is not None for m in TABLE if m.needs == "tokens")


@pytest.mark.parametrize(
    "entry", [e for e in TABLE if e.needs == "tokens"], ids=lambda entry: entry.name
)
def test_a_method_of_tokens_teaches_a_pair_of_transformers(entry: Entry, vits: Pair) -> None:
    assert entry.applies(vits.setup) is None
    check(vits, entry)


# What a reference library of distillation must have, by the name that each stands under here.
TIERS_1_AND_2 = """
forward_kl reverse_kl symmetric_kl js jsd_gkd jsd_continuous jsd_normalized skew_forward_kl
skew_reverse_kl total_variation adaptive_kl
kd logit_std dkd nkd dist wsld ttm wttm logit_mse logit_l1
logit_huber bounded_regression mlld wkd_l wkd_f hinge_ranking logistic_ranking
label_smoothing tf_kd probability_shift mft hard_kd ctkd
hint cosine at ft ab nst fsp vid review ofd simkd cwd mgd srrl catkd ickd pkd srd jacobian
sp rkd pkt cc crd info_nce rrd ridge_hint
hidden_mse hidden_cosine patient_kd attention_kl attention_mse minilm minilm_v2 tinybert
"""


def test_every_method_of_the_first_two_tiers_is_in_the_table() -> None:
    assert set(TIERS_1_AND_2.split()) <= NAMED.keys()


def test_entries_are_complete_and_named_as_their_functions() -> None:
    assert len(NAMED) == len(TABLE)
    for entry in TABLE:
        assert re.fullmatch(r"[a-z0-9_]+", entry.name)
        assert getattr(methods, entry.name) is entry.build
        assert entry.title and entry.needs
        assert re.search(r"\d{4}$", entry.paper), "a paper ends with its year"


def test_docstrings_give_weights_and_papers() -> None:
    for entry in TABLE:
        doc = " ".join((entry.build.__doc__ or "").split())
        year = entry.paper[-4:]
        assert re.search(r"\b(19|20)\d\d\b", doc), f"{entry.name}: no paper ({year})"
        # Divergences share the sentence of their module.
        assert "ask" in doc or entry.build.__module__.endswith("_classes"), entry.name


def test_takes_temperature_is_what_the_signature_says(mlps: Pair) -> None:
    warm = {entry.name for entry in TABLE if methods.takes_temperature(entry)}
    assert {"kd", "dkd", "crd", "forward_kl", "cwd"} <= warm
    assert not warm & {"hint", "logit_mse", "sp", "ctkd"}
    assert NAMED["kd"].build(mlps.setup, temperature=2.0).weights == {"task": 0.1, "kd": 0.9}


def test_only_methods_of_positions_and_tokens_refuse_vectors(mlps: Pair) -> None:
    refused = {entry.name for entry in TABLE if entry.applies(mlps.setup)}
    of_tokens = {entry.name for entry in TABLE if entry.needs == "tokens"}
    of_targets = {"binary_kd", "bounded_regression"}
    assert refused == of_tokens | of_targets | {"at", "nst", "cwd", "wkd_f", "catkd"}


def test_what_is_missing_is_named(mlps: Pair) -> None:
    bare = mlps.setup._replace(teacher_head=None, models=None, before_activation={})
    reasons = {name: NAMED[name].applies(bare) for name in ("simkd", "jacobian", "ofd")}
    assert "the teacher's classifier" in str(reasons["simkd"])
    assert "name outputs PATH/query" in str(NAMED["minilm"].applies(bare))
    assert "both networks" in str(reasons["jacobian"])
    assert "before the activation" in str(reasons["ofd"]) and "hidden_0" in str(reasons["ofd"])
    single = mlps.setup._replace(pairs=mlps.setup.pairs[:1])
    assert "2 matched layers" in str(NAMED["fsp"].applies(single))


def test_softmax_methods_refuse_sigmoid_heads(mlps: Pair) -> None:
    setup = mlps.setup._replace(exclusive=False)
    refused = {e.name for e in TABLE if "exclude each other" in str(e.applies(setup))}
    softmax = {e.name for e in TABLE if e.needs in ("labels", "logits")}
    softmax -= {"binary_kd", "logit_mse", "logit_l1", "logit_huber", "bounded_regression"}
    assert refused == softmax | {"srd", "uskd"}


@pytest.mark.parametrize("labels", [1, 3])
def test_sigmoid_heads_are_taught(labels: int) -> None:
    """Binary heads of one logit, and one logit per label."""
    pair = method_pairs.sigmoid_mlps(labels)
    assert not pair.setup.exclusive and NAMED["kd"].applies(pair.setup) is not None
    check(pair, NAMED["binary_kd"])
    check(pair, NAMED["logit_mse"])
    terms = terms_of(pair, methods.binary_kd(pair.setup))
    student = mlp(pair.student, pair.batch["inputs"])["logits"]
    p, q = jax.nn.sigmoid(pair.teacher["logits"]), jax.nn.sigmoid(student)
    kl = p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q))
    assert jnp.allclose(terms["kd"], kl.mean(axis=1), atol=1e-6)
    assert terms["task"].shape == (BATCH,)
    weighted = methods.binary_kd(pair.setup, class_weights=jnp.full((labels,), 2.0))
    assert jnp.allclose(terms_of(pair, weighted)["kd"], 2 * terms["kd"])


def test_regressions_are_taught() -> None:
    """The task by itself, by its weight, and what a teacher nearer or farther adds."""
    pair = method_pairs.sigmoid_mlps(3)
    pair = pair._replace(setup=pair.setup._replace(task=methods.regression))
    s, t = mlp(pair.student, pair.batch["inputs"])["logits"], pair.teacher["logits"]
    y, gap = pair.batch["labels"], jnp.abs(s - t)
    near, far = (jnp.square(z - y).mean(axis=1) for z in (s, t))
    assert 0 < jnp.sum(near > far) < BATCH
    small = jnp.minimum(gap, 0.2)
    expected: dict[str, tuple[str, Array]] = {
        "logit_mse": ("mse", (gap**2).mean(axis=1)),
        "logit_l1": ("l1", gap.mean(axis=1)),
        "logit_huber": ("huber", (small**2 / 2 + 0.2 * (gap - small)).mean(axis=1)),
        "bounded_regression": ("bounded", jnp.where(near > far, near, 0)),
    }
    for name, (term, values) in expected.items():
        check(pair, NAMED[name])
        more = {"delta": 0.2} if name == "logit_huber" else {}
        terms = terms_of(pair, NAMED[name].build(pair.setup, **more))
        assert jnp.allclose(terms[term], values, atol=1e-6)
        assert jnp.allclose(terms["task"], near, atol=1e-6)
    of_numbers = {e.name for e in TABLE if e.needs == "logits" and not e.applies(pair.setup)}
    assert of_numbers == expected.keys()


def test_weights_are_overridden_as_any_dict_is(mlps: Pair) -> None:
    assert {**methods.kd(mlps.setup).weights, "task": 0.5} == {"task": 0.5, "kd": 0.9}


def terms_of(pair: Pair, method: Method) -> dict[str, Array]:
    student = mlp(pair.student, pair.batch["inputs"])
    terms = method.terms(Inputs(student, pair.teacher, pair.batch))
    assert not isinstance(terms, tuple)
    return {name: jnp.asarray(value) for name, value in terms.items()}


def test_the_temperature_is_an_argument(mlps: Pair) -> None:
    plain, four, one = (
        terms_of(mlps, method)["kd"]
        for method in (
            methods.kd(mlps.setup),
            methods.kd(mlps.setup, temperature=4.0),
            methods.kd(mlps.setup, temperature=1.0),
        )
    )
    assert jnp.array_equal(plain, four) and not jnp.allclose(plain, one)


def test_the_task_is_a_term_and_may_be_replaced(mlps: Pair) -> None:
    alone = terms_of(mlps, methods.alone(mlps.setup))
    assert alone.keys() == {"task"} and alone["task"].shape == (BATCH,)
    assert jnp.array_equal(terms_of(mlps, methods.kd(mlps.setup))["task"], alone["task"])
    zeros = mlps.setup._replace(task=lambda inputs: {"task": jnp.zeros((BATCH,))})
    assert not terms_of(mlps, methods.kd(zeros))["task"].any()


def test_schedules_of_weights(mlps: Pair, cnns: Pair) -> None:
    def at(name: str, step: int) -> dict[str, float]:
        weights = NAMED[name].build(mlps.setup).weights
        resolved = objective.resolve(weights, jnp.asarray(step, jnp.int32))
        return {term: float(weight) for term, weight in resolved.items()}

    assert at("dkd", 0) == {"task": 1, "tckd": 0, "nckd": 0}
    assert at("dkd", 10) == {"task": 1, "tckd": pytest.approx(0.5), "nckd": pytest.approx(4)}
    assert at("dkd", 20) == at("dkd", STEPS) == {"task": 1, "tckd": 1, "nckd": 8}
    assert at("ab", 0) == {"ab": 1, "task": 0}
    assert at("ab", 26)["ab"] == 1
    assert at("ab", 27) == at("ab", STEPS) == {"ab": 0, "task": 1}
    held = methods.wkd_f(cnns.setup).weights["wkd_f"]
    assert callable(held)
    values = [float(held(jnp.asarray(step, jnp.int32))) for step in (0, 150, 195, STEPS)]
    assert values == pytest.approx([0.08, 0.08, 0.04, 0], abs=1e-6)


def test_simkd_predicts_through_the_teachers_head(cnns: Pair) -> None:
    method = methods.simkd(cnns.setup)
    assert method.predict is not None and method.weights["task"] == 0
    connectors, memory = start(method)
    student = cnn(cnns.student, cnns.batch["inputs"][:4])
    logits = method.predict(connectors, memory, student)
    assert logits.shape == (4, CLASSES)
    assert not jnp.allclose(logits, student["logits"])


def test_crd_fixes_its_normalizer_with_the_first_batch(mlps: Pair) -> None:
    """Of real examples: a first step that is skipped, or of padding, does not count."""
    method = methods.crd(mlps.setup)
    connectors, memory = start(method)
    run = jax.jit(gradient(mlps, method), **QUICKLY)

    def after(memory: Any, step: int, batch: Any) -> Any:
        at, key = jnp.asarray(step, jnp.int32), jax.random.key(5 + step, impl=KEYS)
        return run((mlps.student, connectors), memory, at, mlps.teacher, batch, key)[1][1]

    batch = mlps.batch | {"weights": jnp.ones(len(mlps.batch["index"]))}
    padding = after(memory, 0, batch | {"weights": 0 * batch["weights"]})
    first = after(padding, 1, batch)
    second = after(first, 2, batch)
    for side in ("student", "teacher"):
        assert padding[side].log_z == memory[side].log_z != first[side].log_z
        assert second[side].log_z == first[side].log_z
        touched = jnp.any(memory[side].rows != first[side].rows, axis=1)
        assert jnp.array_equal(jnp.flatnonzero(touched), mlps.batch["index"])


def test_crd_says_what_its_batch_lacks(mlps: Pair) -> None:
    batch = {name: x for name, x in mlps.batch.items() if name != "index"}
    with pytest.raises(ValueError, match='the batch has no "index".*jnp.arange'):
        one_step(mlps._replace(batch=batch), NAMED["crd"])
