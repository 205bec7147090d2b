"""Every case of a golden manifest: the reference's value, named outputs and gradients.

`pytest tests/test_golden.py --golden DIR` runs another set in the same format. In float64; each
case is held to its own tolerance.
"""

import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_maps
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import testing

Numbers = dict[str, jax.Array]

DECIDES_ON_VALUES = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)

METHODS: dict[str, golden_maps.Golden] = {}
EXCLUDED: dict[str, str] = {}
for _found in pkgutil.iter_modules(golden_maps.__path__):
    _module = importlib.import_module(f"golden_maps.{_found.name}")
    _twice = METHODS.keys() & _module.METHODS.keys()
    assert not _twice, f"mapped twice: {_twice}"
    METHODS |= _module.METHODS
    EXCLUDED |= getattr(_module, "EXCLUDED", {})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = [case for folder in _folders(metafunc.config) for case in _cases(folder)]
        metafunc.parametrize("case", cases, ids=[case["case"] for case in cases])


def _folders(config: pytest.Config) -> list[Path]:
    given = config.getoption("--golden")
    here = Path(__file__).parent
    return [Path(str(given))] if given else [here / "golden", here / "golden_language"]


def _cases(folder: Path) -> list[dict[str, Any]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return [case | {"folder": folder} for case in manifest["cases"]]


def _evaluated(fn: Callable[..., Any], wanted: Numbers, others: Numbers) -> Any:
    """As one unoptimized program, ten times as quick as op by op; eagerly where a mapping decides
    on values (which labels are ignored, which rows are kept)."""
    try:  # of as few constants as may be: XLA folds what depends on constants alone, slowly
        return testing.compiled(fn, wanted, others)(wanted, others)
    except DECIDES_ON_VALUES:
        pass
    try:
        return testing.compiled(lambda wanted: fn(wanted, others), wanted)(wanted)
    except DECIDES_ON_VALUES:
        return fn(wanted, others)


@pytest.mark.usefixtures("x64", "standard_promotion")
def test_golden(case: dict[str, Any]) -> None:
    method = case["method"]
    if method in EXCLUDED and method not in METHODS:
        return
    assert method in METHODS, f"no mapping for {method!r}: add it to tests/golden_maps or EXCLUDED"
    stored = np.load(case["folder"] / case["file"])
    inputs = {name: jnp.asarray(stored[name]) for name in case["inputs"]}

    def run(wanted: Numbers, others: Numbers) -> tuple[jax.Array, Numbers]:
        out = METHODS[method](inputs | wanted | others, case["hyperparameters"])
        outputs = out if isinstance(out, dict) else {"value": out}
        return jnp.asarray(outputs.get("value", 0.0)), outputs

    by = {name.removeprefix("grad_") for name in case["expected"] if name.startswith("grad_")}
    wanted = {name: inputs[name] for name in sorted(by)}
    others = {
        name: x
        for name, x in inputs.items()
        if name not in wanted and jnp.issubdtype(x.dtype, jnp.floating)
    }
    if wanted:
        (_, outputs), grads = _evaluated(jax.value_and_grad(run, has_aux=True), wanted, others)
        outputs = outputs | {f"grad_{name}": grad for name, grad in grads.items()}
    else:
        outputs = _evaluated(run, {}, others)[1]
    for name, meaning in case["expected"].items():
        if "informative only" in str(meaning):
            continue  # depends on the SVD routine of the reference's machine
        assert name in outputs, f"{method}: the mapping does not return {name!r}"
        got, want = np.asarray(outputs[name]), stored[name]
        assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
        np.testing.assert_allclose(
            got, want, rtol=case["rtol"], atol=case["atol"], err_msg=f"{method}: {name}"
        )


def test_few_methods_are_excluded(request: pytest.FixtureRequest) -> None:
    for folder in _folders(request.config):
        cases = _cases(folder)
        left_out = [c["case"] for c in cases if c["method"] in EXCLUDED]
        assert len(left_out) <= 0.1 * len(cases), left_out
    assert all(EXCLUDED.values()), "an exclusion needs its reason"
    assert not EXCLUDED.keys() & METHODS.keys()
