"""Structural parameter transforms: weight selection and position embeddings."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

import golden_maps
from kdtl_jax import transforms


def _weight_selection(x: Mapping[str, Array], h: Mapping[str, Any]) -> dict[str, Array]:
    teacher, shape = x["teacher"], tuple(h["shape"])
    small, _ = transforms.transfer(
        {"w": teacher}, {"w": jnp.zeros(shape)}, on_mismatch=transforms.select_uniform
    )
    indices = {
        f"indices_{axis}": jnp.asarray(transforms.uniform_indices(n, m))
        for axis, (n, m) in enumerate(zip(teacher.shape, shape, strict=True))
    }
    return {"value": small["w"], **indices}


def _posemb_linear(x: Mapping[str, Array], h: Mapping[str, Any]) -> Array:
    # big_vision resamples square grids only; its class token is added elsewhere.
    grid = (h["new_grid"], h["new_grid"])
    return transforms.resize_positions(x["posemb"], grid, prefix=0)


def _posemb_bicubic(x: Mapping[str, Array], h: Mapping[str, Any]) -> Array:
    return transforms.resize_positions_bicubic(
        x["posemb"],
        tuple(h["new_grid"]),
        old_grid=tuple(h["old_grid"]),
        prefix=h["prefix"],
        antialias=h["antialias"],
    )


METHODS: dict[str, golden_maps.Golden] = {
    "weight_selection": _weight_selection,
    "posemb_linear": _posemb_linear,
    "posemb_bicubic": _posemb_bicubic,
}
