"""Learning from samples: a model continues the prompts of a batch inside the compiled step.

    draw = language.rollout(decoder, prompt=32, temperature=1.0)
    step = language.on_samples(train.make_step(...), draw, of_student)

A row's first `prompt` columns are its prompt, padded on the left; the rest is its completion, which
a rollout replaces by one of the same length. The tokens are constants: sampling is not
differentiated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks
from kdtl_jax._types import Params, Scalar
from kdtl_jax.language._sampling import joined, sample
from kdtl_jax.models import Decoder, segment_positions
from kdtl_jax.objective import Inputs, Metrics, TermsFn
from kdtl_jax.train import Batch, Step, TrainState

Tokens = dict[str, Any]
Rollout = Callable[[Params, Any, Array], Tokens]  # (parameters, token batch, key) -> token batch
Choice = Callable[[TrainState, Any], Params]  # (state, teacher_params) -> parameters that sample
_SAMPLER_KEY = 2**31 - 1  # folded into the sampler's key; no microbatch has this number


def rollout(
    decoder: Decoder,
    *,
    prompt: int,
    temperature: Scalar = 1.0,
    top_k: int | None = None,
    top_p: Scalar | None = None,
    stop_tokens: Sequence[int] = (),
) -> Rollout:
    """`draw(params, tokens, key)`: every row's prompt with a sampled completion.

    Args:
      decoder: the model that samples.
      prompt: number of columns of the prompt, at least 1; the other columns are sampled.
      temperature, top_k, top_p: as in `sample`.
      stop_tokens: a completion ends with one of these.

    Returns:
      The function. Its result has the shape of the rows, with `learned` true on sampled tokens, the
      sampler's `log_probs` `[B, L]`, 0 elsewhere, and `is_drawn` bool `[B]`. A row whose prompt is
      only padding stays padding. If a prompt holds more than one text, the last is continued and
      the others become padding, also in `privileged`, if there is one.

    Raises:
      ValueError: when called, if the prompt leaves no column to sample.
    """

    def draw(params: Params, tokens: Any, key: Array) -> Tokens:
        rows, length = tokens["tokens"].shape
        if not 0 < prompt < length:
            raise ValueError(f"prompt must lie in 1..{length - 1}, got {prompt}.")
        prompts = jnp.asarray(tokens["tokens"])[:, :prompt]
        mask = jnp.ones(prompts.shape, jnp.bool_)
        if "segments" in tokens:
            mask = last_text(jnp.asarray(tokens["segments"])[:, :prompt])
        is_row = jnp.any(mask, axis=1, keepdims=True)
        # A row of only padding still needs a token to run.
        mask = mask.at[:, -1].set(mask[:, -1] | ~is_row[:, 0])
        samples = sample(
            decoder,
            params,
            prompts,
            keys=jax.random.split(key, rows),
            length=length - prompt,
            prompt_mask=mask,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stop_tokens,
        )
        sequences = joined(prompts, samples, prompt_mask=mask)
        segments = jnp.where(is_row, sequences.segments, 0)
        log_probs = jnp.pad(samples.log_probs, ((0, 0), (prompt, 0)))
        result: Tokens = {
            "tokens": sequences.tokens,
            "segments": segments,
            "positions": segment_positions(segments),
            "learned": sequences.is_sampled & is_row,
            "log_probs": jnp.where(is_row, log_probs, 0),
            "is_drawn": jnp.ones(rows, jnp.bool_),
        }
        if "privileged" in tokens:
            privileged = _privileged_tokens(tokens["privileged"])
            segments = last_text(privileged["segments"]).astype(jnp.int32)
            result["privileged"] = {**privileged, "segments": segments}
        return jax.lax.stop_gradient(result)

    return draw


def of_student(state: TrainState, teacher_params: Any) -> Params:
    """Sampling by the student: the parameters being trained."""
    return state.params


def of_teacher(state: TrainState, teacher_params: Any) -> Params:
    """Sampling by the teacher."""
    return teacher_params


def of_data(terms: TermsFn) -> TermsFn:
    """The terms on the data only; rows that were sampled do not count."""

    def on_data(inputs: Inputs) -> dict[str, Any]:
        tokens = inputs.batch["inputs"]
        if "is_drawn" in tokens:
            learned = tokens["learned"] & ~tokens["is_drawn"][:, None]
            batch = {**inputs.batch, "inputs": {**tokens, "learned": learned}}
            inputs = inputs._replace(batch=batch)
        values: Any = terms(inputs)
        return values

    return on_data


def on_samples(
    step: Step, draw: Rollout, choice: Choice = of_student, *, share: float = 1.0
) -> Step:
    """A step that learns from samples of `choice(state, teacher_params)` instead of the data.

    Args:
      step: from `train.make_step`.
      draw: from `rollout`. If the state's parameters are not the decoder's (an adapter's, say),
        `choice` must convert them.
      choice: `of_student`, `of_teacher`, or a function of state and teacher.
      share: the share of steps that learn from samples (GKD's lambda), in [0, 1]; the others learn
        from the data.

    Raises:
      ValueError: if `share` is outside [0, 1].
    """
    _checks.scalar(share=share)
    _checks.within(0, 1, share=share)

    def step_on_samples(
        state: TrainState, batch: Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        sampler_key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), _SAMPLER_KEY)
        key_choice, key = jax.random.split(sampler_key)
        data = batch["inputs"]

        def draw_tokens() -> Tokens:
            return draw(choice(state, teacher_params), data, key)

        if share >= 1:
            tokens = draw_tokens()
        else:
            is_drawn = jax.random.uniform(key_choice) < share
            tokens = jax.lax.cond(is_drawn, draw_tokens, lambda: _with_sample_entries(data))
        rest = {n: x for n, x in data.items() if n not in tokens}
        return step(state, {**batch, "inputs": {**rest, **tokens}}, teacher_params)

    return step_on_samples


def _privileged_tokens(privileged: Any) -> Tokens:
    return {name: jnp.asarray(array, jnp.int32) for name, array in privileged.items()}


def last_text(segments: Array) -> Array:
    """Which columns of each row are of its last text: bool `[B, L]`.

    Args:
      segments: int `[B, L]`, 0 is padding; a row of padding alone has no text.

    Raises:
      TypeError: if segments are not integers.
      ValueError: if they are not `[B, L]`.
    """
    _checks.integers(segments=segments)
    _checks.rank(2, 2, segments=segments)
    segments = jnp.asarray(segments)
    column = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
    last = jnp.max(jnp.where(segments > 0, column, 0), axis=1, keepdims=True)
    return (segments > 0) & (segments == jnp.take_along_axis(segments, last, axis=1))


def _with_sample_entries(data: Any) -> Tokens:
    """Adds the entries of a sampled batch to a batch of data."""
    tokens = jnp.asarray(data["tokens"], jnp.int32)
    segments = jnp.asarray(data.get("segments", jnp.ones_like(tokens)), jnp.int32)
    positions = data.get("positions", segment_positions(segments))
    names = {"privileged"} & data.keys()
    return {
        **{name: _privileged_tokens(data[name]) for name in names},
        "tokens": tokens,
        "segments": segments,
        "positions": jnp.asarray(positions, jnp.int32),
        "learned": jnp.asarray(data.get("learned", segments > 0), jnp.bool_),
        "log_probs": jnp.zeros(tokens.shape, jnp.float32),
        "is_drawn": jnp.zeros(tokens.shape[:1], jnp.bool_),
    }
