"""Contrastive losses, with the embeddings and the memory that the references keep inside."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from golden_maps import Golden
from kdtl_jax import connectors, losses, memory

Arrays = Mapping[str, Array]
Hyper = Mapping[str, Any]


def _embedded(x: Arrays, side: str) -> Array:
    width = x[f"{side}_weight"].shape[1]
    head = connectors.chain(connectors.linear(width), connectors.unit_norm())
    params = [{"kernel": x[f"{side}_weight"], "bias": x[f"{side}_bias"]}, {}]
    return head.apply(params, x[side])


def _crd(x: Arrays, hyper: Hyper) -> dict[str, Array]:
    student, teacher = _embedded(x, "student"), _embedded(x, "teacher")
    places, temperature = x["contrast_index"], hyper["temperature"]
    n = len(x["memory_s"])
    total, log_z = jnp.zeros(()), []
    for rows, queries, z in (
        (x["memory_t"], student, hyper["z_s"]),
        (x["memory_s"], teacher, hyper["z_t"]),
    ):
        bank = memory.Bank(rows, jnp.asarray(math.log(z) if z > 0 else 0.0))
        if z < 0:  # the reference's secret first call
            bank = memory.bank_set_normalizer(bank, queries, places, temperature=temperature)
        scores = memory.bank_scores(bank, queries, places, temperature=temperature)
        total = total + jnp.mean(losses.crd(scores, num_data=n, eps=hyper["eps"]))
        log_z.append(bank.log_z)
    return {
        "value": total,
        "new_z": jnp.exp(jnp.stack(log_z)),
        "new_memory_s": _updated(x, "memory_s", student, hyper),
        "new_memory_t": _updated(x, "memory_t", teacher, hyper),
    }


def _updated(x: Arrays, name: str, embedded: Array, hyper: Hyper) -> Array:
    bank = memory.Bank(x[name], jnp.zeros(()))
    return memory.bank_update(bank, embedded, x["index"], momentum=hyper["momentum"]).rows


def _rrd(x: Arrays, hyper: Hyper) -> dict[str, Array]:
    """The reference pushes first, and minimizes the cross-entropy: KL plus a constant."""
    student = _embedded(x, "student")
    teacher = jax.lax.stop_gradient(_embedded(x, "teacher"))
    pointer = jnp.asarray(hyper["pointer"], jnp.int32)
    queue = memory.queue_push(memory.Queue(x["queue"], pointer), teacher)
    values = losses.rrd(
        student,
        teacher,
        queue=queue.rows,
        student_temperature=hyper["student_temperature"],
        teacher_temperature=hyper["teacher_temperature"],
    )
    log_p = jax.nn.log_softmax(teacher @ queue.rows.T / hyper["teacher_temperature"])
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return {
        "value": jnp.mean(values + entropy),
        "new_queue": queue.rows,
        "new_pointer": queue.pointer,
    }


def _dcd(x: Arrays, hyper: Hyper) -> Array:
    """The learned offset shifts all similarities alike: both softmaxes cancel it."""
    student, teacher = _embedded(x, "student"), _embedded(x, "teacher")
    temperature = 1 / jnp.minimum(jnp.exp(x["log_tau"]), hyper["max_tau"])
    contrastive = jnp.mean(losses.info_nce(student, teacher, temperature=temperature))
    invariance = jnp.mean(losses.dcd_invariance(student, teacher, temperature=temperature))
    return contrastive + hyper["alpha"] * invariance + 0 * x["offset"]


METHODS: dict[str, Golden] = {"crd": _crd, "rrd": _rrd, "dcd": _dcd}
