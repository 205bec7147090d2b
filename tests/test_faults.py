"""A run that is killed or stopped again and again ends as one that was not, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest


@pytest.mark.slow
def test_killed_and_stopped_runs_end_bit_identical(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": str(here.parent),
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(here / "fault_program.py"), str(tmp_path), "--chain"]
    done = subprocess.run(
        [*command, "--kills", "3", "--terms", "1"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *attacks, last = json.loads(done.stdout.splitlines()[-1])["attacks"]
    assert [a["code"] for a in attacks if a["signal"] == "SIGKILL"] == [-9] * 3, done.stderr
    stopped = [a for a in attacks if a["signal"] == "SIGTERM"]
    assert [a["code"] for a in stopped] == [143], done.stderr
    assert all(a["newest"] >= a["last_line"] > 0 for a in stopped), "a stop loses no step"
    assert last["identical"], done.stderr


@pytest.mark.slow
def test_two_processes_end_together_and_identical(tmp_path: Path) -> None:
    """Undisturbed, with SIGTERM to both or to one of them, and with one of them killed."""
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": str(here.parent),
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(here / "pair_program.py"), str(tmp_path)]
    counts = ["--undisturbed", "1", "--stopped", "2", "--killed", "1", "--steps", "30"]
    done = subprocess.run([*command, *counts], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    actual = json.loads(done.stdout.splitlines()[-1])  # Gloo writes to stdout too
    assert len(actual) == 4
    for run in actual:
        assert run["ended"] and run["identical"], actual
        if run["kind"] == "stopped":
            assert set(run["codes"]) <= {143, 0}, "both stop, or both were done"


@pytest.mark.slow
def test_commands_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
    }
    command = [sys.executable, "-W", "ignore", str(here / "kill_program.py"), str(tmp_path / "all")]
    counts = ["--kills", "2", "--stops", "2", "--only", "scale,cache"]
    done = subprocess.run([*command, *counts], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    actual = json.loads(done.stdout.splitlines()[-1])
    assert len(actual) == 8 and not [attack for attack in actual if attack["wrong"]], actual
    assert any(attack["code"] for attack in actual), "nothing was killed before its end"


SIGNALED = """
import os, signal, socket, sys
from kdtl_jax.run import processes

with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
with processes.signals() as found:
    processes.initialize(coordinator=f"localhost:{port}", processes=1, process=0)
    os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(0 if found.number == signal.SIGTERM else 1)
"""


def test_a_process_that_joins_others_keeps_its_signals() -> None:
    """JAX catches SIGTERM too, and a command handles signals before it joins."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SIGNALED], env=environment, capture_output=True, timeout=100
    )
    assert done.returncode == 0, done.stderr.decode()
