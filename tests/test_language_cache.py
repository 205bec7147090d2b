"""Cached teachers of language models: as live, packed as alone, refused for another text."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from test_language_methods import DECODER, STUDENT, TEACHER, batch

from kdtl_jax import language, losses, train, transforms
from kdtl_jax.interop.decoders import PretrainedDecoder
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes import _language_training as training
from kdtl_jax.recipes._language_text import Rows
from kdtl_jax.run import teacher_cache

pytestmark = pytest.mark.usefixtures("standard_promotion")
TOKENIZER = language.byte_tokenizer()._replace(size=12)
TX = optax.sgd(0.1)
FORMS = ("dense", "top_k=12", "top_k=3", "draws=400")


def written(folder: Path, rows: Any = None, **changed: Any) -> teacher_cache.Cache:
    given = {"form": "dense", "batch_size": 4, "seed": 0, **changed}
    tokenizer = given.pop("tokenizer", TOKENIZER)
    params = given.pop("params", TEACHER)
    teacher = PretrainedDecoder(
        DECODER, params, (), {"architectures": ["Tiny"]}, transforms.Report()
    )
    rows = Rows(batch()["inputs"] if rows is None else rows)
    return training.write_cache(str(folder), teacher, tokenizer, rows, say=lambda _: None, **given)


@cache
def stepped(is_cached: bool) -> Any:
    setup = language.Setup(DECODER, TX, vocabulary=12)
    return jax.jit((language.kd_stored if is_cached else language.kd)(setup).step)


@pytest.mark.parametrize("form", FORMS)
def test_a_cached_teacher_gives_the_live_ones_gradient(form: str, tmp_path: Path):
    result = written(tmp_path, form=form)
    given = batch()
    state = train.init_state(STUDENT, TX, key=jax.random.key(0))
    rows = teacher_cache.rows(result, np.arange(4))
    ours, metrics = stepped(True)(state, {**given, "teacher": rows})
    live, expected = stepped(False)(state, given, TEACHER)
    change, wanted = (
        ravel_pytree(jax.tree.map(jnp.subtract, x.params, STUDENT))[0] for x in (ours, live)
    )
    away = float(jnp.linalg.norm(change - wanted) / jnp.linalg.norm(wanted))
    exact = form in ("dense", "top_k=12")
    assert away < (1e-4 if exact else 0.2), away
    if exact:
        kd, live_kd = (train.values(x)["kd"] for x in (metrics, expected))
        np.testing.assert_allclose(kd, live_kd, rtol=1e-4)
    if "draws" in form:
        assert rows["counts"].sum(axis=-1).tolist() == [[400] * 8] * 4
        assert np.all((rows["counts"] == 0).argmax(axis=-1) <= 12)  # different tokens first


def test_a_packed_text_is_cached_as_it_is_alone(tmp_path: Path):
    alone = {
        "tokens": np.asarray([[3, 4, 5, 0], [6, 7, 8, 9]], np.int32),
        "segments": np.asarray([[1, 1, 1, 0], [1, 1, 1, 1]], np.int32),
    }
    packed = {
        "tokens": np.asarray([[3, 4, 5, 6, 7, 8, 9]], np.int32),
        "segments": np.asarray([[1, 1, 1, 2, 2, 2, 2]], np.int32),
    }
    one, two = (
        teacher_cache.load(
            written(tmp_path / str(i), {**x, "learned": x["segments"] > 0}, form="top_k=3")
        )
        for i, x in enumerate((alone, packed))
    )
    for name in ("log_probs", "log_tail", "indices"):
        np.testing.assert_allclose(one[name][0, :3], two[name][0, :3], atol=1e-5)
        np.testing.assert_allclose(one[name][1], two[name][0, 3:], atol=1e-5)


def test_a_cache_of_something_else_is_refused_by_name(tmp_path: Path):
    written(tmp_path)
    written(tmp_path)  # the same is taken as it is
    other = batch(seed=1)["inputs"]
    for changed, says in (
        ({"rows": other}, "data differ"),
        ({"params": STUDENT}, "teacher weights differ"),
        ({"tokenizer": TOKENIZER._replace(fingerprint="another")}, "'tokenizer' was"),
        ({"form": "top_k=3"}, "'stored' was dense"),
    ):
        with pytest.raises(ValueError, match=says):
            written(tmp_path, **changed)
    broken = jax.tree.map(lambda x: x * jnp.nan, TEACHER)
    with pytest.raises(ValueError, match="row 0 is NaN"):
        written(tmp_path / "nan", params=broken)
    drawn = teacher_cache.load(written(tmp_path / "drawn", params=broken, form="draws=5"))
    assert not drawn["counts"].any(), "draws from NaN are no tokens"
    student = {"hidden": jnp.ones((4, 8, 12)), "head": losses.Head(jnp.eye(12))}
    inputs = {"inputs": {"tokens": jnp.ones((4, 8), int)}}
    actual: Any = language.stored_divergence()(Inputs(student, drawn, inputs, {}))
    assert jnp.isnan(actual["kd"].value())


def test_divergences_compare_the_top_and_the_rest_and_counts_have_none():
    logits = jax.random.normal(jax.random.key(0), (1, 4, 12))
    terms = language.stored_divergence(losses.reverse_kl)
    student = {"hidden": logits, "head": losses.Head(jnp.eye(12))}
    cut = losses.top_k_targets(2 * logits, k=12)
    inputs = Inputs(student, cut._asdict(), {"inputs": {"tokens": jnp.ones((1, 4), int)}}, {})
    expected = losses.reverse_kl(logits, 2 * logits)[:, :3].mean()
    actual: Any = terms(inputs)
    np.testing.assert_allclose(actual["kd"].value(), expected, rtol=1e-4)
    counts = {"indices": jnp.zeros((1, 4, 2), int), "counts": jnp.ones((1, 4, 2), int)}
    for stored, says in ((counts, "one loss"), ({}, "no stored teacher")):
        with pytest.raises(ValueError, match=says):
            terms(inputs._replace(teacher=stored))
