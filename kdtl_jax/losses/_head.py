"""Output layers: from hidden states `[..., width]` to logits `[..., vocabulary]`."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar


class Head(NamedTuple):
    """An output layer `z = scale (h W + h a b + bias)`, and `softcap tanh(z / softcap)` if capped.

    `kernel` `[width, vocabulary]` (tied embeddings: their transpose), `bias` `[vocabulary]`;
    `delta` is an adapter's `a [width, r]`, including its scale, and `b [r, vocabulary]`: `W + a b`
    is never formed, and a frozen W needs no gradient of its size.
    """

    kernel: Array
    bias: Array | None = None
    scale: Scalar = 1.0
    softcap: Scalar | None = None
    delta: tuple[Array, Array] | None = None


def head_logits(hidden: Array, head: Head) -> Array:
    """Logits of hidden states: accumulated, biased and capped in float32 or wider.

    Args:
      hidden: `[..., width]`; the kernel is cast to its dtype.
      head: `Head` of the same width.

    Returns:
      `[..., vocabulary]`, float32 or wider.
    """
    check_head(hidden, head)
    return transformed(adapted(product(hidden, head.kernel), hidden, head.delta), head)


def check_head(hidden: Array, head: Head) -> None:
    """Checks that a head fits hidden states `[..., width]`."""
    _checks.instance(Head, head=head)
    _checks.floating(hidden=hidden, kernel=head.kernel)
    _checks.rank(1, hidden=hidden)
    _checks.rank(2, 2, kernel=head.kernel)
    if jnp.shape(hidden)[-1] != jnp.shape(head.kernel)[0]:
        raise ValueError(
            f"expected hidden [..., width] and kernel [width, vocabulary], got "
            f"{_checks.described(hidden=hidden, kernel=head.kernel)}. "
            "Tied embeddings are [vocabulary, width]: pass embedding.T."
        )
    if head.bias is not None:
        _checks.floating(bias=head.bias)
        if jnp.shape(head.bias) != jnp.shape(head.kernel)[1:]:
            raise ValueError(
                f"expected one bias per class, got "
                f"{_checks.described(kernel=head.kernel, bias=head.bias)}."
            )
    if head.delta is not None:
        a, b = head.delta
        _checks.floating(a=a, b=b)
        width, vocabulary = jnp.shape(head.kernel)
        if jnp.shape(a)[:1] != (width,) or jnp.shape(b) != (*jnp.shape(a)[1:], vocabulary):
            raise ValueError(
                f"expected delta a [width, r] and b [r, vocabulary], got "
                f"{_checks.described(kernel=head.kernel, a=a, b=b)}."
            )
    _checks.positive(**({} if head.softcap is None else {"softcap": head.softcap}))


def product(hidden: Array, kernel: Array) -> Array:
    """`h W`, `[..., vocabulary]`: factors in the dtype of h, accumulated in float32 or wider."""
    dtype = _numerics.upcast(hidden).dtype
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=dtype)


def adapted(logits: Array, hidden: Array, delta: tuple[Array, Array] | None) -> Array:
    """`h W + (h a) b`: the logits `h W` with the adapter's contribution, in their dtype."""
    if delta is None:
        return logits
    return logits + product(product(hidden, delta[0]).astype(hidden.dtype), delta[1])


def transformed(logits: Array, head: Head) -> Array:
    """`z = scale (y + bias)` of `y = h W + h a b`, and `softcap tanh(z / softcap)` if capped."""
    if head.bias is not None:
        bias = head.bias.astype(logits.dtype)
        logits = logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)
    logits = logits * _numerics.scalar(head.scale, logits)
    if head.softcap is None:
        return logits
    cap = _numerics.scalar(head.softcap, logits)
    return cap * jnp.tanh(logits / cap)
