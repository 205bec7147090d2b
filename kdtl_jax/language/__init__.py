"""Language models: text, packing, sampling.

Decoders themselves are in `kdtl_jax.models`, their losses in `kdtl_jax.losses`.
"""

from kdtl_jax.language._sampling import Samples as Samples
from kdtl_jax.language._sampling import Sequences as Sequences
from kdtl_jax.language._sampling import joined as joined
from kdtl_jax.language._sampling import sample as sample
from kdtl_jax.language._sampling import sampling_log_probs as sampling_log_probs
