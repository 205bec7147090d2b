"""`kdtl params merge` of tensors larger than a piece: the library's numbers for whole tensors."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import transforms
from kdtl_jax.cli import main
from kdtl_jax.cli.params import _drawn, _rewrite
from kdtl_jax.interop import safetensors

Flat = dict[str, Any]
BLOCK = 20  # less than a kernel, no multiple of its rows


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_rewrite, "BLOCK", BLOCK)
    yield tmp_path


def grid(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    """Numbers on a coarse grid: many magnitudes are equal, sums and means of three exact."""
    return np.asarray(np.random.default_rng(seed).integers(-6, 7, shape) * 0.75, jnp.dtype(dtype))


def tuned(base: np.ndarray, seed: int, size: float) -> np.ndarray:
    """The base and small steps."""
    return (base + size * np.random.default_rng(seed).normal(size=base.shape)).astype(base.dtype)


def merged(method: str, words: str, models: Sequence[Flat], base: Flat | None = None) -> Flat:
    names = [f"{i}.safetensors" for i in range(len(models))]
    for name, model in zip(names, models, strict=True):
        safetensors.save(name, model)
    extra = words.split()
    if base is not None:
        safetensors.save("base.safetensors", base)
        extra += ["--base", "base.safetensors"]
    out = ["--write", "out.safetensors", "--force", "--skip-sha256"]
    assert main(["params", "merge", *names, "--method", method, *extra, *out]) == 0
    return {name: np.array(x) for name, x in safetensors.load("out.safetensors").items()}


def assert_close(got: Flat, want: Flat, rtol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, leaf in want.items():
        assert (got[name].shape, got[name].dtype) == (np.shape(leaf), leaf.dtype), name
        wide = [np.asarray(x).astype(np.float64) for x in (got[name], leaf)]
        near = 2**-8 if leaf.dtype == jnp.bfloat16 else rtol
        np.testing.assert_allclose(*wide, rtol=near, atol=near, err_msg=name)


# --- what ranks and what draws -------------------------------------------------------------------


def taus(base: Flat, models: Sequence[Flat]) -> list[Flat]:
    return [transforms.task_vector(model, base) for model in models]


def agreed(base: Flat, vectors: Sequence[Flat]) -> Flat:
    mean = transforms.disjoint_merge(vectors, transforms.elect_sign(vectors))
    return transforms.apply_task_vectors(base, [mean])


def ties(base: Flat, models: Sequence[Flat]) -> Flat:
    mean = transforms.ties_per_leaf(taus(base, models), [1.0, 2.0, 3.0][: len(models)], density=0.3)
    return transforms.apply_task_vectors(base, [mean], scale=0.5)


def breadcrumbs(base: Flat, models: Sequence[Flat], density: float, outliers: float) -> Flat:
    sparse = [
        transforms.breadcrumbs(t, density=density, outliers=outliers) for t in taus(base, models)
    ]
    return transforms.apply_task_vectors(base, sparse)


def drawn(sparsify: Callable[..., Flat], base: Flat, models: Sequence[Flat]) -> list[Flat]:
    keys = jax.random.split(jax.random.key(3), len(models))
    return [sparsify(k, tau, density=0.4) for k, tau in zip(keys, taus(base, models), strict=True)]


def dare(base: Flat, models: Sequence[Flat]) -> Flat:
    return transforms.apply_task_vectors(base, drawn(transforms.dare, base, models))


def dare_ties(base: Flat, models: Sequence[Flat]) -> Flat:
    return agreed(base, drawn(transforms.dare, base, models))


def della(base: Flat, models: Sequence[Flat]) -> Flat:
    return agreed(base, drawn(partial(transforms.della, epsilon=0.3), base, models))


SPARSE = {
    "ties": ("--scope tensor --density 0.3 --scale 0.5 --weights", ties),
    "breadcrumbs": (
        "--density 0.4 --outliers 0.2",
        partial(breadcrumbs, density=0.4, outliers=0.2),
    ),
    "breadcrumbs, no room": (
        "--density 0.9 --outliers 0.2",
        partial(breadcrumbs, density=0.9, outliers=0.2),
    ),
    "sce": ("--density 0.5", partial(transforms.sce, top=0.5)),
    "sce, all": ("--density 1", partial(transforms.sce, top=1)),
    "dare": ("--density 0.4 --seed 3", dare),
    "dare_ties": ("--density 0.4 --seed 3", dare_ties),
    "della": ("--density 0.4 --epsilon 0.3 --seed 3", della),
}


def on_a_grid(seed: int) -> Flat:
    """Model `seed`, 0 the base; in two leaves models agree with each other or with the base."""
    return {
        "kernel": grid(seed, 5, 8),
        "bias": grid(seed + 10, 28),
        "half": grid(seed + 20, 5, 8, dtype="bfloat16"),
        "equal": grid(30 + (seed > 0), 5, 8),
        "unchanged": grid(40, 5, 8),
        "scale": grid(seed + 50),
        "none": grid(seed, 0, 3),
    }


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", SPARSE)
def test_entries_are_chosen_as_in_whole_tensors(name: str, count: int) -> None:
    words, reference = SPARSE[name]
    if name == "ties":
        words += " 1,2,3"[: 2 * count]
    base, *models = (on_a_grid(seed) for seed in range(count + 1))
    got = merged(name.split(",")[0], words, models, base)
    assert_close(got, reference(base, models))
    np.testing.assert_array_equal(got["unchanged"], base["unchanged"])


def test_a_piece_of_the_draws_is_what_the_whole_has_there() -> None:
    key = jax.random.key(5)
    whole = np.asarray(jax.random.uniform(key, (7, 300)))
    for start in (0, 1000):
        part = jax.jit(_drawn.uniform, static_argnums=2)(key, np.uint32(start), 1000)
        np.testing.assert_array_equal(part, whole.ravel()[start : start + 1000])


# --- spheres -------------------------------------------------------------------------------------

SPHERES = {
    "slerp": ("--t 0.3", lambda base, m, **o: transforms.slerp(m[0], m[1], 0.3, **o)),
    "karcher": ("--weights 1,2,3", lambda base, models: transforms.karcher_mean(models, [1, 2, 3])),
    "model_stock": ("", transforms.model_stock),
}


def check(name: str, words: str, base: Flat, models: Sequence[Flat], **options: Any) -> None:
    """The stream against the library in double precision: both round once."""
    more, reference = SPHERES[name]
    used = models[:2] if name == "slerp" else models
    got = merged(name, f"{more} {words}", used, base if name == "model_stock" else None)
    with jax.enable_x64(True):
        wide = [{n: x.astype(np.float64) for n, x in tree.items()} for tree in (base, *used)]
        want = jax.jit(partial(reference, **options))(wide[0], wide[1:])
    assert_close(got, {n: np.asarray(x).astype(base[n].dtype) for n, x in want.items()}, rtol=2e-6)


@pytest.mark.parametrize("name", SPHERES)
def test_models_are_combined_as_whole_vectors(name: str) -> None:
    start, half = grid(0, 5, 8), grid(1, 5, 8, dtype="bfloat16")
    one, two, three, zero = *(tuned(start, seed, 1) for seed in (1, 2, 3)), np.zeros_like(start)
    cases = {  # the base and three models
        "unrelated": (start, one, two, three),
        "near": (start, *(tuned(start, seed, 1e-3) for seed in (1, 2, 3))),
        "very near": (start, *(tuned(start, seed, 1e-6) for seed in (1, 2, 3))),
        "parallel": (start, 2 * start, 3 * start, -start),
        "half": (half, *(tuned(half, seed, 0.5) for seed in (1, 2, 3))),
        "equal": (start, one, one, one),
        "two equal": (start, one, two, two),
        "unchanged": (start, start, start, start),
        "one unchanged": (start, start, one, two),
        "one zero": (start, zero, one, two),
        "zero": (zero, zero, zero, zero),
        "zero base": (zero, one, two, three),
        "bias": tuple(grid(seed, 28) for seed in range(4)),
        "scale": tuple(grid(seed) for seed in range(4)),
    }
    base, *models = ({case: x[i] for case, x in cases.items()} for i in range(4))
    check(name, "", base, models)


@pytest.mark.parametrize("name", ["slerp", "model_stock"])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_rows_are_combined_along_any_axis(name: str, axis: int) -> None:
    """Slabs that fit into a piece (`axis=-1`), and some that do not."""
    base = {"kernel": grid(0, 6, 8), "stack": grid(1, 2, 3, 8)}
    models = [{n: tuned(x, seed, 0.2) for n, x in base.items()} for seed in (1, 2, 3)]
    models[0]["kernel"][2] = models[1]["kernel"][2]  # a row in which two models agree
    check(name, f"--axis {axis}", base, models, axis=axis)


def test_an_empty_tensor_stays_empty() -> None:
    got = merged("slerp", "--t 0.5", [{"none": grid(0, 0, 3)}] * 2)
    assert got["none"].shape == (0, 3)


@pytest.mark.parametrize("name", ["slerp", "model_stock", "sce", "ties"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_within_its_tensor(
    name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    base, *models = ({path: grid(seed, 5, 8) for path in ("kernel", "other")} for seed in range(3))
    models[1]["kernel"][3, 3] = value
    words = {"slerp": "--t 0.5", "ties": "--scope tensor", "sce": "--density 0.5"}.get(name, "")
    got = merged(name, words, models, None if name == "slerp" else base)
    assert np.isfinite(got["other"]).all()
    if name == "slerp":
        assert np.isnan(got["kernel"]).all()
    assert "other" not in capsys.readouterr().err


def test_double_precision_stays_what_it_is() -> None:
    start = grid(0, 5, 8).astype(np.float64)
    base, *models = ({"kernel": tuned(start, seed, 1e-9)} for seed in range(3))
    got = merged("model_stock", "", models, base)
    with jax.enable_x64(True):
        assert_close(got, transforms.model_stock(base, models), rtol=1e-15)
