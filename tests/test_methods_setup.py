"""`methods.setup`: what is found of two models from shapes alone, and what does not fit."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from kdtl_jax import interop, methods
from kdtl_jax._types import Outputs, Params, Variables
from kdtl_jax.methods import Head, Layout, Setup
from kdtl_jax.objective import Inputs
from kdtl_jax.train import precision


def dense(params: Mapping[str, Array], x: Array) -> Array:
    y = x @ params["kernel"]
    return y + jnp.broadcast_to(params["bias"], y.shape)


def network(
    params: Params, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[Outputs, Any]:
    """Any number of hidden layers f1, f2, ... and a head."""
    outputs: dict[str, Array] = {}
    x = inputs
    for i in range(1, len(params)):
        x = outputs[f"f{i}"] = jax.nn.relu(dense(params[f"layer{i}"], x))
    return {**outputs, "logits": dense(params["head"], x)}, model_state


def params(*sizes: int) -> dict[str, dict[str, Array]]:
    names = [*(f"layer{i}" for i in range(1, len(sizes) - 1)), "head"]
    return {
        name: {"kernel": jnp.ones((n, m)), "bias": jnp.zeros((m,))}
        for name, n, m in zip(names, sizes, sizes[1:], strict=False)
    }


def made(student: Params, teacher: Params, **options: Any) -> Setup:
    shared: dict[str, Any] = {
        "student_variables": Variables(student),
        "teacher_variables": Variables(teacher),
        **{"inputs": jnp.ones((4, 2)), "examples": 9, "steps": 5},
    }
    return methods.setup(network, network, **{**shared, **options})


def test_layers_are_matched_from_the_end() -> None:
    setup = made(params(2, 6, 3), params(2, 7, 5, 3))
    assert setup.pairs == (("f1", "f2"),) and setup.last == ("f1", "f2")
    assert setup.student["f1"].shape == (4, 6) and setup.classes == 3
    assert setup.teacher_head is not None and setup.teacher_head.kernel.shape == (5, 3)
    assert setup.models is not None and setup.student_head is not None
    given = made(params(2, 6, 3), params(2, 7, 5, 3), layers=[("f1", "f1")])
    assert given.pairs == (("f1", "f1"),)


def test_a_head_on_the_inputs_shows_no_features() -> None:
    setup = made(params(2, 3), params(2, 7, 3))
    assert setup.pairs == () and setup.last == ("logits", "f1")
    assert setup.student_head is None
    assert methods.table()[0].applies(setup) is None
    message = (
        "needs 1 matched layers, but this pair of models has 0 (the student returns logits alone: "
    )
    assert message in str(refusal(methods.hint, setup))
    setup = made(params(2, 3), params(2, 3))
    assert "the student and the teacher return logits alone" in str(refusal(methods.hint, setup))


def refusal(build: Any, setup: Setup) -> str | None:
    return next(entry for entry in methods.table() if entry.build is build).applies(setup)


def test_layers_may_be_a_mapping() -> None:
    given: Any = {"f1": "f2"}
    assert made(params(2, 6, 3), params(2, 7, 5, 3), layers=given).pairs == (("f1", "f2"),)


def test_weights_that_change_say_how() -> None:
    setup = made(params(2, 6, 3), params(2, 6, 3), steps=240)
    assert "0 to 1 over 20 steps" in repr(methods.dkd(setup).weights["tckd"])
    assert "600, after 150 steps down to 0 at 240" in repr(methods.wkd_l(setup).weights)
    assert "1, after 27 steps 0" in repr(methods.ab(setup).weights)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="student has 3 outputs, but the data has 4 classes"):
        made(params(2, 6, 3), params(2, 6, 4))
    with pytest.raises(ValueError, match="teacher has 3 outputs, but the data has 4 classes"):
        made(params(2, 6, 4), params(2, 6, 3), classes=4)
    with pytest.raises(ValueError, match="teacher has no tap 'f4'. It has f1, f2, logits"):
        made(params(2, 6, 3), params(2, 7, 5, 3), layers=[("f1", "f4")])
    for flat in ("f1", ["f1", "f2"], [("f1", "f2", "f3")]):
        given: Any = flat
        with pytest.raises(ValueError, match=r"pairs \(student tap, teacher tap\), got '?\(?'?f1"):
            made(params(2, 6, 3), params(2, 6, 3), layers=given)
    with pytest.raises(ValueError, match=r"before_activation=\{'f1': TAP\}"):
        methods.ofd(made(params(2, 6, 3), params(2, 6, 3)))
    before = Layout(("f1",), "f1", before_activation={"f1": "nope"})
    with pytest.raises(ValueError, match="teacher has no tap 'nope'"):
        made(params(2, 6, 3), params(2, 6, 3), teacher_layout=before)
    with pytest.raises(ValueError, match="student has no tap 'pooled'"):
        made(params(2, 6, 3), params(2, 6, 3), student_layout=Layout(("f1",), "pooled"))
    with pytest.raises(TypeError, match=r"teacher_variables must be Variables.*got dict"):
        made(params(2, 6, 3), params(2, 6, 3), teacher_variables=params(2, 6, 3))


def test_shapes_do_where_no_weights_are_read() -> None:
    student, teacher = params(2, 6, 3), params(2, 7, 3)
    shapes = jax.eval_shape(lambda: (student, teacher))
    inputs = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    setup = made(*shapes, inputs=inputs)
    assert setup.pairs == (("f1", "f1"),) and setup.student_head is not None
    assert setup.teacher_head is None and setup.models is None
    key = jax.random.key(0)
    got = jax.eval_shape(methods.hint(setup).connectors, key)
    expected = jax.eval_shape(methods.hint(made(student, teacher)).connectors, key)
    assert got == expected
    assert "the teacher's classifier" in str(refusal(methods.simkd, setup))


def test_the_teacher_may_be_traced() -> None:
    """Every seed of a vmap may have a teacher of its own."""
    student, teacher = params(2, 3, 3), params(2, 3, 3)

    def cost(teacher: Params) -> Array:
        setup = made(student, teacher)
        x = jnp.ones((4, 2))
        outputs = network(student, None, x)[0], network(teacher, None, x)[0]
        batch = {"inputs": x, "labels": jnp.arange(4) % 3}
        actual = methods.wkd_l(setup).terms(Inputs(*outputs, batch, step=jnp.int32(0), key=KEY))
        assert not isinstance(actual, tuple)
        return jnp.asarray(actual["transport"])

    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), teacher)
    assert jax.vmap(cost)(two).shape == (2, 4)


KEY = jax.random.key(0)


def computing(**sizes: tuple[int, ...]) -> Any:
    """A model function that computes its outputs in this order."""

    def model(
        params: Params, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[Outputs, Any]:
        return {
            name: inputs * jnp.ones(size, inputs.dtype) for name, size in sizes.items()
        }, model_state

    return model


def found_in(model: Any) -> Layout:
    return methods.layout(model, Variables({}), jax.ShapeDtypeStruct((), jnp.float32))


def test_features_are_found_by_depth_and_shape() -> None:
    actual = found_in(computing(f9=(2, 8, 8, 3), f10=(2, 4), logits=(2, 3)))
    assert actual.features == ("f9", "f10") and actual.last == "f10" and actual.attention == ()
    pooled = found_in(computing(block_1=(2, 4, 4, 8), pooled=(2, 8), logits=(2, 3)))
    assert pooled.features == ("block_1",) and pooled.last == "pooled"
    parts = {f"layer_{i}/attn/{part}": (2, 5, 4) for i in (9, 10) for part in ("query", "key")}
    tokens = found_in(computing(layer_9=(2, 5, 4), layer_10=(2, 5, 4), logits=(2, 3), **parts))
    assert tokens.features == ("layer_9", "layer_10") and tokens.last == "logits"
    assert tokens.attention == ("layer_9/attn", "layer_10/attn")


def test_depth_is_where_a_feature_is_computed_not_its_name() -> None:
    """Names in another order than their layers once paired a middle layer with the first."""
    model = computing(stem=(2, 8), middle=(2, 6), late=(2, 4), logits=(2, 3))
    forms: list[Any] = [
        model,
        precision.compute_in(model, jnp.bfloat16),  # casts all outputs at the end
        lambda *args, **mode: jax.jit(model)(*args, **mode),
        lambda *args, **mode: jax.checkpoint(model)(*args, **mode),
    ]
    for form in forms:
        assert found_in(form).features == ("stem", "middle", "late")

    def scanned(params: Any, model_state: Any, inputs: Any, **mode: Any) -> Any:
        _, layers = jax.lax.scan(lambda x, _: (2 * x, x), inputs, length=11)
        return {f"layer_{i}": layers[i] for i in range(11)} | {"logits": inputs}, model_state

    def at_once(params: Any, model_state: Any, inputs: Any, **mode: Any) -> Any:
        layers = jax.lax.scan(lambda x, _: (2 * x, {"layer_2": x, "layer_10": x}), inputs, length=1)
        return {**layers[1], "logits": inputs}, model_state

    assert found_in(scanned).features == tuple(f"layer_{i}" for i in range(11))
    assert found_in(at_once).features == ("layer_2", "layer_10")


@pytest.mark.parametrize(
    "tree",
    [
        {"head": {"kernel": np.ones((4, 3)), "bias": np.zeros(3)}},
        {"net/~/head": {"w": np.ones((4, 3)), "b": np.zeros(3)}},
        {"net": {"head": {"weight": np.ones((3, 4)), "bias": np.zeros(3)}}},
    ],
    ids=["flax", "haiku", "equinox"],
)
def test_a_linear_head_is_found_whatever_the_framework(tree: Any) -> None:
    head = methods.linear_head(tree)
    assert head is not None and head.kernel.shape == (4, 3)
    assert head.bias is not None and head.bias.shape == (3,)


def test_a_head_that_does_not_fit_is_none_or_refused() -> None:
    assert methods.linear_head({"output": {"kernel": np.ones((4, 3))}}) is None

    def deep(
        params: Params, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[Outputs, Any]:
        outputs, _ = network(params, model_state, inputs)
        return {"early": inputs, "logits": outputs["logits"]}, model_state

    variables = Variables(params(2, 6, 3))
    given: dict[str, Any] = {
        "student_variables": variables,
        "teacher_variables": variables,
        "inputs": jnp.ones((4, 2)),
        "examples": 9,
        "steps": 5,
    }
    # The head called "head" reads six features, "early" has two: it is another layer's.
    assert methods.setup(deep, deep, **given).teacher_head is None
    layout = Layout(("early",), "early", head=lambda params: Head(params["head"]["kernel"]))
    with pytest.raises(ValueError, match=r"head of 'early' must have the kernel \[2, 3\]"):
        methods.setup(deep, deep, **given, teacher_layout=layout)


def test_a_head_of_another_name_is_given_by_the_layout() -> None:
    @interop.function
    def network(params: Any, inputs: Any) -> Outputs:
        pooled = inputs @ params["w"]
        return {"pooled": pooled, "logits": pooled @ params["fc"]}

    variables, inputs = Variables({"w": jnp.ones((2, 6)), "fc": jnp.ones((6, 3))}), jnp.ones((4, 2))

    def made(**layout: Any) -> Setup:
        pair = dict(student_variables=variables, teacher_variables=variables, inputs=inputs)
        return methods.setup(network, network, **pair, examples=9, steps=5, **layout)

    with pytest.raises(
        ValueError, match="'head' .* 'pooled': give setup a teacher_layout with head"
    ):
        methods.srrl(made())
    layout = methods.layout(network, variables, inputs)
    layout = layout._replace(head=lambda params: Head(params["fc"]))
    assert methods.srrl(made(teacher_layout=layout)).weights["classifier"] == 5


def test_one_logit_needs_a_sigmoid_task() -> None:
    one = params(2, 6, 1)
    with pytest.raises(ValueError, match="softmax of one logit is constant. Pass exclusive=False"):
        made(one, one)
    setup = made(one, one, exclusive=False)
    outputs: Outputs = {"logits": jnp.array([[0.0], [2.0]])}
    actual = setup.task(Inputs(outputs, {}, {"labels": jnp.array([1, 0])}))
    assert not isinstance(actual, tuple)
    np.testing.assert_allclose(actual["task"], np.log1p(np.exp([0.0, 2.0])), rtol=1e-6)


def test_the_task_of_many_labels_is_their_mean() -> None:
    outputs: Outputs = {"logits": jnp.array([[0.0, 2.0]])}
    labels = jnp.array([[1.0, 0.0]])
    actual = methods.multi_label(Inputs(outputs, {}, {"labels": labels}))["task"]
    np.testing.assert_allclose(actual, [(np.log(2) + np.log1p(np.exp(2.0))) / 2], rtol=1e-6)


def test_many_labels_are_shares_of_the_logits_shape() -> None:
    """Transposed labels were reshaped, -100 and 255 learned as targets."""
    outputs: Outputs = {"logits": jnp.array([[0.0, 2.0, 1.0], [1.0, 0.0, 3.0]])}

    def task(labels: Any, **more: Any) -> jax.Array:
        return methods.multi_label(Inputs(outputs, {}, {"labels": labels, **more}))["task"]

    for wrong in (jnp.zeros((3, 2)), jnp.zeros(6), jnp.zeros(2, jnp.int32)):
        with pytest.raises(ValueError, match="of the shape of the logits"):
            task(wrong)
    ignored = jnp.array([[1, 0, 1], [1, -100, 0]])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\]"):
        task(ignored)
    actual = jax.jit(task)(ignored)
    assert np.isfinite(actual[0]) and np.isnan(actual[1])
    np.testing.assert_allclose(task(ignored, weights=jnp.array([1.0, 0.0])), [actual[0], 0])


def test_numbers_are_learned_by_their_squared_error() -> None:
    outputs, targets = jnp.array([[1.0, 2.0], [0.0, 4.0]]), np.array([[0.0, 2.0], [0.0, 1.0]])
    actual = methods.regression(Inputs({"logits": outputs}, {}, {"labels": targets}))["task"]
    np.testing.assert_allclose(actual, [0.5, 4.5])
    with pytest.raises(ValueError, match="one shape"):
        methods.regression(Inputs({"logits": outputs}, {}, {"labels": targets[:, 0]}))
