"""Batches of several runs at once: each run sees what its own key alone would give it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from kdtl_jax import augment
from kdtl_jax.run import data

SIZE = 10
ARRAYS = {
    "inputs": np.arange(SIZE * 4, dtype=np.float32).reshape(SIZE, 2, 2, 1),
    "index": np.arange(SIZE, dtype=np.int32),
}
KEYS = jax.vmap(jax.random.key)(jnp.arange(3, dtype=jnp.uint32))
ROWS = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [1, 3, 5, 7, 9]])


def views(keys: Array, batch: data.Batch) -> data.Batch:
    return {**batch, "inputs": augment.flip(keys, batch["inputs"])}


def batches(source: data.Resident, epoch: int) -> list[dict[str, Array]]:
    rows = data.epoch_rows(source, jnp.int32(epoch))
    assert len(rows) == data.steps_per_epoch(source)
    return [data.gather(source, r, jnp.int32(epoch), jnp.int32(i)) for i, r in enumerate(rows)]


@pytest.mark.parametrize("rows", [None, ROWS[0], ROWS], ids=["all", "shared", "own"])
@pytest.mark.parametrize("drop_remainder", [True, False])
def test_a_stack_of_runs_is_each_run(rows: np.ndarray | None, drop_remainder: bool) -> None:
    teacher = {"logits": np.arange(SIZE * 3, dtype=np.float32).reshape(SIZE, 3)}
    options = {"drop_remainder": drop_remainder, "teacher": teacher}
    stack = data.resident(ARRAYS, 3, key=KEYS, rows=rows, **options)
    plain = data.resident(ARRAYS, 3, key=KEYS, rows=rows, augment=views, drop_remainder=True)
    for epoch in (0, 1):
        for run in range(3):
            own = rows[run] if rows is not None and rows.ndim == 2 else rows
            one = data.resident(ARRAYS, 3, key=KEYS[run], rows=own, **options)
            alone = data.resident(ARRAYS, 3, key=KEYS[run], rows=own, augment=views)
            for whole, single in ((stack, one), (plain, alone)):
                for many, few in zip(batches(whole, epoch), batches(single, epoch), strict=True):
                    for got, expected in zip(
                        jax.tree.leaves(many), jax.tree.leaves(few), strict=True
                    ):
                        np.testing.assert_array_equal(got[run], expected)


def test_an_epoch_shows_every_row_of_a_run_once() -> None:
    source = data.resident(ARRAYS, 5, key=KEYS, rows=ROWS)
    (batch,) = batches(source, 0)
    np.testing.assert_array_equal(jnp.sort(batch["index"], axis=1), ROWS)


@pytest.mark.parametrize("rows", [[[0, 1]], [0.5], [], [10], [-1]])
def test_rows_must_name_examples(rows: list[float]) -> None:
    with pytest.raises(ValueError, match="rows must"):
        data.resident(ARRAYS, 1, key=KEYS, rows=np.array(rows))
