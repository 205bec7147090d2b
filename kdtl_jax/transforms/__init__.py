"""Parameter transforms: pytree in, pytree out.

Only inexact arrays are touched; counters, PRNG keys and functions pass through. A leaf's dtype is
kept, and so is the target's structure. `where` always means *act here*.
"""

from kdtl_jax.transforms._average import average as average
from kdtl_jax.transforms._average import ema as ema
from kdtl_jax.transforms._average import greedy_soup as greedy_soup
from kdtl_jax.transforms._average import interpolate as interpolate
from kdtl_jax.transforms._average import weighted_sum as weighted_sum
from kdtl_jax.transforms._scale import fit_alpha as fit_alpha
from kdtl_jax.transforms._scale import scale as scale
from kdtl_jax.transforms._scale import scale_homogeneous as scale_homogeneous
from kdtl_jax.transforms._sparsify import breadcrumbs as breadcrumbs
from kdtl_jax.transforms._sparsify import dare as dare
from kdtl_jax.transforms._sparsify import della as della
from kdtl_jax.transforms._sparsify import della_probabilities as della_probabilities
from kdtl_jax.transforms._sparsify import keep as keep
from kdtl_jax.transforms._sparsify import mixout as mixout
from kdtl_jax.transforms._sparsify import rescale_l1 as rescale_l1
from kdtl_jax.transforms._sparsify import trim as trim
from kdtl_jax.transforms._sparsify import trim_global as trim_global
from kdtl_jax.transforms._spherical import karcher_mean as karcher_mean
from kdtl_jax.transforms._spherical import model_stock as model_stock
from kdtl_jax.transforms._spherical import multi_slerp as multi_slerp
from kdtl_jax.transforms._spherical import near_swap as near_swap
from kdtl_jax.transforms._spherical import slerp as slerp
from kdtl_jax.transforms._statistics import fisher_merge as fisher_merge
from kdtl_jax.transforms._statistics import regmean as regmean
from kdtl_jax.transforms._statistics import sce as sce
from kdtl_jax.transforms._tasks import apply_task_vectors as apply_task_vectors
from kdtl_jax.transforms._tasks import task_vector as task_vector
from kdtl_jax.transforms._ties import agreeing_count as agreeing_count
from kdtl_jax.transforms._ties import agreeing_weight as agreeing_weight
from kdtl_jax.transforms._ties import disjoint_merge as disjoint_merge
from kdtl_jax.transforms._ties import elect_sign as elect_sign
from kdtl_jax.transforms._ties import elect_sign_by_count as elect_sign_by_count
from kdtl_jax.transforms._ties import elect_sign_global as elect_sign_global
from kdtl_jax.transforms._ties import ties as ties
from kdtl_jax.transforms._ties import ties_per_leaf as ties_per_leaf
from kdtl_jax.transforms._ties import undivided as undivided
