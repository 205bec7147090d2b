"""Methods with a network of their own or a stage of their own: ReviewKD, FT, AB, OFD, FSP."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Params
from kdtl_jax.methods import _builders, _views
from kdtl_jax.methods._features import projection
from kdtl_jax.methods._method import TASK, Built, Method, Options, Setup, no_memory
from kdtl_jax.objective import Inputs

WIDEST = 512  # channels of ReviewKD's residual stream


def _build_reviewkd(setup: Setup, options: Options) -> Built:
    """Fused from the deepest layer up; every fused map learns its teacher's."""
    view, pairs = _views.matched_maps, setup.pairs
    sides = _views.shapes(view, pairs, setup)
    width = min(WIDEST, max(student.shape[-1] for student, _ in sides))
    fusions = [connectors.abf(width, teacher.shape[-1]) for _, teacher in sides]

    def init(key: Array) -> Params:
        params, residual = {}, None
        for i in reversed(range(len(sides))):
            x = sides[i][0], residual
            params[f"pair_{i}"] = fusions[i].init(jax.random.fold_in(key, i), x)
            _, residual = jax.eval_shape(fusions[i].apply, params[f"pair_{i}"], x)
        return params

    def terms(inputs: Inputs) -> dict[str, Array]:
        features = _views.viewed(view, pairs, inputs.student, inputs.teacher)
        fused, residual = [], None
        for i in reversed(range(len(features))):
            student, teacher = features[i]
            params = inputs.connectors[f"pair_{i}"]
            mixed, residual = fusions[i].apply(params, (student, residual))
            fused.append((mixed, teacher))
        return {"hcl": _builders.summed(losses.hcl, fused)}

    weights = {TASK: 1.0, "hcl": _builders.warmed_up(1.0, setup.steps)}
    return Built(terms, weights, init, no_memory)


def _build_ft(setup: Setup, options: Options) -> Built:
    """The teacher's paraphraser is trained beside the student instead of before it.

    It learns from its reconstruction alone: the factor that teaches is a constant.
    """
    [(student_shape, teacher_shape)] = _views.shapes(
        _views.matched_maps, _views.deepest_pair(setup), setup
    )
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
        params = inputs.connectors
        [(student, teacher)] = _views.viewed(
            _views.matched_maps, _views.deepest_pair(setup), inputs.student, inputs.teacher
        )
        factor, rebuilt = paraphrase.apply(params["paraphraser"], teacher)
        factor = jax.lax.stop_gradient(factor)
        translated = translate.apply(params["translator"], student)
        # torchdistill's mean over elements, which its weight of 1000 belongs to.
        values = losses.factor_transfer(translated, factor) / (factor.size // len(factor))
        return {"ft": values, "reconstruction": losses.mse(rebuilt, teacher)}

    return Built(terms, {TASK: 1.0, "ft": 1000.0, "reconstruction": 1.0}, init, no_memory)


def _halving(layer: int, count: int) -> float:
    """1 for the deepest layer, half of it for each before."""
    return 0.5 ** (count - 1 - layer)


def _mean_below_zero(x: Array) -> Array:
    """`E[x | x < 0]` per channel over this batch, 0 for a channel that is never below: `[C]`."""
    below = jnp.minimum(x, 0).reshape(-1, x.shape[-1])
    count = jnp.sum(below < 0, axis=0, dtype=x.dtype)
    return jnp.sum(below, axis=0) / jnp.maximum(count, 1)


def _ofd(student: Array, teacher: Array) -> Array:
    """Margins measured on the batch; a batch normalization would give them in closed form."""
    return losses.partial_l2(student, teacher, margin=_mean_below_zero(teacher))


def _before_activation(setup: Setup) -> _views.Pairs:
    before = setup.before_activation
    return tuple((before.get(s, s), before[t]) for s, t in setup.pairs)


def _needs_teacher_before_activation(setup: Setup) -> str | None:
    missing = [t for _, t in setup.pairs if setup.before_activation.get(t) not in setup.teacher]
    if missing:
        return f"needs the teacher's features before the activation, not tapped for {missing}"
    return None


def _ab(student: Array, teacher: Array) -> Array:
    return losses.activation_boundary(student, teacher) * (3 / 1000)


def _ab_weights(setup: Setup) -> dict[str, _builders.Weight]:
    return _builders.two_stages("ab", 1.0, setup.steps)


def _build_fsp(setup: Setup, options: Options) -> Built:
    """Flows between neighboring layers. The paper's have equal widths; others are projected."""
    sides = _views.shapes(_views.matched_maps, setup.pairs, setup)
    glue = [
        connectors.identity() if s.shape[-1] == t.shape[-1] else connectors.conv1x1(t.shape[-1])
        for s, t in sides
    ]

    def init(key: Array) -> Params:
        return _views.init_each(glue, [student for student, _ in sides], key)

    def terms(inputs: Inputs) -> dict[str, Array]:
        features = _views.viewed(_views.matched_maps, setup.pairs, inputs.student, inputs.teacher)
        features = _builders.connected(glue, inputs.connectors, features)
        students, teachers = ([side[i] for side in features] for i in (0, 1))
        values = [
            losses.fsp(_views.matched(*student), _views.matched(*teacher))
            for student, teacher in zip(_neighbors(students), _neighbors(teachers), strict=True)
        ]
        return {"fsp": sum(values[1:], values[0])}

    return Built(terms, _builders.two_stages("fsp", 50.0, setup.steps), init, no_memory)


def _neighbors(layers: list[Array]) -> list[tuple[Array, Array]]:
    return list(zip(layers, layers[1:], strict=False))


def _method(
    name: str,
    title: str,
    paper: str,
    build: _builders.Build,
    applies: Callable[[Setup], str | None] = _views.matched_layers,
) -> Method:
    return Method(name, title, paper, "features", True, build, applies)


METHODS = (
    _method(
        "reviewkd",
        "Knowledge review: fused layers, hierarchical context",
        "Chen et al., 2104.09044, 2021",
        _build_reviewkd,
    ),
    _method("ft", "Factor transfer", "Kim, Park, Kwak, 1802.04977, 2018", _build_ft),
    _method(
        "ab",
        "Activation boundaries, before the labels",
        "Heo et al., 1811.03233, 2019",
        _builders.over_pairs("ab", _ab, _ab_weights, connector=projection, layer_weight=_halving),
    ),
    _method(
        "ofd",
        "Overhaul of feature distillation",
        "Heo et al., 1904.01866, 2019",
        _builders.over_pairs(
            "ofd",
            _ofd,
            _builders.constant({"ofd": 0.001}),
            pairs=_before_activation,
            connector=projection,
            layer_weight=_halving,
        ),
        _views.both(_views.matched_layers, _needs_teacher_before_activation),
    ),
    _method(
        "fsp",
        "Flow of solution procedure, before the labels",
        "Yim et al., CVPR 2017",
        _build_fsp,
        _views.needs_pairs(2),
    ),
)
