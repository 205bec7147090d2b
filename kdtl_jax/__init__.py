"""Knowledge distillation and transfer learning for JAX: pure functions over parameter pytrees.

`import kdtl_jax` needs only jax, numpy and optax. Flax, orbax and rich are imported by the modules
at the edge (`interop`, `models`, `run`, `recipes`, `cli`) when those are imported or first used.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING

from kdtl_jax import augment as augment
from kdtl_jax import connectors as connectors
from kdtl_jax import discrepancies as discrepancies
from kdtl_jax import losses as losses
from kdtl_jax import memory as memory
from kdtl_jax import methods as methods
from kdtl_jax import metrics as metrics
from kdtl_jax import normalization as normalization
from kdtl_jax import objective as objective
from kdtl_jax import penalties as penalties
from kdtl_jax import projection as projection
from kdtl_jax import temperatures as temperatures
from kdtl_jax import testing as testing
from kdtl_jax import train as train
from kdtl_jax import transferability as transferability
from kdtl_jax import transforms as transforms
from kdtl_jax import trees as trees
from kdtl_jax._types import ModelFn as ModelFn
from kdtl_jax._types import Variables as Variables

__version__ = _version("kdtl_jax")

_EDGE = ("cli", "datasets", "interop", "language", "models", "recipes", "run")


def __dir__() -> list[str]:
    return sorted({name for name in globals() if not name.startswith("_")}.union(_EDGE))


if not _TYPE_CHECKING:  # a type checker is to report names that do not exist

    def __getattr__(name: str) -> object:
        if name in _EDGE:
            return _import_module(f"kdtl_jax.{name}")
        raise AttributeError(f"module 'kdtl_jax' has no attribute {name!r}; it has {__dir__()}")
