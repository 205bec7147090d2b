"""The same steps on one device, data parallel, FSDP, two processes: equal for every objective.

KD, DKD, RKD (relations over the whole batch), CRD (banks in the state) and LoRA fine-tuning run as
one program, so that a placement costs one compilation.
"""

import functools
import itertools
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import Variables, _numerics, losses, memory, train, transforms
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes import settings
from kdtl_jax.run import checkpoint, loop, processes, sharding
from kdtl_jax.train import precision

pytestmark = pytest.mark.usefixtures("optimized", "standard_promotion")
KEY = jax.random.key(0)
# Adam divides by its root mean square, which magnifies rounding without bound where a gradient
# passes zero; its epsilon bounds that, so that 1e-6 is a statement about the placement.
TX = optax.adamw(5e-3, eps=1e-4)


def _init(seed: int, hidden: int) -> Any:
    rng = np.random.default_rng(seed)
    kernels = rng.normal(size=(4, hidden)), rng.normal(size=(hidden, 3)) / 8
    return {
        name: {"kernel": np.float32(kernel), "bias": np.zeros(kernel.shape[1], np.float32)}
        for name, kernel in zip(("in", "out"), kernels, strict=True)
    }


def _model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    hidden = jnp.tanh(inputs @ params["in"]["kernel"] + params["in"]["bias"][None])
    logits = hidden @ params["out"]["kernel"] + params["out"]["bias"][None]
    return {"logits": logits, "hidden": hidden}, model_state


TEACHER, STUDENT = _init(1, 64), _init(2, 64)
BATCH = {
    "inputs": np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32),
    "labels": np.arange(16, dtype=np.int32) % 3,
    "row": np.arange(16, dtype=np.int32) * 3 + 1,
}


SIZE, NEGATIVES = 64, 16  # rows of CRD's banks, of which the batch's are 16
ADAPTER = transforms.lora(2, 4.0)


def _kd(x: Inputs) -> dict[str, jax.Array]:
    return {"term": losses.kd_kl(x.student["logits"], x.teacher["logits"], temperature=2.0)}


def _dkd(x: Inputs) -> dict[str, jax.Array]:
    return {"term": losses.nckd(x.student["logits"], x.teacher["logits"], x.batch["labels"])}


def _rkd(x: Inputs) -> dict[str, jax.Array]:
    s, t = x.student["hidden"], x.teacher["hidden"]
    return {"term": losses.rkd_distance(s, t) + 2 * losses.rkd_angle(s, t)}


def _crd(x: Inputs) -> tuple[dict[str, jax.Array], Any]:
    """Both sides against banks that are sharded, read and written in every step."""
    s, t = (_numerics.normalize(h["hidden"][:, :8]) for h in (x.student, x.teacher))
    row = x.batch["row"]
    assert x.key is not None
    index = memory.bank_draw(x.key, row, size=SIZE, negatives=NEGATIVES)
    banks = x.memory
    sides = [
        losses.crd(memory.bank_scores(banks["teacher"], s, index, temperature=0.5), num_data=SIZE),
        losses.crd(memory.bank_scores(banks["student"], t, index, temperature=0.5), num_data=SIZE),
    ]
    updated = {
        "teacher": memory.bank_update(banks["teacher"], t, row),
        "student": memory.bank_update(banks["student"], s, row),
    }
    return {"term": sides[0] + sides[1]}, updated


def _task(x: Inputs) -> dict[str, jax.Array]:
    logits, labels = x.student["logits"], x.batch["labels"]
    return {"term": optax.softmax_cross_entropy_with_integer_labels(logits, labels)}


def _adapted(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    return _model(ADAPTER.apply(params["base"], params["adapter"]), model_state, inputs)


LORA = r"adapter/.*"
STEPS = {
    **{
        name: train.make_step(_model, terms, {"term": 1.0}, TX, teacher=_model)
        for name, terms in {"kd": _kd, "dkd": _dkd, "rkd": _rkd, "crd": _crd}.items()
    },
    "lora": train.make_step(_adapted, _task, {"term": 1.0}, TX, trainable=LORA),
}


@functools.cache
def _start() -> dict[str, train.TrainState]:
    """One state per objective, on the first device, from one program."""
    return jax.jit(_starts)()


def _starts() -> dict[str, train.TrainState]:
    base, adapter = ADAPTER.init(KEY, STUDENT, where=r"(in|out)/kernel")
    banks = {
        who: memory.bank_init(key, SIZE, 8)
        for who, key in zip(("teacher", "student"), jax.random.split(KEY), strict=True)
    }
    adapted = {"base": base, "adapter": adapter}
    return {
        **{name: train.init_state(STUDENT, TX, key=KEY) for name in ("kd", "dkd", "rkd")},
        "crd": train.init_state(STUDENT, TX, key=KEY, memory=banks),
        "lora": train.init_state(adapted, TX, key=KEY, trainable=LORA),
    }


@functools.cache
def _program(mesh: Any, objectives: tuple[str, ...]) -> Any:
    """A step of every objective, as one program that keeps what a mesh was given in its place."""
    steps = {name: STEPS[name] for name in objectives}
    if mesh is not None:
        for name, step in steps.items():
            steps[name] = sharding.keep_placement(step, sharding.place(_start()[name], mesh))

    def each(states: Any, teacher: Any, batch: Any) -> Any:
        return {
            name: step(states[name], batch, None if name == "lora" else teacher)[0]
            for name, step in steps.items()
        }

    return jax.jit(each)


def _run(mesh: Any, steps: int = 20, states: Any = None) -> dict[str, train.TrainState]:
    states, teacher, batch = _start() if states is None else states, TEACHER, BATCH
    if mesh is not None:
        states, teacher = sharding.place(states, mesh), sharding.place(teacher, mesh)
        batch = sharding.place_batch(batch, mesh)
    program = _program(mesh, tuple(states))
    for _ in range(steps):
        states = program(states, teacher, batch)
    return states


def learned(states: dict[str, train.TrainState]) -> Any:
    return {name: (state.params, state.memory) for name, state in states.items()}


def assert_close(found: Any, wanted: Any) -> None:
    flat, other = jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted)
    for (path, a), b in zip(flat, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def one_device(optimized: None) -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.device_get(learned(_run(None)))


def test_every_objective_learns(one_device: Any) -> None:
    for name, (params, banks) in one_device.items():
        start = _start()[name]
        moved = [
            float(np.abs(a - b).max())
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start.params), strict=True)
        ]
        assert max(moved) > 1e-2, name
        if name == "lora":
            assert_close(params["base"], start.params["base"])
        if name == "crd":
            rows = np.any(banks["student"].rows != start.memory["student"].rows, axis=1)
            assert np.flatnonzero(rows).tolist() == sorted(BATCH["row"].tolist())


@pytest.mark.parametrize(
    ("data", "fsdp", "objectives"),
    [
        (4, 1, tuple(STEPS)),
        pytest.param(2, 2, tuple(STEPS), marks=pytest.mark.slow),
        (2, 1, ("rkd",)),
        (2, 4, ("crd",)),
    ],
    ids=["4", "2x2", "2", "2x4"],
)
def test_every_placement_gives_the_one_device_result(
    data: int, fsdp: int, objectives: tuple[str, ...], one_device: Any
) -> None:
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    states = _run(mesh, states={name: _start()[name] for name in objectives})
    assert_close(learned(states), {name: one_device[name] for name in objectives})
    for leaf in jax.tree.leaves(learned(states)):
        if leaf.size >= 256:
            assert leaf.sharding.is_fully_replicated == (fsdp == 1), "steps keep the placement"


@pytest.mark.parametrize("fsdp", [1, 2])
def test_a_placed_step_compiles_once_and_transfers_nothing(
    fsdp: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A state that came back otherwise than it was placed would be compiled for again."""
    mesh = sharding.make_mesh(data=2, fsdp=fsdp)
    state, teacher = sharding.place(_start()["kd"], mesh), sharding.place(TEACHER, mesh)
    batches = [sharding.place_batch(BATCH, mesh) for _ in range(5)]

    def placed_step(state: train.TrainState, batch: Any, teacher: Any) -> Any:
        return sharding.keep_placement(STEPS["kd"], before)(state, batch, teacher)

    before, step = state, jax.jit(placed_step)
    with jax.transfer_guard("disallow"), jax.checking_leaks(), jax.log_compiles():
        for batch in batches:
            state, _ = step(state, batch, teacher)
    compiled = [x for x in caplog.messages if re.match(r"Compiling .*placed_step", x)]
    assert len(compiled) == 1
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_state_bytes_fall_as_one_over_n() -> None:
    state = jax.jit(lambda: train.init_state(_init(0, 1024), TX, key=KEY))()
    whole = sum(sharding.bytes_per_device(state).values())
    for n in (2, 4, 8):
        mesh = sharding.make_mesh(data=1, fsdp=n)
        per_device = sharding.bytes_per_device(sharding.place(state, mesh))
        assert len(per_device) == n
        assert max(per_device.values()) < 1.02 * whole / n + 200  # scalars and tiny biases


def test_a_placed_state_may_be_donated() -> None:
    state = _start()["kd"]
    for mesh in (sharding.make_mesh(data=1), sharding.make_mesh(data=1, fsdp=2)):
        jax.jit(lambda x: x, donate_argnums=0)(sharding.place(state, mesh))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_what_is_placed_does_not_change_with_the_arrays_it_comes_from() -> None:
    memory = np.zeros(1024 + 64, np.uint8)
    start = -memory.ctypes.data % 64  # JAX shares memory that is aligned to 64 bytes
    array = memory[start : start + 1024].view(np.float32)
    placed = sharding.place({"w": array}, sharding.make_mesh(data=1))
    batches = [sharding.place_batch({"w": array}, sharding.make_mesh(data=n)) for n in (1, 2)]
    array[:] = 1
    assert not any(np.any(x["w"]) for x in (placed, *batches))


def test_bad_placements_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="needs 16 devices, but there are 8"):
        sharding.make_mesh(data=8, fsdp=2)
    with pytest.raises(ValueError, match="at least 1"):
        sharding.make_mesh(data=0)
    with pytest.raises(ValueError, match=r"labels.*multiple of the 4 local devices"):
        sharding.place_batch({"labels": np.zeros(6)}, sharding.make_mesh(data=4))
    assert settings.mesh_sizes("data=4,fsdp=2") == {"data": 4, "fsdp": 2}
    assert settings.mesh_sizes("tensor=2", axes=("tensor",)) == {"tensor": 2}
    for text in ("data:4", "model=2", "data=0", "data=2,data=2"):
        with pytest.raises(ValueError, match="as in data=4,fsdp=2|'data' is given twice"):
            settings.mesh_sizes(text)
    with pytest.raises(ValueError, match="give all of coordinator"):
        processes.initialize(coordinator="localhost:1")


def test_a_teacher_on_devices_of_its_own(one_device: Any) -> None:
    """As the placement of a stream's batches: the teacher runs ahead of the student's steps."""
    devices = jax.devices()
    student_mesh = sharding.make_mesh(devices=devices[:2])
    teacher_mesh = sharding.make_mesh(data=1, fsdp=4, devices=devices[4:])
    teacher = sharding.place(TEACHER, teacher_mesh)
    attach = sharding.separate_teacher(_model, teacher_mesh, student_mesh)
    step = train.make_step(_model, _kd, {"term": 1.0}, TX)

    def batches(start: int) -> Iterator[Any]:
        return itertools.repeat(BATCH)

    state = sharding.place(train.init_state(STUDENT, TX, key=KEY), student_mesh)
    place = functools.partial(attach, teacher)
    result = loop.run(step, state, batches, steps=20, place=place)
    assert_close(result.state.params, one_device["kd"][0])
    batch = attach(Variables(teacher), BATCH)
    assert batch["teacher"]["logits"].devices() == set(devices[:2])
    assert set.union(*(leaf.devices() for leaf in jax.tree.leaves(result.state))) == set(
        devices[:2]
    )
    assert set.union(*(leaf.devices() for leaf in jax.tree.leaves(teacher))) == set(devices[4:])


def test_a_teacher_on_the_students_mesh_in_another_dtype_and_placement(one_device: Any) -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), TEACHER)
    whole = sharding.place(half, mesh, smallest=10**9)  # on every device, in half the bytes
    assert set(sharding.bytes_per_device(whole).values()) == {
        sum(leaf.nbytes for leaf in jax.tree.leaves(TEACHER)) // 2
    }
    teacher = precision.compute_in(_model, jnp.bfloat16)
    step = train.jit_step(train.make_step(_model, _kd, {"term": 1.0}, TX, teacher=teacher))
    state, batch = sharding.place(_start()["kd"], mesh), sharding.place_batch(BATCH, mesh)
    for _ in range(20):
        state, _ = step(state, batch, whole)
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(one_device["kd"][0]), strict=True
    ):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-2)  # the teacher's logits have three digits


PROCESS = """
    import os, sys
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, {tests!r})
    import jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_compilation_cache_dir", {cache!r})
    from kdtl_jax.run import checkpoint, processes, sharding
    rank = int(sys.argv[1])
    processes.initialize(coordinator="localhost:{port}", processes=2, process=rank)
    jax.config.update("jax_disable_most_optimizations", False)  # as in the test's own process
    import test_sharding as t
    from jax.experimental import multihost_utils
    from refused_writes import cannot_write
    t.BATCH = {{k: v[8 * rank : 8 * rank + 8] for k, v in t.BATCH.items()}}
    mesh = sharding.make_mesh(data=2, fsdp=2)
    # Twelve steps from the start; eight more from what one process saved after twelve.
    states = t._run(mesh, steps=12)
    with checkpoint.open_folder({two!r}) as checkpoints:
        checkpoint.save(checkpoints, 12, states, {{"by": 2}})
    for part, victim in (("async_save", 1), ("finalize", 0)):
        cannot_write({full!r}, states, part, rank == victim)
    template = sharding.place(t._start(), mesh)
    restored = checkpoint.restore({one!r}, template)
    assert (restored.step, restored.meta) == (12, {{"by": 1}}), restored
    learned = t.learned(t._run(mesh, steps=8, states=restored.state))
    learned = multihost_utils.process_allgather(learned, tiled=True)
    if rank == 0:
        np.savez({out!r}, *jax.tree.leaves(learned))
"""


@pytest.mark.slow
def test_two_processes_give_the_one_device_result(tmp_path: Path, one_device: Any) -> None:
    """Also what N processes save and M restore: 1 to 2 within the run, 2 to 1 after it.

    And that a step which one of them cannot write ends the save in both.
    """
    with checkpoint.open_folder(tmp_path / "one") as checkpoints:
        checkpoint.save(checkpoints, 12, _run(None, steps=12), {"by": 1})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = {name: str(tmp_path / name) for name in ("one", "two", "full")}
    out, tests = str(tmp_path / "learned.npz"), str(Path(__file__).parent)
    paths["cache"] = jax.config.values["jax_compilation_cache_dir"]
    code = textwrap.dedent(PROCESS).format(port=port, out=out, tests=tests, **paths)
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=600)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    with np.load(out) as stored:
        actual = jax.tree.unflatten(jax.tree.structure(one_device), list(stored.values()))
    assert_close(actual, one_device)
    saved = checkpoint.restore(tmp_path / "two", _start())
    assert (saved.step, saved.meta) == (12, {"by": 2})
    assert_close(learned(_run(None, steps=8, states=saved.state)), one_device)
