"""The same step on one device, data parallel and FSDP: equal results on 2, 4 and 8 devices."""

import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import losses, sharding, train
from kdtl_jax.objective import Inputs

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(0)
TX = optax.adamw(1e-2)


def _init(key: jax.Array, hidden: int) -> Any:
    a, b = jax.random.split(key)
    return {
        "in": {"kernel": jax.random.normal(a, (4, hidden)), "bias": jnp.zeros((hidden,))},
        "out": {"kernel": jax.random.normal(b, (hidden, 3)) / 8, "bias": jnp.zeros((3,))},
    }


def _model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    hidden = jnp.tanh(inputs @ params["in"]["kernel"] + params["in"]["bias"])
    logits = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    return {"logits": logits, "hidden": hidden}, model_state


TEACHER, STUDENT = _init(jax.random.key(1), 64), {"student": _init(jax.random.key(2), 64)}
BATCH = {
    "inputs": np.asarray(jax.random.normal(KEY, (16, 4))),
    "labels": np.arange(16, dtype=np.int32) % 3,
}


def _terms(x: Inputs) -> dict[str, jax.Array]:
    s, t, y = x.student, x.teacher, x.batch["labels"]
    return {
        "kd": losses.kd_kl(s["logits"], t["logits"]),
        "dkd": losses.dkd(s["logits"], t["logits"], y),
        "rkd": losses.rkd_distance(s["hidden"], t["hidden"]),
    }


WEIGHTS = {"kd": 1.0, "dkd": 0.1, "rkd": 1.0}
STEP = train.make_distill_step(_model, _model, _terms, WEIGHTS, TX)


def _run(mesh: Any, steps: int = 20) -> train.TrainState:
    state, teacher, batch = train.init_state(STUDENT, TX, key=KEY), TEACHER, BATCH
    if mesh is not None:
        state, teacher = sharding.place(state, mesh), sharding.place(teacher, mesh)
        batch = sharding.place_batch(batch, mesh)
    step = train.jit_step(STEP)
    for _ in range(steps):
        state, _ = step(state, teacher, batch)
    return state


@pytest.fixture(scope="module")
def one_device() -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.device_get(_run(None).params)


@pytest.mark.parametrize(("data", "fsdp"), [(2, 1), (4, 1), (2, 2), (2, 4)])
def test_every_placement_gives_the_one_device_result(data: int, fsdp: int, one_device: Any) -> None:
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    state = _run(mesh)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(one_device), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    kernel = state.params["student"]["in"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (fsdp == 1), "the step keeps the placement"


def test_state_bytes_fall_as_one_over_n() -> None:
    state = train.init_state({"student": _init(KEY, 1024)}, TX, key=KEY)
    whole = sum(sharding.bytes_per_device(state).values())
    for n in (2, 4, 8):
        mesh = sharding.make_mesh(data=1, fsdp=n)
        per_device = sharding.bytes_per_device(sharding.place(state, mesh))
        assert len(per_device) == n
        assert max(per_device.values()) < 1.02 * whole / n + 200  # scalars and tiny biases


def test_bad_placements_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="needs 16 devices, there are 8"):
        sharding.make_mesh(data=8, fsdp=2)
    with pytest.raises(ValueError, match="at least 1"):
        sharding.make_mesh(data=0)
    with pytest.raises(ValueError, match=r"labels.*multiple of the 4 local devices"):
        sharding.place_batch({"labels": np.zeros(6)}, sharding.make_mesh(data=4))
    assert sharding.parse_mesh("data=4,fsdp=2") == {"data": 4, "fsdp": 2}
    for text in ("data:4", "model=2", "data=2,data=2"):
        with pytest.raises(ValueError, match="expected for example 'data=4,fsdp=2'"):
            sharding.parse_mesh(text)
    with pytest.raises(ValueError, match="give all of coordinator"):
        sharding.initialize(coordinator="localhost:1")


PROCESS = """
    import os, sys
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, {tests!r})
    import jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 2)
    from kdtl_jax import sharding
    rank = int(sys.argv[1])
    sharding.initialize(coordinator="localhost:{port}", processes=2, process=rank)
    import test_sharding as t
    t.BATCH = {{k: v[8 * rank : 8 * rank + 8] for k, v in t.BATCH.items()}}
    from jax.experimental import multihost_utils
    state = t._run(sharding.make_mesh(data=2, fsdp=2))
    params = multihost_utils.process_allgather(state.params, tiled=True)
    if rank == 0:
        np.savez({out!r}, *jax.tree.leaves(params))
"""


@pytest.mark.slow
def test_two_processes_give_the_one_device_result(tmp_path: Any, one_device: Any) -> None:
    import socket
    from pathlib import Path

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = str(tmp_path / "params.npz")
    code = textwrap.dedent(PROCESS).format(port=port, out=out, tests=str(Path(__file__).parent))
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=300)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    with np.load(out) as stored:
        for a, b in zip(stored.values(), jax.tree.leaves(one_device), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
