"""The shape of the package: floors, sizes, what importing it needs, and that its examples run."""

import ast
import doctest
import functools
import importlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdtl_jax

PACKAGE = Path(kdtl_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports go strictly downward. A new module is placed here, once, by deciding what it may know;
# modules on one floor do not know each other. A package (losses/, transforms/) is one module.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"_text", "_pages"}),
    frozenset(
        {"_types", "_checks", "_numerics", "_pooling", "_jaxprs"}
        | {"_files", "_locks", "_columnar", "_donation", "_host_arrays"}
    ),
    frozenset({"trees", "_softmax", "_model_functions"}),
    # Functions of arrays and of parameters.
    frozenset(
        {"losses", "discrepancies", "penalties", "connectors", "memory", "objective"}
        | {"projection", "transforms"}
        | {"normalization", "temperatures", "augment", "transferability", "metrics"}
    ),
    # Published methods as values; steps, and what is made of whole steps.
    frozenset({"methods", "train", "testing"}),
    # The host's side.
    frozenset({"run"}),
    # The edge: frameworks, models, files, the command line.
    frozenset({"models", "datasets"}),
    frozenset({"interop", "language"}),
    frozenset({"recipes"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
# What `import kdtl_jax` may need; everything else is imported at the edge.
LIGHT_FLOOR = 3
LIGHT = {"jax", "numpy", "optax", "scipy"}  # jax itself requires scipy


def unit(path: Path) -> str:
    """`losses` for kdtl_jax/losses/_logits.py, `train` for kdtl_jax/train.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def shown(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """Dotted names imported anywhere in a file, also within functions."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_floor() -> None:
    units = {unit(path) for path in FILES} - {"__init__"}
    homeless = units - FLOOR.keys()
    assert not homeless, f"place in FLOORS of tests/test_structure.py: {sorted(homeless)}"
    assert sum(len(floor) for floor in FLOORS) == len(FLOOR), "a module stands on two floors"


# One test per rule, not per rule and file: a thousand tests take longer to name than to run.


def test_imports_go_strictly_downward() -> None:
    faults = []
    for path in FILES:
        here = unit(path)
        if here == "__init__":
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != "kdtl_jax" or parts[1:] in ([], [here], ["__version__"]):
                continue
            if parts[1] == here:
                continue
            if parts[1] not in FLOOR:
                faults.append(f"{shown(path)} imports {name}, which has no floor")
            elif FLOOR[parts[1]] >= FLOOR[here]:
                faults.append(
                    f"{shown(path)} (floor {FLOOR[here]}) imports {name} "
                    f"(floor {FLOOR[parts[1]]}): imports go strictly downward"
                )
    assert not faults, "\n".join(faults)


def test_the_lower_floors_need_little() -> None:
    low = [path for path in FILES if FLOOR.get(unit(path), 0) <= LIGHT_FLOOR]
    allowed = LIGHT | {"kdtl_jax"} | set(sys.stdlib_module_names)
    needed = {shown(path): {name.split(".")[0] for name in imported(path)} for path in low}
    assert {name: actual - allowed for name, actual in needed.items() if actual - allowed} == {}


def test_files_are_short() -> None:
    tests = sorted(Path(__file__).parent.glob("*.py"))
    lines = {str(path): len(path.read_text().splitlines()) for path in [*FILES, *tests]}
    assert {name: n for name, n in lines.items() if n > 400} == {}, "split them at a noun"


STEP = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in BLOCKED:
                raise ImportError(f"{name} is blocked by this test")

    BLOCKED = {"flax", "orbax", "rich", "yaml", "safetensors", "matplotlib", "equinox", "haiku"}
    sys.meta_path.insert(0, Blocked())

    import jax, jax.numpy as jnp, optax
    import kdtl_jax as kd

    def model(params, model_state, inputs, *, key=None, train=False):
        return {"logits": inputs @ params["w"]}, model_state

    def terms(x):
        return {"kd": kd.losses.kd_kl(x.student["logits"], x.teacher["logits"])}

    tx = optax.sgd(0.1)
    params = {"w": jnp.zeros((2, 3))}
    state = kd.train.init_state(params, tx, key=jax.random.key(0))
    step = kd.train.make_step(model, terms, {"kd": 1.0}, tx, teacher=model)
    state, metrics = kd.train.jit_step(step)(state, {"inputs": jnp.eye(2)}, {"w": jnp.ones((2, 3))})
    assert jnp.isfinite(metrics["loss"].value())
    assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
    print("stepped", int(state.step))
"""


def test_the_package_imports_and_steps_without_flax_and_friends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STEP)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["stepped", "1"]


def documented() -> list[str]:
    with_examples = (p for p in FILES if ">>> " in p.read_text())
    names = (p.relative_to(PACKAGE.parent).with_suffix("").parts for p in with_examples)
    return [".".join(part for part in name if part != "__init__") for name in names]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", documented())
def test_documented_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def reexported() -> set[str]:
    """Dotted names that some `__init__` gives on, `from x import y as y`."""
    return {
        name
        for path in FILES
        if path.name == "__init__.py"
        for name in imported(path)
        if name.startswith("kdtl_jax.")
    }


def test_everything_public_is_documented() -> None:
    public, undocumented = reexported(), []
    for path in FILES:
        tree = parsed(path)
        if not ast.get_docstring(tree):
            undocumented.append(f"{shown(path)}: a file begins by saying what it is")
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        private = path.name[0] == "_" and path.name != "__init__.py"
        undocumented += [
            f"{shown(path)}: {node.name}"
            for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and node.name[0] != "_"
            and (not private or f"{module}.{node.name}" in public)
            and not ast.get_docstring(node)
        ]
    assert not undocumented, "\n".join(undocumented)
