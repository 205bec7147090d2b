"""Models by name, such as `mlp:128,64`, for command lines and for files that name their model."""

import re
from typing import Any

import flax.linen as nn

from kdtl_jax.models._resnets import resnet, resnet_x4, wide_resnet
from kdtl_jax.models._small_networks import cnn, mlp
from kdtl_jax.models._vit import ViT

# The names that `named` understands, for messages and help.
NAMED_FORMS = (
    "mlp:128,64 (hidden widths)",
    "cnn:16,32 (channels)",
    "resnet8, resnet14, resnet20, resnet32, resnet44, resnet56, resnet110",
    "resnet8x4, resnet32x4",
    "wrn-16-2 (depth, width)",
    "vit:patch=4,width=64,layers=4,heads=4,hidden=128 (these are the defaults)",
)
VIT = {"patch": 4, "width": 64, "layers": 4, "heads": 4, "hidden": 128}
LARGEST, DEEPEST = 10**6, 2000  # bounds on any number in a name, and on a number of layers


def named(text: str, classes: int) -> nn.Module:
    """The module with this name (one of `NAMED_FORMS`), with `classes` outputs.

    Raises:
      ValueError: if the text is not such a name, or its numbers are invalid.
    """
    if any(len(digits) > 7 or int(digits) > LARGEST for digits in re.findall(r"\d+", text)):
        raise ValueError(f"a number in it is above {LARGEST:,}.")
    if depth(text) > DEEPEST:
        raise ValueError(f"it is deeper than {DEEPEST:,} layers.")
    name, colon, rest = text.partition(":")
    if name == "mlp":
        return mlp(_numbers(rest), classes)
    if name == "cnn":
        return cnn(_numbers(rest), classes)
    if name == "vit":
        return _vit(rest, classes)
    if colon:
        raise ValueError(f"only mlp, cnn and vit take values after a colon, not {name!r}.")
    if match := re.fullmatch(r"resnet(\d+)x4", name):
        return resnet_x4(int(match[1]), classes)
    if match := re.fullmatch(r"resnet(\d+)", name):
        return resnet(int(match[1]), classes)
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        return wide_resnet(int(match[1]), int(match[2]), classes)
    raise ValueError("its name is not known.")


def canonical_name(text: str) -> str:
    """The canonical form of a name, the same for every way of writing one model."""
    name, _, rest = text.replace(" ", "").partition(":")
    if name != "vit":
        return f"{name}:{rest}" if rest or name == "mlp" else name
    settings = {key: value for key, _, value in (x.partition("=") for x in rest.split(","))}
    return "vit:" + ",".join(f"{key}={settings.get(key, VIT[key])}" for key in VIT)


def depth(text: str) -> int:
    """The least number of layers that a name asks for; 0 if it does not say."""
    name, _, rest = text.replace(" ", "").partition(":")
    if name in ("mlp", "cnn"):
        return rest.count(",") + 1 if rest else 0
    if name == "vit":
        depths = re.findall(r"layers=(\d{1,9})", rest)  # the last one counts
    else:
        depths = re.findall(r"^(?:resnet|wrn-)(\d{1,9})", name)
    return int(depths[-1]) if depths else 0


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{text!r} is not a list of whole numbers.")
    return [int(part) for part in parts]


def _vit(text: str, classes: int) -> nn.Module:
    settings = dict(VIT)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name.strip() not in VIT or not value.strip().isdecimal() or int(value) < 1:
            raise ValueError(f"{part!r} is not one of {', '.join(VIT)} with a whole number.")
        settings[name.strip()] = int(value)
    if settings["width"] % settings["heads"]:
        width, heads = settings["width"], settings["heads"]
        raise ValueError(f"width {width} does not divide into {heads} heads.")
    fields: dict[str, Any] = {**settings, "classes": classes}
    return ViT(**fields)
