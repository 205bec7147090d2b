"""Connectors: trainable layers between a student's features and a teacher's.

A `Connector(init, apply)` has parameters and no loss. `init(key, x)` reads only shapes and dtypes,
so `x` may be a `jax.ShapeDtypeStruct` (or a pytree of them); `apply(params, x)` is pure. Feature
maps have their channels last; linear maps and 1x1 convolutions are matrices `[in, out]`, larger
kernels `[kh, kw, in, out]`. Parameters are float32 (float64 for float64 inputs) and are cast to the
input's dtype when they are applied.

`where` (bool `[B]`, or other leading axes) marks the real examples of a batch: the others enter no
statistic of `batch_norm`. `apply` always normalizes by the current batch, as the published
distillers do in training; that is right for a connector that is discarded. If a connector stays in
the model (SimKD's projector), its output must not depend on the rest of the batch: `measure`
returns the statistics along with the output, `running_update` averages them in the step's memory,
and `evaluate` normalizes by them; `fold_batch_norm` turns the result into plain convolutions.

TypeError: x is not floating point, or a size is not an integer. ValueError: a size is below 1, or x
does not have the rank or the width that the parameters were made for.
"""

from kdtl_jax.connectors._architectures import abf as abf
from kdtl_jax.connectors._architectures import generator as generator
from kdtl_jax.connectors._architectures import mask_token as mask_token
from kdtl_jax.connectors._architectures import paraphraser as paraphraser
from kdtl_jax.connectors._architectures import simkd_projector as simkd_projector
from kdtl_jax.connectors._architectures import translator as translator
from kdtl_jax.connectors._connector import Connector as Connector
from kdtl_jax.connectors._connector import Statistics as Statistics
from kdtl_jax.connectors._connector import fold_batch_norm as fold_batch_norm
from kdtl_jax.connectors._connector import running_init as running_init
from kdtl_jax.connectors._connector import running_update as running_update
from kdtl_jax.connectors._layers import Size as Size
from kdtl_jax.connectors._layers import activation as activation
from kdtl_jax.connectors._layers import batch_norm as batch_norm
from kdtl_jax.connectors._layers import chain as chain
from kdtl_jax.connectors._layers import conv as conv
from kdtl_jax.connectors._layers import conv1x1 as conv1x1
from kdtl_jax.connectors._layers import conv3x3 as conv3x3
from kdtl_jax.connectors._layers import group as group
from kdtl_jax.connectors._layers import identity as identity
from kdtl_jax.connectors._layers import linear as linear
from kdtl_jax.connectors._layers import mlp as mlp
from kdtl_jax.connectors._layers import pool as pool
from kdtl_jax.connectors._layers import resize_bilinear as resize_bilinear
from kdtl_jax.connectors._layers import resize_nearest as resize_nearest
from kdtl_jax.connectors._layers import unit_norm as unit_norm
from kdtl_jax.connectors._layers import variance as variance
