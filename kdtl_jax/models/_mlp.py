"""Multilayer perceptrons."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jax import Array


class MLP(nn.Module):
    """ReLU layers of any widths, then a linear head: positively homogeneous in its parameters.

    Inputs: `[B, ...]`, flattened.
    Outputs: `hidden_0` … (after the ReLU), `logits` `[B, classes]`.
    """

    widths: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        x = inputs.reshape(inputs.shape[0], -1)
        outputs = {}
        for i, width in enumerate(self.widths):
            x = outputs[f"hidden_{i}"] = jax.nn.relu(nn.Dense(width, name=f"dense_{i}")(x))
        return {**outputs, "logits": nn.Dense(self.classes, name="head")(x)}


def mlp(widths: Sequence[int], classes: int) -> MLP:
    """An `MLP` with hidden layers of the given widths.

    Raises:
      ValueError: if a width or the number of classes is not positive.
    """
    if classes < 1 or any(width < 1 for width in widths):
        raise ValueError(
            f"widths and classes must be at least 1, got {list(widths)} and {classes}."
        )
    return MLP(tuple(widths), classes)
