"""NumPy arrays of a caller, who may fill them again while a jitted call still reads them."""

from typing import Any

import jax
import numpy as np


def unshared(tree: Any) -> Any:
    """Copies the NumPy arrays of a tree; other leaves stay.

    On a CPU, JAX reads suitably aligned host arrays where they are, and a jitted call may read them
    after it has returned.
    """
    return jax.tree.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, tree)
