"""The whole battery over every loss of the table, and the table over every loss of the package."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LOSS_CASES

from kdtl_jax import losses, testing
from kdtl_jax.testing._subject import double, float64_values


@functools.lru_cache(maxsize=2)
def subject_of(name: str) -> testing.Subject:
    """The row as checks take it, with the programs that its tests share."""
    case = LOSS_CASES[name]
    student = case.example(np.random.default_rng(0), 4)[0]
    return testing.Subject(
        loss=case.fn,
        example=case.example,
        hyper=case.hyper,
        oracle=case.oracle,
        relational=case.relational,
        zero_at_equality=case.zero_at_equality,
        nonnegative=case.nonnegative,
        where_rank=case.where_rank or (np.ndim(student) if case.has_where else 0),
        twice_differentiable=case.twice_differentiable,
        frozen=case.frozen,
        extreme=case.extreme,
        batch=4,
        rtol=case.rtol,
        programs={},
    )


# By loss, then by test: the tests of one loss follow each other and find its programs compiled.
of_every_loss = pytest.mark.parametrize("name", LOSS_CASES, scope="module")


@of_every_loss
def test_contract(name: str) -> None:
    """The whole battery in one go, since its checks share their programs."""
    subject = subject_of(name)
    # Compositions leave bad arguments to what they are made of.
    of_the_package = hasattr(losses, LOSS_CASES[name].fn.__name__)
    at_the_door = (testing.errors, testing.hyperparameters)
    checks = [check for check in testing.ALL if of_the_package or check not in at_the_door]
    failures = [f"{check.__name__}: {text}" for check in checks for text in check(subject)]
    assert not failures, "\n  ".join([name, *failures])


def values_of(name: str, args: tuple[Any, ...], batch: int) -> np.ndarray:
    """The loss's values in float64, by a program that the battery has compiled already."""
    subject = subject_of(name)
    if batch == subject.batch:
        return float64_values(subject, args)(*args)
    if "few" not in subject.programs:
        subject.programs["few"] = testing.compiled(double(subject), *args)
    return np.asarray(subject.programs["few"](*args))


@of_every_loss
@hypothesis.settings(max_examples=12)
@hypothesis.given(
    batch=st.sampled_from((1, 4)),
    scale=st.floats(0.1, 5.0),
    near=st.sampled_from((0.0, 0.5, 0.99)),
    seed=st.integers(0, 2**16),
)
def test_oracle_over_shapes_and_values(
    name: str, batch: int, scale: float, near: float, seed: int
) -> None:
    """Any batch, any scale, a teacher anywhere between independent of the student and near it."""
    case = LOSS_CASES[name]
    # An example of one that is not relational is alone in any batch.
    batch = batch if case.relational else 4
    student, *others = case.example(np.random.default_rng(seed), batch)
    rows = [np.asarray(a) for a in jax.tree.leaves((student, others[:1]))]
    # Probabilities and attention maps stay as they are: another scale would be no such thing.
    if all(a.dtype.kind == "f" for a in rows):
        if any(a.min() < 0 or a.max() > 1 for a in rows):
            student, others[0] = jax.tree.map(lambda a: a * scale, (student, others[0]))
        if [a.shape for a in jax.tree.leaves(student)] == [
            a.shape for a in jax.tree.leaves(others[0])
        ]:
            others[0] = jax.tree.map(lambda s, t: near * s + (1 - near) * t, student, others[0])
    with jax.enable_x64(True):
        got = values_of(name, (student, *others), batch)
    want = np.asarray(case.oracle(student, *others, **case.hyper))
    # The oracle subtracts nearly equal numbers where the loss does not: 1e-6, and a floor.
    np.testing.assert_allclose(got, want, rtol=max(case.rtol, 1e-6), atol=1e-10)


RELATIONAL = [name for name, case in LOSS_CASES.items() if case.relational]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", RELATIONAL)
def test_a_batch_sharded_over_devices_gives_the_same_values_and_gradients(name: str) -> None:
    """Relational losses see the whole batch, wherever its rows lie."""
    case = LOSS_CASES[name]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    args = tuple(case.example(np.random.default_rng(0), 8))
    spread = jax.device_put(args, rows)
    loss = functools.partial(case.fn, **case.hyper)

    def both(*args: Any) -> Any:
        value, pull = jax.vjp(lambda student: loss(student, *args[1:]), args[0])
        return value, pull(jnp.arange(1.0, 9.0).reshape(8))

    got, gradient = testing.compiled(both, *spread)(*spread)
    assert len(got.sharding.device_set) == 4
    np.testing.assert_allclose(got, case.oracle(*args, **case.hyper), rtol=1e-6, atol=1e-12)
    whole, one = testing.compiled(both, *args)(*args)
    np.testing.assert_allclose(got, whole, rtol=1e-9, atol=1e-12)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def public(text: str) -> set[str]:
    """Functions that the text of `losses/__init__.py` gives on."""
    names = re.findall(r"^from .* import (\w+) as", text, re.MULTILINE)
    return {name for name in names if inspect.isfunction(getattr(losses, name))}


def test_every_public_loss_has_a_row_and_every_piece_is_tested() -> None:
    of_losses, of_pieces = Path(str(losses.__file__)).read_text().split("# Pieces.")
    rows = {case.fn.__name__ for case in LOSS_CASES.values()}
    others = {"afn", "bi_tuning_classifier", "uniform_contrast"}  # no teacher: test_transfer_losses
    rows |= {"unit_classes", "unit_features"}  # within Bi-Tuning
    assert public(of_losses) - rows - others == set(), "public losses without a row"
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    untested = {name for name in public(of_pieces) if f".{name}" not in tests} - rows
    assert not untested, "pieces without a test"
    assert all(case.note for case in LOSS_CASES.values() if not case.extreme), "say why"


X, Y = jnp.ones((3, 4)), jnp.zeros(3, jnp.int32)
BAD_HYPER: dict[str, Callable[[], Any]] = {
    "eps must be finite and >= 0, got -1.0": lambda: losses.dist_inter(X, X, eps=-1.0),
    "eps must": lambda: losses.dist_intra(X, X, eps=float("nan")),
    "gamma must be finite and > 0, got nan": lambda: losses.cc(X, X, gamma=float("nan")),
    "order must be at least 0": lambda: losses.cc(X, X, order=-1),
    "eps must be finite and > 0": lambda: losses.wsld_weight(X, X, Y, eps=-1.0),
    "variance must be floating point, got complex64": lambda: losses.vid(
        X, X, jnp.ones(4, jnp.complex64)
    ),
    "variance must be floating point, got bool": lambda: losses.vid(X, X, X > 0),
    "norms must be floating point, got int32": lambda: losses.afn(X, Y),
}


@pytest.mark.parametrize("says", BAD_HYPER)
def test_bad_hyperparameters_are_refused(says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{says}"):
        BAD_HYPER[says]()


OF_THE_PACKAGE = [
    name for name, case in LOSS_CASES.items() if getattr(losses, case.fn.__name__, None) is case.fn
]


@pytest.mark.parametrize("name", OF_THE_PACKAGE)
def test_what_is_no_array_is_named(name: str) -> None:
    """A model's dict of outputs, None, text or an object: the message names the argument."""
    case = LOSS_CASES[name]
    args = case.example(np.random.default_rng(0), 4)
    names = list(inspect.signature(case.fn).parameters)
    for i, argument in enumerate(names[: len(args)]):
        for wrong in (None, "logits", object(), {"logits": args[i]}):
            with pytest.raises((TypeError, ValueError), match=argument):
                case.fn(*args[:i], wrong, *args[i + 1 :], **case.hyper)


def test_float32_students_of_float64_teachers(x64: None) -> None:
    student = jnp.asarray([[1.0, 2.0, 0.5]], jnp.float32)
    cost = jnp.ones((3, 3), jnp.float32) - jnp.eye(3, dtype=jnp.float32)
    mixed = losses.sinkhorn_cost(student, jnp.asarray([[0.0, 1.0, 2.0]]), cost, iterations=2)
    wide = losses.sinkhorn_cost(
        student.astype(jnp.float64), jnp.asarray([[0.0, 1.0, 2.0]]), cost, iterations=2
    )
    np.testing.assert_array_equal(mixed, wide)
