"""The description of a decoder as data, and its key-value cache."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array

NO_WINDOW = 2**30


class Rope(NamedTuple):
    """Rotary positions of one kind of layer: radians per position of each pair of channels.

    Channel `i` is rotated with channel `i + n` where `n = len(frequencies)`; channels from `2 n` on
    are not rotated (partial rotation), nor is a pair of frequency 0. Cosine and sine are multiplied
    by `scale`. Sequences longer than `original_length` use `long_frequencies`, if given.
    """

    frequencies: tuple[float, ...] = ()
    scale: float = 1.0
    long_frequencies: tuple[float, ...] | None = None
    original_length: int | None = None


class Norm(NamedTuple):
    """`(x - mean) / sqrt(var + epsilon)` if centered, else `x / sqrt(mean(x^2) + epsilon)`.

    The result is multiplied by `scale`, or `1 + scale` with a unit offset (Gemma); `bias` is added
    if there is one.
    """

    epsilon: float = 1e-6
    is_centered: bool = False
    has_unit_offset: bool = False


class DecoderConfig(NamedTuple):
    """The description of a decoder.

    Attributes:
      ropes: one per layer; empty for learned positions.
      windows: number of positions that a position sees, including itself; None sees all earlier
        ones. One per layer, or empty for no windows.
      learned_positions: number of rows of the table of positions (GPT-2); 0 for no table.
      fuses_qkv, fuses_gate: whether query, key and value (gate and up) are one matrix.
      has_pre_norms, has_post_norms: norms before attention and feed-forward, and after them.
      has_head_norms: whether queries and keys are normalized head by head (Qwen3, Gemma 3).
      has_projection_norms: whether they are normalized before they are split into heads (OLMo 2).
      attention_scale: factor of `q k^T`; None means `1 / sqrt(head_width)`.
      attention_softcap, final_softcap: `cap tanh(z / cap)` of scores and of logits.
      embedding_scale: factor of the token embeddings (Gemma: `sqrt(width)`).
      logit_scale: factor of the logits.
      is_tied: whether the head is the token embedding.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    hidden: int
    ropes: tuple[Rope, ...] = ()
    windows: tuple[int | None, ...] = ()
    learned_positions: int = 0
    norm: Norm = Norm()
    has_norm_bias: bool = False
    has_pre_norms: bool = True
    has_post_norms: bool = False
    has_head_norms: bool = False
    has_projection_norms: bool = False
    activation: Callable[[Array], Array] = jax.nn.silu
    is_gated: bool = True
    fuses_qkv: bool = False
    fuses_gate: bool = False
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_mlp_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    is_tied: bool = False
    has_head_bias: bool = False


class Cache(NamedTuple):
    """Keys and values of the positions read so far; arrays only.

    `keys`, `values` `[layers, B, key_heads, S, head_width]`, laid out for products over the slots
    of a head; `positions` and `segments` int32 `[B, S]` of the `S` slots (segment 0: empty or
    padding); `length` int32 `[]`, the number of slots in use.
    """

    keys: Array
    values: Array
    positions: Array
    segments: Array
    length: Array
