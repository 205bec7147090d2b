"""Distillation losses: `(student, teacher, *, hyperparameters) -> one value per example`.

Student first. No loss reduces, weights, mixes, holds parameters or stops a gradient; the objective
and the step do. Task losses are optax's.
"""

from kdtl_jax.losses._divergences import forward_kl as forward_kl
from kdtl_jax.losses._divergences import reverse_kl as reverse_kl
from kdtl_jax.losses._logits import kd_kl as kd_kl
from kdtl_jax.losses._logits import logit_mse as logit_mse
