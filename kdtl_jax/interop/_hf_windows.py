"""Sliding windows of a published decoder's layers."""

from collections.abc import Callable

from kdtl_jax import _text
from kdtl_jax.interop._hf_config import Config
from kdtl_jax.interop._hf_rope import size


def windows(
    config: Config, layers: int, sliding: Callable[[int], bool], default: int | None = 4096
) -> tuple[int | None, ...]:
    """The window of every layer: by `layer_types` if it is given, else by `sliding(layer)`.

    A config without `sliding_window` has the default; one with null has no windows.
    """
    if config.get("sliding_window", default) is None:
        return ()
    window = size(config, "sliding_window", default)
    types = config.get("layer_types")
    if types is None:
        return tuple(window if sliding(i) else None for i in range(layers))
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != layers:
        problem = f" with {_text.listed(sorted(map(str, unknown)))}" if unknown else ""
        raise ValueError(
            f"layer_types must be {layers} times 'sliding_attention' or 'full_attention', got "
            f"{len(types)} entries{problem}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def windows_if_used(
    config: Config, layers: int, sliding: Callable[[int], bool], default: int | None = 4096
) -> tuple[int | None, ...]:
    """`windows` of a family that has them only if `use_sliding_window` says so.

    Raises:
      ValueError: if `layer_types` says otherwise; transformers' implementations of attention then
        differ from each other.
    """
    if config.get("use_sliding_window", False):
        return windows(config, layers, sliding, default)
    expected, types = ["full_attention"] * layers, config.get("layer_types")
    if types is not None and types != expected:
        raise ValueError(
            f"layer_types must be {len(expected)} times 'full_attention' if use_sliding_window "
            f"is false, got {_text.shown(types)}."
        )
    return ()
