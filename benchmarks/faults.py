"""Kills, terminations and a full disk: does a resumed run end like an undisturbed one?

Command:   python benchmarks/faults.py [--kills 50] [--terms 20] [--seed 1] [--json out.json]
           python benchmarks/faults.py --pairs 20
           mount -t tmpfs -o size=8m tmpfs FOLDER && python benchmarks/faults.py --full-disk FOLDER
Machine:   2 cores of an AMD EPYC virtual machine, Linux 6.18, busy with other work (load 5 to 15);
           jax 0.10.2, orbax-checkpoint 0.12, Python 3.11.7
RESULT:    kill -9: 50 of 50 resumes bit-identical; 42 of the kills came during a save
           SIGTERM: 20 of 20 resumes bit-identical; 20 exited 143, 20 with their last step saved;
           0.91 s to the exit (at most 1.58)
           two processes: 20 of 20 undisturbed runs ended identical; 17 of 17 stopped by SIGTERM (to
           both or to one) exited 143 together within 16 s and resumed bit-identical; 3 of 3 whose
           partner was killed ended on their own and resumed bit-identical: within 2 s if process 0
           was killed; if process 1 was, process 0 waits for a missing heartbeat and ended after 28
           to 31 s
           full disk, foreseen and not: step 8 fails with the reason, and steps 0 to 7 stay whole;
           once there is space again, step 8 is saved and restored

The run (tests/fault_program.py) distills an MLP with dropout, augmentation, AdamW and a running
mean for 200 steps, saves every 20 and evaluates every 50. Every attack picks a random line of its
metrics and a random moment after it, sends the signal, resumes to the end, and compares the whole
state and the metrics file with an uninterrupted run's, bit by bit. With --full-disk, checkpoints
fill a folder on a small file system until there is no space.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdtl_jax.run import checkpoint

TESTS = Path(__file__).parent.parent / "tests"
PROGRAM, PAIRS = TESTS / "fault_program.py", TESTS / "pair_program.py"


def last_line(stdout: str) -> Any:
    """The JSON that a program printed last; Gloo writes to stdout too."""
    return json.loads(stdout.splitlines()[-1])


def attacks(kills: int, terms: int, seed: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PROGRAM), folder, "--kills", str(kills)]
        command += ["--terms", str(terms), "--seed", str(seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return last_line(done.stdout)["attacks"]


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Runs of two processes: so many undisturbed, as many stopped or killed and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PAIRS), folder, "--undisturbed", str(count)]
        killed = count // 6
        command += ["--stopped", str(count - killed), "--killed", str(killed), "--seed", str(seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = last_line(done.stdout)
    for kind in ("undisturbed", "stopped", "killed"):
        runs = [run for run in result if run["kind"] == kind]
        ended, same = (sum(run[name] for run in runs) for name in ("ended", "identical"))
        print(
            f"two processes, {kind}: {ended} of {len(runs)} ended by themselves, at most "
            f"{max((run['seconds'] for run in runs), default=0):.0f} s later; {same} identical"
        )
    return result


def summary(found: list[dict[str, Any]]) -> None:
    killed = [a for a in found if a["signal"] == "SIGKILL"]
    stopped = [a for a in found if a["signal"] == "SIGTERM"]
    same = sum(a["identical"] for a in killed)
    print(
        f"kill -9: {same} of {len(killed)} resumes bit-identical; "
        f"{sum(a['in_save'] for a in killed)} of the kills came during a save"
    )
    if stopped:
        seconds = [a["seconds"] for a in stopped]
        print(
            f"SIGTERM: {sum(a['identical'] for a in stopped)} of {len(stopped)} resumes "
            f"bit-identical; {sum(a['code'] == 143 for a in stopped)} exited 143, "
            f"{sum(a['newest'] >= a['last_line'] for a in stopped)} with their last step saved; "
            f"{statistics.median(seconds):.2f} s to the exit (at most {max(seconds):.2f})"
        )


def full_disk(folder: Path, is_foreseen: bool) -> None:
    """Saves a megabyte at a time until the disk is full; then frees two steps and goes on.

    A save that cannot fit is refused before it writes. Unforeseen, as where another process takes
    the room meanwhile, the write itself must fail without loss.
    """
    usage = shutil.disk_usage
    if not is_foreseen:
        shutil.disk_usage = lambda path: usage(path)._replace(free=2**40)
    rng = np.random.default_rng(0)

    def state(step: int) -> dict[str, Any]:
        return {"step": jnp.asarray(step), "weights": jnp.asarray(rng.random(2**18), jnp.float32)}

    states, step = {}, 0
    home = folder / ("foreseen" if is_foreseen else "unforeseen")
    with checkpoint.open_folder(
        home, keep=lambda saved: [one.step for one in saved]
    ) as checkpoints:
        while step < 1000:
            states[step] = state(step)
            try:
                checkpoint.save(checkpoints, step, states[step])
                checkpoint.wait(checkpoints)
            except OSError as error:
                print(f"step {step}: {error}")
                break
            step += 1
        assert 2 < step < 1000, "the file system is too small or too large for this"
        for old in range(step):
            result = checkpoint.restore(home, states[0], step=old).state
            assert (result["weights"] == states[old]["weights"]).all() and result["step"] == old
        assert checkpoint.steps(home) == list(range(step)), "nothing half-written stays"
        print(f"all {step} steps saved before it are whole, bit by bit")
    with checkpoint.open_folder(home) as checkpoints:  # keeps three: room comes back step by step
        for old in range(2):
            shutil.rmtree(home / str(old))
        checkpoint.save(checkpoints, step, states[step])
    assert checkpoint.restore(home, states[0]).step == step
    print(f"with room again, step {step} is saved and restored")
    shutil.disk_usage = usage
    shutil.rmtree(home)


def main() -> None:
    parser = argparse.ArgumentParser(description="Example: python benchmarks/faults.py --kills 5")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=int, help="runs of two processes instead")
    parser.add_argument("--full-disk", type=Path, metavar="FOLDER", help="on a small file system")
    parser.add_argument("--json", help="write the attacks here")
    args = parser.parse_args()
    print(f"{platform.machine()}, {platform.system()} {platform.release()}", flush=True)
    if args.full_disk is not None:
        for is_foreseen in (True, False):
            full_disk(args.full_disk, is_foreseen)
        return
    if args.pairs is not None:
        results = pairs(args.pairs, args.seed)
        sys.exit(0 if all(run["ended"] and run["identical"] for run in results) else 1)
    results = attacks(args.kills, args.terms, args.seed)
    summary(results)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    sys.exit(0 if all(a["identical"] for a in results) else 1)


if __name__ == "__main__":
    main()
