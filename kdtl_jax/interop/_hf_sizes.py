"""Sizes of an image model's config that are not a single side of a tensor: patches, grids, stages.

`flat` holds the tensors to write, `{canonical path: array}`; `config` is the one of their source.
The functions return the keys that describe the tensors.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from kdtl_jax.interop._hf_config import Config

Flat = Mapping[str, Any]


def patches(flat: Flat, config: Config, tokens: int = 1) -> dict[str, Any]:
    """Derives channels, patch size and image size of a vision transformer.

    `tokens` is the number of positions that are not patches: class tokens.
    """
    kernel, table = flat.get("embeddings/patches/kernel"), _positions(flat)
    if kernel is None or table is None:
        return {}
    rows, columns, channels, _ = kernel.shape
    out: dict[str, Any] = {}
    if channels != config.get("num_channels", 3):
        out["num_channels"] = int(channels)
    if _pair(config["patch_size"]) != (rows, columns):
        out["patch_size"] = int(rows) if rows == columns else [int(rows), int(columns)]
    count, (height, width) = table - tokens, _pair(config["image_size"])
    if count == (height // rows) * (width // columns):
        return out
    side = math.isqrt(max(count, 0))
    if side * side != count or not side:
        raise ValueError(
            f"config.json: image_size = {config['image_size']} does not give the {count} patches "
            f"of {[int(rows), int(columns)]} that have positions. Give the config with their "
            "image_size."
        )
    image = [int(side * rows), int(side * columns)]
    return out | {"image_size": image[0] if image[0] == image[1] else image}


def dinov2(flat: Flat, config: Config) -> dict[str, Any]:
    """`patches`, and the ratio that gives the width of DINOv2's feed-forward layers."""
    out, gated = patches(flat, config), flat.get("layers_0/gated_mlp/down/kernel")
    down = flat.get("layers_0/mlp/down/kernel", gated)
    if down is None:
        return out
    hidden, width = down.shape
    # The gated layer has two thirds of the units, rounded up to a multiple of 8.
    units = hidden if gated is None else math.ceil(hidden * 3 / 2)
    configured = int(config["hidden_size"] * config.get("mlp_ratio", 4))
    if configured == units or (gated is not None and gated_width(configured) == hidden):
        return out
    ratio = units / width
    while int(width * ratio) < units:  # rounded down
        ratio = math.nextafter(ratio, math.inf)
    return out | {"mlp_ratio": int(ratio) if ratio == int(ratio) else ratio}


def stages(flat: Flat, config: Config) -> dict[str, Any]:
    """Widths and depths of the stages of a convolutional network, and its channels."""
    widths: dict[int, int] = {}
    depths: dict[int, int] = {}
    for path, leaf in flat.items():
        if match := re.fullmatch(r"stage(\d{1,4})_block(\d{1,4})/.*", path):
            stage, block = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
            if re.search(r"/(conv\d*/conv|mlp/down)/kernel$", path):  # the last of a block
                widths[stage] = int(leaf.shape[-1])
    stem = flat.get("stem/conv/kernel", flat.get("stem/kernel"))
    count = len(depths)
    if stem is None or widths.keys() != depths.keys() or sorted(depths) != list(range(count)):
        return {}
    out: dict[str, Any] = {
        "hidden_sizes": [widths[i] for i in range(count)],
        "depths": [depths[i] for i in range(count)],
        "num_channels": int(stem.shape[-2]),
    }
    out |= {"embedding_size": int(stem.shape[-1])} if "embedding_size" in config else {}
    if "num_stages" in config:
        out["num_stages"] = count
    return out


def _positions(flat: Flat) -> int | None:
    """The number of learned positions."""
    rows, table = flat.get("embeddings/positions"), flat.get("embeddings/positions/embedding")
    if rows is not None:
        return int(rows.shape[1])
    return None if table is None else int(table.shape[0])


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, list) else (size, size)


def gated_width(units: int) -> int:
    """The width of DINOv2's gated layer in place of one of `units` units."""
    return (int(units * 2 / 3) + 7) // 8 * 8
