"""Models: shapes of logits and features, published parameter counts, refusals. Little is compiled.

Architecture and weights of published checkpoints are compared in test_huggingface.py.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import models, train
from kdtl_jax._types import Variables
from kdtl_jax.interop import linen
from kdtl_jax.models import _blocks, _deberta

pytestmark = pytest.mark.usefixtures("standard_promotion")
IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 7), jnp.int32)
KEY, F32 = jax.random.key(0), jnp.dtype(jnp.float32)

CASES: dict[str, tuple[nn.Module, Any, dict[str, tuple[int, ...]]]] = {
    "mlp": (
        models.mlp([6, 5], 3),
        jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32),
        {"hidden_0": (2, 6), "hidden_1": (2, 5), "logits": (2, 3)},
    ),
    "cnn": (
        models.cnn([4, 5, 6, 7], 3),
        jax.ShapeDtypeStruct((2, 9, 5, 1), jnp.float32),  # odd sides; more layers than halvings
        {
            "block_0": (2, 9, 5, 4),
            "block_1": (2, 4, 2, 5),
            "block_2": (2, 2, 1, 6),
            "block_3": (2, 1, 1, 7),
            "pooled": (2, 7),
            "logits": (2, 3),
        },
    ),
    "resnet": (
        models.resnet(8, 11),
        IMAGES,
        {
            "stem": (2, 32, 32, 16),
            **{f"stage{i}{x}": (2, 64 >> i, 64 >> i, 8 << i) for i in (1, 2, 3)
               for x in ("", "_preact")},
            "pooled": (2, 64),
            "logits": (2, 11),
        },
    ),
    "wide_resnet": (
        models.wide_resnet(10, 2, 11),
        IMAGES,
        {
            "stem": (2, 32, 32, 16),
            **{f"stage{i}": (2, 64 >> i, 64 >> i, 16 << i) for i in (1, 2, 3)},
            "pooled": (2, 128),
            "logits": (2, 11),
        },
    ),
    "image_resnet": (
        models.ImageResNet(8, (16, 32), (1, 2), classes=5),
        IMAGES,
        {
            "stem": (2, 8, 8, 8),
            "stage0": (2, 8, 8, 16),
            "stage1": (2, 4, 4, 32),
            "pooled": (2, 32),
            "logits": (2, 5),
        },
    ),
    "vit": (
        models.ViT(8, 2, 2, 16, patch=8, classes=5, has_pooler=True),
        IMAGES,
        {"last_hidden": (2, 17, 8), "pooled": (2, 8), "logits": (2, 5)},
    ),
    "bert": (
        models.Bert(13, 8, 2, 2, 16, positions=9, classes=4),
        TOKENS,
        {"last_hidden": (2, 7, 8), "pooled": (2, 8), "logits": (2, 4)},
    ),
}  # fmt: skip


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_weights_and_outputs_are_float32_where_jax_has_float64(name: str) -> None:
    module, inputs, _ = CASES[name]
    variables = jax.eval_shape(module.init, KEY, inputs)
    outputs = jax.eval_shape(module.apply, variables, inputs)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((variables, outputs))}
    assert {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)} == {F32}


@pytest.mark.parametrize("name", CASES)
def test_outputs_have_their_names_and_shapes(name: str) -> None:
    module, inputs, expected = CASES[name]
    init, apply = linen.model(module)
    variables = jax.eval_shape(init, KEY, inputs)

    def both(variables: Variables, x: Any) -> Any:
        evaluated = apply(variables.params, variables.model_state, x)
        return evaluated, apply(variables.params, variables.model_state, x, key=KEY, train=True)

    (outputs, kept), (trained, updated) = jax.eval_shape(both, variables, inputs)
    assert {k: v.shape for k, v in outputs.items()} == expected
    assert all(v.dtype == jnp.float32 for v in outputs.values())
    assert shapes(trained) == shapes(outputs)
    assert shapes(updated) == shapes(kept) == shapes(variables.model_state)
    assert (variables.model_state is not None) == ("resnet" in name)  # batch statistics


@pytest.mark.parametrize(
    ("module", "published"),
    [
        # Tian et al., 2020 (1910.10699) and the works that follow it, CIFAR-100, in millions.
        (models.resnet(8, 100), 0.08),
        (models.resnet(20, 100), 0.28),
        (models.resnet(20, 10), 0.27),  # He et al., 2015, table 6
        (models.resnet(32, 100), 0.47),
        (models.resnet(56, 100), 0.86),
        (models.resnet_x4(8, 100), 1.23),
        (models.resnet_x4(32, 100), 7.43),
        (models.wide_resnet(16, 2, 100), 0.70),
        (models.wide_resnet(40, 1, 100), 0.57),
        (models.wide_resnet(40, 2, 100), 2.26),
        (models.wide_resnet(28, 10, 10), 36.5),  # Zagoruyko and Komodakis, 2016, table 4
    ],
    ids=lambda x: f"{x}" if isinstance(x, float) else "",
)
def test_parameters_are_as_many_as_published(module: nn.Module, published: float) -> None:
    variables = jax.eval_shape(linen.model(module).init, KEY, IMAGES)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables.params)) / 1e6
    assert round(count, 1 if published > 10 else 2) == published


def test_a_cifar_resnet_by_hand() -> None:
    """Two stages of sums that anyone can do: 3x3 stem, then a block that doubles the channels."""
    module = models.resnet(8, 10, channels=(2, 2, 4, 8))
    params = jax.eval_shape(linen.model(module).init, KEY, IMAGES).params
    count = {name: sum(x.size for x in jax.tree.leaves(leaf)) for name, leaf in params.items()}
    assert count["stem_conv"] == 9 * 3 * 2 and count["stem_norm"] == 2 * 2
    assert count["stage1_block0"] == 2 * (9 * 2 * 2 + 4)
    assert count["stage2_block0"] == 9 * 2 * 4 + 8 + 9 * 4 * 4 + 8 + (2 * 4 + 8)
    assert count["head"] == 8 * 10 + 10


def test_a_convolution_is_the_same_as_patches_times_kernel() -> None:
    """While training on a CPU the CNN multiplies matrices; elsewhere it convolves."""
    init, apply = linen.model(models.cnn([3, 4], 2))
    rng = np.random.default_rng(0)

    def drawn(leaf: Any) -> Any:
        return rng.normal(size=leaf.shape).astype(np.float32)

    x = drawn(jax.ShapeDtypeStruct((2, 6, 5, 2), jnp.float32))
    params = jax.tree.map(drawn, jax.eval_shape(init, KEY, x).params)

    @jax.jit
    def both(params: Any, x: jax.Array) -> Any:
        return apply(params, None, x)[0], apply(params, None, x, key=KEY, train=True)[0]

    evaluated, trained = both(params, x)
    for name, value in evaluated.items():
        np.testing.assert_allclose(trained[name], value, rtol=1e-5, atol=1e-6)
    # By hand, one place of the first block: zero padding, then ReLU.
    conv = params["conv_0"]
    corner = np.zeros((3, 3, 2), np.float32)
    corner[1:, 1:] = x[0, :2, :2]
    expected = np.maximum(np.tensordot(corner, conv["kernel"], 3) + conv["bias"], 0)
    np.testing.assert_allclose(evaluated["block_0"][0, 0, 0], expected, rtol=1e-5, atol=1e-6)


def test_batch_statistics_move_in_training_only() -> None:
    init, apply = linen.model(models.resnet(8, 3, channels=(1, 1, 2, 2)))
    x = np.random.default_rng(0).normal(3, 1, size=(4, 4, 4, 1)).astype(np.float32)
    shapes = jax.eval_shape(init, KEY, x)
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.7, np.float32), shapes)
    apply = jax.jit(apply, static_argnames="train")
    evaluated = apply(variables.params, variables.model_state, x)[1]
    trained = apply(variables.params, variables.model_state, x, train=True)[1]
    before = jax.tree.leaves(variables.model_state)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(evaluated), before, strict=True))
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(trained), before, strict=True))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: models.mlp([3, 0], 2), r"at least 1, got \[3, 0\] and 2"),
        (lambda: models.mlp([3], 0), "at least 1"),
        (lambda: models.cnn([], 2), "at least one layer"),
        (lambda: models.cnn([3, -1], 2), "at least one layer, channels and classes of at least 1"),
        (lambda: models.resnet(18, 10), r"depth must be 6 n \+ 2 \(\[8, 14, 20, 26, 32\] …\)"),
        (lambda: models.wide_resnet(16, 0, 10), "width must be at least 1, got 0"),
        (lambda: models.wide_resnet(18, 2, 10), r"6 n \+ 4"),
    ],
)
def test_impossible_models_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", ["cnn", "resnet", "wide_resnet", "image_resnet", "vit"])
def test_images_without_channels_are_refused(name: str) -> None:
    flat = jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)
    with pytest.raises(ValueError, match=r"images must be \[B, H, W, C\].*got \[2, 32, 32\]"):
        jax.eval_shape(linen.model(CASES[name][0]).init, KEY, flat)


def test_every_public_model_is_in_the_table() -> None:
    classes = {x for x in vars(models).values() if isinstance(x, type) and issubclass(x, nn.Module)}
    layers = {models.Conv3x3}  # tested below, and with the CNN
    recorded = {  # compared with torch's outputs in test_huggingface
        *(models.ClipText, models.ClipVision, models.SiglipText, models.SiglipVision),
        *(models.ConvNext, models.Deberta, models.Dinov2, models.ModernBert, models.T5Encoder),
    }
    assert {type(module) for module, _, _ in CASES.values()} == classes - layers - recorded


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_small_models_run_whole_epochs_in_a_scan(name: str) -> None:
    """Whether a step convolves decides the path of an epoch; on a CPU these two do not."""
    module, inputs, _ = CASES[name]
    init, apply = linen.model(module)
    tx = optax.sgd(0.1)

    def terms(x: Any) -> Any:
        return {"size": jnp.sum(x.student["logits"] ** 2, axis=-1)}

    def start(images: jax.Array) -> train.TrainState:
        return train.init_state(init(KEY, images).params, tx, key=KEY)

    step = train.make_step(apply, terms, {"size": 1.0}, tx)
    state = jax.eval_shape(start, inputs)
    assert train.step_path(step, state, {"inputs": inputs}) == "scan"


def test_within_blocks_of_image_resnets_is_relu() -> None:
    """transformers' ResNetConvLayer: `hidden_act` is the stem's and the block's, not its inside."""
    module = models.ImageResNet(2, (2,), (1,), is_bottleneck=False, activation=jnp.negative)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 3)), jnp.float32)
    variables = module.init(KEY, images)
    outputs: Any = module.apply(variables, images)
    block: Any = variables["params"]["stage0_block0"]
    statistics = 1 / np.sqrt(1 + 1e-5)  # of a mean of 0 and a variance of 1

    def convolved(x: jax.Array, name: str) -> jax.Array:
        kernel = block[name]["conv"]["kernel"]
        around = ((1, 1), (1, 1))
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), around, dimension_numbers=layout)
        return y * statistics

    inner = jax.nn.relu(convolved(outputs["stem"], "conv0"))
    want = -(outputs["stem"] + convolved(inner, "conv1"))
    np.testing.assert_allclose(outputs["stage0"], want, rtol=1e-4, atol=1e-5)


def test_relative_positions_need_buckets_and_a_distance():
    """Too few of either divided by zero, or gave buckets that do not exist."""
    for buckets, most in ((1, 128), (3, 128), (32, 8), (32, 1)):
        with pytest.raises(ValueError, match=rf"got {buckets} buckets, and {most} as the largest"):
            _blocks.relative_buckets(4, buckets, most)
    for buckets, most in ((1, 512), (4, 3), (4, 1)):
        with pytest.raises(ValueError, match=rf"got {buckets} buckets, and {most} as the largest"):
            _deberta.log_buckets(9, buckets, most)
    # A short model has its own bucket for every distance.
    near = np.arange(4)[:, None] - np.arange(4)
    np.testing.assert_array_equal(_deberta.log_buckets(4, 256, 4), near)
    np.testing.assert_array_equal(_deberta.log_buckets(4, 0, 4), near)


def test_tokens_that_do_not_exist_are_nan_and_padding_may_be_anything() -> None:
    """JAX reads -1 as the last token of the vocabulary."""
    config = models.DecoderConfig(13, 8, layers=1, heads=2, key_heads=2, head_width=4, hidden=8)
    decoder, encoder = models.decoder(config), linen.model(CASES["bert"][0])
    tokens = jnp.array([[3, -1, 5], [3, 4, 13], [3, 4, 5]])
    where = tokens == jnp.array([3, 4, 5])

    @jax.jit
    def outputs() -> Any:
        params = decoder.init(KEY)
        variables = encoder.init(KEY, {"tokens": tokens, "mask": where})
        hidden = [decoder.apply(params, tokens, segments=s)[0] for s in (None, where.astype(int))]
        pooled = [
            encoder.apply(variables.params, None, {"tokens": tokens, "mask": mask})[0]["pooled"]
            for mask in (jnp.ones_like(where), where)
        ]
        return hidden, pooled

    for given, padded in outputs():
        rows = np.isnan(np.reshape(given, (3, -1))).any(axis=1)
        np.testing.assert_array_equal(rows, [True, True, False])
        assert np.isfinite(padded[where] if padded.ndim == 3 else padded).all()
