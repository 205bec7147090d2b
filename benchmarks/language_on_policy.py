"""A short task and five ways to learn it: which answers correctly, and which models answers best.

    python benchmarks/language_on_policy.py

The task is to write digits backwards. A teacher learns it from its rules. Students of one layer are
warmed up on 256 answers, then learn from a second set of prompts by fine-tuning on noisy answers,
from the teacher's answers, or from the teacher's distribution on the noisy answers or on their own.
Exact match is for greedy and for sampled answers, and bits per byte (a digit is a byte) for correct
ones, each on 512 new prompts. Intervals are 95% over seeds of the students.

Obtained on two CPU cores, jax 0.10.2, in two minutes; decoded greedily, every method answers all
correctly:

                    exact match, sampled, %   bits per byte
    teacher                  99.8             0.001
    fine-tuning              39.1 ± 6.6       0.154 ± 0.021
    sequence KD              72.9 ± 11.7      0.051 ± 0.022
    KD                       73.4 ± 11.8      0.050 ± 0.022
    GKD                      77.9 ± 5.1       0.041 ± 0.016
    on-policy                78.9 ± 5.0       0.039 ± 0.014

The means are in the expected order. Three seeds distinguish fine-tuning from the rest, but not the
other four from each other. With six digits and students of 24 channels, all but fine-tuning reached
99%.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from _seeds import learning, optimizer, show

from kdtl_jax import language, models

DIGITS, SEPARATOR, END = 8, 10, 11
PROMPT, LENGTH, BATCH = DIGITS + 1, 2 * DIGITS + 2, 64
METHODS = {
    "fine-tuning": language.sft,
    "sequence KD": language.seqkd,
    "KD": language.kd,
    "GKD": language.gkd,
    "on-policy": language.opd,
}


def decoder(layers: int, width: int) -> models.Decoder:
    """A small one with learned positions."""
    return models.decoder(
        models.DecoderConfig(
            vocabulary=END + 1,
            width=width,
            layers=layers,
            heads=2,
            key_heads=2,
            head_width=width // 2,
            hidden=2 * width,
            learned_positions=LENGTH,
        )
    )


def questions(key: jax.Array, count: int, noise: float = 0.0) -> dict[str, Any]:
    """Rows of digits, a separator, the digits backwards and an end; some answered wrongly."""
    ours, where, wrong = jax.random.split(key, 3)
    digits = jax.random.randint(ours, (count, DIGITS), 0, 10)
    is_wrong = jax.random.bernoulli(where, noise, digits.shape)
    answers = jnp.where(is_wrong, jax.random.randint(wrong, digits.shape, 0, 10), digits[:, ::-1])
    middle, end = (jnp.full((count, 1), token) for token in (SEPARATOR, END))
    tokens = jnp.concatenate([digits, middle, answers, end], axis=1)
    learned = jnp.broadcast_to(jnp.arange(LENGTH) >= PROMPT, tokens.shape)
    inputs = {"tokens": tokens, "segments": jnp.ones_like(tokens), "learned": learned}
    return {"inputs": inputs}


def learns(method: Any, student: models.Decoder, teacher: models.Decoder, steps: int) -> Any:
    """`learn(params, data, teacher_params, key)` by a method."""
    tx = optimizer(3e-3, steps)
    setup = language.Setup(student, tx, teacher=teacher, prompt=PROMPT, stop_tokens=(END,))
    return learning(method(setup), tx, steps, BATCH)


def measuring(student: models.Decoder) -> Any:
    """`measure(params, data, key)`: exact match, greedy and sampled, and bits per byte."""
    model = language.model(student)

    @jax.jit
    def measure(params: Any, data: Any, key: jax.Array) -> dict[str, jax.Array]:
        inputs: Any = data["inputs"]
        keys = jax.random.split(key, len(inputs["tokens"]))
        results = {}
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            answers = language.sample(
                student, params, inputs["tokens"][:, :PROMPT], keys=keys, length=DIGITS + 1,
                temperature=temperature,
            )  # fmt: skip
            is_right = jnp.all(answers.tokens == inputs["tokens"][:, PROMPT:], axis=1)
            results[f"exact match, {name}, %"] = 100 * jnp.mean(is_right)
        outputs, _ = model(params, None, inputs)
        compared = language.fidelity(outputs, outputs, *language.next_tokens(inputs))
        return {**results, "bits per byte": compared.nats.value() / jnp.log(2)}

    return measure


def main(seeds: int, steps: int, noise: float) -> None:
    """Trains everything and prints a line per number."""
    large, small = decoder(2, 48), decoder(1, 16)
    held_out = questions(jax.random.key(1000), 512)
    teach = learns(language.sft, large, large, 8 * steps)
    key = jax.random.key(0)
    teacher = teach(jax.jit(large.init)(key), questions(key, 8192), None, key)
    results: dict[str, list[float]] = {}

    def note(name: str, measured: Any) -> None:
        for what, value in measured.items():
            results.setdefault(f"{name}: {what}", []).append(float(value))

    note("teacher", measuring(large)(teacher, held_out, key))
    warm_up = learns(language.sft, small, large, steps)
    learners = {name: learns(method, small, large, steps) for name, method in METHODS.items()}
    measure, init = measuring(small), jax.jit(small.init)
    for seed in range(seeds):
        key, other = jax.random.split(jax.random.key(seed + 1))
        start = warm_up(init(key), questions(key, 256), None, key)
        note("warm-up alone", measure(start, held_out, key))
        data = questions(other, 1024, noise)
        for name, learn in learners.items():
            note(name, measure(learn(start, data, teacher, key), held_out, key))
            last = [f"{v[-1]:.3f}" for n, v in results.items() if n.startswith(f"{name}: ")]
            print(f"seed {seed}, {name}: {', '.join(last)}", flush=True)
    show(results, digits=3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--noise", type=float, default=0.1)
    given = parser.parse_args()
    main(given.seeds, given.steps, given.noise)
