"""Settings whose defaults depend on the data: labels per class, batch size, epochs.

The built-in digits are so easy that a small student learns all there is from their labels; from ten
labels per class it does not, and what a teacher adds can be seen. So that is their default.
"""

import dataclasses
import inspect
import math
from typing import Any

from kdtl_jax import methods
from kdtl_jax.recipes import _optimizers

LABELS = 10  # per class, of the built-in digits
BATCH, FEWEST_BATCHES = 64, 5  # examples per step, steps per epoch
EPOCHS, STEPS = 60, 1000  # at least, per student


def batch_size(examples: int, divisor: int = 1) -> int:
    """64, or less where so few examples would make fewer than five steps of an epoch.

    Args:
      examples: that a student sees.
      divisor: what it is a multiple of: devices times microbatches.
    """
    most = min(BATCH, examples // FEWEST_BATCHES)
    return max(divisor, most // divisor * divisor)


def resolved(settings: Any, examples: int, classes: int, divisor: int = 1) -> Any:
    """The settings of `kdtl distill` with numbers in place of what was not given."""
    few = settings.per_class
    if few is None:
        few = LABELS if settings.data == "digits" else 0
    size = few * classes or examples
    batch = settings.batch_size or batch_size(size, divisor)
    epochs = settings.epochs or max(EPOCHS, math.ceil(STEPS / max(1, size // batch)))
    return dataclasses.replace(settings, per_class=few, batch_size=batch, epochs=epochs)


def described(entry: methods.Entry | None, settings: Any) -> dict[str, Any]:
    """Optimizer, rate and temperature of a method, defaults filled in, for its line of settings."""
    rate = settings.learning_rate or _optimizers.RATES[settings.optimizer]
    found = {"optimizer": settings.optimizer, "learning_rate": rate}
    if settings.weight_decay:
        found["weight_decay"] = settings.weight_decay
    if entry is not None and methods.takes_temperature(entry):
        own = inspect.signature(entry.build).parameters["temperature"].default
        found["temperature"] = settings.temperature or own
    return found
