"""Whole sweeps as one compiled program.

An *experiment* is a pure function of one point, `experiment(point, *shared) -> results`, where a
point is a dict of scalars (`{"seed": ..., "temperature": ...}`) and `shared` arrays are the same
for all points. Anything traceable can be swept: seeds, temperatures, loss weights, alpha, learning
rates (`optax.sgd(point["rate"])` takes a traced rate). For static settings (widths, methods), write
an ordinary Python loop around it.

    fit = sweep.vmap(experiment)                          # compiled once, called often
    points = sweep.grid(seed=range(8), temperature=[1.0, 4.0])
    accuracy = fit(points, data)                          # every leaf [16, ...]
"""

from kdtl_jax.train.sweep._halving import Halving as Halving
from kdtl_jax.train.sweep._halving import Kept as Kept
from kdtl_jax.train.sweep._halving import successive_halving as successive_halving
from kdtl_jax.train.sweep._measure import chunk_for_memory as chunk_for_memory
from kdtl_jax.train.sweep._measure import fastest as fastest
from kdtl_jax.train.sweep._measure import timings as timings
from kdtl_jax.train.sweep._points import Points as Points
from kdtl_jax.train.sweep._points import Range as Range
from kdtl_jax.train.sweep._points import grid as grid
from kdtl_jax.train.sweep._points import rows as rows
from kdtl_jax.train.sweep._points import sample as sample
from kdtl_jax.train.sweep._points import size as size
from kdtl_jax.train.sweep._programs import Experiment as Experiment
from kdtl_jax.train.sweep._programs import Program as Program
from kdtl_jax.train.sweep._programs import map as map
from kdtl_jax.train.sweep._programs import sequential as sequential
from kdtl_jax.train.sweep._programs import vmap as vmap
