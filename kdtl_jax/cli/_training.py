"""The flags of a training run: optimizer, precision, augmentation, devices; and what they name."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from kdtl_jax import augment
from kdtl_jax.cli._config import UsageError
from kdtl_jax.run import processes, sharding
from kdtl_jax.train import Batch, precision

Views = Callable[[Array, Array, Batch], dict[str, Any]]  # key, epoch, batch -> batch
RATES = {"sgd": 0.05, "adam": 3e-3, "adamw": 3e-3}
PRECISIONS = {"float32": None, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
AUGMENTATIONS = ("crop", "flip", "mixup", "cutmix")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the optimizer, the precision and the augmentation."""
    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=count, default=64, metavar="N", help="default: 64")
    group.add_argument("--optimizer", choices=tuple(RATES), default="adam", help="default: adam")
    group.add_argument(
        "--rate",
        type=positive,
        metavar="X",
        help="learning rate, falling to 0 along a cosine; default: 0.05 (sgd), 0.003 (adam, adamw)",
    )
    group.add_argument(
        "--weight-decay", type=not_negative, default=0.0, metavar="X", help="default: 0"
    )
    group.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="float32",
        help="of the computation; weights and losses stay in float32; default: float32",
    )
    group.add_argument(
        "--microbatches",
        type=count,
        default=1,
        metavar="N",
        help="take every batch in so many parts, to save memory; default: 1",
    )
    group.add_argument(
        "--augment",
        type=augmentations,
        default=[],
        metavar="NAME,...",
        help="crop or crop=PIXELS, flip, mixup or mixup=ALPHA, cutmix or cutmix=ALPHA; teacher and "
        "student see the same views. mixup and cutmix mix the labels of the cross-entropy; a "
        "method that reads labels itself sees each image's own",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the mesh and of several processes."""
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--mesh",
        type=mesh_sizes,
        default={},
        metavar="AXIS=N,...",
        help="data=4,fsdp=2: split batches over 8 devices, weights over 2 of them",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of a run of several processes (see --process)"
    )
    group.add_argument("--processes", type=count, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")


def optimizer(args: argparse.Namespace) -> Callable[[int], optax.GradientTransformation]:
    """From the number of steps to the optimizer that the flags describe."""
    peak = RATES[args.optimizer] if args.rate is None else args.rate

    def of(steps: int) -> optax.GradientTransformation:
        rate = optax.cosine_decay_schedule(peak, max(steps, 1))
        decay = optax.add_decayed_weights(args.weight_decay)
        if args.optimizer == "adamw":
            tx = optax.adamw(rate, weight_decay=args.weight_decay)
        elif args.optimizer == "adam":
            tx = optax.adam(rate) if not args.weight_decay else optax.chain(decay, optax.adam(rate))
        else:
            tx = optax.chain(decay, optax.sgd(rate, momentum=0.9, nesterov=True))
        return precision.loss_scaling(tx) if args.precision == "float16" else tx

    return of


def views(chosen: Sequence[str], classes: int, side: int) -> Views | None:
    """The augmentation that the flag names, or None; `side` is the image's height.

    Mixed labels arrive as `batch["targets"]`.
    """
    if not chosen:
        return None

    def of(key: Array, epoch: Array, batch: Batch) -> dict[str, Any]:
        keys = augment.example_keys(key, epoch, batch["index"])
        out, x = dict(batch), batch["inputs"]
        for place, (name, _, value) in enumerate(part.partition("=") for part in chosen):
            own = jax.vmap(lambda k, at=place: jax.random.fold_in(k, at))(keys)
            if name == "crop":
                padding = int(float(value)) if value else max(1, side // 8)
                x = augment.crop(own, x, padding=padding)
            elif name == "flip":
                x = augment.flip(own, x)
            else:
                mix = augment.mixup if name == "mixup" else augment.cutmix
                targets = out.get("targets", augment.smooth_labels(batch["labels"], classes))
                x, out["targets"] = mix(own[0], x, targets, alpha=float(value or 1))
        return {**out, "inputs": x}

    return of


def mesh(args: argparse.Namespace) -> Mesh | None:
    """The mesh that the flags describe, after joining the other processes, if there are any.

    Call it before anything touches a device.
    """
    several = (args.coordinator, args.processes, args.process)
    if any(value is not None for value in several):
        try:
            processes.initialize(
                coordinator=args.coordinator, processes=args.processes, process=args.process
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
        return sharding.make_mesh(**args.mesh)
    return sharding.make_mesh(**args.mesh) if args.mesh else None


def count(text: str) -> int:
    """`type=` of a number of things: 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def positive(text: str) -> float:
    """`type=` of a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def not_negative(text: str) -> float:
    """`type=` of a number of 0 or more."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value


def mesh_sizes(text: str) -> dict[str, int]:
    """`type=` of `--mesh`."""
    try:
        return sharding.parse_mesh(text.replace(" ", ""))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def augmentations(text: str) -> list[str]:
    """`type=` of `--augment`: names in order, with a value where one is given."""
    out = []
    for part in names(text):
        name, equals, value = part.partition("=")
        if name not in AUGMENTATIONS or (equals and name == "flip"):
            raise argparse.ArgumentTypeError(
                f"{part!r} is none of {', '.join(AUGMENTATIONS)} (crop=PIXELS, mixup=ALPHA, "
                "cutmix=ALPHA)"
            )
        if equals:
            positive(value)
        out.append(part)
    return out


def numbers(text: str) -> dict[str, float]:
    """`type=` of `name=number,...`."""
    out = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        try:
            out[name.strip()] = not_negative(value)
        except (ValueError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(
                f"{part!r} is not term=number with a number of 0 or more, as in kd=0.9,task=0.1"
            ) from None
        if not equals or not name.strip():
            raise argparse.ArgumentTypeError(f"{part!r} is not term=number, as in kd=0.9,task=0.1")
    return out


def layer_pairs(text: str) -> list[str]:
    """`type=` of `--layers`: `student_tap:teacher_tap,...` (`=` does as well)."""
    out = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        student, _, teacher = part.replace("=", ":", 1).partition(":")
        if not student.strip() or not teacher.strip():
            raise argparse.ArgumentTypeError(
                f"{part!r} is not student_tap:teacher_tap, as in hidden_0:hidden_1"
            )
        out.append(f"{student.strip()}:{teacher.strip()}")
    return out


def names(text: str) -> list[str]:
    """`type=` of a list of names."""
    return [name.strip() for name in text.split(",") if name.strip()]
