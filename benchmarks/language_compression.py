"""Pruned and quantized language models: what distillation gives beyond training.

    python benchmarks/language_compression.py pruned
    python benchmarks/language_compression.py quantized
    python benchmarks/language_compression.py converged --steps 200

A teacher of four layers learns the package's text, in bytes, for every seed.

- pruned: two of its layers distilled, the same two fine-tuned, and two new ones trained, all for
  the same number of steps.
- quantized: its kernels in 4 and 3 bits, with a scale per 32 inputs: trained with rounding on the
  teacher (QAD) or on the text (QAT), or only rounded. KL to the teacher.

Intervals are 95% over seeds; differences are paired. Obtained on two CPU cores, jax 0.10.2:

    pruned                       KL(T||S), nats      bits per byte
    teacher                      0                   3.11 ± 0.59
    pruned, distilled            0.020 ± 0.008       3.13 ± 0.58
    pruned, fine-tuned           0.104 ± 0.040       3.01 ± 0.50
    from nothing, fine-tuned     0.628 ± 0.414       4.05 ± 0.24
    fine-tuned above distilled   0.083 ± 0.045       -0.119 ± 0.088
    from nothing above pruned    0.524 ± 0.430       1.033 ± 0.530

Distilled is nearest to the teacher, and pruned beats new layers. In bits per byte,
fine-tuning is ahead: this teacher is still learning, and its pruned layers, trained as long again,
surpass it.

quantized, KL(T||S) by seed:

    4 bits: QAD .0010 .0002 .0005; rounding .0094 .0090 .0133; QAT .0164 .0161 .0167
    3 bits: QAD .0045 .0009 .0018; rounding .0489 .0234 .0428; QAT .0204 .0166 .0186

QAD is nearest by far, but at 4 bits QAT is farther away than rounding: with a teacher that is still
learning, the text moves the weights farther from it than 4 bits do. `converged` (--steps 200) lets
it learn a fiftieth of the text for up to 110 epochs. KL on the learned text, by seed, and the bits
per byte that the rounded teacher reached there:

    seed    bits per byte    QAD       QAT       rounding    QAT over rounding
    0       0.06             0.0004    0.0015    0.0022      0.68
    2       2.00             0.0021    0.0611    0.0510      1.20
    1       3.51             0.0002    0.0174    0.0119      1.47

QAD beats QAT, which beats rounding, if the teacher has nothing left to learn: one of these three.
On held-out text the KL is .002 to .23 for QAD, .04 to .18 for QAT and .01 to .16 for rounding; for
a teacher that knows its text by heart (seed 0), rounding is nearest there.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _seeds import learning, optimizer, show, texts

from kdtl_jax import language, models, transforms

LENGTH, BATCH, LAYERS, WIDTH = 64, 16, 4, 96
KEPT = (0, 2)
KERNELS = r"layers_\d+/(attention|mlp)/.*kernel"


def decoder(layers: int) -> models.Decoder:
    """A small one on bytes, with learned positions."""
    config = models.DecoderConfig(
        vocabulary=257, width=WIDTH, layers=layers, heads=4, key_heads=4, head_width=WIDTH // 4,
        hidden=3 * WIDTH, learned_positions=LENGTH, is_tied=True,
    )  # fmt: skip
    return models.decoder(config)


def rows(text: bytes) -> dict[str, Any]:
    """The text in rows."""
    count = len(text) // LENGTH
    tokens = np.frombuffer(text[: count * LENGTH], np.uint8).reshape(count, LENGTH)
    return {"inputs": {"tokens": jnp.asarray(tokens, jnp.int32)}}


def learns(method: Any, steps: int, rate: float, student: Any, teacher: Any, weights: Any) -> Any:
    """`learn(params, data, teacher_params, key)` by a method."""
    tx = optimizer(rate, steps)
    learner = method(language.Setup(student, tx, teacher=teacher, weights=weights))
    return learning(learner, tx, steps, BATCH)


def measuring(student: Any, teacher: Any, weights: Any = language.as_they_are) -> Any:
    """`measure(params, teacher_params, inputs)`: bits per byte, and KL to the teacher."""
    model, teacher_model = language.model(student, weights), language.model(teacher)

    @jax.jit
    def measure(params: Any, teacher_params: Any, inputs: Any) -> dict[str, jax.Array]:
        outputs, _ = model(params, None, inputs)
        teacher_outputs, _ = teacher_model(teacher_params, None, inputs)
        result = language.fidelity(outputs, teacher_outputs, *language.next_tokens(inputs))
        nats = result.nats.value() / jnp.log(2)
        return {"bits per byte": nats, "KL(T||S)": result.forward_kl.value()}

    return measure


def taught(steps: int) -> Any:
    """`teach(data, key)`."""
    teacher = decoder(LAYERS)
    learn = learns(language.sft, 4 * steps, 2e-3, teacher, teacher, language.as_they_are)
    init = jax.jit(teacher.init)
    return lambda data, key: learn(init(key), data, None, key)


def pruned(seeds: range, steps: int) -> None:
    """Half of the layers distilled, the same fine-tuned, the same from nothing."""
    (data, held_out), same = split(), language.as_they_are
    teacher, student = decoder(LAYERS), decoder(len(KEPT))
    teach, init = taught(steps), jax.jit(student.init)
    measure, own = measuring(student, teacher), measuring(teacher, teacher)
    kd, sft = (
        learns(method, steps, 2e-3, student, teacher, same)
        for method in (language.kd, language.sft)
    )
    shapes = jax.eval_shape(init, jax.random.key(0))
    rename = transforms.layer_map(r"layers_(\d+)/.*", KEPT)
    results: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        key, other = jax.random.split(jax.random.key(seed))
        teacher_params = teach(data, key)
        half, _ = transforms.transfer(teacher_params, shapes, rename=rename)
        note(results, "teacher", own(teacher_params, teacher_params, held_out))
        for name, learn, start in (
            ("pruned, distilled", kd, half),
            ("pruned, fine-tuned", sft, half),
            ("from nothing, fine-tuned", sft, init(other)),
        ):
            note(
                results,
                name,
                measure(learn(start, data, teacher_params, key), teacher_params, held_out),
            )
    show_paired(results)


def quantized(
    seeds: range, steps: int, share: float = 1.0, depths: tuple[int, ...] = (4, 3)
) -> None:
    """At 4 and 3 bits: distilled, fine-tuned, and only rounded."""
    data, held_out = split(share)
    model, teach = decoder(LAYERS), taught(steps)
    results: dict[str, dict[str, list[float]]] = {}
    ways = {}
    for bits in depths:
        quantizer = partial(transforms.int_by_group, bits=bits, group=32)
        rounded = partial(transforms.fake_quantize, quantizer=quantizer, where=KERNELS)
        measure = measuring(model, model, rounded)
        for name, method in (("QAD", language.qad), ("QAT", language.sft)):
            ways[f"{bits} bits, {name}"] = (
                learns(method, steps, 3e-4, model, model, rounded), measure,
            )  # fmt: skip
        ways[f"{bits} bits, rounding"] = (lambda params, data, teacher_params, key: params), measure
    for seed in seeds:
        key = jax.random.key(seed)
        teacher_params = teach(data, key)
        for name, (learn, measure) in ways.items():
            params = learn(teacher_params, data, teacher_params, key)
            note(results, name, measure(params, teacher_params, held_out))
            if share < 1:
                on_learned = measure(params, teacher_params, data["inputs"])
                note(results, f"{name}, on what was learned", on_learned)
    show_paired(results)


def converged(seeds: range, steps: int) -> None:
    """The same at 4 bits, of a teacher that has learned all that its text, a fiftieth, has."""
    quantized(seeds, steps, share=0.02, depths=(4,))


def split(share: float = 1.0) -> tuple[Any, Any]:
    """What is learned from, the first share of it, and what is measured on."""
    learned, held_out = texts()
    learned = learned[: int(share * len(learned))]
    return rows(learned), rows(held_out)["inputs"]


def note(found: Any, name: str, measured: Any) -> None:
    """Keeps a measurement and prints it."""
    values = {what: float(value) for what, value in measured.items()}
    for what, value in values.items():
        found.setdefault(name, {}).setdefault(what, []).append(value)
    print(name, values, flush=True)


def show_paired(found: dict[str, dict[str, list[float]]]) -> None:
    """A line per number, and the paired differences of neighbors."""
    lines = {f"{name}: {what}": v for name, each in found.items() for what, v in each.items()}
    names = [name for name in found if name != "teacher"]
    for one, two in zip(names, names[1:], strict=False):
        for what, values in found[one].items():
            paired = np.subtract(found[two][what], values).tolist()
            lines[f"{two} above {one}, paired: {what}"] = paired
    show(lines, digits=5)


if __name__ == "__main__":
    proofs = {f.__name__: f for f in (pruned, quantized, converged)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("proof", choices=proofs)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    proofs[given.proof](range(given.first, given.first + given.seeds), given.steps)
