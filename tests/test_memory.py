"""Banks and queues as values: what is drawn, scored, replaced, and what never moves in secret."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from kdtl_jax import augment, losses, memory, train, transforms
from kdtl_jax.train import TrainState

KEY = jax.random.key(0)


def units(seed: int, *shape: int) -> Array:
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


def test_a_new_bank_is_ready_and_its_normalizer_is_no_secret() -> None:
    bank = memory.bank_init(KEY, 50, 12)
    assert bank.rows.shape == (50, 12)
    assert float(jnp.max(jnp.abs(bank.rows))) <= 0.5  # 1 / sqrt(12 / 3)
    np.testing.assert_allclose(bank.log_z, math.log(50), rtol=1e-6)
    x, index = units(0, 3, 12), memory.bank_draw(KEY, jnp.arange(3), size=50, negatives=4)
    memory.bank_scores(bank, x, index)
    np.testing.assert_allclose(bank.log_z, math.log(50), rtol=1e-6)  # scoring sets nothing


def test_draws_hold_the_example_first_and_never_again() -> None:
    index = jnp.asarray([0, 2, 4], jnp.int32)
    drawn = np.asarray(memory.bank_draw(KEY, index, size=5, negatives=400))
    assert drawn.shape == (3, 401)
    np.testing.assert_array_equal(drawn[:, 0], index)
    for own, row in zip(index, drawn[:, 1:], strict=True):
        assert set(row.tolist()) == set(range(5)) - {int(own)}
        counts = np.bincount(row, minlength=5)
        assert counts[counts > 0].min() > 60  # 100 expected of each
    with pytest.raises(ValueError, match="size must be at least 2"):
        memory.bank_draw(KEY, index, size=1, negatives=3)
    with pytest.raises(TypeError, match="must be integers"):
        memory.bank_draw(KEY, jnp.ones(3), size=5, negatives=3)


def test_scores_are_the_published_ones() -> None:
    bank = memory.Bank(units(1, 6, 4), jnp.asarray(math.log(7.0), jnp.float32))
    x, index = units(2, 2, 4), jnp.asarray([[0, 3, 5], [4, 4, 1]])
    got = memory.bank_scores(bank, x, index, temperature=0.2)
    want = [
        [math.exp(float(bank.rows[j] @ x[b]) / 0.2) / 7 for j in index[b].tolist()]
        for b in range(2)
    ]
    np.testing.assert_allclose(jnp.exp(got), want, rtol=1e-5)


@pytest.mark.parametrize(("count", "all_rows"), [(3, 8), (3, 0), (700, 0)])
def test_scores_do_not_depend_on_what_is_multiplied(
    count: int, all_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of a small bank, drawn rows of a large one; 700 of 4096 numbers in chunks."""
    monkeypatch.setattr(memory, "_MAX_BANK_RATIO", all_rows)
    bank = memory.Bank(units(1, 8, 4096), jnp.zeros(()))
    x, probe = units(2, 4, 4096), units(4, 4, count)
    index = jnp.asarray(np.random.default_rng(3).integers(0, 8, size=(4, count)))

    def scores(x: Array) -> Array:
        return memory.bank_scores(bank, x, index, temperature=1.0)

    got, pull = jax.vjp(scores, x)
    want = jnp.take_along_axis(jnp.matmul(x, bank.rows.T, precision="highest"), index, axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    gradient = jnp.einsum("bk,bkd->bd", probe, bank.rows[index], precision="highest")
    np.testing.assert_allclose(pull(probe)[0], gradient, rtol=1e-4, atol=1e-5)


def test_scores_differentiate_by_queries_and_not_by_the_bank() -> None:
    bank = memory.bank_init(KEY, 6, 4)
    x, index = units(2, 2, 4), jnp.asarray([[0, 3, 5], [4, 4, 1]])

    def total(rows: Array, x: Array, temperature: Array) -> Array:
        scores = memory.bank_scores(bank._replace(rows=rows), x, index, temperature=temperature)
        return jnp.mean(losses.crd(scores, num_data=6))

    by_rows, by_x, by_temperature = jax.grad(total, argnums=(0, 1, 2))(
        bank.rows, x, jnp.asarray(0.1)
    )
    np.testing.assert_array_equal(by_rows, 0)
    assert float(jnp.abs(by_x).max()) > 0 and float(jnp.abs(by_temperature)) > 0


def test_the_normalizer_is_set_when_asked_and_makes_the_mean_score_one_in_n() -> None:
    bank = memory.bank_init(KEY, 6, 4)
    x, index = units(2, 2, 4), jnp.asarray([[0, 3, 5], [4, 4, 1]])
    once = memory.bank_set_normalizer(bank, x, index, temperature=0.1)
    scores = memory.bank_scores(once, x, index, temperature=0.1)
    np.testing.assert_allclose(jnp.mean(jnp.exp(scores)), 1 / 6, rtol=1e-5)
    twice = memory.bank_set_normalizer(once, x, index, temperature=0.1)
    np.testing.assert_allclose(twice.log_z, once.log_z, rtol=1e-6)  # of the raw scores
    np.testing.assert_array_equal(once.rows, bank.rows)


def test_updates_move_the_batchs_rows_alone() -> None:
    bank = memory.Bank(units(1, 5, 3), jnp.zeros(()))
    x, index = units(2, 2, 3), jnp.asarray([3, 1])
    new = memory.bank_update(bank, x, index, momentum=0.25)
    for b, row in enumerate((3, 1)):
        mixed = 0.25 * np.asarray(bank.rows[row]) + 0.75 * np.asarray(x[b])
        np.testing.assert_allclose(new.rows[row], mixed / np.linalg.norm(mixed), rtol=1e-5)
    np.testing.assert_array_equal(
        new.rows[jnp.asarray([0, 2, 4])], bank.rows[jnp.asarray([0, 2, 4])]
    )
    np.testing.assert_allclose(
        memory.bank_update(bank, x, index, momentum=1.0).rows, bank.rows, rtol=1e-6
    )
    np.testing.assert_allclose(
        memory.bank_update(bank, x, index, momentum=0.0).rows[3], x[0], rtol=1e-6
    )
    assert jax.tree.structure(new) == jax.tree.structure(bank)
    with pytest.raises(ValueError, match="momentum must lie in"):
        memory.bank_update(bank, x, index, momentum=1.5)


def test_bank_errors_name_both_shapes() -> None:
    bank = memory.bank_init(KEY, 6, 4)
    with pytest.raises(ValueError, match=r"x\[2, 3\], rows\[6, 4\]"):
        memory.bank_scores(bank, jnp.ones((2, 3)), jnp.zeros((2, 5), jnp.int32))
    with pytest.raises(ValueError, match=r"x\[2, 4\], index\[3, 5\]"):
        memory.bank_scores(bank, jnp.ones((2, 4)), jnp.zeros((3, 5), jnp.int32))
    with pytest.raises(ValueError, match="index must have 1 dimension"):
        memory.bank_update(bank, jnp.ones((2, 4)), jnp.zeros((2, 5), jnp.int32))
    with pytest.raises(ValueError, match="at least one negative"):
        losses.crd(jnp.zeros((2, 1)), num_data=6)


BANK, X = memory.Bank(units(1, 10, 4), jnp.zeros(())), units(2, 1, 4)
BAD_PLACES = {
    "index must lie in 0..9, got 1..20": lambda: memory.bank_scores(
        BANK, X, jnp.asarray([[20, 1]])
    ),
    "index must lie in 0..9, got -1": lambda: memory.bank_update(BANK, X, jnp.asarray([-1])),
    "index must lie in 0..9, got 20": lambda: memory.bank_draw(
        KEY, jnp.asarray([20]), size=10, negatives=3
    ),
    "negatives must be at least 1, got -3": lambda: memory.bank_draw(
        KEY, jnp.asarray([2]), size=10, negatives=-3
    ),
    r"size must be an integer, got 10.5 \(float\)": lambda: memory.bank_draw(
        KEY,
        jnp.asarray([2]),
        size=10.5,  # type: ignore[arg-type]  # wrong on purpose
        negatives=3,
    ),
    "size must be an integer, got 10.5": lambda: memory.bank_init(KEY, 10.5, 4),  # type: ignore[arg-type]  # wrong on purpose
    "width must be at least 1, got 0": lambda: memory.queue_init(KEY, 5, 0),
}


@pytest.mark.parametrize("says", BAD_PLACES)
def test_places_outside_the_bank_and_sizes_that_are_none(says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{says}"):
        BAD_PLACES[says]()


def test_crd_loss_of_a_queue_of_one_by_hand() -> None:
    scores = jnp.log(jnp.asarray([[0.3, 0.2, 0.1]]))
    noise = 2 / 10
    right = 0.3 / (0.3 + noise + 1e-7)
    wrong = [noise / (x + noise + 1e-7) for x in (0.2, 0.1)]
    want = -math.log(right) - sum(math.log(w) for w in wrong)
    np.testing.assert_allclose(losses.crd(scores, num_data=10), [want], rtol=1e-5)


def test_a_queue_is_first_in_first_out_at_any_batch_size() -> None:
    queue = memory.Queue(jnp.zeros((5, 1)), jnp.zeros((), jnp.int32))
    pushed: list[float] = []
    push = jax.jit(memory.queue_push)
    for size in (2, 2, 3, 1, 5, 7, 4):
        new = [float(len(pushed) + i + 1) for i in range(size)]
        queue = push(queue, jnp.asarray(new)[:, None])
        pushed += new
        last = pushed[-5:]
        held = np.asarray(queue.rows[:, 0])
        assert sorted(held[held > 0].tolist()) == sorted(last)
        assert int(queue.pointer) == len(pushed) % 5
        # Read from the pointer on, the queue is in order of arrival.
        order = np.roll(held, -int(queue.pointer))
        assert order[order > 0].tolist() == last


def test_a_new_queue_has_unit_rows_and_pushing_keeps_its_types() -> None:
    queue = memory.queue_init(KEY, 6, 3)
    np.testing.assert_allclose(jnp.linalg.norm(queue.rows, axis=1), 1, rtol=1e-5)
    new = memory.queue_push(queue, units(1, 2, 3).astype(jnp.bfloat16))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(
        lambda a: (a.shape, a.dtype), queue
    )
    gradient = jax.grad(lambda x: jnp.sum(memory.queue_push(queue, x).rows))(units(1, 2, 3))
    np.testing.assert_array_equal(gradient, 0)
    with pytest.raises(ValueError, match=r"x must be \[B, 3\], got x\[2, 4\]"):
        memory.queue_push(queue, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"queue must have shape \[K, D\]"):
        losses.rrd(jnp.ones((2, 3)), jnp.ones((2, 3)), queue=jnp.ones((6, 2)))


@pytest.mark.parametrize("size", [3, 400])  # multiplied as a whole, or gathered
def test_memories_of_numpy_arrays_give_what_those_of_jax_give(size: int) -> None:
    bank, x = memory.Bank(units(0, size, 5), jnp.float32(1)), units(1, 3, 5)
    queue, index = (
        memory.Queue(units(2, size, 5), jnp.int32(1)),
        jnp.asarray([[0, 1], [2, 0], [1, 1]]),
    )

    def results(bank: memory.Bank, queue: memory.Queue, x: Any, index: Any) -> Any:
        return (
            memory.bank_scores(bank, x, index),
            memory.bank_set_normalizer(bank, x, index),
            memory.bank_update(bank, x, jnp.arange(3)),
            memory.queue_push(queue, x),
        )

    host = jax.device_get((bank, queue, x, index))
    jax.tree.map(np.testing.assert_array_equal, results(*host), results(bank, queue, x, index))


def test_memory_is_carried_by_a_train_state() -> None:
    """One pytree of arrays: scan over batches with a bank and a queue in the state."""
    state = {"bank": memory.bank_init(KEY, 8, 3), "queue": memory.queue_init(KEY, 4, 3)}
    assert "memory" in TrainState._fields
    batches = units(3, 3, 2, 3), jnp.asarray([[0, 1], [2, 3], [4, 5]])

    def step(carried: dict, given: tuple[Array, Array]) -> tuple[dict, Array]:
        x, index = given
        queue = memory.queue_push(carried["queue"], x)
        bank = memory.bank_update(carried["bank"], x, index)
        return {"bank": bank, "queue": queue}, queue.pointer

    last, pointers = jax.lax.scan(step, state, batches)
    assert pointers.tolist() == [2, 0, 2]
    np.testing.assert_array_equal(last["bank"].rows[6:], state["bank"].rows[6:])
    np.testing.assert_allclose(last["queue"].rows[:2], batches[0][2])


WHERE = jnp.asarray([True, False, True, False])
GARBAGE = units(5, 4, 3).at[1].set(jnp.nan).at[3].set(1e30)


@pytest.mark.parametrize("jit", [False, True])
def test_padded_rows_write_nothing_even_where_their_index_is_a_real_rows(jit: bool) -> None:
    bank = memory.Bank(units(1, 6, 3), jnp.asarray(0.5, jnp.float32))
    index = jnp.asarray([2, 2, 4, -7], jnp.int32)
    real = jnp.asarray([0, 2])

    def update(x: Array, index: Array, where: Array) -> memory.Bank:
        return memory.bank_update(bank, x, index, momentum=0.25, where=where)

    # Both sides through one kind of program: compiled and op by op may round differently.
    run = jax.jit(update) if jit else update
    got, want = run(GARBAGE, index, WHERE), run(GARBAGE[real], index[real], WHERE[real])
    np.testing.assert_array_equal(got.rows, want.rows)
    unwritten = jnp.asarray([0, 1, 3, 5])
    np.testing.assert_array_equal(got.rows[unwritten], bank.rows[unwritten])
    nobody = update(GARBAGE, index, jnp.zeros(4, jnp.bool_))
    np.testing.assert_array_equal(nobody.rows, bank.rows)


def test_the_normalizer_and_the_scores_are_those_of_the_real_rows() -> None:
    bank = memory.bank_init(KEY, 6, 3)
    index, real = jnp.asarray([2, -1, 4, 99], jnp.int32), jnp.asarray([0, 2])
    drawn = memory.bank_draw(KEY, index, size=6, negatives=2, where=WHERE)
    np.testing.assert_array_equal(drawn[:, 0], [2, 0, 4, 0])
    drawn = drawn.at[1].set(-5)
    got = memory.bank_set_normalizer(bank, GARBAGE, drawn, where=WHERE)
    want = memory.bank_set_normalizer(bank, GARBAGE[real], drawn[real])
    np.testing.assert_allclose(got.log_z, want.log_z, rtol=1e-6)
    scores = memory.bank_scores(got, GARBAGE, drawn, where=WHERE)
    np.testing.assert_allclose(scores[real], memory.bank_scores(want, GARBAGE[real], drawn[real]))
    assert bool(jnp.isfinite(scores).all())
    gradient = jax.grad(
        lambda x: jnp.sum(losses.crd(memory.bank_scores(got, x, drawn, where=WHERE), num_data=6))
    )(GARBAGE)
    assert bool(jnp.isfinite(gradient).all()) and not gradient[1].any()
    nobody = memory.bank_set_normalizer(bank, GARBAGE, drawn, where=jnp.zeros(4, jnp.bool_))
    assert nobody.log_z == bank.log_z


def test_draws_of_the_real_rows_do_not_depend_on_the_padding() -> None:
    index = jnp.asarray([3, 1, 0, 0, 0], jnp.int32)
    padded = memory.bank_draw(KEY, index, size=9, negatives=4, where=jnp.arange(5) < 2)
    np.testing.assert_array_equal(padded[:2], memory.bank_draw(KEY, index[:2], size=9, negatives=4))


@pytest.mark.parametrize("size", [2, 5])
def test_padded_rows_are_not_pushed(size: int) -> None:
    queue = memory.Queue(units(1, size, 3), jnp.asarray(1, jnp.int32))
    push = jax.jit(lambda x, where: memory.queue_push(queue, x, where=where))
    for where in (WHERE, ~WHERE, jnp.ones(4, jnp.bool_), jnp.zeros(4, jnp.bool_)):
        x = jnp.where(where[:, None], units(6, 4, 3), jnp.nan)
        got, want = push(x, where), memory.queue_push(queue, x[np.asarray(where)])
        np.testing.assert_array_equal(got.rows, want.rows)
        assert got.pointer == want.pointer
    with pytest.raises(ValueError, match=r"where must have shape \[4\]"):
        memory.queue_push(queue, GARBAGE, where=WHERE[:2])


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_index_outside_the_bank_is_nan_under_jit_and_writes_nothing(wrong: int) -> None:
    """JAX reads -1 as the last row, and 5 too."""
    bank = memory.bank_init(jax.random.key(0), 5, 3)
    x = jnp.eye(3)[:2]
    index = jnp.asarray([1, wrong])

    @jax.jit
    def traced(x: Array, index: Array, where: Array) -> tuple[Array, Array, Array]:
        drawn = jnp.stack([index, jnp.asarray([2, 3])], axis=1)
        scores = memory.bank_scores(bank, x, drawn, where=where)
        return (
            scores,
            memory.bank_update(bank, x, index).rows,
            memory.bank_draw(jax.random.key(1), index, size=5, negatives=4),
        )

    scores, rows, drawn = traced(x, index, jnp.asarray([True, True]))
    assert np.isnan(np.asarray(scores)).tolist() == [[False, False], [True, False]]
    want = memory.bank_update(bank, x[:1], index[:1]).rows
    np.testing.assert_allclose(rows, want, rtol=1e-6)
    assert drawn[1, 0] == wrong  # so that it scores NaN
    scores, _, _ = traced(x, index, jnp.asarray([True, False]))
    assert np.isfinite(np.asarray(scores)).all()
    slope = jax.grad(lambda x: jnp.sum(jnp.tanh(traced(x, index, jnp.ones(2, bool))[0])))(x)
    assert np.isfinite(np.asarray(slope)).all()  # as for labels: a later mask leaves no NaN


@pytest.mark.parametrize("key", [None, 0, "a", jnp.zeros(3), jax.random.split(jax.random.key(0))])
def test_what_is_no_key_is_named(key: object) -> None:
    made: Any = key
    for call in (
        lambda: memory.bank_init(made, 5, 3),
        lambda: memory.queue_init(made, 5, 3),
        lambda: memory.bank_draw(made, jnp.asarray([0]), size=5, negatives=2),
        lambda: transforms.dare(made, {"w": jnp.ones(3)}, density=0.5),
        lambda: transforms.random_indices(made, 5, 2),
        lambda: train.epoch_index(made, 0, 5, 2),
        lambda: train.init_state({"w": jnp.ones(3)}, optax.sgd(0.1), key=made),
        lambda: augment.example_keys(made, 0, jnp.arange(3)),
        lambda: augment.mixup(made, jnp.ones((2, 3)), jnp.ones((2, 3))),
    ):
        with pytest.raises(TypeError, match=r"^key must be (a|one) PRNG key"):
            call()
    memory.bank_init(jax.random.PRNGKey(0), 5, 3)
