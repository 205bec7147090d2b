"""A user's program as a type checker sees it: the installed package says its types.

cp tests/typed_program.py FOLDER && cd FOLDER && basedpyright typed_program.py
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, assert_type

import jax
import jax.numpy as jnp
import optax
from jax import Array

import kdtl_jax
from kdtl_jax import Variables, interop, losses, methods, train, transforms
from kdtl_jax.objective import Inputs, Mean

if TYPE_CHECKING:  # names and arguments that do not exist are errors; modules at the edge do exist
    kdtl_jax.lossses.kd_kl()  # pyright: ignore[reportAttributeAccessIssue]  # on purpose
    losses.kd_kl(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temp=2.0)  # pyright: ignore[reportCallIssue]  # on purpose
    assert_type(kdtl_jax.datasets.digits(), kdtl_jax.datasets.Dataset)

student = interop.function(lambda params, x: x @ params["w"])
assert_type(losses.kd_kl(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temperature=2.0), Array)


def terms(x: Inputs) -> dict[str, Array]:
    return {"kd": losses.kd_kl(x.student["logits"], x.teacher["logits"], temperature=2.0)}


params = {"w": jnp.ones((4, 3))}
tx = optax.adam(1e-3)
step = train.make_step(student, terms, {"kd": 1.0}, tx, teacher=student)
state = train.init_state(params, tx, key=jax.random.key(0))
state, metrics = step(state, {"inputs": jnp.ones((2, 4))}, params)
assert_type(state, train.TrainState)
assert_type(metrics["kd"], Mean)
assert_type(train.values(metrics), dict[str, Array])

setup = methods.setup(
    student,
    student,
    student_variables=Variables(params),
    teacher_variables=Variables(params),
    inputs=jnp.ones((2, 4)),
    examples=2,
    steps=1,
)
weights: Mapping[str, object] = methods.kd(setup).weights
moved, report = transforms.transfer(params, params, alpha=0.5)
assert_type(report, transforms.Report)
