"""Gradients of language-model losses, without training: which are unbiased, and their variance.

    python benchmarks/language_gradients.py gradients   # on the student's own samples
    python benchmarks/language_gradients.py sampling    # from a teacher's stored draws or top k

All at one position of random logits with 256 classes, relative to the exact gradient's norm.
Obtained on two CPU cores, jax 0.10.2, 5 seeds, 20,000 samples each, 95 % intervals over seeds:

    gradients
      sampled: error of the mean, in its standard errors: 1.0710 ± 0.3741
      sampled: variance over the squared exact gradient: 37.6835 ± 20.9540
      top 16 summed, the rest sampled: error of the mean, in its standard errors: 1.0699 ± 0.2966
      top 16 summed, the rest sampled: variance over the squared exact gradient: 16.9749 ± 11.7219
      their variances, the second over the first: 0.4480 ± 0.1611
      top 3, one bucket: distance from the exact gradient, relative: 0.7782 ± 0.2702
      top 16, one bucket: distance from the exact gradient, relative: 0.3326 ± 0.1100
      top 64, one bucket: distance from the exact gradient, relative: 0.1166 ± 0.0639
      top 255, one bucket: distance from the exact gradient, relative: 0.0000 ± 0.0000
    sampling
      random sampling, 12 draws: error of the mean, in its standard errors: 0.9798 ± 0.2673
      random sampling, 12 draws: error of the mean, relative: 0.0117 ± 0.0034
      renormalized top-12: bias, relative: 0.8958 ± 0.6277

The exact sum, the sampled loss and the sum over the student's top k with the rest sampled
(`losses.top_k_reverse_kl_sampled_tail`) have the same expectation; their variances are zero,
largest, and in between. The top k with all other classes in one bucket
(`losses.student_top_k_reverse_kl`, what papers call a tail) has no variance but a different
gradient: it bounds the reverse KL from below and equals it only where both models agree on the
shape of the tail.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
from _seeds import show

from kdtl_jax import losses

SAMPLES, VOCABULARY, K = 20_000, 256, 16


def pair(seed: int) -> tuple[jax.Array, jax.Array]:
    """Logits of a student and a teacher that differ."""
    keys = jax.random.split(jax.random.key(seed))
    student = 2 * jax.random.normal(keys[0], (VOCABULARY,))
    return student, student + jax.random.normal(keys[1], (VOCABULARY,))


def on_policy_losses(z: jax.Array, teacher: jax.Array, token: jax.Array) -> tuple[jax.Array, ...]:
    """The sampled reverse KL of a token that the student drew, and with its top k summed."""
    top = losses.top_k_targets(jax.lax.stop_gradient(z), k=K).indices
    log_p, teacher_log_p = (jax.nn.log_softmax(x) for x in (z, teacher))
    drawn = jax.lax.stop_gradient(log_p[token])
    sampled = losses.sampled_reverse_kl(
        log_p[token][None], teacher_log_p[token][None], drawn[None]
    )[0]
    targets = losses.top_k_at(teacher, top)
    return sampled, losses.top_k_reverse_kl_sampled_tail(
        z, targets, token, teacher_log_p[token], drawn
    )


def gradients(seeds: int) -> None:
    """One position: each loss's mean gradient over the student's tokens, and its variance.

    The exact loss has no variance. The loss on the student's top k and one bucket for all others
    has none either, but is a bound: its gradient is that of another function of the weights.
    """
    results: dict[str, list[float]] = {}
    for seed in range(seeds):
        student, teacher = pair(seed)
        exact = jax.grad(losses.reverse_kl)(student, teacher)
        size = jnp.linalg.norm(exact)
        tokens = jax.random.categorical(jax.random.key(seed + 1), student, shape=(SAMPLES,))
        values, variances = {}, []
        for i, name in enumerate(("sampled", f"top {K} summed, the rest sampled")):

            def loss(z: jax.Array, teacher: jax.Array, token: jax.Array, i: int = i) -> jax.Array:
                return on_policy_losses(z, teacher, token)[i]

            each = jax.vmap(jax.grad(loss), in_axes=(None, None, 0))(student, teacher, tokens)
            variance = jnp.sum(each.var(axis=0))
            error = jnp.linalg.norm(each.mean(axis=0) - exact)
            variances.append(variance)
            values[f"{name}: error of the mean, in its standard errors"] = error / jnp.sqrt(
                variance / SAMPLES
            )
            values[f"{name}: variance over the squared exact gradient"] = variance / size**2
        values["their variances, the second over the first"] = variances[1] / variances[0]
        for k in (3, K, 64, VOCABULARY - 1):
            bucket = jax.grad(partial(losses.student_top_k_reverse_kl, k=k))(student, teacher)
            values[f"top {k}, one bucket: distance from the exact gradient, relative"] = (
                jnp.linalg.norm(bucket - exact) / size
            )
        for name, value in values.items():
            results.setdefault(name, []).append(float(value))
    show(results, digits=4)


def sampling(seeds: int) -> None:
    """One position: mean gradients of random-sampling KD and renormalized top-k, against KD's."""
    results: dict[str, list[float]] = {}
    for seed in range(seeds):
        student, teacher = pair(seed)
        exact = jax.grad(losses.forward_kl)(student, teacher)
        keys = jax.random.split(jax.random.key(seed), SAMPLES)

        def loss(z: jax.Array, key: jax.Array, teacher: jax.Array = teacher) -> jax.Array:
            draws = losses.random_sampling_draws(key, teacher[None], num_draws=12)
            targets = losses.random_sampling_targets(teacher[None], draws)
            return losses.random_sampling_cross_entropy(z[None], targets)[0]

        each = jax.lax.map(partial(jax.grad(loss), student), keys, batch_size=1000)
        spread = jnp.sqrt(jnp.sum(each.var(axis=0)) / SAMPLES)
        top = jax.grad(losses.top_k_kl_renormalized)(student, losses.top_k_targets(teacher, k=12))
        size = jnp.linalg.norm(exact)
        bias = jnp.linalg.norm(each.mean(axis=0) - exact)
        for name, value in {
            "random sampling, 12 draws: error of the mean, in its standard errors": bias / spread,
            "random sampling, 12 draws: error of the mean, relative": bias / size,
            "renormalized top-12: bias, relative": jnp.linalg.norm(top - exact) / size,
        }.items():
            results.setdefault(name, []).append(float(value))
    show(results, digits=4)


if __name__ == "__main__":
    proofs = {f.__name__: f for f in (gradients, sampling)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("proof", choices=proofs)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    proofs[given.proof](given.seeds)
