"""A teacher of byte pairs and a student of bytes: ALM and ULD beside fine-tuning alone.

    python benchmarks/language_tokenizers.py

The teacher reads the whole text in bytes and in the 256 most frequent pairs of them; students read
bytes and have a tenth of the text. Every method trains the same student on the same rows with the
cross-entropy, two of them with a loss to the teacher beside it: ALM compares the probability of
each of the teacher's tokens with that of its bytes; ULD compares the two sorted distributions of
what follows, both sides standing at the beginning of the same teacher's token. Bits per byte are
those of held-out text. Intervals are 95 % over seeds, differences paired. No results are recorded
here yet.
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _seeds import learning, optimizer, show, texts

from kdtl_jax import language, losses, models, train
from kdtl_jax.objective import Inputs, Masked

LENGTH, BATCH, PAIRS, START = 64, 16, 256, 256
WEIGHTS = {
    "fine-tuning": {"task": 1.0},
    "fine-tuning and ALM": {"task": 1.0, "alm": 1.0, "uld": 0.0},
    "fine-tuning and ULD": {"task": 1.0, "alm": 0.0, "uld": 1.5},
}


def decoder(layers: int, width: int, vocabulary: int) -> models.Decoder:
    """A small one with learned positions."""
    return models.decoder(
        models.DecoderConfig(
            vocabulary=vocabulary,
            width=width,
            layers=layers,
            heads=4,
            key_heads=4,
            head_width=width // 4,
            hidden=3 * width,
            learned_positions=LENGTH + 1,
            is_tied=True,
        )
    )


def in_pairs(text: bytes, pairs: dict[bytes, int]) -> list[bytes]:
    """The text cut from the left into frequent pairs and single bytes."""
    cut, at = [], 0
    while at < len(text):
        step = 2 if text[at : at + 2] in pairs else 1
        cut.append(text[at : at + step])
        at += step
    return cut


def rows(text: bytes, pairs: dict[bytes, int]) -> dict[str, Any]:
    """Rows of the text in bytes and in pairs, and which of the teacher's tokens a byte is part of.

    Both begin with a start token. `first` is the column of each chunk's first byte.
    """
    made: dict[str, list[np.ndarray]] = {n: [] for n in ("tokens", "pairs", "groups", "first")}
    for at in range(0, len(text) - LENGTH + 1, LENGTH):
        row = text[at : at + LENGTH]
        cut = in_pairs(row, pairs)
        ends = np.cumsum([len(piece) for piece in cut])
        groups, _, count = language.align_tokens(np.arange(1, LENGTH + 1), ends)
        teacher_tokens, first = np.full(LENGTH + 1, -1), np.zeros(LENGTH, int)
        teacher_tokens[0] = START
        teacher_tokens[1 : count + 1] = [pairs.get(piece, piece[0]) for piece in cut]
        first[:count] = ends - [len(piece) for piece in cut]
        made["tokens"].append(np.asarray([START, *row]))
        for name, value in (("pairs", teacher_tokens), ("groups", groups), ("first", first)):
            made[name].append(value)
    found = {name: np.stack(values).astype(np.int32) for name, values in made.items()}
    teacher_tokens = found.pop("pairs")
    teacher = {
        "tokens": np.maximum(teacher_tokens, 0),
        "segments": (teacher_tokens >= 0).astype(np.int32),
    }
    return jax.tree.map(jnp.asarray, {"inputs": {**found, "teacher": teacher}})


def next_logits(outputs: Mapping[str, Any]) -> jax.Array:
    """Logits `[B, T - 1, V]` of the tokens after the first."""
    return losses.head_logits(outputs["hidden"], outputs["head"])[:, :-1]


def of_text(inputs: Inputs) -> dict[str, Any]:
    """The cross-entropy of a token batch whose first token is given."""
    batch = inputs.batch["inputs"]
    logits = next_logits(inputs.student)
    nats = -losses.token_log_probs(logits, batch["tokens"][:, 1:])
    real = batch.get("segments", jnp.ones_like(batch["tokens"]))[:, 1:] > 0
    return {"task": Masked(nats, real)}


def across(inputs: Inputs) -> dict[str, Any]:
    """The same, and both losses to the teacher, each a mean over the teacher's tokens."""
    batch = inputs.batch["inputs"]
    logits, teacher_logits = next_logits(inputs.student), next_logits(inputs.teacher)
    of_bytes = losses.token_log_probs(logits, batch["tokens"][:, 1:])
    of_pieces = losses.token_log_probs(teacher_logits, batch["teacher"]["tokens"][:, 1:])
    chunks = language.chunk_log_probs(of_bytes, batch["groups"], num_chunks=LENGTH)
    before = jnp.take_along_axis(logits, batch["first"][..., None], axis=1)
    where = batch["teacher"]["segments"][:, 1:] > 0
    return {
        "task": Masked(-of_bytes, jnp.ones(of_bytes.shape, bool)),
        "alm": Masked(losses.alm_limit(chunks, of_pieces), where),
        "uld": Masked(losses.uld(before, teacher_logits), where),
    }


def learns(model: Any, some: Any, weights: Any, teacher: Any, steps: int) -> Any:
    """`learn(params, data, teacher_params, key)` by some terms."""
    tx = optimizer(3e-3, steps)
    step = train.make_step(model, some, weights, tx, teacher=teacher)
    return learning(language.Learner(step), tx, steps, BATCH)


def bits(model: Any, params: Any, inputs: Any) -> float:
    """Bits per byte of rows, each of LENGTH bytes, by tokens of whatever kind."""

    @partial(jax.jit, static_argnums=0)
    def nats(model: Any, params: Any, inputs: Any) -> jax.Array:
        outputs, _ = model(params, None, inputs)
        found = language.fidelity(outputs, outputs, *language.next_tokens(inputs))
        return found.nats.total

    return float(nats(model, params, inputs)) / np.log(2) / (len(inputs["tokens"]) * LENGTH)


def main(seeds: int, steps: int) -> None:
    """Trains everything and prints a line per number."""
    learned, rest = texts()
    frequent = Counter(map(bytes, zip(learned, learned[1:], strict=False))).most_common(PAIRS)
    pairs = {pair: START + 1 + i for i, (pair, _) in enumerate(frequent)}
    whole, held_out = rows(learned, pairs), rows(rest, pairs)["inputs"]
    few = jax.tree.map(lambda x: x[: len(x) // 10], whole)
    large, small = decoder(2, 96, START + 1 + PAIRS), decoder(2, 48, START + 1)
    of_pairs, of_bytes = language.model(large), language.model(small)

    def teacher_model(params: Any, model_state: Any, inputs: Any, **options: Any) -> Any:
        return of_pairs(params, model_state, inputs["teacher"], **options)

    key = jax.random.key(0)
    teach = learns(of_pairs, of_text, WEIGHTS["fine-tuning"], None, 2 * steps)
    teacher = teach(jax.jit(large.init)(key), {"inputs": whole["inputs"]["teacher"]}, None, key)
    print(f"teacher: bits per byte: {bits(of_pairs, teacher, held_out['teacher']):.4f}", flush=True)
    learners = {}
    for name, weights in WEIGHTS.items():
        is_alone = set(weights) == {"task"}
        some, other = (of_text, None) if is_alone else (across, teacher_model)
        learners[name] = learns(of_bytes, some, weights, other, steps)
    found: dict[str, list[float]] = {name: [] for name in WEIGHTS}
    init = jax.jit(small.init)
    for seed in range(seeds):
        key = jax.random.key(seed + 1)
        for name, learn in learners.items():
            params = learn(init(key), few, teacher if "and" in name else None, key)
            found[name].append(bits(of_bytes, params, held_out))
            print(f"seed {seed}, {name}: {found[name][-1]:.4f}", flush=True)
    alone, alm, uld = (np.asarray(found[name]) for name in WEIGHTS)
    lines = {f"{name}: bits per byte": found[name] for name in WEIGHTS}
    lines["ALM below ULD, paired"] = (uld - alm).tolist()
    lines["ALM below fine-tuning, paired"] = (alone - alm).tolist()
    show(lines, digits=4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    main(given.seeds, given.steps)
