"""Contrastive methods: embeddings on both sides, and for some a memory of earlier examples."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses, memory
from kdtl_jax._types import Params, PyTree
from kdtl_jax.methods import _builders, _views
from kdtl_jax.methods._method import TASK, Built, Method, Options, Setup, no_memory
from kdtl_jax.objective import Inputs

WIDTH = 128  # of the embeddings, in CRD and its successors
NEGATIVES = 16384

_EMBED = connectors.chain(connectors.linear(WIDTH), connectors.unit_norm())


def _embeddings(setup: Setup) -> Callable[[Array], Params]:
    def init(key: Array) -> Params:
        key_student, key_teacher = jax.random.split(key)
        of_student, of_teacher = setup.last
        return {
            "student": _EMBED.init(key_student, setup.student[of_student]),
            "teacher": _EMBED.init(key_teacher, setup.teacher[of_teacher]),
        }

    return init


def _embedded(setup: Setup, inputs: Inputs) -> tuple[Array, Array]:
    params, (of_student, of_teacher) = inputs.connectors, setup.last
    return (
        _EMBED.apply(params["student"], inputs.student[of_student]),
        _EMBED.apply(params["teacher"], inputs.teacher[of_teacher]),
    )


def _build_crd(setup: Setup, options: Options) -> Built:
    temperature, n = _builders.chosen(options, 0.07), setup.examples
    negatives = min(NEGATIVES, n - 1)

    def side(bank: memory.Bank, queries: Array, drawn: Array, step: Array) -> tuple[Array, Array]:
        """Values of one side, and the normalizer: the first batch's, as published."""
        fixed = jax.lax.stop_gradient(queries)
        first = memory.bank_set_normalizer(bank, fixed, drawn, temperature=temperature)
        log_z = jnp.where(step == 0, first.log_z, bank.log_z)
        scores = memory.bank_scores(
            bank._replace(log_z=log_z), queries, drawn, temperature=temperature
        )
        return losses.crd(scores, num_data=n), log_z

    def terms(inputs: Inputs) -> tuple[dict[str, Array], PyTree]:
        student, teacher = _embedded(setup, inputs)
        index, banks, (key, step) = inputs.batch["index"], inputs.memory, _builders.clock(inputs)
        drawn = memory.bank_draw(key, index, size=n, negatives=negatives)
        of_student, log_z_s = side(banks["teacher"], student, drawn, step)
        of_teacher, log_z_t = side(banks["student"], teacher, drawn, step)
        updated = {
            "student": memory.bank_update(banks["student"], student, index),
            "teacher": memory.bank_update(banks["teacher"], teacher, index),
        }
        updated["teacher"] = updated["teacher"]._replace(log_z=log_z_s)
        updated["student"] = updated["student"]._replace(log_z=log_z_t)
        return {"crd": of_student + of_teacher}, updated

    def banks(key: Array) -> PyTree:
        key_student, key_teacher = jax.random.split(key)
        return {
            "student": memory.bank_init(key_student, n, WIDTH),
            "teacher": memory.bank_init(key_teacher, n, WIDTH),
        }

    return Built(terms, {TASK: 1.0, "crd": 0.8}, _embeddings(setup), banks)


def _build_rrd(setup: Setup, options: Options) -> Built:
    """A queue of the teacher's embeddings, whose map is random and stays so, as published."""
    student_temperature = _builders.chosen(options, 0.1)

    def terms(inputs: Inputs) -> tuple[dict[str, Array], PyTree]:
        student, teacher = _embedded(setup, inputs)
        teacher = jax.lax.stop_gradient(teacher)
        queue = memory.queue_push(inputs.memory, teacher)
        values = losses.rrd(
            student, teacher, queue=queue.rows, student_temperature=student_temperature
        )
        return {"rrd": values}, queue

    def queue(key: Array) -> PyTree:
        return memory.queue_init(key, min(NEGATIVES, setup.examples), WIDTH)

    return Built(terms, {TASK: 1.0, "rrd": 1.0}, _embeddings(setup), queue)


def _build_info_nce(setup: Setup, options: Options) -> Built:
    temperature = _builders.chosen(options, 0.07)

    def terms(inputs: Inputs) -> dict[str, Array]:
        student, teacher = _embedded(setup, inputs)
        return {"info_nce": losses.info_nce(student, teacher, temperature=temperature)}

    return Built(terms, {TASK: 1.0, "info_nce": 0.8}, _embeddings(setup), no_memory)


def _build_dcd(setup: Setup, options: Options) -> Built:
    """The inverse temperature is learned: `min(exp(tau), 10)`, tau 1 at first."""
    embeddings = _embeddings(setup)

    def terms(inputs: Inputs) -> dict[str, Array]:
        student, teacher = _embedded(setup, inputs)
        temperature = 1 / jnp.minimum(jnp.exp(inputs.connectors["tau"]), 10)
        return {
            "info_nce": losses.info_nce(student, teacher, temperature=temperature),
            "invariance": losses.dcd_invariance(student, teacher, temperature=temperature),
        }

    def init(key: Array) -> Params:
        return {**embeddings(key), "tau": jnp.ones((), jnp.float32)}

    weights = {TASK: 1.0, "info_nce": 1.0, "invariance": 0.5}
    return Built(terms, weights, init, no_memory)


def _has_negatives(setup: Setup) -> str | None:
    if setup.examples < 2:
        return f"needs at least 2 training examples to tell apart, there are {setup.examples}"
    return None


METHODS = (
    Method(
        "crd",
        "Contrastive representation distillation",
        "Tian, Krishnan, Isola, 1910.10699, 2020",
        "features",
        True,
        _build_crd,
        _has_negatives,
    ),
    Method(
        "info_nce",
        "Contrast with the rest of the batch",
        "van den Oord, Li, Vinyals, 1807.03748, 2018",
        "features",
        True,
        _build_info_nce,
        _views.always,
    ),
    Method(
        "dcd",
        "Discriminative and consistent distillation",
        "Giakoumoglou, Stathaki, 2407.11802, 2024",
        "features",
        True,
        _build_dcd,
        _views.always,
    ),
    Method(
        "rrd",
        "Relational representation distillation with a queue",
        "Giakoumoglou, Stathaki, 2407.12073, 2024",
        "features",
        True,
        _build_rrd,
        _views.always,
    ),
)
