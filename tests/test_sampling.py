"""Sampling: the distribution, the loop, and the log-probabilities that come with it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import language, losses, models

CONFIG = models.DecoderConfig(
    vocabulary=22,
    width=16,
    layers=2,
    heads=4,
    key_heads=2,
    head_width=4,
    hidden=24,
    ropes=(models.Rope((1.0, 0.01)),) * 2,
    is_tied=True,
)
MODEL = models.decoder(CONFIG)
PARAMS = jax.jit(lambda key: jax.tree.map(lambda x: 8 * x, MODEL.init(key)))(jax.random.key(0))
PROMPTS = jnp.asarray([[3, 4, 5, 6], [7, 8, 0, 0], [9, 0, 0, 0]])
MASK = jnp.asarray([[True] * 4, [True, True, False, False], [True, False, False, False]])
KEYS = jax.random.split(jax.random.key(0), 3)
HOW = {"temperature": 0.8, "top_k": 9, "top_p": 0.9}
DRAW = jax.jit(
    lambda prompts, mask, keys: language.sample(
        MODEL, PARAMS, prompts, keys=keys, length=10, prompt_mask=mask, stop_tokens=(2, 18), **HOW
    )
)


def filtered(
    z: np.ndarray,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> np.ndarray:
    """One row in float64, step by step."""
    z = z.astype(np.float64) / temperature
    if top_k is not None:
        z = np.where(z >= np.sort(z)[-min(top_k, len(z))], z, -np.inf)
    if top_p is not None:
        p, mass = np.exp(z - z.max()) / np.exp(z - z.max()).sum(), 0.0
        for i in np.argsort(z, kind="stable")[:-1]:
            mass += p[i]
            if mass <= 1 - top_p:
                z[i] = -np.inf
    if min_p is not None:
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        z = np.where(p >= min_p * p.max(), z, -np.inf)
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 3},
        {"top_k": 50},
        {"top_p": 0.7},
        {"top_p": 0.0},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_the_distribution_is_the_one_described(how: dict[str, Any]):
    z = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32) * 2
    z[0, :3] = z[0].max()  # ties
    actual = language.sampling_log_probs(jnp.asarray(z), **how)
    expected = np.stack([filtered(row, **how) for row in z])
    np.testing.assert_array_equal(np.isinf(actual), np.isinf(expected))
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_rows_may_be_sampled_in_their_own_way():
    z = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32))
    t, k, p = (0.5, 1.0, 2.0), (2, 8, 5), (1.0, 0.6, 0.9)
    actual = language.sampling_log_probs(
        z, temperature=jnp.asarray(t), top_k=jnp.asarray(k), top_p=jnp.asarray(p)
    )
    for i in range(3):
        alone = language.sampling_log_probs(z[i], temperature=t[i], top_k=k[i], top_p=p[i])
        np.testing.assert_allclose(actual[i], alone, atol=1e-6)


def test_a_temperature_of_zero_takes_the_largest():
    z = jnp.asarray([[1.0, 3.0, 3.0, 2.0]])
    np.testing.assert_array_equal(
        language.sampling_log_probs(z, temperature=0.0), [[-jnp.inf, 0, -jnp.inf, -jnp.inf]]
    )


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"temperature": -1.0}, "temperature must be finite and >= 0"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"min_p": -0.1}, "min_p must lie in"),
        ({"top_k": 0}, "top_k must lie in"),
    ],
)
def test_what_is_no_way_to_sample_is_refused(how: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        language.sampling_log_probs(jnp.zeros((2, 4)), **how)


def log_probs(tokens: Any, segments: Any) -> np.ndarray:
    """Of what follows every token, by one pass over the whole text."""

    @jax.jit
    def table(tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
        hidden, _ = MODEL.apply(PARAMS, tokens, segments=segments)
        return language.sampling_log_probs(losses.head_logits(hidden, MODEL.head(PARAMS)), **HOW)

    return np.asarray(table(tokens, segments))


def test_log_probs_are_those_of_a_pass_over_the_whole_text():
    samples = jax.tree.map(np.asarray, DRAW(PROMPTS, MASK, KEYS))
    rows = jax.tree.map(np.asarray, language.joined(PROMPTS, samples, prompt_mask=MASK))
    table = log_probs(rows.tokens, rows.segments)
    compared = 0
    for b in range(3):
        real = np.flatnonzero(rows.segments[b])
        for before, here in zip(real, real[1:], strict=False):
            if rows.is_sampled[b, here]:
                expected = table[b, before, rows.tokens[b, here]]
                np.testing.assert_allclose(samples.log_probs[b, here - 4], expected, atol=2e-5)
                compared += 1
    assert compared == int(samples.mask.sum()) > 3


def test_a_row_does_not_depend_on_its_batch_or_its_padding():
    samples = DRAW(PROMPTS, MASK, KEYS)
    left = jnp.asarray([[0, 0, 7, 8]]), jnp.asarray([[False, False, True, True]])
    for prompt, mask in (left, (PROMPTS[1:2, :2], MASK[1:2, :2])):
        alone = DRAW(prompt, mask, KEYS[1:2])
        np.testing.assert_array_equal(alone.tokens[0], samples.tokens[1])
        np.testing.assert_allclose(alone.log_probs[0], samples.log_probs[1], atol=3e-5)


def test_rows_end_with_a_stop_token_that_counts():
    samples = DRAW(PROMPTS, MASK, KEYS)
    for tokens, mask, log_probs in zip(*map(np.asarray, samples), strict=True):
        count = mask.sum()
        assert mask[:count].all() and not tokens[count:].any() and not log_probs[count:].any()
        assert not np.isin(tokens[: count - 1], (2, 18)).any()
        assert count == 10 or tokens[count - 1] in (2, 18)
    assert not samples.mask.all(), "some row stops early, or this test shows nothing"


def test_what_is_drawn_follows_the_distribution():
    many = 4000
    prompts = jnp.broadcast_to(PROMPTS[:1], (many, 4))
    keys = jax.random.split(jax.random.key(5), many)
    run = jax.jit(lambda k: language.sample(MODEL, PARAMS, prompts, keys=k, length=1, **HOW))
    drawn = np.asarray(run(keys).tokens[:, 0])
    p = np.exp(log_probs(PROMPTS[:1], None)[0, -1])
    shares = np.bincount(drawn, minlength=22) / many
    assert (shares[p == 0] == 0).all()
    np.testing.assert_allclose(shares, p, atol=5 * np.sqrt(0.25 / many))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"keys": KEYS[:2]}, "one per prompt"),
        ({"length": 0}, "length must be at least 1"),
        ({"prompt_mask": MASK.at[0].set(False)}, "at least one token"),
        ({"prompt_mask": MASK[:, :2]}, "prompt_mask must have shape"),
    ],
)
def test_what_cannot_be_continued_is_refused(change: dict[str, Any], says: str):
    given = {"keys": KEYS, "length": 2, "prompt_mask": MASK} | change
    with pytest.raises(ValueError, match=says):
        language.sample(MODEL, PARAMS, PROMPTS, **given)
