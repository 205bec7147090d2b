"""KD train step: this library against a hand-written JAX step and PyTorch, interleaved, as ratios.

Command:   python benchmarks/step_time.py [--rounds 15] [--json out.json]
Peers:     PyTorch eager and torch.compile (skipped with a line if torch is not installed;
           `pip install torch==2.13.0`).
Machine:   Intel Xeon 2.5 GHz (AVX-512), virtual, 2 cores, nothing else running; jax 0.10.2, torch
           2.13.0, Python 3.11.7; OMP_WAIT_POLICY=PASSIVE, 15 rounds.
RESULT:    median us per step (least), times faster than torch eager on two threads, speed
           relative to the hand-written step (both medians of paired rounds)
           MLP  hand-written JAX step            343 (231)     6.0   1.00
                the same, this library's KL      327 (230)     6.3   1.01
                jit_step, plain KL               344 (227)     6.1   0.97
                jit_step                         311 (240)     6.0   1.04
                jit_epoch, one scan              213 (187)     7.9   1.38
                jit_epoch, cached teacher         85 (59)     25.6   4.29
                torch eager, two / one thread   1863 (1593) / 1407 (1319)
                torch.compile, two / one thread 1684 (1469) / 1300 (1216)
           CNN  hand-written JAX step          17940 (15290)   1.10  1.00
                jit_step                       18052 (15370)   1.05  0.96
                jit_step, models.Conv3x3       17049 (13517)   1.17  1.05
                jit_epoch, single steps        18227 (14809)   1.01  0.96
                jit_epoch, cached teacher      13143 (10710)   1.48  1.38
                torch eager, two / one thread  20391 (16786) / 27362 (23120)
                torch.compile, two / one       30894 (24487) / 51276 (42852)
           Against torch eager on one thread, the better count for the MLP, jit_epoch is 6.6 times
           faster (ratio of the medians). It takes a sixth of the better torch.compile's time. The
           CNN is on par with torch eager and 1.7 times faster than torch.compile. On an AMD EPYC
           (AVX-512, 2 cores) the CNN's jit_step was 1.2 times faster than torch eager, with
           models.Conv3x3 1.31 times, and 1.7 times faster than torch.compile.

Two models: an MLP 64-256-256-10 teaching 64-32-10, and a CNN on 28x28 images, about 200k
parameters teaching 20k; batch 64, float32, SGD with momentum, temperature 4. A round runs every
form once for an epoch of the same batches; medians and spreads are over rounds, ratios are medians
of paired rounds.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _rounds import Form, machine, measure

from kdtl_jax import losses, train
from kdtl_jax.models import Conv3x3

BATCH, TEMPERATURE, RATE, MOMENTUM = 64, 4.0, 0.05, 0.9
FLOOR = "hand-written jax step"


def mlp_init(key: jax.Array, widths: list[int]) -> Any:
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (i, o)) / i**0.5, "bias": jnp.zeros((o,))}
        for k, i, o in zip(keys, widths, widths[1:], strict=False)
    ]


def mlp_apply(params: Any, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def as_model(apply: Callable[[Any, jax.Array], jax.Array]) -> Any:
    def model(params: Any, state: Any, inputs: Any, *, key: Any = None, train: bool = False) -> Any:
        return {"logits": apply(params, inputs)}, state

    return model


def plain_kl(logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    log_t = jax.nn.log_softmax(teacher_logits / TEMPERATURE)
    log_s = jax.nn.log_softmax(logits / TEMPERATURE)
    return jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1) * TEMPERATURE**2


def exact_kl(logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    return losses.kd_kl(logits, teacher_logits, temperature=TEMPERATURE)


def hand_written_step(apply: Any, tx: optax.GradientTransformation, kd_loss: Any) -> Any:
    """The floor: the step one would write without any library."""

    def loss_fn(params: Any, teacher_logits: jax.Array, batch: Any) -> jax.Array:
        logits = apply(params, batch["inputs"])
        kd = kd_loss(logits, teacher_logits)
        task = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return 0.9 * jnp.mean(kd) + 0.1 * jnp.mean(task)

    def step(params: Any, opt_state: Any, teacher: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, apply(teacher, batch["inputs"]), batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def with_loss(kd_loss: Any) -> Any:
    def terms(x: Any) -> Any:
        student = x.student["logits"]
        return {
            "kd": kd_loss(student, x.teacher["logits"]),
            "task": optax.softmax_cross_entropy_with_integer_labels(student, x.batch["labels"]),
        }

    return terms


def jax_forms(kind: str, apply: Any, teacher: Any, student: Any, data: Any, steps: int) -> Any:
    tx = optax.sgd(RATE, momentum=MOMENTUM)
    model, weights, key = as_model(apply), {"kd": 0.9, "task": 0.1}, jax.random.key(0)
    terms = with_loss(exact_kl)
    step = train.make_step(model, terms, weights, tx, teacher=model)
    plain_step = train.make_step(model, with_loss(plain_kl), weights, tx, teacher=model)
    cached_step = train.make_step(model, terms, weights, tx)
    epoch, cached_epoch = train.jit_epoch(step), train.jit_epoch(cached_step)
    index = train.epoch_index(key, 0, len(data["labels"]), BATCH)[:steps]
    batches = [train.take(data, rows) for rows in index]
    cached = {**data, "teacher": {"logits": jax.jit(apply)(teacher, data["inputs"])}}

    def state() -> train.TrainState:
        return train.init_state(student, tx, key=key)

    path = train.epoch_path(step, state(), data, BATCH, teacher)

    def hand_written(kd_loss: Any) -> Form:
        run = hand_written_step(apply, tx, kd_loss)
        params, opt_state = jax.tree.map(jnp.copy, student), tx.init(student)

        def form() -> None:
            nonlocal params, opt_state
            for batch in batches:
                params, opt_state, _ = run(params, opt_state, teacher, batch)
            jax.block_until_ready(params)

        return form

    def stepped(step: train.Step) -> Form:
        run, s = train.jit_step(step), state()

        def form() -> None:
            nonlocal s
            for batch in batches:
                s, _ = run(s, batch, teacher)
            jax.block_until_ready(s)

        return form

    def epochs(run: train.Epoch, teacher: Any, data: Any) -> Form:
        s = state()

        def form() -> None:
            nonlocal s
            s, _ = jax.block_until_ready(run(s, data, index, teacher))

        return form

    forms = {
        FLOOR: hand_written(plain_kl),
        "hand-written, this library's KL": hand_written(exact_kl),
        "kdtl jit_step, plain KL": stepped(plain_step),
        "kdtl jit_step": stepped(step),
        f"kdtl jit_epoch ({path})": epochs(epoch, teacher, data),
        f"kdtl jit_epoch ({path}), cached teacher": epochs(cached_epoch, None, cached),
    }
    if kind == "cnn":
        layers = train.make_step(with_library_layers, terms, weights, tx, teacher=model)
        forms["kdtl jit_step, models.Conv3x3"] = stepped(layers)
    return forms


def cnn_init(key: jax.Array, channels: tuple[int, int], hidden: int) -> Any:
    k1, k2, k3 = jax.random.split(key, 3)
    c1, c2 = channels
    return {
        "conv1": jax.random.normal(k1, (3, 3, 1, c1)) / 3,
        "conv2": jax.random.normal(k2, (3, 3, c1, c2)) / (9 * c1) ** 0.5,
        "dense": mlp_init(k3, [49 * c2, hidden, 10]),
    }


def cnn_apply(params: Any, x: jax.Array) -> jax.Array:
    for name in ("conv1", "conv2"):
        x = jax.lax.conv_general_dilated(
            x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        b, h, w, c = x.shape
        x = jax.nn.relu(x).reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
    return mlp_apply(params["dense"], x.reshape(x.shape[0], -1))


def with_library_layers(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> Any:
    """`cnn_apply` with this library's convolution, which trains as a matrix product on a CPU."""
    x = inputs
    for name in ("conv1", "conv2"):
        kernel = params[name]
        layer = {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}
        x: Any = Conv3x3(kernel.shape[-1]).apply({"params": layer}, x, train)
        b, h, w, c = x.shape
        x = jax.nn.relu(x).reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
    return {"logits": mlp_apply(params["dense"], x.reshape(x.shape[0], -1))}, model_state


def torch_forms(kind: str, data: Any, steps: int) -> dict[str, Form]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    def mlp(widths: list[int]) -> nn.Module:
        layers: list[nn.Module] = []
        for i, o in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(i, o), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def cnn(channels: tuple[int, int], hidden: int) -> nn.Module:
        c1, c2 = channels
        body = [nn.Conv2d(1, c1, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)]
        body += [nn.Conv2d(c1, c2, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*body, nn.Flatten(), mlp([49 * c2, hidden, 10]))

    def build() -> tuple[nn.Module, nn.Module]:
        if kind == "mlp":
            return mlp([64, 256, 256, 10]), mlp([64, 32, 10])
        return cnn((32, 64), 56), cnn((8, 16), 24)

    x, y = torch.tensor(np.array(data["inputs"])), torch.tensor(np.array(data["labels"])).long()
    if kind == "cnn":
        x = x.permute(0, 3, 1, 2).contiguous()
    batches = [
        (x[i * BATCH : (i + 1) * BATCH], y[i * BATCH : (i + 1) * BATCH]) for i in range(steps)
    ]

    def make(compiled: bool, threads: int) -> Form:
        teacher, student = build()
        teacher.eval()
        optimizer = torch.optim.SGD(student.parameters(), lr=RATE, momentum=MOMENTUM)

        def step(inputs: Any, labels: Any) -> None:
            with torch.no_grad():
                soft = F.softmax(teacher(inputs) / TEMPERATURE, dim=-1)
            logits = student(inputs)
            log_student = F.log_softmax(logits / TEMPERATURE, dim=-1)
            kd = F.kl_div(log_student, soft, reduction="batchmean") * TEMPERATURE**2
            loss = 0.9 * kd + 0.1 * F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        run = torch.compile(step) if compiled else step

        def epoch() -> None:
            torch.set_num_threads(threads)  # small models are faster on one
            for inputs, labels in batches:
                run(inputs, labels)

        return epoch

    cores = os.cpu_count() or 1
    results = {"torch eager": make(False, cores), "torch.compile": make(True, cores)}
    if cores > 1:
        results |= {"torch eager, one thread": make(False, 1)}
        results |= {"torch.compile, one thread": make(True, 1)}
    return results


def table(kind: str, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    base = "torch eager" if "torch eager" in seconds else FLOOR
    rows = []
    print(f"\n{kind}: microseconds per step; ratios are medians of paired rounds")
    print(f"{'form':44s} {'median':>9s} {'min':>9s} {'max':>9s}  faster than {base} / the floor")
    for name, times in seconds.items():
        ratios = {
            other: statistics.median(b / a for a, b in zip(times, seconds[other], strict=True))
            for other in seconds
        }
        us = [1e6 * t for t in (statistics.median(times), min(times), max(times))]
        floor = ratios[FLOOR]
        print(
            f"{name:44s} {us[0]:9.1f} {us[1]:9.1f} {us[2]:9.1f}  {ratios[base]:6.2f}x {floor:6.3f}x"
        )
        rows.append({"model": kind, "form": name, "us": us, "speedup_over": ratios})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Example: python benchmarks/step_time.py")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", choices=("mlp", "cnn"), help="one of the two; default: both")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    versions = machine()
    print(versions)
    rng, rows = np.random.default_rng(0), []
    for kind, shape, steps in [("mlp", (64,), 100), ("cnn", (28, 28, 1), 20)]:
        if args.model not in (None, kind):
            continue
        data = {
            "inputs": jnp.asarray(rng.normal(size=(steps * BATCH, *shape)), jnp.float32),
            "labels": jnp.asarray(rng.integers(0, 10, steps * BATCH), jnp.int32),
        }
        k1, k2 = jax.random.split(jax.random.key(0))
        if kind == "mlp":
            apply, pair = mlp_apply, (mlp_init(k1, [64, 256, 256, 10]), mlp_init(k2, [64, 32, 10]))
        else:
            apply, pair = cnn_apply, (cnn_init(k1, (32, 64), 56), cnn_init(k2, (8, 16), 24))
        forms = jax_forms(kind, apply, *pair, data, steps)
        try:
            forms |= torch_forms(kind, data, steps)
        except ImportError:
            print("torch is not installed: the peers are left out (pip install torch==2.13.0)")
        rows += table(kind, measure(forms, args.rounds, steps=steps))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"versions": versions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
