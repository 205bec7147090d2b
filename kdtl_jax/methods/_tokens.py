"""Methods for transformers: hidden states, attention and its relations, on matched layers.

Attention modules are matched by `Setup.attention`; their taps are `path/probs`, `path/query`,
`path/key` and `path/value`, as the library's encoders name them. All need tokens `[B, L, D]`.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Outputs
from kdtl_jax.methods import _layers
from kdtl_jax.methods._layers import by_example, pairwise
from kdtl_jax.methods._method import Method, method
from kdtl_jax.methods._setup import Pair, Setup, check_setup
from kdtl_jax.objective import Inputs

RELATION_HEADS = 12


def _token_layers(setup: Setup) -> Sequence[Pair]:
    """All matched layers, checked to be token layers with equally many tokens on both sides."""
    check_setup(setup)
    for student_tap, teacher_tap in setup.pairs:
        if len(setup.student[student_tap].shape) != 3 or len(setup.teacher[teacher_tap].shape) != 3:
            raise ValueError(
                f"needs tokens: {student_tap!r} and {teacher_tap!r} are not both [B, L, D]"
            )
    _layers.layers(setup, setup.pairs)
    return _layers.every(setup)


def _attention(setup: Setup, *parts: str) -> Sequence[Pair]:
    """Matched attention modules, checked to have taps for `parts`."""
    check_setup(setup)
    if not setup.attention:
        raise ValueError(
            "needs matched attention modules, but this pair of models has none: name outputs "
            "PATH/query, PATH/key, PATH/value and PATH/probs"
        )
    for student_path, teacher_path in setup.attention:
        for part in parts:
            for taps, path in ((setup.student, student_path), (setup.teacher, teacher_path)):
                if f"{path}/{part}" not in taps:
                    raise ValueError(f"needs the tap {f'{path}/{part}'!r}")
    return setup.attention


def _same_heads(setup: Setup, *parts: str) -> Sequence[Pair]:
    """`_attention`, checked to have equally many heads and tokens, for comparing entries."""
    pairs = _attention(setup, "probs", *parts)
    for student_path, teacher_path in pairs:
        student = setup.student[f"{student_path}/probs"].shape
        teacher = setup.teacher[f"{teacher_path}/probs"].shape
        if student != teacher:
            raise ValueError(
                f"needs equally many heads and tokens on both sides, but attention is "
                f"{list(student[1:])} and {list(teacher[1:])}"
            )
    return pairs


def hidden_mse(setup: Setup) -> Method:
    """`mean_d (W h_S - h_T)^2` per token, summed over layers; a linear map per layer.

    Jiao et al., TinyBERT, 2019 (1909.10351). Task 1, hidden 1: TextBrewer.
    """
    layers = _layers.layers(setup, _token_layers(setup), _layers.unchanged)
    weights = {"task": 1.0, "hidden": 1.0}
    loss = by_example(losses.last_axis_mse)
    return pairwise(setup, "hidden", loss, layers, weights, connector=connectors.linear)


def hidden_cosine(setup: Setup) -> Method:
    """`1 - cos(W h_S, h_T)` per token, summed over layers: directions of hidden states.

    Sanh et al., DistilBERT, 2019 (1910.01108). Task 1, hidden 1: DistilBERT, whose widths are equal
    (so it has no map).
    """
    layers = _layers.layers(setup, _token_layers(setup), _layers.unchanged)
    weights = {"task": 1.0, "hidden": 1.0}
    loss = by_example(losses.cosine_distance)
    return pairwise(setup, "hidden", loss, layers, weights, connector=connectors.linear)


def patient_kd(setup: Setup) -> Method:
    """`|| h_S / |h_S| - h_T / |h_T| ||^2` of every layer's first token: patient distillation.

    Sun et al., 2019 (1908.09355). Task 1, patient 10, within the paper's range for beta. A student
    of a different width goes through one linear map per layer.
    """
    layers = _layers.layers(setup, _token_layers(setup), _layers.first_tokens)
    weights = {"task": 1.0, "patient": 10.0}

    def loss(student: Array, teacher: Array) -> Array:
        return 2 * losses.cosine_distance(student, teacher)

    return pairwise(
        setup, "patient", by_example(loss), layers, weights, connector=connectors.linear
    )


def attention_kl(setup: Setup) -> Method:
    """`mean over heads of KL(A_T || A_S)` of attention distributions, summed over layers.

    Wang et al., MiniLM, 2020 (2002.10957), on the last layer. Task 1, attention 1.
    """
    pairs = _same_heads(setup)

    def terms(inputs: Inputs) -> dict[str, Array]:
        return {"attention": _over_layers(losses.attention_kl, _log_probs, pairs, inputs)}

    return method(setup, terms, {"task": 1.0, "attention": 1.0})


def attention_mse(setup: Setup) -> Method:
    """`mean (A_S - A_T)^2` of attention scores before the softmax, summed over layers.

    Jiao et al., TinyBERT, 2019 (1909.10351). Task 1, attention 1.
    """
    pairs = _same_heads(setup, "query", "key")

    def terms(inputs: Inputs) -> dict[str, Array]:
        return {"attention": _over_layers(losses.attention_mse, _scores, pairs, inputs)}

    return method(setup, terms, {"task": 1.0, "attention": 1.0})


def tinybert(setup: Setup) -> Method:
    """Attention scores, and hidden states through one linear map that all layers share.

    Jiao et al., TinyBERT, 2019 (1909.10351). Task 1, attention 1, hidden 1: the authors' task
    distillation.
    """
    layers, pairs = _token_layers(setup), _same_heads(setup, "query", "key")
    student_tap, teacher_tap = layers[-1]
    shared = connectors.linear(setup.teacher[teacher_tap].shape[-1])
    shape = setup.student[student_tap]

    def terms(inputs: Inputs) -> dict[str, Array]:
        hidden = [
            losses.last_axis_mse(
                shared.apply(inputs.connectors, inputs.student[s]), inputs.teacher[t]
            )
            for s, t in layers
        ]
        attention = _over_layers(losses.attention_mse, _scores, pairs, inputs)
        return {"attention": attention, "hidden": sum(hidden[1:], hidden[0])}

    weights = {"task": 1.0, "attention": 1.0, "hidden": 1.0}
    return method(setup, terms, weights, connectors=lambda key: shared.init(key, shape))


def minilm(setup: Setup) -> Method:
    """The last layer's attention, which is the query-key relation, and its value relation.

    Wang et al., MiniLM, 2020 (2002.10957). There are 12 relation heads, or the most that divide
    both widths. Task 1, attention 1, value 1, as in the paper.
    """
    student_path, teacher_path, heads = _last_attention(setup)

    def terms(inputs: Inputs) -> dict[str, Array]:
        student = _parts(inputs.student, student_path)
        teacher = _parts(inputs.teacher, teacher_path)

        def relation(left: str, right: str) -> Array:
            return losses.minilm_relation(
                (student[left], student[right]),
                (teacher[left], teacher[right]),
                relation_heads=heads,
            )

        return {"attention": relation("query", "key"), "value": relation("value", "value")}

    return method(setup, terms, {"task": 1.0, "attention": 1.0, "value": 1.0})


def minilm_v2(setup: Setup) -> Method:
    """Query-query, key-key and value-value relations of the last layer.

    Wang et al., MiniLMv2, 2021 (2012.15828). There are 12 relation heads, or the most that divide
    both widths. Task 1, relations 1, as in the paper.
    """
    student_path, teacher_path, heads = _last_attention(setup)

    def terms(inputs: Inputs) -> dict[str, Array]:
        values = losses.minilm_v2(
            _parts(inputs.student, student_path),
            _parts(inputs.teacher, teacher_path),
            relation_heads=heads,
        )
        return {"relations": values}

    return method(setup, terms, {"task": 1.0, "relations": 1.0})


def _last_attention(setup: Setup) -> tuple[str, str, int]:
    """The last matched attention module, of equally many tokens, and its number of relation heads.

    These are the most, at most 12, that divide both widths.
    """
    student_path, teacher_path = _attention(setup, "query", "key", "value")[-1]
    student = setup.student[f"{student_path}/query"].shape
    teacher = setup.teacher[f"{teacher_path}/query"].shape
    if student[1] != teacher[1]:
        raise ValueError(
            f"needs equally many tokens on both sides, got {student[1]} and {teacher[1]}"
        )
    widths = student[-1], teacher[-1]
    heads = next(n for n in range(RELATION_HEADS, 0, -1) if all(w % n == 0 for w in widths))
    return student_path, teacher_path, heads


def _parts(outputs: Outputs, path: str) -> dict[str, Array]:
    return {part: outputs[f"{path}/{part}"] for part in ("query", "key", "value")}


def _over_layers(
    loss: Callable[[Array, Array], Array],
    read: Callable[[Outputs, str], Array],
    pairs: Sequence[Pair],
    inputs: Inputs,
) -> Array:
    """The sum over matched modules of a loss of what `read(outputs, path)` returns."""
    values = [loss(read(inputs.student, s), read(inputs.teacher, t)) for s, t in pairs]
    return sum(values[1:], values[0])


def _log_probs(outputs: Outputs, path: str) -> Array:
    """Scores whose softmax is the module's attention."""
    probs = outputs[f"{path}/probs"]
    return jnp.log(jnp.maximum(probs, jnp.finfo(probs.dtype).tiny))


def _scores(outputs: Outputs, path: str) -> Array:
    """`q k^T / sqrt(d)` of each head, before the softmax: `[B, heads, L, L]`."""
    heads = outputs[f"{path}/probs"].shape[1]
    query, key = (outputs[f"{path}/{part}"] for part in ("query", "key"))
    query, key = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key))
    return jnp.einsum("blhd,bmhd->bhlm", query, key) / query.shape[-1] ** 0.5
