"""`kdtl params lora-merge`: `W' = W + s a b`, LoRA's and DoRA's, as plain weights."""

import argparse
import math
from typing import Any

import numpy as np

from kdtl_jax import transforms, trees
from kdtl_jax.cli import _config
from kdtl_jax.cli.params import _adapters, _inputs, _rewrite
from kdtl_jax.interop import safetensors
from kdtl_jax.transforms import Kept, Report

EXAMPLE = "kdtl params lora-merge base/ adapter/ --write merged.safetensors"
SCALINGS = {"rank": transforms.scale_by_rank, "root-rank": transforms.scale_by_root_rank}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl params lora-merge`."""
    parser.add_argument("base", nargs="?", metavar="BASE", help="a checkpoint")
    parser.add_argument(
        "adapter",
        nargs="?",
        metavar="ADAPTER",
        help="'kernel/a', 'kernel/b' as this library saves them, or a PEFT folder with its "
        "adapter_config.json",
    )
    parser.add_argument(
        "--alpha", type=float, metavar="A", help="numerator of s (default: PEFT's lora_alpha)"
    )
    parser.add_argument(
        "--scaling",
        choices=tuple(SCALINGS),
        help="s = alpha / r, or alpha / sqrt(r) for rsLoRA (default: PEFT's, else rank)",
    )
    parser.add_argument(
        "--weight", type=float, default=1.0, metavar="W", help="times s a b (default: 1)"
    )
    parser.add_argument(
        "--in-axis", type=int, metavar="A", help="kernels' inputs (default: -2; PEFT: -1)"
    )
    parser.add_argument(
        "--out-axis", type=int, metavar="A", help="kernels' outputs (default: -1; PEFT: -2)"
    )
    _rewrite.add_write(parser)
    _inputs.show_example(parser, EXAMPLE)


def run(args: argparse.Namespace) -> int:
    """Reports, and writes if asked to."""
    _inputs.required(args, EXAMPLE, "base", "adapter")
    base, adapter = _inputs.opened(args.base), _inputs.opened(args.adapter)
    file = _adapters.lora_file(adapter, base.specs)
    alpha = file.alpha if args.alpha is None else args.alpha
    if alpha is None:
        raise _config.UsageError("no adapter_config.json gives lora_alpha: pass --alpha")
    scaling = SCALINGS[args.scaling or ("root-rank" if file.has_root_rank else "rank")]
    flipped = file.is_torch and not file.has_flipped_kernels
    in_axis, out_axis = (-1, -2) if flipped else (-2, -1)
    in_axis = in_axis if args.in_axis is None else args.in_axis
    out_axis = out_axis if args.out_axis is None else args.out_axis
    if args.weight != 1 and any(pair.magnitude for pair in file.pairs.values()):
        raise _config.UsageError("DoRA is not linear in its weights; --weight must stay 1")
    kinds = {
        is_dora: (transforms.dora if is_dora else transforms.lora)(
            alpha=alpha, scaling=scaling, in_axis=in_axis, out_axis=out_axis
        )
        for is_dora in (False, True)
    }

    def produce(path: str) -> Any:
        if path not in file.pairs:
            return safetensors.blocks(base.tensors[path], _rewrite.BLOCK)
        parts = _adapters.loaded(file.pairs[path], file.is_torch)
        is_dora = "magnitude" in parts
        weights = (transforms.DoraWeights if is_dora else transforms.LoraWeights)(**parts)
        weights = weights._replace(b=np.float32(args.weight) * weights.b)
        kernel = {path: safetensors.read(base.tensors[path])}
        return np.asarray(kinds[is_dora].merge(kernel, {path: weights})[path])

    _check_shapes(file, base, in_axis, out_axis)
    report = Report(
        merged=tuple(file.pairs),
        kept=tuple(Kept(path, "no adapter") for path in base.specs if path not in file.pairs),
        shapes={path: spec.shape for path, spec in base.specs.items()},
        sizes={p: math.prod(s.shape) for p, s in base.specs.items() if trees.is_inexact(s)},
    )
    rewrite = _rewrite.Rewrite(base.specs, produce, report, [base, adapter], base.names)
    return _rewrite.finish(args, rewrite)


def _check_shapes(
    file: _adapters.LoraFile, base: _inputs.Opened, in_axis: int, out_axis: int
) -> None:
    """Raises ValueError, before anything is computed, if a pair does not fit its kernel."""
    for path, pair in file.pairs.items():
        shape, a, b = base.specs[path].shape, pair.a.shape, pair.b.shape
        if file.is_torch:
            a, b = a[::-1], b[::-1]
        fits = len(shape) >= 2 and a[-1] == b[-2]
        if not fits or (shape[in_axis], shape[out_axis]) != (a[-2], b[-1]):
            raise ValueError(
                f"lora-merge: the adapter of {path!r} does not fit: kernel {list(shape)} with "
                f"in_axis={in_axis}, out_axis={out_axis}, a {list(a)}, b {list(b)}. Is it another "
                "architecture's, or do its kernels have other axes (--in-axis, --out-axis)?"
            )
