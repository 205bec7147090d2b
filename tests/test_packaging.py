"""What `import kdtl_jax` shows, and what an installed package brings along."""

import importlib
import sys
from importlib import resources
from pathlib import Path

import pytest

import kdtl_jax


def test_dir_lists_the_modules_and_nothing_else() -> None:
    shown = dir(kdtl_jax)
    assert {"losses", "methods", "train", "interop", "run", "models", "Variables"} <= set(shown)
    assert not [name for name in shown if name.startswith("_")]
    assert all(hasattr(kdtl_jax, name) for name in shown)  # modules at the edge load when used


def test_a_name_that_does_not_exist_is_an_attribute_error_with_the_names_that_do() -> None:
    with pytest.raises(AttributeError, match="no attribute 'loses'.*'losses'"):
        getattr(kdtl_jax, "los" + "es")


def test_files_that_are_no_python_are_there() -> None:
    package = resources.files("kdtl_jax")
    for name in ("py.typed", "datasets/digits.npz", "run/report/page.html.jinja"):
        assert package.joinpath(name).is_file()


def test_the_package_holds_modules_and_four_other_files() -> None:
    package = Path(str(resources.files("kdtl_jax")))
    results = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    others = {str(path) for path in results if path.suffix not in (".py", ".pyc")}
    assert others == {
        "py.typed",
        "datasets/digits.npz",
        "datasets/shakespeare.txt",
        "run/report/page.html.jinja",
    }


@pytest.mark.parametrize(("module", "package"), [("equinox", "equinox"), ("haiku", "haiku")])
def test_a_framework_that_is_not_installed_is_named_with_its_extra(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"kdtl_jax.interop.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'kdtl_jax\[{module}\]'"):
        importlib.import_module(f"kdtl_jax.interop.{module}")
