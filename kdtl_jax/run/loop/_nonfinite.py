"""What to do when an update is not finite: raise, stop, or skip it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdtl_jax.objective import Metrics
from kdtl_jax.run.loop import _programs
from kdtl_jax.train import Batch, Step, TrainState


class Nonfinite(NamedTuple):
    """An update that was not applied: the step that made it, and what it would have spoilt."""

    step: int
    leaves: list[str]

    def __str__(self) -> str:
        listed = ", ".join(repr(leaf) for leaf in self.leaves[:4])
        more = f" and {len(self.leaves) - 4} more" if len(self.leaves) > 4 else ""
        return f"step {self.step} gave values that are not finite in {listed}{more}"


def raise_nonfinite(found: Nonfinite) -> None:
    """The default: an error. The state of the last good step is saved before."""
    raise FloatingPointError(
        f"{found}. The state before it is kept. Lower the learning rate, clip gradients, "
        "or pass skip_nonfinite(step) to leave such updates out."
    )


def stop_nonfinite(found: Nonfinite) -> None:
    """Ends the run without an error; `Result.stopped` tells why."""


def skip_nonfinite(step: Step) -> Step:
    """The step that leaves a non-finite update out and goes on with the next batch.

    Parameters, optimizer, model state and memory stay as they were; the step number advances, so
    that the batch order holds. The metric `"skipped"` is the share of steps left out, and the
    other metrics do not count them.
    """

    def guarded(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        new, metrics = step(state, teacher_params, batch)
        good = ~jnp.any(_programs.nonfinite_leaves(new, metrics))
        kept = _programs.choose(good, new, state)._replace(step=new.step)
        sums = jnp.where(good, metrics.sums, jnp.zeros((), metrics.sums.dtype))
        skipped = jnp.stack([~good, jnp.ones_like(good)]).astype(sums.dtype)
        names = (*metrics.names, "skipped")
        return kept, Metrics(names, jnp.concatenate([sums, skipped[None]]))

    return guarded


def found_in(carry: _programs.Carry) -> Nonfinite | None:
    """What a held carry was held for, or None."""
    flags = jax.device_get(carry.bad)
    if not flags.any():
        return None
    paths = _programs.checked_paths(carry.state)
    leaves = [path for path, bad in zip(paths, flags, strict=True) if bad]
    return Nonfinite(int(jax.device_get(carry.state.step)), leaves)
