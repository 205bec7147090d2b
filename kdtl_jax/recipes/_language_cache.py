"""A teacher's distributions on the training rows, stored in a folder of their own."""

from typing import Any

import jax
import numpy as np

from kdtl_jax import _files, language
from kdtl_jax.interop.decoders import PretrainedDecoder
from kdtl_jax.recipes import _progress
from kdtl_jax.recipes._language_text import Rows
from kdtl_jax.run import teacher_cache

METHODS = ("kd", "qad")  # those that learn from a teacher only on the data
FORMS = "dense, top_k=N or draws=N"


def form(value: Any) -> str:
    """`dense`, `top_k=64` or `draws=50`."""
    name, _, size = str(value).partition("=")
    if value != "dense" and not (
        name in ("top_k", "draws") and size.isdecimal() and 0 < int(size) < 10**5
    ):
        raise ValueError(f"expected {FORMS}, got {value!r}")
    return str(value)


def written(
    folder: str,
    teacher: PretrainedDecoder,
    tokenizer: language.Tokenizer,
    rows: Rows,
    *,
    form: str,
    batch_size: int,
    seed: int,
    say: _progress.Say,
) -> teacher_cache.Cache:
    """The cache in a folder, completed if necessary.

    Raises:
      ValueError: if it was made from other weights, text or tokenizer, or in another form, naming
        which; or if the teacher's outputs are NaN.
    """
    name, _, size = form.partition("=")
    stored: dict[str, int] = {name: int(size)} if size else {}
    outputs = language.stored_outputs(
        teacher.model,
        **stored,
        key=jax.random.key(seed) if "draws" in stored else None,
        vocabulary=tokenizer.size,
    )
    inputs = {n: rows.inputs[n] for n in ("tokens", "segments", "learned")}
    if "draws" in stored:
        inputs["row"] = np.arange(len(inputs["tokens"]), dtype=np.int32)
    names = teacher.config.get("architectures") or ["decoder"]
    about = {"stored": form, "tokenizer": tokenizer.fingerprint[:12]}
    made: dict[str, Any] = {
        "model": f"{names[0]} {_files.digest(_files.as_json(teacher.config))[:12]}",
        "preprocessing": about | ({"seed": seed} if "draws" in stored else {}),
        "taps": language.stored_names(**stored),
        "dtype": "float32",
    }
    expect = teacher_cache.fingerprint(teacher.params, {"inputs": inputs}, **made)
    seldom = _progress.seldom(say, 5.0)
    teacher_cache.write(
        folder,
        outputs,
        teacher.params,
        {"inputs": inputs},
        batch_size=batch_size,
        weights=expect.teacher,
        progress=lambda done, total: seldom(f"cache: {done:,} of {total:,} rows", done == total),
        **made,
    )
    return teacher_cache.open_cache(folder, expect=expect, contents=False)
