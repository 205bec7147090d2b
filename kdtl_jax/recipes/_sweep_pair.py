"""What the students of a sweep share: the pair of models, the teacher, its outputs, the data."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax._types import Variables
from kdtl_jax.datasets import Splits
from kdtl_jax.methods import Entry, Setup
from kdtl_jax.recipes import _networks, _seeds, _training
from kdtl_jax.recipes._networks import Network
from kdtl_jax.recipes._sweep_runs import Shared
from kdtl_jax.recipes._training import Bench, Place, Schedule


def setup_of(
    student: Network,
    teacher: Network,
    variables: Variables,
    splits: Splits,
    *,
    epochs: int,
    batch_size: int,
    example: Any,
) -> Setup:
    """The pair as methods see it.

    Raises:
      ValueError: if the batch is larger than the training set, or a head does not fit the data.
    """
    size = len(splits.train.labels)
    if batch_size > size:
        raise ValueError(
            f"a batch of {batch_size} is larger than the {size} training examples. "
            "Choose a smaller batch size."
        )
    return _networks.setup(
        student,
        teacher,
        variables,
        example=example,
        classes=splits.train.classes,
        batch_size=batch_size,
        examples=size,
        steps=epochs * (size // batch_size),
        task=_training.task,
    )


def shared_arrays(
    splits: Splits, teacher: Network, frozen: Variables, methods: Sequence[Entry]
) -> Shared:
    """The data on the device, with the teacher's outputs that these methods read."""
    outputs = _training.outputs(teacher, frozen, splits.train.inputs)
    if all(method.needs in ("labels", "logits") for method in methods):
        outputs = {"logits": outputs["logits"]}
    arrays = {**train_arrays(splits), "teacher": outputs}
    on_device = jax.tree.map(jnp.asarray, arrays)
    validation, test = (
        (jnp.asarray(part.inputs), jnp.asarray(part.labels))
        for part in (splits.validation, splits.test)
    )
    return Shared(on_device, jax.tree.map(jnp.asarray, frozen), validation, test)


def train_arrays(splits: Splits) -> dict[str, np.ndarray]:
    """Inputs, labels and every example's place."""
    labels = splits.train.labels
    index = np.arange(len(labels), dtype=np.int32)
    return {"inputs": splits.train.inputs, "labels": labels, "index": index}


def teacher_of(
    net: Network,
    example: Any,
    splits: Splits,
    schedule: Schedule,
    weights: Path | None,
    folder: Path,
    say: Callable[[str], None],
) -> Variables:
    """Loaded, or trained as `kdtl distill` trains its own."""
    if weights is not None:
        say(f"teacher, from {weights}")
        return _networks.load(str(weights), net, example)
    say("teacher")
    keys = _seeds.keys(1)
    trained = _training.train_seeds(
        "teacher",
        net,
        _training.initial(net, keys.model, example),
        _training.ALONE,
        Bench(train_arrays(splits), None, splits.validation, keys),
        schedule,
        Place(folder, False, []),
        _training.namer(net),
    )
    state = trained.state
    return Variables(*_seeds.pick((state.params, state.model_state), 0))


def accuracies(net: Network, frozen: Variables, splits: Splits) -> tuple[float, float]:
    """The teacher's share of right answers on the validation and the test split."""
    state, named = _training.untrained(frozen, _seeds.keys(1)), _training.namer(net)
    found = [
        float((named(state, part.inputs, True)[0] == part.labels).mean())
        for part in (splits.validation, splits.test)
    ]
    return found[0], found[1]
