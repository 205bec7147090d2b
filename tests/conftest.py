"""Strict JAX for the whole suite: no silent promotion of rank or dtype, warnings are errors.

Eight virtual CPU devices, so that every run covers sharding; the persistent compilation cache, so
that a second run compiles nothing. Steps that call optax use `standard_promotion`, because optax's
Adam does not pass strict promotion.
"""

import contextlib
import ctypes
import gc
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

# Traces are garbage by the million and die young; looking through all that lives, as often as the
# default does, takes a twelfth of the suite's time.
gc.freeze()
gc.set_threshold(50_000, 50, 100)

# The older emitters of fused loops compile a training run in three fifths of the time, and tiny
# modules gain nothing from being split for several threads. Later XLA does not know the flags.
if jax.__version_info__ < (0, 11):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiles in four fifths of the time
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # and so in processes that tests start
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# A first example compiles, so its time says nothing; the same examples every run.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")


ROOM = 2**31  # bytes that a worker's compiled programs may take


@pytest.fixture(scope="module", autouse=True)
def programs_released() -> Iterator[None]:
    """Several workers share a machine: what nothing reads again goes between files.

    A worker that has grown drops its programs too; those that are needed again come from the
    persistent cache.
    """
    yield
    _drop_modules()
    if _resident() > ROOM:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _drop_modules() -> None:
    """What programs were compiled from, a megabyte each: dropped, the next are written there.

    A version of JAX that keeps them elsewhere keeps them.
    """
    for name, cache in (("interpreters.pxla", "_cached_lowering_to_hlo"), ("pjit", "_pjit_lower")):
        with contextlib.suppress(ImportError, AttributeError):
            getattr(importlib.import_module(f"jax._src.{name}"), cache).cache_clear()


def _resident() -> int:
    """Bytes of memory in use; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """Relaxes strict dtype promotion around optax, and rank promotion around models' biases."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Machine code as users run it, where a bound is on the last bits of float32."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision within one test."""
    with jax.enable_x64(True):
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        help="folder with manifest.json and .npz files (default: tests/golden and golden_language)",
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of `tiny.write_data`."""
    from tiny import write_data  # imports the whole package, which few tests need

    return write_data(tmp_path_factory.mktemp("data") / "small.npz")


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder of `params_checkpoints`, with its three models."""
    from params_checkpoints import prepare  # imports the whole command line

    prepare(tmp_path, monkeypatch)
