"""Training steps as pure functions of pytrees.

Static things (model functions, terms, weights, the optimizer) go to the factory; arrays go to the
step. The returned step is not jitted, so `jax.jit`, `jax.vmap`, `jax.lax.scan` and sharding all
compose with it; `jit_step` adds jit and donation.

The trainable partition is taken *before* the gradient: frozen weights cost no FLOPs, have no
optimizer state, do not enter clipping and stay bit-identical.
"""

from kdtl_jax.objective import Metrics as Metrics
from kdtl_jax.train import balancing as balancing
from kdtl_jax.train import dot as dot
from kdtl_jax.train import ensembles as ensembles
from kdtl_jax.train import finetune as finetune
from kdtl_jax.train import fisher as fisher
from kdtl_jax.train import hypergradients as hypergradients
from kdtl_jax.train import mean_teachers as mean_teachers
from kdtl_jax.train import online as online
from kdtl_jax.train import precision as precision
from kdtl_jax.train import sweep as sweep
from kdtl_jax.train._epochs import Epoch as Epoch
from kdtl_jax.train._epochs import epoch_index as epoch_index
from kdtl_jax.train._epochs import epoch_path as epoch_path
from kdtl_jax.train._epochs import jit_epoch as jit_epoch
from kdtl_jax.train._epochs import scan_epoch as scan_epoch
from kdtl_jax.train._epochs import step_path as step_path
from kdtl_jax.train._epochs import take as take
from kdtl_jax.train._state import Batch as Batch
from kdtl_jax.train._state import Step as Step
from kdtl_jax.train._state import TrainState as TrainState
from kdtl_jax.train._state import init_state as init_state
from kdtl_jax.train._steps import add_metrics as add_metrics
from kdtl_jax.train._steps import jit_step as jit_step
from kdtl_jax.train._steps import make_eval_step as make_eval_step
from kdtl_jax.train._steps import make_step as make_step
from kdtl_jax.train._steps import values as values
