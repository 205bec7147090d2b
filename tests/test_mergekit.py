"""`kdtl params merge --recipe` gives mergekit's numbers, from mergekit 0.1.5's `merge_tensors`.

Its random methods were given this library's draws. float32, torch 2.13.0.
"""

import json
from pathlib import Path

import mergekit_cases as cases
import numpy as np
import pytest
from params_checkpoints import OUT, params, written

from kdtl_jax.interop import safetensors

STORED = np.load(Path(__file__).with_name("data") / "mergekit.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("models")
    for name, tensors in cases.tensors().items():
        safetensors.save(result / f"{name}.safetensors", tensors)
    return result


@pytest.mark.parametrize("case", cases.CASES)
def test_mergekits_numbers(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    method, shared, weights, models = cases.CASES[case]
    own = [{} if weights is None else {"weight": w} for w in weights or models]
    recipe = {
        "merge_method": method,
        "parameters": shared,
        "models": [
            {"model": f"{name}.safetensors", "parameters": given}
            for name, given in zip(models, own, strict=True)
        ],
    }
    if cases.has_base(case) or method == "slerp":
        recipe["base_model"] = "base.safetensors" if cases.has_base(case) else "a.safetensors"
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert params("merge", "--recipe", "recipe.yaml", *OUT, "--force") == 0
    actual, expected = written(), [name for name in STORED if name.startswith(f"{case}|")]
    assert expected  # mergekit refuses some tensors, of no case all
    for name in expected:
        want, path = STORED[name], name.removeprefix(f"{case}|")
        size = float(np.abs(want).max())
        np.testing.assert_allclose(actual[path], want, rtol=0, atol=1e-6 * size, err_msg=path)
