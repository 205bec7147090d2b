"""Checkpoints: asynchronous, whole or not at all, verified, and never unpickled.

Orbax's `CheckpointManager` writes the arrays (in the background, every process its own shards); an
integrity manifest, written last, makes a step whole: SHA-256 of every file, the path, shape and
dtype of every leaf, and the caller's JSON `meta`. A step without a valid manifest, or with a file
that does not match it, is never restored: `restore` takes the newest whole step and says why it
skipped the others.

    with checkpoint.open_folder(folder) as checkpoints:
        checkpoint.save(checkpoints, step, state, meta)
    state, step, meta, skipped = checkpoint.restore(folder, template=state)

Deliberately not here: model exchange between programs (safetensors), and choosing when to save
(the loop).
"""

from kdtl_jax.run.checkpoint._restore import Restored as Restored
from kdtl_jax.run.checkpoint._restore import problem as problem
from kdtl_jax.run.checkpoint._restore import restore as restore
from kdtl_jax.run.checkpoint._restore import steps as steps
from kdtl_jax.run.checkpoint._save import Checkpoints as Checkpoints
from kdtl_jax.run.checkpoint._save import Keep as Keep
from kdtl_jax.run.checkpoint._save import newest as newest
from kdtl_jax.run.checkpoint._save import newest_and_every as newest_and_every
from kdtl_jax.run.checkpoint._save import open_folder as open_folder
from kdtl_jax.run.checkpoint._save import save as save
from kdtl_jax.run.checkpoint._save import wait as wait
