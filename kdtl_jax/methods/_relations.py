"""Methods on relations between examples: within a batch, or to embeddings kept in a memory.

Widths may differ. Contrastive methods embed the heads' inputs in 128 dimensions on both sides.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses, memory
from kdtl_jax._types import Params, PyTree, Scalar
from kdtl_jax.methods import _layers
from kdtl_jax.methods._layers import pairwise
from kdtl_jax.methods._method import Method, count, key_and_step, method
from kdtl_jax.methods._setup import Setup, check_setup
from kdtl_jax.objective import Inputs


def sp(setup: Setup) -> Method:
    """`mean_ij (G_S - G_T)_ij^2` of row-normalized Gram matrices of the deepest layer.

    Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019 (1907.09682). Task 1, sp 3000:
    RepDistiller.
    """
    layers = _layers.layers(setup, _layers.deepest(setup), _layers.unchanged)
    return pairwise(setup, "sp", losses.sp, layers, {"task": 1.0, "sp": 3000.0})


def rkd(setup: Setup) -> Method:
    """Distances between pairs and angles in triples of examples, on the heads' inputs.

    Park et al., Relational Knowledge Distillation, 2019 (1904.05068). Task 1, distance 25, angle
    50: RepDistiller and mdistiller.
    """
    check_setup(setup)
    student_tap, teacher_tap = setup.last

    def terms(inputs: Inputs) -> dict[str, Array]:
        sides = inputs.student[student_tap], inputs.teacher[teacher_tap]
        where = inputs.real
        return {
            "distance": losses.rkd_distance(*sides, where=where),
            "angle": losses.rkd_angle(*sides, where=where),
        }

    return method(setup, terms, {"task": 1.0, "distance": 25.0, "angle": 50.0})


def pkt(setup: Setup) -> Method:
    """`KL` of cosine similarities to the batch, on the heads' inputs, divided by the batch size.

    Passalis and Tefas, Probabilistic Knowledge Transfer, 2018 (1803.10837). Task 1, pkt 30000:
    RepDistiller, which averages over pairs of examples.
    """

    def loss(student: Array, teacher: Array, *, where: Array | None) -> Array:
        values = losses.pkt(student, teacher, where=where)
        return values / count(values, where)

    check_setup(setup)
    layers = _layers.layers(setup, [setup.last], _layers.unchanged)
    return pairwise(setup, "pkt", loss, layers, {"task": 1.0, "pkt": 30000.0})


def cc(setup: Setup) -> Method:
    """`mean_ij (K_S - K_T)_ij^2` of Gaussian kernels of the heads' inputs.

    Peng et al., Correlation Congruence, 2019 (1904.01802). Task 1, cc 0.003: torchdistill's
    configuration.
    """
    check_setup(setup)
    layers = _layers.layers(setup, [setup.last], _layers.unchanged)
    return pairwise(setup, "cc", losses.cc, layers, {"task": 1.0, "cc": 0.003})


def itrd(setup: Setup) -> Method:
    """`log2 sum_d |rho_d - 1|^3` of feature correlations rho, and mutual information.

    Miles, Rodriguez and Mikolajczyk, 2022 (2112.00459). The student is projected linearly to the
    teacher's width. Task 1, correlation 2, mutual 0.05: the settings in the distillers zoo, whose
    `forward` adds both unweighted. The published logarithm has no floor and is -inf at perfect
    correlation; here the floor is 1e-12.
    """
    check_setup(setup)
    student_tap, teacher_tap = setup.last
    embed = connectors.linear(setup.teacher[teacher_tap].shape[-1])
    shape = setup.student[student_tap]

    def terms(inputs: Inputs) -> dict[str, Array]:
        teacher, where = inputs.teacher[teacher_tap], inputs.real
        student = embed.apply(inputs.connectors, inputs.student[student_tap])
        mutual = losses.itrd_mutual(student, teacher, where=where)
        distance = jnp.abs(losses.feature_correlation(student, teacher, where=where) - 1)
        return {
            "correlation": jnp.log2(jnp.sum(distance**3) + 1e-12),
            "mutual": count(mutual, where) * mutual,
        }

    weights = {"task": 1.0, "correlation": 2.0, "mutual": 0.05}
    return method(setup, terms, weights, connectors=lambda key: embed.init(key, shape))


WIDTH = 128  # of the embeddings, in CRD and its successors
NEGATIVES = 16384

_EMBED = connectors.chain(connectors.linear(WIDTH), connectors.unit_norm())


def _init_embeddings(setup: Setup, key: Array) -> Params:
    key_student, key_teacher = jax.random.split(key)
    student_tap, teacher_tap = setup.last
    return {
        "student": _EMBED.init(key_student, setup.student[student_tap]),
        "teacher": _EMBED.init(key_teacher, setup.teacher[teacher_tap]),
    }


def _embed(setup: Setup, inputs: Inputs) -> tuple[Array, Array]:
    params, (student_tap, teacher_tap) = inputs.connectors, setup.last
    return (
        _EMBED.apply(params["student"], inputs.student[student_tap]),
        _EMBED.apply(params["teacher"], inputs.teacher[teacher_tap]),
    )


def crd(setup: Setup, *, temperature: Scalar = 0.07) -> Method:
    """Noise-contrastive estimation against banks of both models' embeddings.

    Tian, Krishnan and Isola, 2020 (1910.10699). There are 16384 negatives. The normalizer is fixed
    by the first batch (or microbatch) with a real example, as published. Batches hold their
    examples' positions as `"index"`. Task 1, crd 0.8: RepDistiller.
    """
    check_setup(setup)
    n = setup.examples
    if n < 2:
        raise ValueError(f"needs at least 2 training examples to distinguish, got {n}")
    negatives = min(NEGATIVES, n - 1)

    def side(
        bank: memory.Bank, queries: Array, samples: Array, inputs: Inputs
    ) -> tuple[Array, Array]:
        """The values of one side, and its normalizer."""
        constant, where = jax.lax.stop_gradient(queries), inputs.real
        options = {"temperature": temperature, "where": where}
        first = memory.bank_set_normalizer(bank, constant, samples, **options)
        # Decided by the memory, not by the step: the first step may be skipped, or hold only
        # padding.
        log_z = jnp.where(inputs.memory["is_normalized"], bank.log_z, first.log_z)
        scores = memory.bank_scores(bank._replace(log_z=log_z), queries, samples, **options)
        return losses.crd(scores, num_data=n), log_z

    def terms(inputs: Inputs) -> tuple[dict[str, Array], PyTree]:
        if "index" not in inputs.batch:
            raise ValueError(
                'the batch has no "index", the places of its examples in the training set: add '
                '"index": jnp.arange(number of examples) to the data.'
            )
        student, teacher = _embed(setup, inputs)
        index, banks, where = inputs.batch["index"], inputs.memory, inputs.real
        key, _ = key_and_step(inputs)
        samples = memory.bank_draw(key, index, size=n, negatives=negatives, where=where)
        student_values, log_z_teacher = side(banks["teacher"], student, samples, inputs)
        teacher_values, log_z_student = side(banks["student"], teacher, samples, inputs)
        updated = {
            "student": memory.bank_update(banks["student"], student, index, where=where),
            "teacher": memory.bank_update(banks["teacher"], teacher, index, where=where),
        }
        updated["student"] = updated["student"]._replace(log_z=log_z_student)
        updated["teacher"] = updated["teacher"]._replace(log_z=log_z_teacher)
        is_normalized = banks["is_normalized"] | (True if where is None else jnp.any(where))
        return {"crd": student_values + teacher_values}, updated | {"is_normalized": is_normalized}

    def banks(key: Array) -> PyTree:
        key_student, key_teacher = jax.random.split(key)
        return {
            "student": memory.bank_init(key_student, n, WIDTH),
            "teacher": memory.bank_init(key_teacher, n, WIDTH),
            "is_normalized": jnp.asarray(False),
        }

    weights = {"task": 1.0, "crd": 0.8}
    return method(setup, terms, weights, connectors=partial(_init_embeddings, setup), memory=banks)


def info_nce(setup: Setup, *, temperature: Scalar = 0.07) -> Method:
    """`-log softmax_j(cos(s_i, t_j) / T)_i`: the negatives are the rest of the batch.

    van den Oord, Li and Vinyals, 2018 (1807.03748). Task 1, info_nce 0.8, T = 0.07: the settings of
    `crd`.
    """

    def terms(inputs: Inputs) -> dict[str, Array]:
        student, teacher = _embed(setup, inputs)
        options = {"temperature": temperature, "where": inputs.real}
        return {"info_nce": losses.info_nce(student, teacher, **options)}

    return method(
        setup, terms, {"task": 1.0, "info_nce": 0.8}, connectors=partial(_init_embeddings, setup)
    )


def dcd(setup: Setup) -> Method:
    """`info_nce` at a learned `1 / T = min(exp(tau), 10)`, and half the invariance of both views.

    Giakoumoglou and Stathaki, 2024 (2407.11802). Tau starts at 1. Task 1, info_nce 1, invariance
    0.5: the authors' code.
    """

    def terms(inputs: Inputs) -> dict[str, Array]:
        student, teacher = _embed(setup, inputs)
        temperature = 1 / jnp.minimum(jnp.exp(inputs.connectors["tau"]), 10)
        options = {"temperature": temperature, "where": inputs.real}
        return {
            "info_nce": losses.info_nce(student, teacher, **options),
            "invariance": losses.dcd_invariance(student, teacher, **options),
        }

    def init(key: Array) -> Params:
        return {**_init_embeddings(setup, key), "tau": jnp.ones((), jnp.float32)}

    weights = {"task": 1.0, "info_nce": 1.0, "invariance": 0.5}
    return method(setup, terms, weights, connectors=init)


def rrd(setup: Setup, *, temperature: Scalar = 0.1) -> Method:
    """`KL` of similarities to a queue of the teacher's last 16384 embeddings.

    Giakoumoglou and Stathaki, 2024 (2407.12073). The teacher's temperature is 0.02; `temperature`
    is the student's. The teacher's embedding is random and stays fixed, and the batch enters the
    queue before it is compared, as published. Task 1, rrd 1: the authors' code.
    """

    def terms(inputs: Inputs) -> tuple[dict[str, Array], PyTree]:
        student, teacher = _embed(setup, inputs)
        teacher = jax.lax.stop_gradient(teacher)
        where = inputs.real
        queue = memory.queue_push(inputs.memory, teacher, where=where)
        values = losses.rrd(
            student, teacher, queue=queue.rows, student_temperature=temperature, where=where
        )
        return {"rrd": values}, queue

    def queue(key: Array) -> PyTree:
        return memory.queue_init(key, min(NEGATIVES, setup.examples), WIDTH)

    return method(
        setup,
        terms,
        {"task": 1.0, "rrd": 1.0},
        connectors=partial(_init_embeddings, setup),
        memory=queue,
    )
