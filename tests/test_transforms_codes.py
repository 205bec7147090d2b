"""Quantized integer codes are refused by every transform that computes, and named."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import transforms
from kdtl_jax._types import Params

CODES = np.array([[100, -30], [7, 1]], np.int8)
SPEC = [("fc/kernel", (None, "units")), ("fc/bias", ("units",)), (".*", None)]


def _quantized(dtype: Any = np.int8) -> Params:
    """A quantized layer beside a plain one; `step` is a counter."""
    return {
        "fc": {"kernel": CODES.astype(dtype), "bias": np.ones(2, np.float32)},
        "head": np.ones((2, 2), np.float32),
        "step": np.int32(3),
    }


CALLS = {
    "scale": lambda p: transforms.scale(p, 2.0),
    "scale_homogeneous": lambda p: transforms.scale_homogeneous(p, 2.0, ["fc/.*", "head"]),
    "select_width": lambda p: transforms.select_width(p, SPEC, {"units": [0]}),
    "prune_heads": lambda p: transforms.prune_heads(p, SPEC, [0], name="units"),
    "permute_units": lambda p: transforms.permute_units(p, SPEC, {"units": [1, 0]}),
    "pad_width": lambda p: transforms.pad_width(p, SPEC, {"units": 3}),
    "remap_units": lambda p: transforms.remap_units(p, SPEC, {"units": [0, -1]}),
    "widen": lambda p: transforms.widen(p, SPEC, {"units": 3}),
    "match_permutations": lambda p: transforms.match_permutations(p, p, SPEC),
    "importance": lambda p: transforms.importance_by_magnitude(p, SPEC, "units"),
    "truncate_rank": lambda p: transforms.truncate_rank(p, 1, where="fc/kernel|head"),
    "lora": lambda p: transforms.lora(1).init(jax.random.key(0), p, where="fc/kernel|head"),
    "ia3": lambda p: transforms.ia3_output().init(jax.random.key(0), p, where="fc/kernel|head"),
    "oft": lambda p: transforms.oft(2).init(jax.random.key(0), p, where="fc/kernel|head"),
    "average": lambda p: transforms.average([p, p]),
    "interpolate": lambda p: transforms.interpolate(p, p, 0.5),
    "task_vector": lambda p: transforms.task_vector(p, p),
    "trim": lambda p: transforms.trim(p, density=0.5),
    "trim_global": lambda p: transforms.trim_global(p, density=0.5),
    "breadcrumbs": lambda p: transforms.breadcrumbs(p, density=0.5, outliers=0.1),
    "apply_task_vectors": lambda p: transforms.apply_task_vectors(p, [p]),
    "ram": lambda p: transforms.ram(p, [p, p]),
    "transfer": lambda p: transforms.transfer(p, p),
    "fake_quantize": lambda p: transforms.fake_quantize(p, abs, where="fc/kernel|head"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, jnp.int4, jnp.float8_e4m3fn])
def test_codes_are_refused_by_name(name: str, dtype: Any) -> None:
    with pytest.raises(ValueError, match="'fc/kernel' .*integer codes.*Dequantize"):
        CALLS[name](_quantized(dtype))


def test_deepening_refuses_codes() -> None:
    with pytest.raises(ValueError, match="integer codes"):
        transforms.deepen([{"w": CODES}], r"(\d)/w", [0], transforms.identity_layer)


def test_what_is_not_selected_may_be_quantized() -> None:
    scaled = transforms.scale(_quantized(), 2.0, where="head")
    assert scaled["fc"]["kernel"] is not None and scaled["head"][0, 0] == 2
    np.testing.assert_array_equal(scaled["fc"]["kernel"], CODES)
    spec = [("head", ("units", None)), (".*", None)]
    narrow = transforms.select_width(_quantized(), spec, {"units": [1]})
    assert narrow["head"].shape == (1, 2)


def test_codes_beside_floating_point_numbers_are_refused() -> None:
    plain = jax.tree.map(lambda x: np.asarray(x, np.float32), _quantized())
    for dtype in (np.int8, np.int32):
        for pair in ([plain, _quantized(dtype)], [_quantized(dtype), plain]):
            with pytest.raises(ValueError, match="'fc/kernel' .*integer"):
                transforms.average(pair)


def test_integers_that_differ_are_refused_and_counters_pass() -> None:
    tree = {"table": CODES.astype(np.int32), "head": np.ones(2, np.float32), "step": np.int32(3)}
    other = tree | {"step": np.int32(9)}
    assert transforms.average([tree, other])["step"] == 3
    with pytest.raises(ValueError, match="'table' holds integers .* that differ"):
        transforms.average([tree, other | {"table": CODES.astype(np.int32) + 1}])


ROWS, VECTOR = np.ones((4, 4), np.float32), np.ones(4, np.float32)
INTS = np.ones((4, 4), np.int32)
FORMATS = {  # what published formats store for one linear layer, and what of it is no code
    "gptq": ({"qweight": INTS, "qzeros": INTS, "scales": ROWS}, {"g_idx": INTS[0]}),
    "mlx": ({"weight": INTS.astype(np.uint32), "scales": ROWS}, {"biases": ROWS}),
    "bitsandbytes": ({"weight": np.ones((8, 1), np.uint8), "weight.absmax": VECTOR}, {}),
    "bitsandbytes8": ({"weight": INTS.astype(np.int8), "SCB": VECTOR}, {"bias": VECTOR}),
    "compressed-tensors": (
        {"weight_packed": INTS, "weight_scale": ROWS, "weight_zero_point": INTS},
        {"weight_shape": np.array([4, 32])},
    ),
    "aqlm": ({"codes": INTS.astype(np.int16), "codebooks": ROWS, "scales": VECTOR}, {}),
    "exl2": ({"q_weight": INTS, "q_scale": INTS, "q_scale_max": VECTOR}, {}),
    "hqq": ({"W_q": INTS, "scale": ROWS, "zero": ROWS}, {}),
    "fp8": ({"weight": jnp.ones((4, 4), jnp.float8_e4m3fn), "weight_scale_inv": VECTOR}, {}),
    "nested": ({"kernel/values": INTS, "kernel/scale": VECTOR}, {"bias": VECTOR}),
}
AROUND = {
    "norm.weight": VECTOR,
    "norm/scale": VECTOR,
    "embeddings.position_ids": np.arange(4)[None],
    "attention.relative_position_index": INTS,
    "attention.relative_position_bias_table": ROWS,
    "bn.num_batches_tracked": np.array(3),
}


@pytest.mark.parametrize("name", FORMATS)
def test_packed_formats_are_known_by_their_names(name: str) -> None:
    codes, others = FORMATS[name]
    separator = "/" if name == "nested" else "."
    actual = {f"fc{separator}{k}": v for k, v in codes.items()}
    flat = AROUND | actual | {f"fc{separator}{k}": v for k, v in others.items()}
    assert transforms.quantized(flat) == actual.keys()
    with pytest.raises(ValueError, match="Dequantize"):
        transforms.scale(flat, 2.0)
    for path in actual:  # the scales alone, too
        with pytest.raises(ValueError, match="Dequantize"):
            transforms.scale(flat, 2.0, where=re.escape(path))
    np.testing.assert_array_equal(transforms.scale(flat, 2.0, where="norm/scale")["norm/scale"], 2)


def test_tables_of_indices_are_no_codes() -> None:
    assert not transforms.quantized(AROUND)
    assert transforms.scale(AROUND, 2.0)["norm.weight"][0] == 2


def test_integer_masks_are_masks() -> None:
    tau = {"w": jnp.asarray([1.0, 2.0])}
    np.testing.assert_array_equal(
        transforms.keep(tau, {"w": np.array([0, 1], np.int8)})["w"], [0, 2]
    )
