"""`kdtl params merge` in pieces: no tensor is held whole, and the numbers are the whole's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from params_checkpoints import (
    BASE,
    OUT,
    A,
    B,
    Flat,
    assert_same,
    drop_step,
    flat,
    native,
    params,
    written,
)

from kdtl_jax import transforms
from kdtl_jax.cli.params._methods import METHODS
from kdtl_jax.interop import safetensors
from kdtl_jax.transforms import _blocks

pytestmark = pytest.mark.usefixtures("checkpoints")


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all pieces that will be read, two rows of four at most if all is well."""
    monkeypatch.setattr(_blocks, "BLOCK", 8)
    sizes, blocks = [], safetensors.blocks

    def watch(tensor: Any, size: int) -> Iterator[np.ndarray]:
        for piece in blocks(tensor, size):
            sizes.append(piece.size)
            yield piece

    monkeypatch.setattr(safetensors, "blocks", watch)
    monkeypatch.setattr(safetensors, "read", None)
    return sizes


# Whole models by the library: the command merges block by block.
LIBRARY: dict[str, Any] = {
    "slerp --t 0.3": lambda b, m: transforms.slerp(m[0], m[1], 0.3),
    "slerp --t 0.3 --axis -1": lambda b, m: transforms.slerp(m[0], m[1], 0.3, axis=-1),
    "slerp --t 0.3 --axis 0": lambda b, m: transforms.slerp(m[0], m[1], 0.3, axis=0),
    "multi_slerp --weights 1,3": lambda b, m: transforms.multi_slerp(None, m, [1.0, 3.0]),
    "karcher --weights 1,3": lambda b, m: transforms.karcher_mean(m, [1.0, 3.0]),
    "model_stock": transforms.model_stock,
    "model_stock --axis -1": lambda b, m: transforms.model_stock(b, m, axis=-1),
    "multi_slerp": transforms.multi_slerp,
    "sce --density 0.4": lambda b, m: transforms.sce(b, m, top=0.4),
    "arcee_fusion": lambda b, m: transforms.arcee_fusion(b, m[0]),
    "ram --gain 0.1": lambda b, m: transforms.ram(b, m, gain=0.1),
    "breadcrumbs --density 0.5 --outliers 0.2": lambda b, m: transforms.apply_task_vectors(
        b, [transforms.breadcrumbs(_tau(b, x), density=0.5, outliers=0.2) for x in m]
    ),
    "ties --scope tensor --density 0.4": lambda b, m: transforms.apply_task_vectors(
        b, [transforms.ties_per_leaf([_tau(b, x) for x in m], density=0.4)]
    ),
}


def _tau(base: Flat, model: Flat) -> Flat:
    return transforms.task_vector(model, base)


@pytest.mark.parametrize("words", LIBRARY)
def test_blocks_of_rows_give_what_whole_models_give(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = watched(monkeypatch)
    name, *more = words.split()
    has_base = not words.startswith(("slerp", "karcher", "multi_slerp --weights"))
    base = ["--base", BASE] if has_base else []
    assert params("merge", *(A, B)[: METHODS[name].most], "--method", name, *more, *base, *OUT) == 0
    assert max(sizes) <= 8  # no matrix in one piece
    want = LIBRARY[words](drop_step(flat(0)), [drop_step(flat(1)), drop_step(flat(2))])
    assert_same(drop_step(written()), native(want))


def stacked(seed: int) -> Flat:
    """Kernels with axes before `[in, out]`, beside tensors without Gram matrices."""
    rng = np.random.default_rng(seed)
    shapes = {"heads/kernel": (2, 4, 3), "fc/kernel": (4, 5), "fc/bias": (5,), "one": ()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_regmean_reads_kernels_and_grams_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Least squares in double precision by NumPy; what has no Gram matrix is averaged."""
    models, grams = [stacked(seed) for seed in (1, 2)], []
    for i, model in enumerate(models):
        x = np.random.default_rng(10 + i).normal(size=(2, 9, 4))
        own = np.swapaxes(x, 1, 2) @ x
        grams.append({"heads/kernel": own, "fc/kernel": own[0]})
        safetensors.save(f"m{i}.safetensors", model)
        safetensors.save(
            f"s{i}.safetensors", {name: gram.astype(np.float32) for name, gram in grams[i].items()}
        )
    sizes = watched(monkeypatch)
    files = ["m0.safetensors", "m1.safetensors"]
    data = [f"--statistics=s{i}.safetensors" for i in range(2)]
    assert params("merge", *files, "--method", "regmean", *data, *OUT) == 0
    assert max(sizes) <= 8
    got = written()
    assert_same(got, native(transforms.regmean(models, [native(g) for g in grams])), rtol=5e-6)
    for name in ("heads/kernel", "fc/kernel"):
        left, right = 0, 0
        for model, gram in zip(models, grams, strict=True):
            eye = np.eye(4) * gram[name]
            soft = 0.9 * gram[name] + 0.1 * eye
            left, right = left + soft, right + soft @ model[name].astype(np.float64)
        np.testing.assert_allclose(got[name], np.linalg.solve(left, right), rtol=5e-6, atol=5e-6)
    np.testing.assert_allclose(got["fc/bias"], (models[0]["fc/bias"] + models[1]["fc/bias"]) / 2)


def test_columns_of_stacks_are_turned_apart_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [stacked(seed) for seed in (1, 2)]
    for i, model in enumerate(models):
        safetensors.save(f"m{i}.safetensors", model)
    sizes = watched(monkeypatch)
    for axis in (-3, -2):
        words = ("--method", "slerp", "--t", "0.3", "--axis", str(axis))
        assert params("merge", "m0.safetensors", "m1.safetensors", *words, *OUT, "--force") == 0
        assert_same(
            written(), native(transforms.slerp(models[0], models[1], 0.3, axis=axis)), rtol=1e-6
        )
    assert max(sizes) <= 12  # one row of the heads


def test_what_does_not_fit_is_refused_before_anything_is_read(capsys: Any) -> None:
    for i in range(2):
        safetensors.save(f"m{i}.safetensors", stacked(i))
        safetensors.save(f"s{i}.safetensors", {"fc/kernel": np.eye(5, dtype=np.float32)})
        safetensors.save(f"t{i}.safetensors", {"fc/kernl": np.eye(4, dtype=np.float32)})
    for file, says in {"s": "a Gram matrix", "t": "no leaf 'fc/kernl'"}.items():
        data = [f"--statistics={file}{i}.safetensors" for i in range(2)]
        files = ("m0.safetensors", "m1.safetensors")
        assert params("merge", *files, "--method", "regmean", *data) == 1
        assert says in capsys.readouterr().err
    words = ("--method", "sce", "--base", BASE, "--density", "0.5,0.2")
    assert params("merge", A, B, *words) == 2
    assert "sce selects one share" in capsys.readouterr().err
