"""Feature methods: most regress the teacher's features through connectors, one per matched layer.

They work in the same way on vectors and on maps; `review`, `ft`, `ab`, `ofd` and `fsp` have a
network or a training stage of their own.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Params, Scalar
from kdtl_jax.methods import _layers
from kdtl_jax.methods._layers import by_example, pairwise, projection, regressor
from kdtl_jax.methods._method import (
    Method,
    Weight,
    exclusive_classes,
    key_and_step,
    method,
    schedule,
    warmed_up,
)
from kdtl_jax.methods._setup import Setup
from kdtl_jax.objective import Inputs


def hint(setup: Setup) -> Method:
    """`mean (r(f_S) - f_T)^2` of the middle layer, r a 1x1 convolution, batch norm, ReLU: FitNets.

    Romero et al., 2015 (1412.6550). Task 1, hint 100: RepDistiller and mdistiller, which train both
    at once (the paper trains the hint first).
    """
    layers = _layers.layers(setup, _layers.middle(setup))
    weights = {"task": 1.0, "hint": 100.0}
    return pairwise(setup, "hint", by_example(losses.mse), layers, weights, connector=regressor)


def cosine(setup: Setup) -> Method:
    """`mean (1 - cos(W f_S, f_T))` summed over layers; task 1, cosine 1.

    Sanh et al., DistilBERT, 2019 (1910.01108), whose term for tokens is `hidden_cosine`.
    """
    layers = _layers.layers(setup, _layers.every(setup))
    weights = {"task": 1.0, "cosine": 1.0}

    def loss(student: Array, teacher: Array) -> Array:
        values = losses.cosine_distance(student, teacher)  # of every position
        return jnp.mean(values.reshape(len(values), -1), axis=1)

    return pairwise(setup, "cosine", by_example(loss), layers, weights, connector=connectors.linear)


def ridge_hint(setup: Setup) -> Method:
    """The hint of the deepest layer through the best linear map, solved for inside the loss.

    Golub and Pereyra, Separable nonlinear least squares: the variable projection method, 2003.
    Nothing besides the student is trained; task 1, hint 1.
    """
    layers = _layers.layers(setup, _layers.deepest(setup))
    return pairwise(setup, "hint", losses.ridge_hint, layers, {"task": 1.0, "hint": 1.0})


def vid(setup: Setup) -> Method:
    """`mean 1/2 ((f_T - mu(f_S))^2 / v + log v)` summed over layers: variational information.

    Ahn et al., 2019 (1904.05835). The mean comes from three 1x1 convolutions; the variance is
    learned per channel and starts at 5. Task 1, vid 1: RepDistiller.
    """
    layers = _layers.layers(setup, _layers.every(setup))
    means = [connectors.mlp((t.shape[-1],) * 3, bias=False) for t in layers.teacher]
    variance = connectors.variance()

    def init(key: Array) -> Params:
        variances = [variance] * len(means)
        return _layers.init_each(means, layers.student, key) | _layers.init_each(
            variances, layers.teacher, key, prefix="variance"
        )

    def terms(inputs: Inputs) -> dict[str, Array]:
        params, features = inputs.connectors, layers.read(inputs.student, inputs.teacher)
        features = _layers.connect(means, params, features, inputs.real)
        values = [
            losses.vid(mean, teacher, variance.apply(params[f"variance_{i}"], teacher))
            for i, (mean, teacher) in enumerate(features)
        ]
        return {"vid": sum(values[1:], values[0])}

    return method(setup, terms, {"task": 1.0, "vid": 1.0}, connectors=init)


def ickd(setup: Setup) -> Method:
    """`sum_cc' (G_S - G_T)^2 / C` of the deepest layer's row-normalized channel Gram matrices.

    Liu et al., ICCV 2021. Task 1, ickd 500 / 256: torchdistill's 500 without its second division by
    the batch size, which is 256 there.
    """

    def loss(student: Array, teacher: Array) -> Array:
        return teacher.shape[-1] * losses.ickd(student, teacher)

    layers = _layers.layers(setup, _layers.deepest(setup), _layers.maps)
    weights = {"task": 1.0, "ickd": 500 / 256}
    return pairwise(setup, "ickd", by_example(loss), layers, weights, connector=projection)


def pkd(setup: Setup) -> Method:
    """`1 - rho` of features standardized per channel, summed over layers: Pearson correlation.

    Cao et al., 2022 (2207.02039). Task 1, pkd 1: mmrazor's default.
    """
    layers = _layers.layers(setup, _layers.every(setup))
    weights = {"task": 1.0, "pkd": 1.0}
    loss = losses.pkd_pearson
    return pairwise(setup, "pkd", loss, layers, weights, connector=connectors.conv1x1)


def mgd(setup: Setup, *, masked: float = 0.15) -> Method:
    """`sum (G(mask * A f_S) - f_T)^2` of the deepest layer: masked generative distillation.

    Yang et al., 2022 (2205.01529). A share of the student's channels is dropped at every step and
    the teacher's features are generated from the rest. Task 1, mgd 7e-5, masked 0.15: the authors'
    classification settings.
    """
    layers = _layers.layers(setup, _layers.deepest(setup), _layers.maps)
    channels = layers.teacher[0].shape[-1]
    align, generate = connectors.conv1x1(channels), connectors.generator(channels)

    def init(key: Array) -> Params:
        key_align, key_generate = jax.random.split(key)
        return {
            "align": align.init(key_align, layers.student[0]),
            "generator": generate.init(key_generate, layers.teacher[0]),
        }

    def terms(inputs: Inputs) -> dict[str, Array]:
        params, (key, _) = inputs.connectors, key_and_step(inputs)
        [(student, teacher)] = layers.read(inputs.student, inputs.teacher)
        student = align.apply(params["align"], student)
        keep = jax.random.bernoulli(key, 1 - masked, (len(student), 1, 1, channels))
        kept = jnp.where(keep, student, jnp.zeros((), student.dtype))
        generated = generate.apply(params["generator"], kept)
        return {"mgd": losses.squared_distance(generated, teacher)}

    return method(setup, terms, {"task": 1.0, "mgd": 7e-5}, connectors=init)


def srd(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`log sum_d |P f_S - f_T|^4` of the heads' inputs, batch-normalized, plus KD at T = 1.

    Miles and Mikolajczyk, 2023 (2303.11098). The student is projected linearly. Task 1, srd 1, kd
    1; torchdistill's distance, one value for the whole batch, has weight 2.
    """
    exclusive_classes(setup)
    student_tap, teacher_tap = setup.last
    teacher_shape = setup.teacher[teacher_tap]
    project = projection(teacher_shape.shape[-1])
    norm = connectors.batch_norm()
    # Scale 1, offset 0: nothing to learn.
    identity_params = norm.init(jax.random.key(0), teacher_shape)

    def terms(inputs: Inputs) -> dict[str, Array]:
        where = inputs.real
        student = project.apply(inputs.connectors, inputs.student[student_tap], where=where)
        teacher = norm.apply(identity_params, inputs.teacher[teacher_tap], where=where)
        logits = inputs.student["logits"], inputs.teacher["logits"]
        return {
            "srd": losses.srd(student, teacher),
            "kd": losses.kd_kl(*logits, temperature=temperature),
        }

    def init(key: Array) -> Params:
        return project.init(key, setup.student[student_tap])

    return method(setup, terms, {"task": 1.0, "srd": 1.0, "kd": 1.0}, connectors=init)


WIDEST = 512  # channels of ReviewKD's residual stream


def features_first(term: str, weight: float, setup: Setup) -> dict[str, Weight]:
    """Weights that first train one term alone, then the task.

    RepDistiller's two-stage methods train 30 epochs on features, then 240 on the labels.
    """
    switch_step = max(round(30 / 270 * setup.steps), 1)

    def switched(first: float, second: float) -> Weight:
        values = map(optax.constant_schedule, (first, second))
        description = f"{first:g}, after {switch_step} steps {second:g}"
        return schedule(optax.join_schedules([*values], [switch_step]), description)

    return {"task": switched(0.0, 1.0), term: switched(weight, 0.0)}


def halving(count: int) -> list[float]:
    """Layer weights: 1 for the deepest, halved for each earlier layer."""
    return [0.5 ** (count - 1 - layer) for layer in range(count)]


def review(setup: Setup) -> Method:
    """Fuses layers from the deepest up (`connectors.abf`); each fused map learns its teacher's.

    Chen et al., 2021 (2104.09044). The loss of a map is the hierarchical context loss
    (`losses.hcl`), summed over layers. Task 1, hcl 1 after a linear warm-up over 20 of 240 epochs:
    mdistiller, whose weight is 1, 5 or 8 depending on the pair.
    """
    layers = _layers.layers(setup, _layers.every(setup), _layers.maps)
    count = len(layers.student)
    width = min(WIDEST, max(student.shape[-1] for student in layers.student))
    fusions = [connectors.abf(width, teacher.shape[-1]) for teacher in layers.teacher]

    def init(key: Array) -> Params:
        params, residual = {}, None
        for i in reversed(range(count)):
            x = layers.student[i], residual
            params[f"pair_{i}"] = fusions[i].init(jax.random.fold_in(key, i), x)
            _, residual = jax.eval_shape(fusions[i].apply, params[f"pair_{i}"], x)
        return params

    def terms(inputs: Inputs) -> dict[str, Array]:
        where, features = inputs.real, layers.read(inputs.student, inputs.teacher)
        fused, residual = [], None
        for i in reversed(range(count)):
            student, teacher = features[i]
            params, x = inputs.connectors[f"pair_{i}"], (student, residual)
            fused_map, residual = fusions[i].apply(params, x, where=where)
            fused.append((fused_map, teacher))
        return {"hcl": _layers.total(by_example(losses.hcl), fused, None)}

    return method(setup, terms, {"task": 1.0, "hcl": warmed_up(1.0, setup)}, connectors=init)


def ft(setup: Setup) -> Method:
    """`|| F_S / ||F_S|| - F_T / ||F_T|| ||_1` per element, with F factors of the deepest layer.

    Kim, Park and Kwak, 2018 (1802.04977). The teacher's factor comes from a paraphraser, an
    autoencoder that is trained alongside the student instead of before it, on its reconstruction
    loss alone: the factor that teaches is a constant. Task 1, ft 1000 (torchdistill's weight for
    the mean over elements), reconstruction 1.
    """
    layers = _layers.layers(setup, _layers.deepest(setup), _layers.maps)
    [student_shape], [teacher_shape] = layers.student, layers.teacher
    channels = teacher_shape.shape[-1]
    paraphrase = connectors.paraphraser(channels)
    translate = connectors.translator(student_shape.shape[-1], max(channels // 2, 1))

    def init(key: Array) -> Params:
        key_teacher, key_student = jax.random.split(key)
        return {
            "paraphraser": paraphrase.init(key_teacher, teacher_shape),
            "translator": translate.init(key_student, student_shape),
        }

    def terms(inputs: Inputs) -> dict[str, Array]:
        [(student, teacher)] = layers.read(inputs.student, inputs.teacher)
        params, where = inputs.connectors, inputs.real
        factor, rebuilt = paraphrase.apply(params["paraphraser"], teacher, where=where)
        factor = jax.lax.stop_gradient(factor)
        translated = translate.apply(params["translator"], student, where=where)
        elements = factor.size // len(factor)
        return {
            "ft": losses.factor_transfer(translated, factor) / elements,
            "reconstruction": losses.mse(rebuilt, teacher),
        }

    weights = {"task": 1.0, "ft": 1000.0, "reconstruction": 1.0}
    return method(setup, terms, weights, connectors=init)


def ab(setup: Setup) -> Method:
    """Squared hinges that push every neuron to the teacher's side of 0: activation boundaries.

    Heo et al., 2019 (1811.03233). Every layer has half the weight of the next, and all are
    multiplied by 3 / 1000. Task 1, ab 1, trained before the task for 30 of 270 epochs:
    RepDistiller.
    """

    def loss(student: Array, teacher: Array) -> Array:
        return losses.activation_boundary(student, teacher) * (3 / 1000)

    layers = _layers.layers(setup, _layers.every(setup))
    return pairwise(
        setup,
        "ab",
        by_example(loss),
        layers,
        features_first("ab", 1.0, setup),
        connector=projection,
        layer_weights=halving(len(layers.student)),
    )


def ofd(setup: Setup) -> Method:
    """`sum (s - max(t, m))^2 [s > max(t, m) or t > 0]` before the activation: the overhaul.

    Heo et al., 2019 (1904.01866). Margins m are the batch's `E[t | t < 0]` per channel; the authors
    compute them in closed form from the teacher's batch normalization (`losses.ofd_margin`). Every
    layer has half the weight of the next. Task 1, ofd 0.001: the authors' code.
    """
    missing = [t for s, t in _layers.every(setup) if (s, t) not in setup.before_activation]
    if missing:
        raise ValueError(
            f"needs the teacher's features before the activation, unknown for {missing}: give "
            f"setup a teacher_layout with before_activation={{{missing[0]!r}: TAP}}, where TAP is "
            "the tap of the same layer before its ReLU"
        )

    def loss(student: Array, teacher: Array, *, where: Array | None) -> Array:
        return losses.partial_l2(student, teacher, margin=_mean_below_zero(teacher, where))

    layers = _layers.layers(setup, [setup.before_activation[pair] for pair in setup.pairs])
    return pairwise(
        setup,
        "ofd",
        loss,
        layers,
        {"task": 1.0, "ofd": 0.001},
        connector=projection,
        layer_weights=halving(len(layers.student)),
    )


def _mean_below_zero(x: Array, where: Array | None) -> Array:
    """`E[x | x < 0]` per channel over this batch, 0 for a channel that is never negative: `[C]`."""
    if where is not None:
        x = jnp.where(jnp.expand_dims(where, tuple(range(1, x.ndim))), x, 0)
    negatives = jnp.minimum(x, 0).reshape(-1, x.shape[-1])
    count = jnp.sum(negatives < 0, axis=0, dtype=x.dtype)
    return jnp.sum(negatives, axis=0) / jnp.maximum(count, 1)


def fsp(setup: Setup) -> Method:
    """`mean (F_S - F_T)^2` of flow matrices between neighboring layers, summed.

    Yim et al., CVPR 2017. The paper's networks have equal widths; other students are projected to
    the teacher's widths by 1x1 convolutions. Task 1, fsp 50, trained before the task for 30 of 270
    epochs: RepDistiller's script, whose first stage does not read the weight.
    """
    layers = _layers.layers(setup, _layers.every(setup, at_least=2), _layers.maps)
    glue = [
        connectors.identity() if s.shape[-1] == t.shape[-1] else connectors.conv1x1(t.shape[-1])
        for s, t in zip(layers.student, layers.teacher, strict=True)
    ]

    def terms(inputs: Inputs) -> dict[str, Array]:
        features = layers.read(inputs.student, inputs.teacher)
        features = _layers.connect(glue, inputs.connectors, features, inputs.real)
        flows = []
        for (s1, t1), (s2, t2) in zip(features, features[1:], strict=False):
            student, teacher = _layers.same_positions(s1, s2), _layers.same_positions(t1, t2)
            flows.append(losses.fsp(student, teacher))
        return {"fsp": sum(flows[1:], flows[0])}

    def init(key: Array) -> Params:
        return _layers.init_each(glue, layers.student, key)

    return method(setup, terms, features_first("fsp", 50.0, setup), connectors=init)
