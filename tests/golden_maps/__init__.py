"""How to get the other systems' numbers: one function per method of the golden manifest.

Each module maps `method -> fn(inputs, hyperparameters)`, where `inputs` are arrays by the
manifest's names and the return value is the reference's number, or a dict
`{"value": ..., other names: ...}`.
A mapping reads shapes and hyper-parameters only, never a case's name, so that further sets run
unchanged. A module may also list methods in EXCLUDED, each with its reason.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jax import Array

Golden = Callable[[Mapping[str, Array], Mapping[str, Any]], Array | dict[str, Array]]
