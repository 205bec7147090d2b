"""What the table of losses cannot say of relations: memory, devices, invariances, limits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdtl_jax import losses, testing

Batch = tuple[Array, Array]


def batch(size: int, student: int = 5, teacher: int = 3, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(size, student)), rng.normal(size=(size, teacher))
    return jnp.asarray(arrays[0], jnp.float32), jnp.asarray(arrays[1], jnp.float32)


def relational(student: Array, teacher: Array, same: Array) -> dict[str, Array]:
    """Every loss that looks at more than one example; `same` has the student's width."""
    return {
        "sp": losses.sp(student, teacher),
        "pkt": losses.pkt(student, teacher),
        "cc": losses.cc(student, teacher),
        "rkd_distance": losses.rkd_distance(student, teacher),
        "rkd_angle": losses.rkd_angle(student, teacher, anchors_at_once=2),
        "ega_edge": losses.ega_edge(student, same),
        "ega_node": losses.ega_node(student, same),
        "itrd_mutual": losses.itrd_mutual(student, teacher),
        "feature_correlation": losses.feature_correlation(student, same),
        "info_nce": losses.info_nce(student, same),
        "dcd_invariance": losses.dcd_invariance(student, same),
        "pkd_pearson": losses.pkd_pearson(student, same),
        "ridge_hint": losses.ridge_hint(student, teacher),
    }


@pytest.mark.slow
def test_four_devices_give_the_values_and_gradients_of_one() -> None:
    student, teacher = batch(8)
    same, _ = batch(8, seed=1)

    @jax.jit
    def both(student: Array, teacher: Array, same: Array) -> tuple[dict[str, Array], Array]:
        def total(x: Array) -> Array:
            terms = losses.rkd_distance(x, teacher), losses.sp(x, teacher), losses.info_nce(x, same)
            return jnp.sum(jnp.stack(terms))

        return relational(student, teacher, same), jax.grad(total)(student)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    place = NamedSharding(mesh, PartitionSpec("data"))
    want = both(student, teacher, same)
    sharded = [jax.device_put(x, place) for x in (student, teacher, same)]
    assert len(sharded[0].sharding.device_set) == 4
    got = both(*sharded)
    assert got[0].keys() == want[0].keys()
    for (path, left), (_, right) in zip(
        *(jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want)), strict=True
    ):
        np.testing.assert_allclose(left, right, rtol=2e-6, atol=1e-6, err_msg=str(path))


def temporary_floats(fn: Callable[..., Array], *shapes: tuple[int, ...]) -> int:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    total = jax.value_and_grad(lambda *a: jnp.mean(fn(*a)), argnums=tuple(range(len(args))))
    analysis = jax.jit(total).lower(*args).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes // 4


def test_angles_need_no_cubic_memory() -> None:
    size = 512
    floats = temporary_floats(losses.rkd_angle, (size, 16), (size, 16))
    assert floats < size**3 / 8


@pytest.mark.slow
def test_angles_all_at_once_are_cubic_when_asked_for() -> None:
    """The check of the check: the measure above does see a cube."""
    size = 256

    def at_once(student: Array, teacher: Array) -> Array:
        return losses.rkd_angle(student, teacher, anchors_at_once=size)

    all_of_them = temporary_floats(at_once, (size, 8), (size, 8))
    assert all_of_them > size**3
    assert temporary_floats(losses.rkd_angle, (size, 8), (size, 8)) < all_of_them / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sp", "pkt", "cc", "rkd_distance", "rkd_angle", "itrd_mutual"])
def test_large_batches_run_in_bounded_memory(name: str) -> None:
    size, width = 4096, 512
    floats = temporary_floats(getattr(losses, name), (size, width), (size, width))
    assert floats < 24 * size**2  # some matrices of pairs; B B d would be 512 of them


def test_angles_do_not_depend_on_the_chunk(x64: None) -> None:
    rng = np.random.default_rng(0)
    student, teacher = jnp.asarray(rng.normal(size=(7, 4))), jnp.asarray(rng.normal(size=(7, 4)))
    student = student.at[3].set(student[2])

    def run(at_once: int) -> tuple[Array, Array]:
        def total(x: Array) -> Array:
            return jnp.sum(losses.rkd_angle(x, teacher, anchors_at_once=at_once))

        return testing.compiled(jax.value_and_grad(total), student)(student)

    value, gradient = run(7)
    other, other_gradient = run(3)
    np.testing.assert_allclose(other, value, rtol=1e-12)
    np.testing.assert_allclose(other_gradient, gradient, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="anchors_at_once must be finite and > 0"):
        losses.rkd_angle(student, teacher, anchors_at_once=0)


def test_relations_ignore_similarity_transformations(x64: None) -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(5, 4)))
    rotation = jnp.asarray(np.linalg.qr(rng.normal(size=(4, 4)))[0])
    moved = 3 * x @ rotation + 7

    def values(x: Array, y: Array) -> dict[str, Array]:
        names = ("rkd_distance", "rkd_angle", "sp", "pkt", "cc")
        return {name: getattr(losses, name)(x, y) for name in names}

    run = testing.compiled(values, x, moved)
    turned, shifted = run(x, 3 * x @ rotation), run(x, moved)
    for name, value in turned.items():
        np.testing.assert_allclose(value, 0, atol=1e-12, err_msg=name)
        if name.startswith("rkd"):
            np.testing.assert_allclose(shifted[name], 0, atol=1e-20, err_msg=name)
        else:
            assert float(jnp.max(shifted[name])) > 1e-4, name


def test_distances_of_three_points_by_hand(x64: None) -> None:
    student = jnp.asarray([[0.0], [1.0], [3.0]])  # distances 1, 2, 3, mean 2
    teacher = jnp.asarray([[0.0], [1.0], [2.0]])  # distances 1, 1, 2, mean 4/3
    apart = np.asarray([0.5 - 0.75, 1.5 - 1.5, 1.0 - 0.75])  # pairs 01, 02, 12
    squares = 0.5 * apart**2
    want = np.asarray([squares[0] + squares[1], squares[0] + squares[2], squares[1] + squares[2]])
    np.testing.assert_allclose(losses.rkd_distance(student, teacher), want / 3, rtol=1e-12)


def test_the_taylor_kernel_is_the_gaussian_of_unit_rows(x64: None) -> None:
    x = np.random.default_rng(2).normal(size=(4, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    squares = ((x[:, None] - x[None]) ** 2).sum(-1)
    got = losses.gaussian_taylor_kernel(jnp.asarray(x), gamma=0.7, order=25)
    np.testing.assert_allclose(got, np.exp(-0.7 * squares), rtol=1e-12)


def test_feature_correlation_is_numpys(x64: None) -> None:
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    student[:, 2] = 4.0  # constant
    got = losses.feature_correlation(jnp.asarray(student), jnp.asarray(teacher))
    want = [np.corrcoef(student[:, d], teacher[:, d])[0, 1] for d in range(2)]
    np.testing.assert_allclose(got, [*want, 0.0], rtol=1e-12)


def test_ridge_hint_forgives_invertible_maps_and_shifts(x64: None) -> None:
    rng = np.random.default_rng(5)
    teacher = rng.normal(size=(40, 3))
    student = jnp.asarray(teacher @ rng.normal(size=(3, 3)) + 5)
    exact = losses.ridge_hint(student, jnp.asarray(teacher), ridge=1e-10)
    np.testing.assert_allclose(exact, 0, atol=1e-9)
    shuffled = jnp.asarray(rng.permutation(teacher))
    assert float(jnp.mean(losses.ridge_hint(student, shuffled, ridge=1e-10))) > 0.3


def test_pkd_pearson_wants_more_positions_than_ddof() -> None:
    with pytest.raises(ValueError, match="more than ddof=2 positions"):
        losses.pkd_pearson(jnp.ones((2, 3)), jnp.ones((2, 3)), ddof=2)
