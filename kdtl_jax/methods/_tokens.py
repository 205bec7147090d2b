"""Methods of transformers: hidden states, attention and its relations, of matched layers.

Attention modules are matched by `Setup.attention`; their taps are `path/probs`, `path/query`,
`path/key` and `path/value`, as the library's encoders name them.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Outputs, Params
from kdtl_jax.methods import _builders, _views
from kdtl_jax.methods._method import TASK, Built, Method, Options, Setup, no_connectors, no_memory
from kdtl_jax.objective import Inputs

RELATION_HEADS = 12


def _tokens_only(setup: Setup) -> str | None:
    """Matched layers of tokens, equally many on both sides."""
    for of_student, of_teacher in setup.pairs:
        if len(setup.student[of_student].shape) != 3 or len(setup.teacher[of_teacher].shape) != 3:
            return f"needs tokens: {of_student!r} and {of_teacher!r} are not both [B, L, D]"
    return _views.matched_layers(setup)


def _needs_attention(*parts: str) -> _views.Applies:
    """Matched attention modules whose named parts are tapped."""

    def applies(setup: Setup) -> str | None:
        if not setup.attention:
            return "needs matched attention modules, this pair of models has none"
        for of_student, of_teacher in setup.attention:
            for part in parts:
                for taps, path in ((setup.student, of_student), (setup.teacher, of_teacher)):
                    if f"{path}/{part}" not in taps:
                        return f"needs the tap {f'{path}/{part}'!r}"
        return None

    return applies


def _same_heads(setup: Setup) -> str | None:
    """Attention maps compared entry by entry: as many heads and tokens on both sides."""
    for of_student, of_teacher in setup.attention:
        student = setup.student[f"{of_student}/probs"].shape
        teacher = setup.teacher[f"{of_teacher}/probs"].shape
        if student != teacher:
            return (
                f"needs as many heads and tokens on both sides, attention is "
                f"{list(student[1:])} and {list(teacher[1:])}"
            )
    return None


def _divided_heads(setup: Setup) -> str | None:
    of_student, of_teacher = setup.attention[-1]
    student = setup.student[f"{of_student}/query"].shape
    teacher = setup.teacher[f"{of_teacher}/query"].shape
    if student[1] != teacher[1]:
        return f"needs as many tokens on both sides, there are {student[1]} and {teacher[1]}"
    return None


def _log_probs(probs: Array) -> Array:
    """Scores of which the softmax is `probs`."""
    return jnp.log(jnp.maximum(probs, jnp.finfo(probs.dtype).tiny))


def _scores(outputs: Outputs, path: str) -> Array:
    """`q k^T / sqrt(d)` of each head, before the softmax: `[B, heads, L, L]`."""
    heads = outputs[f"{path}/probs"].shape[1]
    query, key = (_split(outputs[f"{path}/{part}"], heads) for part in ("query", "key"))
    return jnp.einsum("blhd,bmhd->bhlm", query, key) / query.shape[-1] ** 0.5


def _split(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:2], heads, -1)


def _first_token(x: Array) -> Array:
    return x[:, 0]


def _first_tokens(student: Array, teacher: Array) -> tuple[Array, Array]:
    return _first_token(student), _first_token(teacher)


def _build_attention_kl(setup: Setup, options: Options) -> Built:
    def terms(inputs: Inputs) -> dict[str, Array]:
        values = [
            losses.attention_kl(
                _log_probs(inputs.student[f"{s}/probs"]), _log_probs(inputs.teacher[f"{t}/probs"])
            )
            for s, t in setup.attention
        ]
        return {"attention": sum(values[1:], values[0])}

    return Built(terms, {TASK: 1.0, "attention": 1.0}, no_connectors, no_memory)


def _attention_mse(setup: Setup, inputs: Inputs) -> Array:
    values = [
        losses.attention_mse(_scores(inputs.student, s), _scores(inputs.teacher, t))
        for s, t in setup.attention
    ]
    return sum(values[1:], values[0])


def _build_attention_mse(setup: Setup, options: Options) -> Built:
    def terms(inputs: Inputs) -> dict[str, Array]:
        return {"attention": _attention_mse(setup, inputs)}

    return Built(terms, {TASK: 1.0, "attention": 1.0}, no_connectors, no_memory)


def _build_tinybert(setup: Setup, options: Options) -> Built:
    """Attention scores, and hidden states through one linear map shared by all layers."""
    of_student, of_teacher = setup.pairs[-1]
    shared = connectors.linear(setup.teacher[of_teacher].shape[-1])

    def terms(inputs: Inputs) -> dict[str, Array]:
        hidden = [
            losses.last_axis_mse(
                shared.apply(inputs.connectors, inputs.student[s]), inputs.teacher[t]
            )
            for s, t in setup.pairs
        ]
        return {"attention": _attention_mse(setup, inputs), "hidden": sum(hidden[1:], hidden[0])}

    def init(key: Array) -> Params:
        return shared.init(key, setup.student[of_student])

    return Built(terms, {TASK: 1.0, "attention": 1.0, "hidden": 1.0}, init, no_memory)


def _relation_heads(setup: Setup, path: tuple[str, str]) -> int:
    """The most heads, at most 12, that divide both widths."""
    widths = (
        setup.student[f"{path[0]}/query"].shape[-1],
        setup.teacher[f"{path[1]}/query"].shape[-1],
    )
    return next(n for n in range(RELATION_HEADS, 0, -1) if all(w % n == 0 for w in widths))


def _relations(outputs: Outputs, path: str) -> dict[str, Array]:
    return {part: outputs[f"{path}/{part}"] for part in ("query", "key", "value")}


def _build_minilm(setup: Setup, options: Options) -> Built:
    """The last layer: attention, which is the query-key relation, and the value relation."""
    of_student, of_teacher = setup.attention[-1]
    heads = _relation_heads(setup, setup.attention[-1])

    def terms(inputs: Inputs) -> dict[str, Array]:
        student, teacher = (
            _relations(inputs.student, of_student),
            _relations(inputs.teacher, of_teacher),
        )

        def relation(first: str, second: str) -> Array:
            return losses.minilm_relation(
                (student[first], student[second]),
                (teacher[first], teacher[second]),
                relation_heads=heads,
            )

        return {"attention": relation("query", "key"), "value": relation("value", "value")}

    return Built(terms, {TASK: 1.0, "attention": 1.0, "value": 1.0}, no_connectors, no_memory)


def _build_minilm_v2(setup: Setup, options: Options) -> Built:
    of_student, of_teacher = setup.attention[-1]
    heads = _relation_heads(setup, setup.attention[-1])

    def terms(inputs: Inputs) -> dict[str, Array]:
        values = losses.minilm_v2(
            _relations(inputs.student, of_student),
            _relations(inputs.teacher, of_teacher),
            relation_heads=heads,
        )
        return {"relations": values}

    return Built(terms, {TASK: 1.0, "relations": 1.0}, no_connectors, no_memory)


def _method(
    name: str,
    title: str,
    paper: str,
    build: _builders.Build,
    applies: Callable[[Setup], str | None],
    *,
    connector: bool = False,
) -> Method:
    return Method(name, title, paper, "tokens", connector, build, applies)


_probs = _views.both(_needs_attention("probs"), _same_heads)
_scored = _views.both(_needs_attention("probs", "query", "key"), _same_heads)
_related = _views.both(_needs_attention("query", "key", "value"), _divided_heads)

METHODS = (
    _method(
        "hidden_mse",
        "Hidden states of every layer",
        "Jiao et al., 1909.10351, 2019",
        _builders.over_pairs(
            "hidden",
            losses.last_axis_mse,
            _builders.constant({"hidden": 1.0}),
            view=_views.unmatched,
            connector=connectors.linear,
        ),
        _tokens_only,
        connector=True,
    ),
    _method(
        "hidden_cosine",
        "Directions of hidden states (DistilBERT)",
        "Sanh et al., 1910.01108, 2019",
        _builders.over_pairs(
            "hidden",
            losses.cosine_distance,
            _builders.constant({"hidden": 1.0}),
            view=_views.unmatched,
            connector=connectors.linear,
        ),
        _tokens_only,
        connector=True,
    ),
    _method(
        "patient_kd",
        "Patient KD: the first token of every layer",
        "Sun et al., 1908.09355, 2019",
        _builders.over_pairs(
            "patient",
            lambda student, teacher: 2 * losses.cosine_distance(student, teacher),
            _builders.constant({"patient": 10.0}),
            view=_first_tokens,
            connector=connectors.linear,
        ),
        _tokens_only,
        connector=True,
    ),
    _method(
        "attention_kl",
        "Attention distributions of every layer",
        "Wang et al., 2002.10957, 2020",
        _build_attention_kl,
        _probs,
    ),
    _method(
        "attention_mse",
        "Attention scores of every layer",
        "Jiao et al., 1909.10351, 2019",
        _build_attention_mse,
        _scored,
    ),
    _method(
        "tinybert",
        "TinyBERT: attention scores and hidden states",
        "Jiao et al., 1909.10351, 2019",
        _build_tinybert,
        _views.both(_tokens_only, _scored),
        connector=True,
    ),
    _method(
        "minilm",
        "MiniLM: attention and value relations of the last layer",
        "Wang et al., 2002.10957, 2020",
        _build_minilm,
        _related,
    ),
    _method(
        "minilm_v2",
        "MiniLMv2: query, key and value relations",
        "Wang et al., 2012.15828, 2021",
        _build_minilm_v2,
        _related,
    ),
)
