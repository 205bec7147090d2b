"""Sizes of image models that changed are in the config.json that is written."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdtl_jax import transforms, trees
from kdtl_jax.interop import huggingface, naming

FOLDERS = Path(__file__).parent / "data" / "huggingface"


def described(family: str, change: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a family's tensors, by canonical path, as `change` makes them; and the old."""
    source = huggingface.load(FOLDERS / family)
    flat = {k: np.asarray(x) for k, x in trees.flatten(source.params).items()}
    flat |= {k: np.asarray(x) for k, x in trees.flatten(source.model_state or {}).items()}
    new = huggingface.described(source.config, naming.to_torch(change(flat), source.rules))
    return new, json.loads((FOLDERS / family / "config.json").read_text())


def narrowed(flat: dict[str, Any], part: str, axis: int, to: int) -> dict[str, Any]:
    """The parameters of these paths with fewer entries along an axis."""
    where = trees.any_of(part)
    cut = {k: np.take(x, np.arange(to), axis) for k, x in flat.items() if where(k, x)}
    assert cut
    return {**flat, **cut}


@pytest.mark.parametrize(("family", "units"), [("dinov2_classifier", 10), ("dinov2_gated", 8)])
def test_the_feed_forward_ratio_of_dinov2(family: str, units: int) -> None:
    def change(flat: dict[str, Any]) -> dict[str, Any]:
        flat = narrowed(flat, "layers_.*/(gated_)?mlp/down/kernel", 0, units)
        if family == "dinov2_gated":
            return narrowed(flat, "layers_.*/gated_mlp/gate_up/.*", -1, 2 * units)
        return narrowed(flat, "layers_.*/mlp/up/.*", -1, units)

    new, old = described(family, change)
    assert new["mlp_ratio"] != old["mlp_ratio"]
    hidden = int(new["hidden_size"] * new["mlp_ratio"])
    hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if new["use_swiglu_ffn"] else hidden
    assert hidden == units
    assert described(family, lambda flat: flat)[0]["mlp_ratio"] == old["mlp_ratio"]


@pytest.mark.parametrize("family", ["vit", "deit_teacher", "clip_vision", "siglip_vision"])
def test_channels_patches_and_images(family: str) -> None:
    def gray(flat: dict[str, Any]) -> dict[str, Any]:
        return narrowed(flat, "embeddings/patches/kernel", 2, 1)

    new, old = described(family, gray)
    assert new["num_channels"] == 1 and new["image_size"] == old["image_size"]

    def grown(flat: dict[str, Any]) -> dict[str, Any]:
        name = next(k for k in flat if re.fullmatch("embeddings/positions(/embedding)?", k))
        rows, axis = flat[name], 0 if name.endswith("embedding") else 1
        side = old["image_size"] // old["patch_size"]
        more = (side + 1) ** 2 - side**2
        extra = np.repeat(np.take(rows, [0], axis), more, axis)
        return {**flat, name: np.concatenate([rows, extra], axis)}

    new, _ = described(family, grown)
    assert new["image_size"] == old["image_size"] + old["patch_size"]

    def one_more(flat: dict[str, Any]) -> dict[str, Any]:
        made = grown(flat)
        name = next(k for k in made if made[k] is not flat[k])
        axis = 0 if name.endswith("embedding") else 1
        return narrowed(made, name, axis, made[name].shape[axis] - 1)

    with pytest.raises(ValueError, match="image_size = .* does not give the .* patches"):
        described(family, one_more)


def test_a_patch_of_another_size_keeps_the_grid() -> None:
    def smaller(flat: dict[str, Any]) -> dict[str, Any]:
        kernel = flat["embeddings/patches/kernel"]
        return {**flat, "embeddings/patches/kernel": kernel[:2, :2]}

    new, old = described("vit", smaller)
    grid = old["image_size"] // old["patch_size"]
    assert new["patch_size"] == 2 and new["image_size"] == 2 * grid


@pytest.mark.parametrize("family", ["resnet_basic", "resnet_bottleneck", "convnext"])
def test_depths_and_stages(family: str) -> None:
    def first_stage(flat: dict[str, Any]) -> dict[str, Any]:
        kept = {k: x for k, x in flat.items() if "stage1" not in k and k.split("/")[0] != "head"}
        width = next(
            x.shape[-1]
            for k, x in reversed(kept.items())
            if k.startswith("stage0_block0") and k.endswith(("conv/kernel", "down/kernel"))
        )
        return narrowed(kept, "norm/.*", 0, width) if family == "convnext" else kept

    new, old = described(family, first_stage)
    assert new["depths"] == old["depths"][:1] and new["hidden_sizes"] == old["hidden_sizes"][:1]
    assert "stage_names" not in new and new["num_channels"] == old["num_channels"]
    assert described(family, lambda flat: flat)[0]["hidden_sizes"] == old["hidden_sizes"]


def test_a_narrower_convnext_says_its_widths() -> None:
    source = huggingface.load(FOLDERS / "convnext")
    first, second = source.config["hidden_sizes"]
    spec = [
        ("stem/kernel", (None, None, None, "a")),
        ("stem.*|stage0_block.*/(norm|scale|conv/bias).*|stage1_norm/.*", ("a",)),
        ("stage0_block.*/conv/kernel", (None, None, None, "a")),
        ("stage0_block.*/up/kernel", ("a", "ha")),
        ("stage0_block.*/up/bias", ("ha",)),
        ("stage0_block.*/down/kernel", ("ha", "a")),
        ("stage0_block.*/down/bias", ("a",)),
        ("stage1_down/kernel", (None, None, "a", None)),
        (".*", None),
    ]
    keep = first // 2
    small = transforms.select_width(
        source.params, spec, {"a": np.arange(keep), "ha": np.arange(4 * keep)}
    )
    config = huggingface.described(source.config, naming.to_torch(small, source.rules))
    assert config["hidden_sizes"] == [keep, second]
