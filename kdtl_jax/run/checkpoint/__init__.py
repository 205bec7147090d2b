"""Checkpoints: asynchronous, whole or not at all, verified, and never unpickled.

Orbax writes the arrays (in the background, every process its own shards) into a hidden folder; an
integrity manifest is added (SHA-256 of every file, the path, shape and dtype of every leaf, the
folder and step it belongs to, and the caller's JSON `meta`), and a rename makes the step appear. A
step without a valid manifest, with a file that does not match it, or from another folder is never
restored: `restore` takes the newest whole step and reports why it skipped the others.

    with checkpoint.open_folder(folder) as checkpoints:
        checkpoint.save(checkpoints, step, state, meta)
    restored = checkpoint.restore(folder, template=state)       # .state, .step, .meta, .skipped

Leaves are found by their paths, never by position. To restore part of a state:

    params = checkpoint.restore(folder, {"params": params}, only=r"params/.*").state["params"]
    state = checkpoint.restore(folder, state_of_another_optimizer, only=r"params/.*").state

The best step by an evaluation, instead of the newest (save whenever you evaluate):

    with checkpoint.open_folder(folder, keep=checkpoint.newest_and_best(1, "error")) as checkpoints:
        loop.run(..., evaluate_every=100, save_every=100, stop=loop.no_improvement("error", 5))
    best = checkpoint.restore(folder, state, step=checkpoint.best(folder, "error"))

Folders, steps and counts of another type raise TypeError, negative steps and counts below 1
ValueError.

Out of scope: exchanging models between programs (see safetensors), and choosing when to save (see
the loop).
"""

from kdtl_jax.run.checkpoint._restore import Restored as Restored
from kdtl_jax.run.checkpoint._restore import best as best
from kdtl_jax.run.checkpoint._restore import problem as problem
from kdtl_jax.run.checkpoint._restore import restore as restore
from kdtl_jax.run.checkpoint._restore import steps as steps
from kdtl_jax.run.checkpoint._save import Checkpoints as Checkpoints
from kdtl_jax.run.checkpoint._save import Keep as Keep
from kdtl_jax.run.checkpoint._save import Saved as Saved
from kdtl_jax.run.checkpoint._save import check_removable as check_removable
from kdtl_jax.run.checkpoint._save import newest as newest
from kdtl_jax.run.checkpoint._save import newest_and_best as newest_and_best
from kdtl_jax.run.checkpoint._save import newest_and_every as newest_and_every
from kdtl_jax.run.checkpoint._save import open_folder as open_folder
from kdtl_jax.run.checkpoint._save import remove as remove
from kdtl_jax.run.checkpoint._save import save as save
from kdtl_jax.run.checkpoint._save import wait as wait
