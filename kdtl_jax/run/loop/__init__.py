"""The host side of training: pace, logging, evaluation, saving, signals.

One function, `run`, drives any step of `kdtl_jax.train` (`fit` makes the step, too). Everything it
needs from outside (where lines go, how to save and evaluate, when to stop) is passed as functions.

    with checkpoint.open_folder(folder) as checkpoints, loop.metrics_file(path) as log:
        result = loop.run(step, state, data.resident(arrays, 64, key=key), teacher_params,
                          steps=10_000, log=log, save=partial(checkpoint.save, checkpoints),
                          save_every=500)

A run that is killed at any moment and resumed from its newest whole checkpoint (state and `meta`)
ends with the same bits, and the same metrics file, as an uninterrupted one. Paths that are neither
text nor paths raise TypeError.
"""

from kdtl_jax.run.loop._metrics import Evaluate as Evaluate
from kdtl_jax.run.loop._metrics import Log as Log
from kdtl_jax.run.loop._metrics import Stop as Stop
from kdtl_jax.run.loop._metrics import evaluation as evaluation
from kdtl_jax.run.loop._metrics import metrics_file as metrics_file
from kdtl_jax.run.loop._metrics import no_improvement as no_improvement
from kdtl_jax.run.loop._metrics import read_metrics as read_metrics
from kdtl_jax.run.loop._run import Nonfinite as Nonfinite
from kdtl_jax.run.loop._run import Result as Result
from kdtl_jax.run.loop._run import Save as Save
from kdtl_jax.run.loop._run import fit as fit
from kdtl_jax.run.loop._run import raise_nonfinite as raise_nonfinite
from kdtl_jax.run.loop._run import run as run
from kdtl_jax.run.loop._run import skip_nonfinite as skip_nonfinite
from kdtl_jax.run.loop._run import stop_nonfinite as stop_nonfinite
