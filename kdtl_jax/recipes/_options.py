"""What a user may change for every method: the temperature, and weights of terms."""

from collections.abc import Mapping
from typing import NamedTuple

from kdtl_jax import methods
from kdtl_jax._types import Scalar
from kdtl_jax.methods import Entry, Method, Setup


class Options(NamedTuple):
    """None keeps the method's own value."""

    temperature: Scalar | None = None  # methods without one ignore it
    weights: Mapping[str, Scalar] = {}  # by term, "task" included


def build(entry: Entry, setup: Setup, options: Options) -> Method:
    """The method, the user's weights in place of its own.

    Raises:
      ValueError: if the method does not apply to the pair.
    """
    warm = options.temperature is not None and methods.takes_temperature(entry)
    own = {"temperature": options.temperature} if warm else {}
    method = entry.build(setup, **own)
    return method._replace(weights={**method.weights, **options.weights})
