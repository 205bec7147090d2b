"""A sweep of students as one program, compared with the same students one after another, as ratios.

Command:   python benchmarks/sweep.py [--rounds 5] [--model mlp] [--json out.json]
Peers:     PyTorch on one and on all threads: all MLP students by `torch.func.vmap` under
           `torch.compile`, and eager students one after another (skipped with a line if torch is
           not installed; `pip install torch==2.13.0`).
Machine:   Intel Xeon 2.5 GHz (AVX-512), virtual, 2 cores, nothing else running; jax 0.10.2, torch
           2.13.0, Python 3.11.7; OMP_WAIT_POLICY=PASSIVE, 5 rounds.
RESULT:    us per student-step (and times faster than this library one after another)
           MLP, live teacher:   one after another 247, vmap of 64 49 (5.3x), lax.map 199 (1.2x);
                                torch 1321 on one thread, 1585 on two
           MLP, cached teacher: one after another 86, vmap of 64 47 (1.9x), lax.map 55 (1.5x);
                                torch 1029 on one thread, 1223 on two
           CNN, cached teacher: one after another 8764, vmap of 16 8784 (0.88x), lax.map 8794
                                (0.93x), one program per student 7390 (1.09x); torch 9191 on one
                                thread, 8161 on two
           `sweep.fastest` chose vmap for the MLP and one program per student for the CNN: never
           slower than one after another. Against PyTorch one after another (its better thread
           count): MLP 27x with a live teacher, 22x with a cached one; CNN 1.1x.
           On an AMD EPYC (AVX-512, 2 cores) the MLP sweep with a live teacher ran 7.5 to 9.6
           times faster than one after another (29 us; 8 times on a quiet machine), with a cached
           one 2.0 times.
           Against `torch.func.vmap` under `torch.compile` at its better thread count (one), MLP, on
           two cores of a quiet AMD EPYC, 5 and 9 rounds: live teacher 19.8 and 22.5 us against 27.6
           and 28.5, cached 21.1 and 20.8 against 24.6 and 25.7; ratio of the medians 1.40 and 1.27
           live (1.3), 1.17 and 1.24 cached; of the least 1.47 and 1.49 live, 1.26 and 1.34 cached.
           On a quiet AMD EPYC of family 26, 5 rounds: live teacher 11.7 us against 19.2 (1.6),
           cached 11.7 against 17.2 (1.5).

64 MLP students (8 seeds x 8 temperatures; 64-32-10 taught by 64-256-256-10, batch 64, 50 steps),
and 16 CNN students (8 seeds x 2 temperatures, 28x28, about 20k parameters taught by 200k, 5 steps).
"One after another" is this library's own compiled epoch, one call per student; all students use
the same batch order. With a live teacher, the sweep runs the teacher's forward pass once for all
students, which is most of its gain; cached outputs leave nothing of that kind to save.
"""

import argparse
import json
import os
import statistics
from typing import Any

import _rounds
import jax
import jax.numpy as jnp
import numpy as np
import optax
from step_time import BATCH, MOMENTUM, RATE, as_model, cnn_apply, cnn_init, mlp_apply, mlp_init

from kdtl_jax import losses, train
from kdtl_jax.interop import linen
from kdtl_jax.models import cnn
from kdtl_jax.train import sweep

WEIGHTS = {"kd": 0.9, "task": 0.1}


def experiment(init: Any, model: Any, teacher: Any) -> sweep.Experiment:
    """Trains one student; all students read one batch order, so that rows are gathered once."""

    def run(
        point: dict[str, jax.Array], teacher_params: Any, data: Any, index: jax.Array
    ) -> jax.Array:
        def terms(x: Any) -> Any:
            student, teacher = x.student["logits"], x.teacher["logits"]
            return {
                "kd": losses.kd_kl(student, teacher, temperature=point["temperature"]),
                "task": optax.softmax_cross_entropy_with_integer_labels(student, x.batch["labels"]),
            }

        tx = optax.sgd(RATE, momentum=MOMENTUM)
        key = jax.random.key(point["seed"])
        step = train.make_step(model, terms, WEIGHTS, tx, teacher=teacher)
        state = train.init_state(init(key), tx, key=key)
        _, metrics = train.scan_epoch(step)(state, data, index, teacher_params)
        return metrics["loss"].value()[-1]

    return run


def one_after_another(
    init: Any, model: Any, teacher: Any, points: Any, teacher_params: Any, data: Any, index: Any
) -> Any:
    """This library's fastest single runs: a compiled epoch per student, traced temperature."""

    def terms(x: Any) -> Any:
        student, teacher = x.student["logits"], x.teacher["logits"]
        return {
            "kd": losses.kd_kl(student, teacher, temperature=x.memory),
            "task": optax.softmax_cross_entropy_with_integer_labels(student, x.batch["labels"]),
        }

    tx = optax.sgd(RATE, momentum=MOMENTUM)
    epoch = train.jit_epoch(train.make_step(model, terms, WEIGHTS, tx, teacher=teacher))
    start = jax.jit(
        lambda point: train.init_state(
            init(jax.random.key(point["seed"])),
            tx,
            key=jax.random.key(point["seed"]),
            memory=point["temperature"],
        )
    )

    def run() -> Any:
        results = []
        for i in range(sweep.size(points)):
            state = start({name: column[i] for name, column in points.items()})
            _, metrics = epoch(state, data, index, teacher_params)
            results.append(metrics["loss"].value()[-1])
        return jax.block_until_ready(jnp.stack(results))

    return run


def torch_one_after_another(
    kind: str, live: bool, threads: int, points: Any, data: Any, steps: int
) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional as F

    x = torch.tensor(np.array(data["inputs"]))
    x = x.permute(0, 3, 1, 2).contiguous() if kind == "cnn" else x
    y = torch.tensor(np.array(data["labels"])).long()
    soft = torch.tensor(np.array(data["teacher"]["logits"]))

    def student() -> nn.Module:
        if kind == "mlp":
            return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        return nn.Sequential(
            *[nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Flatten(), nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10)],
        )

    large = nn.Sequential(
        *[nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    )

    def teach(inputs: Any, rows: slice) -> Any:
        with torch.no_grad():
            return large(inputs) if live else soft[rows]

    def run() -> None:
        torch.set_num_threads(threads)  # small models are faster on one
        for t in np.asarray(points["temperature"]):
            model = student()
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
            for i in range(steps):
                rows = slice(i * BATCH, (i + 1) * BATCH)
                logits = model(x[rows])
                taught = teach(x[rows], rows)
                log_s, p_t = F.log_softmax(logits / t, -1), F.softmax(taught / t, -1)
                kd = F.kl_div(log_s, p_t, reduction="batchmean") * float(t) ** 2
                loss = 0.9 * kd + 0.1 * F.cross_entropy(logits, y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return run


def torch_together(live: bool, threads: int, points: Any, data: Any, steps: int) -> Any:
    """All MLP students in one compiled `torch.func` program, on one shared batch."""
    import torch
    from torch import func
    from torch.nn import functional as F

    students = sweep.size(points)
    x = torch.tensor(np.array(data["inputs"]))
    y = torch.tensor(np.array(data["labels"])).long()
    soft = torch.tensor(np.array(data["teacher"]["logits"]))
    temperatures = torch.tensor(np.array(points["temperature"]))

    def weights(sizes: list[int], lead: tuple[int, ...]) -> list[Any]:
        return [
            torch.randn(*lead, *shape) * scale
            for i, o in zip(sizes, sizes[1:], strict=False)
            for shape, scale in (((i, o), i**-0.5), ((o,), 0.0))
        ]

    def forward(params: list[Any], x: Any) -> Any:
        *hidden, kernel, bias = params
        for w, b in zip(hidden[::2], hidden[1::2], strict=True):
            x = torch.relu(x @ w + b)
        return x @ kernel + bias

    def loss(params: list[Any], temperature: Any, x: Any, y: Any, taught: Any) -> Any:
        logits = forward(params, x)
        log_s = F.log_softmax(logits / temperature, -1)
        log_t = F.log_softmax(taught / temperature, -1)
        kd = (log_t.exp() * (log_t - log_s)).sum(-1).mean() * temperature**2
        return 0.9 * kd + 0.1 * F.cross_entropy(logits, y)

    gradients = func.vmap(func.grad_and_value(loss), in_dims=(0, 0, None, None, None))
    large = weights([64, 256, 256, 10], ())

    @torch.compile
    def step(params: list[Any], momenta: list[Any], x: Any, y: Any, taught: Any) -> Any:
        taught = forward(large, x) if live else taught
        grads, values = gradients(params, temperatures, x, y, taught)
        momenta = [MOMENTUM * m + g for m, g in zip(momenta, grads, strict=True)]
        return [p - RATE * m for p, m in zip(params, momenta, strict=True)], momenta, values

    def run() -> Any:
        torch.set_num_threads(threads)
        params = weights([64, 32, 10], (students,))
        momenta, values = [torch.zeros_like(p) for p in params], None
        with torch.no_grad():
            for i in range(steps):
                rows = slice(i * BATCH, (i + 1) * BATCH)
                params, momenta, values = step(params, momenta, x[rows], y[rows], soft[rows])
        return values

    return run


def measure(kind: str, rounds: int) -> list[dict[str, Any]]:
    rng, (k1, k2) = np.random.default_rng(0), jax.random.split(jax.random.key(0))
    steps = 50 if kind == "mlp" else 5
    shape = (64,) if kind == "mlp" else (28, 28, 1)
    inputs = jnp.asarray(rng.normal(size=(steps * BATCH, *shape)), jnp.float32)
    if kind == "mlp":
        teacher_params, apply = mlp_init(k1, [64, 256, 256, 10]), mlp_apply
        init, model = (lambda key: mlp_init(key, [64, 32, 10])), as_model(mlp_apply)
        points = sweep.grid(seed=range(8), temperature=np.geomspace(1, 20, 8))
    else:
        teacher_params, apply = cnn_init(k1, (32, 64), 56), cnn_apply
        module = linen.model(cnn([8, 16], classes=10))
        init, model = (lambda key: module.init(key, inputs[:1]).params), module.apply
        points = sweep.grid(seed=range(8), temperature=[1.0, 4.0])
    labels = jnp.asarray(rng.integers(0, 10, steps * BATCH), jnp.int32)
    taught = {"logits": jax.jit(apply)(teacher_params, inputs)}
    index = train.epoch_index(k2, 0, steps * BATCH, BATCH)
    data = {"inputs": inputs, "labels": labels}
    forms: dict[str, _rounds.Form] = {}
    for name in ("live", "cached") if kind == "mlp" else ("cached",):
        teacher = as_model(apply) if name == "live" else None
        given = teacher_params if name == "live" else None
        arrays = data if name == "live" else {**data, "teacher": taught}
        forms[f"{name}: one after another"] = one_after_another(
            init, model, teacher, points, given, arrays, index
        )
        run = experiment(init, model, teacher)
        programs = {
            "vmap": sweep.vmap(run),
            "map": sweep.map(run),
            "sequential": sweep.sequential(run),
        }
        for form, every in programs.items():
            forms[f"{name}: sweep.{form}"] = lambda every=every, given=given, arrays=arrays: (
                jax.block_until_ready(every(points, given, arrays, index))
            )
        chosen = sweep.fastest(list(programs.values()), points, given, arrays, index)
        print(f"\n{kind}, {name} teacher: sweep.fastest chooses sweep.{list(programs)[chosen]}")
        try:
            for threads in sorted({1, os.cpu_count() or 1}):
                if kind == "mlp":
                    forms[f"{name}: torch.func vmap, compiled, {threads} threads"] = torch_together(
                        name == "live", threads, points, {**data, "teacher": taught}, steps
                    )
                forms[f"{name}: torch eager, {threads} threads"] = torch_one_after_another(
                    kind, name == "live", threads, points, {**data, "teacher": taught}, steps
                )
        except ImportError:
            print("torch is not installed: the peer is left out (pip install torch==2.13.0)")
    seconds = _rounds.measure(forms, rounds)
    students = sweep.size(points)
    print(f"{kind}: {students} students x {steps} steps; ratios are medians of paired rounds")
    rows = []
    for name, times in seconds.items():
        base = f"{name.partition(':')[0]}: one after another"
        ratio = statistics.median(b / a for a, b in zip(times, seconds[base], strict=True))
        us, least = (1e6 * t / (students * steps) for t in (statistics.median(times), min(times)))
        print(f"{name:38s} {us:8.1f} us per student-step (min {least:8.1f})  {ratio:5.2f}x {base}")
        rows.append({"model": kind, "form": name, "us": us, "least_us": least, "speedup": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Example: python benchmarks/sweep.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=("mlp", "cnn"), help="one of the two; default: both")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    versions = _rounds.machine()
    print(versions)
    kinds = ("mlp", "cnn") if args.model is None else (args.model,)
    rows = [row for kind in kinds for row in measure(kind, args.rounds)]
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"versions": versions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
