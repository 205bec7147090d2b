"""Knowledge distillation and transfer learning for JAX: pure functions over parameter pytrees.

`import kdtl_jax` needs only jax, numpy and optax. Flax, orbax and rich are only imported by the
outer modules (`interop`, `models`, `run`, `recipes`, `cli`), when those are imported or first used.
"""

import typing as _typing
from importlib import import_module as _import_module
from importlib.metadata import version as _version

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


if _typing.TYPE_CHECKING:  # a type checker then reports names that do not exist
    from kdtl_jax import cli as cli
    from kdtl_jax import datasets as datasets
    from kdtl_jax import interop as interop
    from kdtl_jax import language as language
    from kdtl_jax import models as models
    from kdtl_jax import recipes as recipes
    from kdtl_jax import run as run
else:

    def __getattr__(name: str) -> object:
        if name in _EDGE:
            return _import_module(f"kdtl_jax.{name}")
        raise AttributeError(f"module 'kdtl_jax' has no attribute {name!r}; it has {__dir__()}")
