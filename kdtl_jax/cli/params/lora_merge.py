"""`kdtl params lora-merge`: adapters merged into their base; for LoRA, `W' = W + s a b`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from kdtl_jax import transforms, trees
from kdtl_jax.cli.params import _checkpoints, _folders
from kdtl_jax.cli.params._checkpoints import Opened, Rewrite, Writing
from kdtl_jax.interop import peft, safetensors
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.transforms import Kept, Report

EXAMPLES = f"""
kdtl params lora-merge base/ adapter/ --write merged.safetensors
{_checkpoints.SELECTORS}"""
SCALINGS = {"rank": transforms.scale_by_rank, "root-rank": transforms.scale_by_root_rank}
_ADAPTER_NAME = re.compile(r"(?:adapter/)?(?P<module>.*)/(?P<part>a|b|magnitude)")


@dataclass(frozen=True)
class Settings(Writing):
    """Adds an adapter's weights to its base."""

    base: str | None = setting(None, "a checkpoint", positional=True)
    adapter: str | None = setting(
        None,
        "'kernel/a', 'kernel/b' as this library saves them, or a PEFT folder with its "
        "adapter_config.json",
        positional=True,
    )
    alpha: float | None = setting(
        None, "numerator of s, for files of this library (PEFT's carry their own)", metavar="A"
    )
    scaling: Literal["rank", "root-rank"] = setting(
        "rank", "s = alpha / r, or alpha / sqrt(r) for rsLoRA; for files of this library"
    )
    weight: float = setting(1.0, "factor of the added weights", metavar="W")
    in_axis: int = setting(-2, "input axis of the kernels, for files of this library", metavar="A")
    out_axis: int = setting(
        -1, "output axis of the kernels, for files of this library", metavar="A"
    )


def run(settings: Settings) -> int:
    """Prints a report and, with `--write`, writes the result."""
    base = _checkpoints.opened(settings.base, "BASE", EXAMPLES)
    adapter = _checkpoints.opened(settings.adapter, "ADAPTER", EXAMPLES)
    for checkpoint in (base, adapter):
        transforms.refuse_codes(checkpoint.specs)
    folder = adapter.checkpoint.files[0].parent if adapter.checkpoint.files else Path()
    if (folder / peft.CONFIG).is_file():
        edits = _peft_edits(settings, base)
    elif any(".lora_" in name for name in adapter.tensors):
        raise ValueError(f"{folder} has no {peft.CONFIG}, which says how the adapter is applied.")
    else:
        edits = _library_edits(settings, base, adapter)

    def produce(path: str) -> Any:
        tensor = base.tensors[path]
        if path not in edits:
            return safetensors.blocks(tensor, _checkpoints.BLOCK)
        return np.asarray(edits[path](_checkpoints.widened(safetensors.read(tensor))))

    report = Report(
        merged=tuple(path for path in base.specs if path in edits),
        kept=tuple(Kept(path, "no adapter") for path in base.specs if path not in edits),
        shapes={path: spec.shape for path, spec in base.specs.items()},
        sizes={p: math.prod(s.shape) for p, s in base.specs.items() if trees.is_inexact(s)},
    )
    rewrite = Rewrite(base.specs, produce, report, [base, adapter])
    return _checkpoints.finish(settings, "lora-merge", rewrite)


def _peft_edits(settings: Settings, base: Opened) -> Mapping[str, Any]:
    for flag in ("alpha", "scaling", "in_axis", "out_axis", "weight"):
        if getattr(settings, flag) != getattr(Settings, flag):
            name = flag.replace("_", "-")
            raise UsageError(f"--{name} is for files of this library; PEFT's carry their own")
    assert settings.adapter is not None
    config = _folders.config_of(base.checkpoint)
    return peft.edits(peft.load(settings.adapter), base.specs, config)


def _library_edits(settings: Settings, base: Opened, adapter: Opened) -> Mapping[str, Any]:
    """LoRA and DoRA weights, from saved `AdaptedParams` or only their adapter.

    If the file also holds a base, it must equal this one: PiSSA, OLoRA and LoRA-GA start from a
    base of their own, to which the adapter must be added.
    """
    parts: dict[str, dict[str, safetensors.Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        match = _ADAPTER_NAME.fullmatch(name)
        if match is None and name.startswith("base/"):
            _check_base(name, tensor, base)
        elif match is None:
            raise ValueError(
                f"{name!r} in {adapter.name} is not part of a LoRA or DoRA: expected 'kernel/a' "
                f"and 'kernel/b', or a PEFT folder with {peft.CONFIG}."
            )
        else:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
    for path, tensors in parts.items():
        _check_pair(settings, path, tensors, base)
    if settings.alpha is None:
        raise UsageError("the file does not say alpha: pass --alpha")
    if settings.weight != 1 and any("magnitude" in tensors for tensors in parts.values()):
        raise UsageError("DoRA is not linear in its weights; --weight must stay 1")
    return {path: _edit(settings, path, tensors) for path, tensors in parts.items()}


def _check_base(name: str, tensor: safetensors.Tensor, base: Opened) -> None:
    path = name.removeprefix("base/")
    if path not in base.tensors or not _folders.equal(base.tensors[path], tensor):
        raise ValueError(
            f"the adapter was trained on a {path!r} other than the base's (as with PiSSA, OLoRA "
            "and LoRA-GA): merge it with the base in its own file, or with adapter.merge."
        )


def _check_pair(
    settings: Settings, path: str, tensors: Mapping[str, safetensors.Tensor], base: Opened
) -> None:
    if not {"a", "b"} <= tensors.keys():
        raise ValueError(f"the adapter of {path!r} has {sorted(tensors)}, not a and b.")
    if path not in base.specs:
        raise ValueError(
            f"the adapter's {path!r} is not in the base; nearest: "
            f"{trees.nearest(path, list(base.specs))}. Adapters belong to one architecture."
        )
    shape, a, b = base.specs[path].shape, tensors["a"].shape, tensors["b"].shape
    axes = (settings.in_axis, settings.out_axis)
    has_axes = len(shape) >= 2 and all(-len(shape) <= axis < len(shape) for axis in axes)
    fits = has_axes and min(len(a), len(b)) >= 2 and a[-1] == b[-2]
    if not fits or tuple(shape[axis] for axis in axes) != (a[-2], b[-1]):
        raise ValueError(
            f"the adapter of {path!r} does not fit: kernel {list(shape)} with in_axis={axes[0]}, "
            f"out_axis={axes[1]}, a {list(a)}, b {list(b)}. Is it another architecture's, or do "
            "its kernels have other axes (--in-axis, --out-axis)?"
        )


def _edit(settings: Settings, path: str, tensors: Mapping[str, safetensors.Tensor]) -> Any:
    make, weights_of = transforms.lora, transforms.LoraWeights
    if "magnitude" in tensors:
        make, weights_of = transforms.dora, transforms.DoraWeights
    adapter = make(
        alpha=settings.alpha or 0.0,
        scaling=SCALINGS[settings.scaling],
        in_axis=settings.in_axis,
        out_axis=settings.out_axis,
    )

    def edit(kernel: np.ndarray) -> Any:
        arrays = {part: jnp.asarray(safetensors.read(tensor)) for part, tensor in tensors.items()}
        arrays["b"] *= np.float32(settings.weight)
        weights = weights_of(**arrays)
        return adapter.merge({path: kernel}, {path: weights})[path]

    return edit
