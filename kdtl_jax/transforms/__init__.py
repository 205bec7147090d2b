"""Parameter transforms: pytree in, pytree out.

Only inexact arrays are touched; counters, PRNG keys and functions pass through. A leaf's dtype is
kept, and so is the target's structure. `where` always means *act here*.
"""

from kdtl_jax.transforms._scale import fit_alpha as fit_alpha
from kdtl_jax.transforms._scale import scale as scale
from kdtl_jax.transforms._scale import scale_homogeneous as scale_homogeneous
