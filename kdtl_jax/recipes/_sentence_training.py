"""Training of one student in `kdtl sentences`, with evaluation, saving and resuming."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import losses, train
from kdtl_jax._types import Params, Variables
from kdtl_jax.models import sentence_embedding
from kdtl_jax.objective import Inputs, Masked
from kdtl_jax.recipes import _progress, _saves
from kdtl_jax.recipes._training import warmup_adamw
from kdtl_jax.run import checkpoint, data, loop

WEIGHTS = {"hidden": 1.0, "embedding": 1.0, "relation": 1.0}


def terms_of(layers: Sequence[int]) -> Callable[[Inputs], dict[str, Any]]:
    """The terms that match the student's layer j to the teacher's layer `layers[j]`.

    `hidden`, `[B, L]`, masked: the mean over layers of `mean (h_S - h_T)^2`. `embedding`, `[B]`:
    `1 - cos` of the sentences' embeddings. `relation`, `[B]`: RKD's distances between them.
    """

    def terms(x: Inputs) -> dict[str, Any]:
        mask = x.batch["inputs"]["mask"]
        hidden_losses = [
            losses.last_axis_mse(x.student[f"layers_{j}"], x.teacher[f"layers_{i}"])
            for j, i in enumerate(layers)
        ]
        student, teacher = (
            sentence_embedding(o["last_hidden"], mask) for o in (x.student, x.teacher)
        )
        return {
            "hidden": Masked(jnp.mean(jnp.stack(hidden_losses), axis=0), mask),
            "embedding": losses.cosine_distance(student, teacher),
            "relation": losses.rkd_distance(student, teacher, where=x.real),
        }

    return terms


def optimizer(settings: Any) -> optax.GradientTransformation:
    """AdamW on clipped gradients; the learning rate warms up over a tenth of the steps."""
    return warmup_adamw(settings.learning_rate, settings.steps, max(1, settings.steps // 10))


class StudentRun(NamedTuple):
    """Where one student's training is saved and reported."""

    folder: Path
    identity: str  # of the run, in its checkpoints
    name: str  # of the student, under `checkpoints/`
    settings: Any  # `sentences.Settings`
    say: _progress.Say
    advance: _progress.Advance


class Distilled(NamedTuple):
    """A student and its learning curve.

    If training diverged, `diverged` says how, and `params` are those before.
    """

    params: Params
    curve: dict[str, list[float]]
    seconds: float
    diverged: str


def distill_student(
    step: train.Step,
    start: Params,
    teacher: Params,
    lines: Mapping[str, Any],
    key: Array,
    agreement: Callable[[Params], float],
    run: StudentRun,
) -> Distilled:
    """Trains one student, from its newest save if resumed."""
    nonfinite: list[loop.Nonfinite] = []
    start_time, settings = time.perf_counter(), run.settings
    key_order, key_steps = jax.random.split(key)
    batches = data.resident({"inputs": lines}, settings.batch_size, key=key_order)
    state = train.init_state(start, optimizer(settings), key=key_steps)
    saves = _saves.restore(
        run.folder, run.identity, run.name, state, resume=settings.resume, start_time=start_time
    )

    def log(line: Mapping[str, Any]) -> None:
        if "loss" in line:
            run.say(f"  step {line['step']} of {settings.steps}, loss {line['loss']:.4f}")

    with _saves.open_saves(saves, checkpoint.newest(1)) as save:
        result = loop.run(
            step,
            saves.state,
            batches,
            Variables(teacher),
            steps=settings.steps,
            log=log,
            log_every=max(1, settings.steps // 10),
            evaluate=lambda state: {"agreement": agreement(state.params)},
            evaluate_every=max(1, settings.steps // settings.checks),
            save=save,
            save_every=settings.save_every,
            meta=saves.meta,
            on_nonfinite=nonfinite.append,
            reached=lambda step: run.advance(step, settings.steps),
        )
    curve = {
        "epoch": [float(line["step"]) for line in result.evaluations],
        "validation_accuracy": [line["eval/agreement"] for line in result.evaluations],
    }
    return Distilled(
        result.state.params, curve, _saves.seconds(saves), str(nonfinite[0]) if nonfinite else ""
    )
