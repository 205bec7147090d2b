"""Losses at vocabulary scale: equal to the dense composition, in chunk-sized memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from kdtl_jax import losses, train
from kdtl_jax.losses import Head
from kdtl_jax.objective import Inputs

TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY = (4, 6), 5, 7, 11


def arrays(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {
        "hidden": (*TOKENS, WIDTH),
        "kernel": (WIDTH, VOCABULARY),
        "bias": (VOCABULARY,),
        "a": (WIDTH, 2),
        "b": (2, VOCABULARY),
        "teacher_hidden": (*TOKENS, TEACHER_WIDTH),
        "teacher_kernel": (TEACHER_WIDTH, VOCABULARY),
        "teacher_bias": (VOCABULARY,),
    }
    made = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    return made | {"temperature": jnp.asarray(1.7), "scale": jnp.asarray(0.8)}


def where_of(seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).random(TOKENS) < 0.7)


def heads(x: dict[str, Array]) -> tuple[Head, Head]:
    student = Head(x["kernel"], x["bias"], x["scale"], 6.0, (x["a"], x["b"]))
    return student, Head(x["teacher_kernel"], x["teacher_bias"])


Divergence = Callable[..., Array]
# How each uses the temperature, which must have its derivative too.
DIVERGENCES: dict[str, Callable[[Array], Divergence]] = {
    "forward_kl": lambda t: partial(losses.forward_kl, temperature=t),
    "reverse_kl": lambda t: partial(losses.reverse_kl, temperature=t),
    "jsd_normalized": lambda t: partial(losses.jsd_normalized, beta=0.2, temperature=t),
    "skew_reverse_kl": lambda t: partial(losses.skew_reverse_kl, temperature=t),
    "total_variation": lambda t: partial(losses.total_variation, temperature=t),
    "logit_mse": lambda t: lambda s, z: losses.last_axis_mse(s, z) / t,
}


def chunked_total(name: str, x: dict[str, Array], where: Array | None, chunk: int = 5) -> Array:
    student, teacher = heads(x)
    summed = losses.chunked_divergence(
        DIVERGENCES[name](x["temperature"]),
        x["hidden"],
        student,
        x["teacher_hidden"],
        teacher,
        where=where,
        chunk_size=chunk,
    )
    return summed.total


def dense_total(name: str, x: dict[str, Array], where: Array | None) -> Array:
    student, teacher = heads(x)
    logits = losses.head_logits(x["hidden"], student)
    aim = jax.lax.stop_gradient(losses.head_logits(x["teacher_hidden"], teacher))
    values = DIVERGENCES[name](x["temperature"])(logits, aim)
    return jnp.sum(values if where is None else jnp.where(where, values, 0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradients_are_those_of_the_dense_composition(name: str) -> None:
    """By hidden states, head, bias, scale and temperature; none by the teacher. 24 tokens in chunks
    of 5 leave one of 4 and one padded."""
    x, where = arrays(), where_of()
    got, by_chunks = jax.jit(jax.value_and_grad(partial(chunked_total, name)))(x, where)
    want, dense = jax.jit(jax.value_and_grad(partial(dense_total, name)))(x, where)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    for key, gradient in dense.items():
        np.testing.assert_allclose(by_chunks[key], gradient, rtol=1e-9, atol=1e-12, err_msg=key)
        assert key.startswith("teacher") or np.abs(gradient).max() > 0, key
    np.testing.assert_allclose(chunked_total(name, x, where), want, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk", [1, 8, 24, 1000])
def test_the_size_of_a_chunk_changes_nothing(chunk: int) -> None:
    x = arrays()
    both = jax.jit(
        jax.value_and_grad(partial(chunked_total, "forward_kl", where=None, chunk=chunk))
    )
    got, gradients = both(x)
    want, dense = jax.jit(jax.value_and_grad(partial(dense_total, "forward_kl", where=None)))(x)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    for key, gradient in dense.items():
        np.testing.assert_allclose(gradients[key], gradient, rtol=1e-9, atol=1e-12, err_msg=key)


@pytest.mark.usefixtures("x64")
def test_blocks_of_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 tokens in chunks of two blocks of 8 rows, and a head of 5 x 600 by 512 columns."""
    monkeypatch.setattr("kdtl_jax.losses._chunk_blocks.BLOCK_OF_LOGITS", 1)
    monkeypatch.setattr("kdtl_jax.losses._chunk_blocks.BLOCK_OF_HEAD", 1)
    monkeypatch.setitem(globals(), "VOCABULARY", 600)
    x, where = arrays(), where_of()
    both = jax.jit(jax.value_and_grad(partial(chunked_total, "logit_mse", chunk=13)))
    assert str(both.lower(x, where).as_text()).count("while") >= 3  # chunks, rows, columns
    got, gradients = both(x, where)
    want, dense = jax.jit(jax.value_and_grad(partial(dense_total, "logit_mse")))(x, where)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    for key, gradient in dense.items():
        np.testing.assert_allclose(gradients[key], gradient, rtol=1e-9, atol=1e-12, err_msg=key)


@pytest.mark.usefixtures("x64")
def test_labels_and_top_k_teachers_and_foreign_vocabularies() -> None:
    x = arrays()
    labels = jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, TOKENS), jnp.int32)
    dense_teacher = losses.head_logits(x["teacher_hidden"], heads(x)[1])
    cases: dict[str, tuple[Any, Any]] = {
        "labels": (optax.softmax_cross_entropy_with_integer_labels, labels),
        "top_k": (losses.top_k_kl_tail, losses.top_k_targets(dense_teacher, k=3)),
        "stored logits": (losses.forward_kl, dense_teacher),
        "uld": (losses.uld, dense_teacher[..., :4]),
    }

    @jax.jit
    def both(x: dict[str, Array], targets: dict[str, Any]) -> Any:
        def chunked(x: dict[str, Array], name: str) -> Array:
            loss = cases[name][0]
            rows = targets[name]
            return losses.chunked_loss(loss, x["hidden"], heads(x)[0], rows, chunk_size=7).total

        def dense(x: dict[str, Array], name: str) -> Array:
            logits = losses.head_logits(x["hidden"], heads(x)[0])
            return jnp.sum(cases[name][0](logits, targets[name]))

        return {
            name: (jax.value_and_grad(chunked)(x, name), jax.value_and_grad(dense)(x, name))
            for name in cases
        }

    with jax.numpy_dtype_promotion("standard"):
        for name, (got, want) in both(x, {k: v[1] for k, v in cases.items()}).items():
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=name)


def test_tokens_that_do_not_count_may_hold_anything() -> None:
    where = where_of()
    x = {k: v.astype(jnp.float32) for k, v in arrays().items()}
    spoiled = dict(x)
    for name in ("hidden", "teacher_hidden"):
        spoiled[name] = jnp.where(where[..., None], x[name], jnp.nan)
    both = jax.jit(jax.value_and_grad(partial(chunked_total, "forward_kl")))
    want, clean = both(x, where)
    got, gradients = both(spoiled, where)
    assert got == want
    for key, gradient in clean.items():
        np.testing.assert_array_equal(gradients[key], gradient, err_msg=key)
    assert not np.asarray(gradients["hidden"])[~np.asarray(where)].any()
    nothing = losses.chunked_divergence(
        losses.forward_kl,
        spoiled["hidden"],
        heads(x)[0],
        spoiled["teacher_hidden"],
        heads(x)[1],
        where=jnp.zeros(TOKENS, jnp.bool_),
    )
    assert nothing == (0, 0)


def test_bfloat16_is_accumulated_in_float32() -> None:
    half = {k: v.astype(jnp.bfloat16) for k, v in arrays().items()}
    # A float32 master kernel under bfloat16 hidden states gets a float32 gradient.
    mixed = half | {"kernel": half["kernel"].astype(jnp.float32)}
    total = partial(chunked_total, "forward_kl", where=None)
    got, gradients = jax.jit(jax.value_and_grad(total))(mixed)
    assert got.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = {k: jnp.asarray(np.asarray(v, np.float64)) for k, v in half.items()}
        dense = jax.jit(jax.value_and_grad(partial(dense_total, "forward_kl", where=None)))
        want, exact = dense(wide)
    np.testing.assert_allclose(got, want, rtol=1e-2)
    for key, gradient in gradients.items():
        assert gradient.dtype == mixed[key].dtype
        right = np.asarray(exact[key])
        worst = np.abs(np.asarray(gradient, np.float64) - right).max()
        assert worst <= 2e-2 * np.abs(right).max(), key


@pytest.mark.usefixtures("x64")
def test_vmap_over_students_and_temperatures_is_a_loop() -> None:
    x, where = arrays(), where_of()
    several = {name: jnp.stack([x[name], 1.3 * x[name]]) for name in ("kernel", "temperature")}

    @jax.jit
    def gradient(changed: dict[str, Array]) -> Any:
        return jax.grad(lambda changed: chunked_total("reverse_kl", x | changed, where))(changed)

    mapped = jax.jit(jax.vmap(gradient))(several)
    for i in range(2):
        one = gradient({name: value[i] for name, value in several.items()})
        for name, value in one.items():
            np.testing.assert_allclose(mapped[name][i], value, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_second_derivatives_are_right_and_forward_mode_says_no() -> None:
    x, where = arrays(), where_of()

    def of_temperature(total: Any, temperature: Array) -> Array:
        return total("forward_kl", x | {"temperature": temperature}, where)

    hessians = [
        jax.jit(jax.hessian(partial(of_temperature, total)))(x["temperature"])
        for total in (chunked_total, dense_total)
    ]
    np.testing.assert_allclose(*hessians, rtol=1e-9)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(partial(of_temperature, chunked_total), (x["temperature"],), (jnp.asarray(1.0),))


def test_sharded_tokens_give_the_same_value_and_gradients_and_stay_where_they_lie() -> None:
    x, where = {k: v.astype(jnp.float32) for k, v in arrays().items()}, where_of()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tokens = ("hidden", "teacher_hidden")
    spread = {k: jax.device_put(v, rows if k in tokens else whole) for k, v in x.items()}
    both = jax.jit(jax.value_and_grad(partial(chunked_total, "forward_kl", chunk=8)))
    program = both.lower(spread, jax.device_put(where, rows)).compile()
    got, gradients = program(spread, jax.device_put(where, rows))
    want, one = both(x, where)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for key, gradient in one.items():
        np.testing.assert_allclose(gradients[key], gradient, rtol=1e-5, atol=1e-6, err_msg=key)
    assert "all-gather" not in str(program.as_text())


def test_memory_is_a_chunk_s() -> None:
    """Compiled, never run: 4,096 tokens of 8,192 classes, 128 at a time."""
    tokens, vocabulary, width, chunk = 4096, 8192, 32, 128
    f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = f32((tokens, width)), f32((width, vocabulary))

    def temporaries(loss: Callable[..., Array], *given: Any) -> int:
        by = (0, 1) if not given else 0
        program = jax.jit(jax.value_and_grad(loss, by)).lower(*given or shapes * 2).compile()
        memory: Any = program.memory_analysis()
        return memory.temp_size_in_bytes

    def chunked(h: Array, kernel: Array, teacher_h: Array, teacher_kernel: Array) -> Array:
        heads = Head(kernel), Head(teacher_kernel)
        return losses.chunked_divergence(
            losses.forward_kl, h, heads[0], teacher_h, heads[1], chunk_size=chunk
        ).total

    def dense(h: Array, kernel: Array, teacher_h: Array, teacher_kernel: Array) -> Array:
        return jnp.sum(losses.forward_kl(h @ kernel, teacher_h @ teacher_kernel))

    of_chunk, of_head = 4 * chunk * vocabulary, 4 * width * vocabulary
    assert temporaries(chunked) < 8 * of_chunk + 3 * of_head
    assert temporaries(dense) > 4 * tokens * vocabulary

    # What trains an adapter on a frozen head makes nothing of the head's size.
    def adapted(delta: tuple[Array, Array], h: Array, kernel: Array) -> Array:
        head = Head(kernel, delta=delta)
        return losses.chunked_divergence(
            losses.forward_kl, h, head, h, Head(kernel), chunk_size=4
        ).total

    delta = f32((512, 2)), f32((2, vocabulary))
    of_adapter = temporaries(adapted, delta, f32((16, 512)), f32((512, vocabulary)))
    assert of_adapter < 4 * 512 * vocabulary / 4


def test_as_a_term_microbatches_are_exactly_the_large_batch() -> None:
    """Masks are spread unevenly over the parts: a mean of means would differ."""
    x = {k: v.astype(jnp.float32) for k, v in arrays().items()}
    batch = {"inputs": x["hidden"], "where": where_of(3)}

    def student(params: Any, model_state: Any, inputs: Any, **_: Any) -> tuple[Any, Any]:
        return {"hidden": inputs @ params["body"]}, model_state

    def teacher(params: Any, model_state: Any, inputs: Any, **_: Any) -> tuple[Any, Any]:
        return {"hidden": jnp.concatenate([inputs, inputs[..., :2]], -1)}, model_state

    def terms(inputs: Inputs) -> dict[str, Any]:
        summed = losses.chunked_divergence(
            losses.forward_kl,
            inputs.student["hidden"],
            Head(inputs.params["head"]),
            inputs.teacher["hidden"],
            Head(x["teacher_kernel"]),
            where=inputs.batch["where"],
            chunk_size=4,
        )
        return {"kl": summed}

    tx = optax.sgd(0.1)
    params = {"body": jnp.eye(WIDTH), "head": x["kernel"]}
    after = []
    for microbatches in (1, 4):
        step = jax.jit(
            train.make_step(
                student, terms, {"kl": 1.0}, tx, teacher=teacher, microbatches=microbatches
            )
        )
        state = train.init_state(params, tx, key=jax.random.key(0))
        state, metrics = step(state, batch, {})
        after.append((state.params, metrics["kl"].value()))
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bad_arguments_say_what_fits() -> None:
    x = {k: v.astype(jnp.float32) for k, v in arrays().items()}
    student, teacher = heads(x)
    hidden, rows = x["hidden"], x["teacher_hidden"]

    def divergence(*args: Any, **options: Any) -> None:
        losses.chunked_divergence(losses.forward_kl, *args, **options)

    with pytest.raises(ValueError, match=r"kernel \[width, vocabulary\].*pass embedding\.T"):
        divergence(hidden, Head(x["kernel"].T), rows, teacher)
    with pytest.raises(TypeError, match="head must be a Head, got "):
        divergence(hidden, x["kernel"], rows, teacher)
    with pytest.raises(ValueError, match="one bias per class"):
        divergence(hidden, Head(x["kernel"], x["bias"][:3]), rows, teacher)
    with pytest.raises(ValueError, match=r"delta a \[width, r\] and b \[r, vocabulary\]"):
        divergence(hidden, Head(x["kernel"], delta=(x["a"], x["b"].T)), rows, teacher)
    with pytest.raises(ValueError, match=r"targets must begin with .*\[4, 6\]"):
        divergence(hidden, student, rows[:2], teacher)
    with pytest.raises(ValueError, match="where must have shape"):
        divergence(hidden, student, rows, teacher, where=jnp.ones(4, jnp.bool_))
    with pytest.raises(TypeError, match="where must be bool"):
        divergence(hidden, student, rows, teacher, where=jnp.ones(TOKENS))
    with pytest.raises(ValueError, match="must be finite and > 0, got 0"):
        divergence(hidden, student, rows, teacher, chunk_size=0)
    with pytest.raises(ValueError, match="one value per token"):
        losses.chunked_loss(lambda z, t: jnp.sum(z), hidden, student, rows)
    with pytest.raises(TypeError, match="must be floating point"):
        divergence(hidden.astype(jnp.int32), student, rows, teacher)


def test_a_map_over_chunks_is_the_map_over_all_logits() -> None:
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 3), (3, 7)))
    ids = jnp.asarray(rng.integers(0, 7, (2, 5)), jnp.int32)
    where = jnp.arange(10).reshape(2, 5) % 4 != 1

    def picked(logits: Array, ids: Array) -> dict[str, Array]:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=-1)
        return {"chosen": chosen[:, 0], "top": jax.lax.top_k(logits, 2)[0]}

    actual = losses.chunked_map(picked, hidden, Head(kernel), ids, where=where, chunk_size=4)
    logits = np.asarray(hidden) @ np.asarray(kernel)
    normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(normal, np.asarray(ids)[..., None], -1)[..., 0]
    np.testing.assert_allclose(actual["chosen"], np.where(where, chosen, 0), rtol=1e-5, atol=1e-6)
    top = np.where(where[..., None], -np.sort(-logits, axis=-1)[..., :2], 0)
    np.testing.assert_allclose(actual["top"], top, rtol=1e-5, atol=1e-6)
