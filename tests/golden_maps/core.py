"""The plainest losses: what multiplies and divides one and the same KL."""

import jax.numpy as jnp

from golden_maps import Golden
from kdtl_jax import losses

METHODS: dict[str, Golden] = {
    # RepDistiller, mdistiller, mmrazor: T^2, sum over classes, mean over the batch.
    "kd": lambda x, h: jnp.mean(
        losses.kd_kl(x["student_logits"], x["teacher_logits"], temperature=h["temperature"])
    ),
}
