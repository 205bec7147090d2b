"""Teacher outputs on disk: computed once, checked against what they were made from, read by rows.

    from kdtl_jax.run import data, teacher_cache as tc

    made_from = {  # what determines the outputs besides weights and data
        "model": "vit:heads=8",
        "classes": names,
        "preprocessing": {"mean": 0.13, "scale": 0.31},
    }
    tc.write("cache", teacher, variables, arrays, batch_size=256, **made_from)

    needed = tc.fingerprint(variables, arrays, **made_from)
    cache = tc.open_cache("cache", expect=needed)  # names what differs, if anything
    source = data.resident(arrays, 64, key=key, teacher=tc.load(cache))  # on the device, or
    source = data.stream(  # memory-mapped
        lambda epoch, rows: data.take_rows(arrays, rows) | {"teacher": tc.rows(cache, rows, epoch)},
        cache.plan.size, 64, key=key,
    )
    step = train.make_step(student, terms, weights, tx)  # no live teacher

Outputs are returned as from a live teacher: float32 arrays by name, or `losses.TopK` for logits
that were cut to the k most likely classes (`top_k=32`), ready for `losses.top_k_kl_tail`.
`dtype=` stores them in half the bytes. Entries of a fingerprint that are None are not compared:
`needed._replace(dtype=None, logits=None)` accepts any precision, dense or cut (see
`cache.plan.top_k` and `cache.plan.temperature`).

Augmented views are keyed by `(key, view, row)`, so that cache and live teacher see the same image:

    views = {"views": 4, "view_key": data.view_key(key)}
    tc.write("cache", teacher, variables, arrays, augment=augment, batch_size=256, **views)
    cache = tc.open_cache("cache", expect=tc.fingerprint(variables, arrays, **views))
    data.resident(arrays, 64, key=key, augment=augment, teacher=tc.load(cache), views=4)

On disk: `plan.json` (what is being made), one `.bin` of records per shard, one sealed `.json` per
finished shard with its SHA-256, and `manifest.json`, written last. `write` on the same folder
resumes where it stopped, and recomputes damaged shards. Functions of a cache raise TypeError for
anything that `open_cache` did not return.
"""

from kdtl_jax.run.teacher_cache._fingerprint import Fingerprint as Fingerprint
from kdtl_jax.run.teacher_cache._fingerprint import digest as digest
from kdtl_jax.run.teacher_cache._fingerprint import fingerprint as fingerprint
from kdtl_jax.run.teacher_cache._shards import Cache as Cache
from kdtl_jax.run.teacher_cache._shards import Plan as Plan
from kdtl_jax.run.teacher_cache._shards import begun as begun
from kdtl_jax.run.teacher_cache._shards import load as load
from kdtl_jax.run.teacher_cache._shards import open_cache as open_cache
from kdtl_jax.run.teacher_cache._shards import rows as rows
from kdtl_jax.run.teacher_cache._shards import verify as verify
from kdtl_jax.run.teacher_cache._write import write as write
