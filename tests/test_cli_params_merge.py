"""`kdtl params merge` and `average`: the numbers of `transforms` on whole models, bit for bit."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from params_checkpoints import (
    BASE,
    OUT,
    A,
    B,
    Flat,
    assert_same,
    by_tensor,
    drop_step,
    flat,
    native,
    params,
    written,
)

from kdtl_jax import transforms
from kdtl_jax.cli.params._formulas import Members, Options
from kdtl_jax.cli.params._methods import METHODS
from kdtl_jax.interop import safetensors

pytestmark = pytest.mark.usefixtures("checkpoints")


# --- every method --------------------------------------------------------------------------------

NEEDED = {
    "interpolate": ["--t", "0.3"],
    "slerp": ["--t", "0.3", "--axis", "-2"],
    "near_swap": ["--t", "0.4"],
    **dict.fromkeys(["breadcrumbs", "breadcrumbs_ties", "sce"], ["--density", "0.5"]),
    **dict.fromkeys(["dare", "dare_ties"], ["--density", "0.5", "--seed", "3"]),
    **dict.fromkeys(["della", "della_linear"], ["--density", "0.5", "--epsilon", "0.2"]),
    "task_arithmetic": ["--weights", "0.5,2", "--scale", "0.7"],
    "linear": ["--weights", "1,3"],
    "passthrough": ["--scale", "0.7"],
    "ram": ["--gain", "0.1"],
    "ties": ["--scope", "tensor"],
}


def statistics(seed: int, *, grams: bool) -> Flat:
    rng = np.random.default_rng(10 + seed)
    if grams:
        x = rng.normal(size=(9, 4)).astype(np.float32)
        return {"layer_1/kernel": x.T @ x}
    return {
        n: rng.uniform(size=x.shape).astype(np.float32)
        for n, x in flat(seed).items()
        if n != "step"
    }


def options(words: list[str]) -> Options:
    """The library's for the command's."""
    given = dict(zip(words[::2], words[1::2], strict=True))
    weights = [float(w) for w in given.get("--weights", "").split(",") if w]
    return Options(
        weights=weights or None,
        scale=float(given.get("--scale", 1)),
        density=float(given.get("--density", 0.2)),
        epsilon=float(given.get("--epsilon", 0.15)),
        t=float(given.get("--t", 0.5)),
        axis=int(given["--axis"]) if "--axis" in given else None,
        gain=float(given.get("--gain", 0)),
        seed=int(given.get("--seed", 0)),
    )


@pytest.mark.parametrize("name", METHODS)
def test_merging_tensor_by_tensor_is_merging_whole_models(name: str) -> None:
    method, words = METHODS[name], NEEDED.get(name, [])
    files, extra = [A, B][: method.most or 2], list(words)
    data: list[Flat] = []
    for i in range(len(files) if method.has_statistics else 0):
        data.append(statistics(i, grams=name == "regmean"))
        safetensors.save(f"s{i}.safetensors", data[-1])
        extra += ["--statistics", f"s{i}.safetensors"]
    has_base = method.base != "has no"
    extra += ["--base", BASE] if has_base else []
    assert params("merge", *files, "--method", name, *extra, *OUT) == 0
    trees = [flat(seed + 1) for seed in range(len(files))]
    if name == "fisher":
        trees = [drop_step(tree) for tree in trees]
    first = flat(0) if has_base else flat(1)
    has = drop_step(first) if has_base else {}
    want = by_tensor(method.merge, has, [drop_step(t) for t in trees], options(words), data)
    assert_same(drop_step(written()), want)
    assert written()["step"] == first["step"]


def taus() -> list[Flat]:
    return [transforms.task_vector(drop_step(flat(i)), drop_step(flat(0))) for i in (1, 2)]


def added(vectors: list[Flat], weights: list[float]) -> Flat:
    return native(transforms.apply_task_vectors(drop_step(flat(0)), vectors, weights))


def consensus(vectors: list[Flat], weights: list[float], *, normalize: bool) -> Flat:
    vectors = [transforms.scale(tau, w) for tau, w in zip(vectors, weights, strict=True)]
    divisor = transforms.agreeing_weight(weights) if normalize else transforms.undivided
    signs = transforms.elect_sign(vectors)
    return added([transforms.disjoint_merge(vectors, signs, divisor=divisor)], [1.0])


def dropped(sparsify: Any) -> list[Flat]:
    """What is left after dropping, at the L1 norm of the whole."""
    out = []
    for key, tau in zip(jax.random.split(jax.random.key(0), 2), taus(), strict=True):
        kept = {path: leaf != 0 for path, leaf in sparsify(key, tau, density=0.5).items()}
        out.append(transforms.rescale_l1(transforms.keep(tau, kept), tau))
    return out


MERGEKIT: dict[str, Any] = {
    "ties --density 0.5": lambda w: consensus(
        [transforms.trim(tau, density=0.5) for tau in taus()], w, normalize=True
    ),
    "ties": lambda w: consensus(taus(), w, normalize=True),
    "dare --density 0.5": lambda w: added(dropped(transforms.dare), w),
    "dare_ties --density 0.5": lambda w: consensus(dropped(transforms.dare), w, normalize=False),
    "della --density 0.5": lambda w: consensus(dropped(transforms.della), w, normalize=True),
    "della_linear --density 0.5": lambda w: added(dropped(transforms.della), w),
    "breadcrumbs_ties --density 0.5": lambda w: consensus(
        [transforms.breadcrumbs(tau, density=0.5, outliers=0.01) for tau in taus()],
        w,
        normalize=False,
    ),
}


@pytest.mark.parametrize("words", MERGEKIT)
def test_mergekits_conventions_by_name(words: str) -> None:
    """Weighted signs, weights as divisors, L1 norms; the paper's number is another."""
    name, *more = words.split()
    call = ("merge", A, B, "--method", name, *more, "--base", BASE, "--weights", "1,0.4")
    assert params(*call, "--as", "mergekit", *OUT) == 0
    got = drop_step(written())
    assert_same(got, MERGEKIT[words]([1.0, 0.4]))
    assert params(*call, *(["--density", "1"] if not more else []), *OUT, "--force") == 0
    paper = drop_step(written())
    assert any((got[path] != paper[path]).any() for path in got)


def test_sums_instead_of_means() -> None:
    assert params("merge", A, B, "--weights", "1,0.5", "--normalize", "no", *OUT) == 0
    want = transforms.weighted_sum([flat(1), flat(2)], [1.0, 0.5])
    assert_same(drop_step(written()), drop_step(native(want)))


def test_an_entry_of_its_own_for_some_tensors() -> None:
    rules = ("--rule", "head/.*=1", "--rule", "layer_0/.*=0")
    assert params("merge", A, B, "--method", "slerp", "--t", "0.5", *rules, *OUT) == 0
    got, first, second = written(), flat(1), flat(2)
    np.testing.assert_array_equal(got["head/kernel"], second["head/kernel"])
    np.testing.assert_array_equal(got["layer_0/kernel"], first["layer_0/kernel"])
    want = transforms.slerp(first, second, 0.5)
    np.testing.assert_array_equal(got["layer_1/kernel"], want["layer_1/kernel"])


def test_nuslerp_and_multi_slerp_need_no_base() -> None:
    for name, want in {
        "nuslerp": transforms.slerp(flat(1), flat(2), 0.25, threshold=1.0),
        "multi_slerp": transforms.multi_slerp(None, [flat(1), flat(2)], [3.0, 1.0]),
    }.items():
        words = ("--method", name, "--weights", "3,1")
        assert params("merge", A, B, *words, *OUT, "--force") == 0
        assert_same(drop_step(written()), drop_step(native(want)))


@pytest.mark.parametrize(("name", "normalize"), [("nuslerp", None), ("task_arithmetic", True)])
def test_weights_that_are_small_together_are_ratios_still(name: str, normalize: Any) -> None:
    base = {} if name == "nuslerp" else {"w": np.asarray([1.0, 0.0], np.float32)}
    models = [{"w": np.asarray(x, np.float32)} for x in ([2.0, 1.0], [0.0, 3.0])]

    def merged(size: float) -> Any:
        options = Options([3 * size, size], normalize, axis=-1)
        return by_tensor(METHODS[name].merge, base, models, options)["w"]

    np.testing.assert_allclose(merged(1e-9), merged(1.0), rtol=1e-6)


@pytest.mark.parametrize("name", ["dare", "dare_ties", "della"])
def test_tensors_stored_twice_stay_tied(name: str) -> None:
    """As in whole trees whose leaves are one array."""
    trees = []
    for seed, file in enumerate((BASE, A, B)):
        tree = {
            "embed": np.asarray(flat(seed)["layer_0/kernel"]),
            "other": flat(seed)["head/kernel"],
        }
        tree["lm_head"] = tree["embed"]
        safetensors.save(file, tree)
        trees.append({name: jnp.asarray(x) for name, x in tree.items()})
        trees[-1]["lm_head"] = trees[-1]["embed"]
    words = ("--method", name, "--base", BASE, "--density", "0.4", "--seed", "1")
    assert params("merge", A, B, *words, *OUT) == 0
    got = written()
    np.testing.assert_array_equal(got["embed"], got["lm_head"])
    want = METHODS[name].merge.combine(
        Members(trees[0], trees[1:], []), Options(density=0.4, seed=1)
    )
    assert want["embed"] is want["lm_head"] or (want["embed"] == want["lm_head"]).all()
    assert_same(got, native(want))


@pytest.mark.parametrize("name", ["dare", "dare_ties", "della", "della_linear"])
def test_blocks_of_rows_are_merged_one_after_another(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the draws of the whole tensor."""
    monkeypatch.setattr("kdtl_jax.transforms._blocks.BLOCK", 6)
    words, sizes = NEEDED[name], []
    merge = METHODS[name].merge

    def watched(x: Members, o: Options) -> Any:
        sizes.extend(leaf.size for leaf in x.base.values() if leaf.ndim > 1)
        return merge.combine(x, o)

    method = METHODS[name]._replace(merge=merge._replace(combine=watched))
    monkeypatch.setitem(METHODS, name, method)
    assert params("merge", A, B, "--method", name, *words, "--base", BASE, *OUT) == 0
    assert len(sizes) > 8 and max(sizes) <= 6
    base, *models = (drop_step(flat(seed)) for seed in range(3))
    want = by_tensor(merge, base, models, options(words))
    assert_same(drop_step(written()), want)


@pytest.mark.parametrize("words", [[], ["--on-mismatch", "keep"], ["--method", "ties"]])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_integer_codes_are_never_merged(words: list[str], dtype: Any, capsys: Any) -> None:
    codes = flat(2) | {"head/kernel": np.ones((4, 3), dtype)}
    safetensors.save("codes.safetensors", codes)
    extra = [*words, *(["--base", BASE] if words[:1] == ["--method"] else [])]
    assert params("merge", A, "codes.safetensors", *extra, *OUT) == 1
    error = capsys.readouterr().err
    assert "head/kernel" in error and "Dequantize" in error
    for action in (["scale"], ["average"], ["slice", "--take", "head/.*@-1=0"]):
        assert params(action[0], "codes.safetensors", *action[1:], *OUT) == 1
        assert "Dequantize" in capsys.readouterr().err
    assert not Path("out.safetensors").exists()


def test_packed_codes_that_differ_are_not_the_firsts(capsys: Any) -> None:
    """Integers of unknown names beside numbers that would be averaged; counters may differ."""
    for seed in (0, 1):
        packed = {"q": np.full((2, 3), seed, np.int32), "step": np.asarray([seed], np.int64)}
        same = {"index": np.ones((2, 2), np.int64), "norm": np.full(3, 1.0 + seed, np.float32)}
        safetensors.save(f"{seed}.safetensors", packed | same)
    both = ("0.safetensors", "1.safetensors")
    recipe = {"models": [{"model": name} for name in both], "merge_method": "linear"}
    recipe["parameters"] = {"weight": 1.0}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    for words in (("average", *both), ("merge", *both), ("merge", "--recipe", "recipe.yaml")):
        assert params(*words, *OUT) == 1
        assert "'q' holds integers that differ" in capsys.readouterr().err
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize("density", [0.0, 0.3, 0.77, 1.0])
def test_ties_of_whole_models_is_the_librarys(density: float) -> None:
    """Thresholds by histogram keep what sorting keeps, equal magnitudes in the same order."""
    words = ["--method", "ties", "--base", BASE, "--density", str(density), "--weights", "1,0.5"]
    assert params("merge", A, B, *words, *OUT) == 0
    base = flat(0)
    taus = [transforms.task_vector(flat(seed), base) for seed in (1, 2)]
    merged = transforms.ties(taus, [1.0, 0.5], density=density)
    assert_same(written(), native(transforms.apply_task_vectors(base, [merged])))


def test_average_weighs_and_leaves_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert params("average", A, B, "--weights", "3,1", "--where", "layer_./kernel", *OUT) == 0
    a, b, got = flat(1), flat(2), written()
    for name, array in a.items():
        want = (3 * array + b[name]) / 4 if "layer" in name and "kernel" in name else array
        np.testing.assert_array_equal(got[name], want, err_msg=name)
    text = capsys.readouterr().out
    assert "merged  layer_{0..2}/kernel" in text and "kept    head/kernel" in text


def test_models_that_differ_stop_the_merge_or_keep_the_base(capsys: Any) -> None:
    other = flat(2) | {"head/kernel": np.ones((4, 5), np.float32), "extra": np.ones(1)}
    del other["layer_0/bias"]
    safetensors.save("other.safetensors", other)
    assert params("average", A, "other.safetensors", *OUT) == 1
    error = capsys.readouterr().err
    for part in ("lacks 'layer_0/bias'", "'extra'", "[4, 3]", "--on-mismatch keep"):
        assert part in error
    assert params("average", A, "other.safetensors", "--on-mismatch", "keep", *OUT) == 0
    text = capsys.readouterr().out
    for part in ("missing  layer_0/bias", "extra    extra", "is [4, 5] elsewhere"):
        assert part in text
    np.testing.assert_array_equal(written()["layer_0/bias"], flat(1)["layer_0/bias"])


# --- tensors of every kind -----------------------------------------------------------------------


def many(seed: int) -> Flat:
    """Leaves of several shapes and dtypes; in two, models agree with each other or the base."""

    def grid(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
        values = np.random.default_rng(seed).integers(-6, 7, shape) * 0.75
        return np.asarray(values, jnp.dtype(dtype))

    return {
        "kernel": grid(seed, 5, 8),
        "bias": grid(seed + 10, 28),
        "half": grid(seed + 20, 5, 8, dtype="bfloat16"),
        "equal": grid(30 + (seed > 0), 5, 8),
        "unchanged": grid(40, 5, 8),
        "scalar": grid(seed + 50),
        "none": grid(seed, 0, 3),
    }


@pytest.mark.parametrize("name", ["linear", "dare", "della", "breadcrumbs", "sce", "model_stock"])
def test_leaves_of_every_kind_keep_shape_and_dtype(name: str) -> None:
    base, *models = (many(seed) for seed in range(4))
    names = [f"{i}.safetensors" for i in range(3)]
    for file, tree in zip([BASE, *names], [base, *models], strict=True):
        safetensors.save(file, tree)
    words = list(NEEDED.get(name, []))
    if "--weights" in words:
        words[words.index("--weights") + 1] += ",1"
    has_base = METHODS[name].base != "has no"
    extra = ["--base", BASE] if has_base else []
    assert params("merge", *names, "--method", name, *words, *extra, *OUT) == 0
    got = written()
    full = {path: x for path, x in base.items() if x.size}
    given = [{p: m[p] for p in full} for m in models]
    want = by_tensor(METHODS[name].merge, full if has_base else {}, given, options(words))
    assert_same(got, want | {"none": base["none"]})
    if has_base:
        np.testing.assert_array_equal(got["unchanged"], base["unchanged"])


@pytest.mark.parametrize(
    "words",
    ["slerp --t 0.5", "slerp --t 0.5 --axis 0", "model_stock", "sce --density 0.5",
     "ties --scope tensor", "ties", "dare --density 0.5"],
)  # fmt: skip
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_within_its_tensor(words: str, value: float, capsys: Any) -> None:
    """And its input is named, once: what drops entries may drop it, and the result is finite."""
    trees = [{path: flat(seed)["head/kernel"] for path in ("kernel", "other")} for seed in range(3)]
    trees[2]["kernel"][3, 2] = value
    for file, tree in zip((BASE, A, B), trees, strict=True):
        safetensors.save(file, tree)
    base = [] if "slerp" in words else ["--base", BASE]
    assert params("merge", A, B, "--method", *words.split(), *base, *OUT) == 0
    got, message = written(), capsys.readouterr().err
    assert np.isfinite(got["other"]).all() and "other" not in message
    assert message.count("warning: kernel of b.safetensors holds NaN or infinity") == 1
    if "slerp" in words:  # of a column, if every one has its own angle
        assert np.isnan(got["kernel"][:, 2]).all()
        assert np.isnan(got["kernel"][:, :2]).all() == ("--axis" not in words)


def test_double_precision_stays_what_it_is() -> None:
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 8))
    base, *models = ({"kernel": start + i * 1e-9 * rng.normal(size=(5, 8))} for i in range(3))
    for file, tree in zip((BASE, A, B), (base, *models), strict=True):
        safetensors.save(file, tree)
    assert params("merge", A, B, "--method", "model_stock", "--base", BASE, *OUT) == 0
    with jax.enable_x64(True):
        assert_same(written(), native(transforms.model_stock(base, models)))


@pytest.mark.parametrize("command", [["average"], ["merge", "--method", "linear"]])
def test_models_that_say_different_things_of_themselves_are_named(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    says = {"model": "vit:heads=8", "class_names": '["ant", "bee"]', "seed": "0"}
    other = {"model": "vit:heads=1", "class_names": '["bee", "ant"]', "seed": "1"}
    for file, metadata in ((A, says), (B, other), (BASE, {})):
        safetensors.save(file, flat(0), metadata=metadata)
    assert params(*command, A, B, "--write", "one.safetensors") == 0
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first.startswith(
        "warning: b.safetensors says model vit:heads=1, a.safetensors vit:heads"
    )
    assert second.startswith("warning: b.safetensors says class_names")
    for models in ((A, A), (A, BASE)):  # who says nothing contradicts nobody
        assert params(*command, *models, *OUT, "--force") == 0
        assert capsys.readouterr().err == ""
