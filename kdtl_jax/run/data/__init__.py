"""Batches: arrays on the device, arrays larger than memory, and any iterator.

Batches must be a function of the step, so that a resumed run sees the same as an uninterrupted one.
Two forms ensure that:

- `Resident`: whole arrays on the device; rows are gathered inside the compiled step, in an order
  that is a function of `(key, epoch)`. Nothing is transferred from the host.
- `Source`: a function `source(step)` that iterates over the batches from that step on. `stream`
  makes one from a function that reads rows (memory-mapped files, a teacher cache), `iterate` from
  anything that yields batches (Grain, Hugging Face datasets, torch loaders).

All batches of a run have one shape, so that one compiled step serves all: a short last batch is
padded, and `batch["weights"]` is 0 for the padding. A model with batch statistics cannot mask the
padding, so `loop.run` gives it only the real rows, in a batch of their own shape; a single row is
padded with other examples, with a warning.

All functions raise TypeError for sizes that are not integers, batches that are not mappings, and
keys that are not PRNG keys.
"""

from kdtl_jax.run.data._host import Reader as Reader
from kdtl_jax.run.data._host import Source as Source
from kdtl_jax.run.data._host import in_order as in_order
from kdtl_jax.run.data._host import iterate as iterate
from kdtl_jax.run.data._host import open_arrays as open_arrays
from kdtl_jax.run.data._host import pad as pad
from kdtl_jax.run.data._host import prefetch as prefetch
from kdtl_jax.run.data._host import stream as stream
from kdtl_jax.run.data._host import take_rows as take_rows
from kdtl_jax.run.data._host import unpad as unpad
from kdtl_jax.run.data._resident import Augment as Augment
from kdtl_jax.run.data._resident import Batch as Batch
from kdtl_jax.run.data._resident import Resident as Resident
from kdtl_jax.run.data._resident import canonical as canonical
from kdtl_jax.run.data._resident import epoch_rows as epoch_rows
from kdtl_jax.run.data._resident import examples as examples
from kdtl_jax.run.data._resident import gather as gather
from kdtl_jax.run.data._resident import length as length
from kdtl_jax.run.data._resident import resident as resident
from kdtl_jax.run.data._resident import steps_per_epoch as steps_per_epoch
from kdtl_jax.run.data._resident import view_key as view_key
