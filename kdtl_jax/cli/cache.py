"""`kdtl cache`: a teacher's outputs for a training set, computed once and kept on disk."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdtl_jax._types import ModelFn, Variables
from kdtl_jax.cli import _specs
from kdtl_jax.cli._config import UsageError
from kdtl_jax.datasets import Splits
from kdtl_jax.losses import TopK
from kdtl_jax.recipes import _networks
from kdtl_jax.run import teacher_cache
from kdtl_jax.train import precision

ALL = "all"
DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = (*DTYPES, "int8")
COMPARED = 1024  # examples behind the fidelity of a lower precision
LINE_SECONDS = 5.0  # between lines of progress where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl cache`."""
    _specs.add_model_arguments(parser, {"teacher": "mlp:128,64"})
    parser.add_argument(
        "--weights", metavar="FILE", help="the teacher's safetensors, as kdtl distill writes them"
    )
    _specs.add_data_arguments(parser)
    parser.add_argument(
        "--taps",
        type=_names,
        default=["logits"],
        metavar="NAME,...",
        help=f"outputs to store, or {ALL}, as kdtl distill --teacher-cache reads them; "
        "default: logits",
    )
    parser.add_argument(
        "--top-k", type=_count, metavar="K", help="logits of the K most likely classes and the tail"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="of the softmax that is cut to K classes; default: 1",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help=f"stored; default: {DTYPES[0]}"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help=f"the teacher's; int8 is of its weights alone; default: {PRECISIONS[0]}",
    )
    parser.add_argument("--batch-size", type=_count, default=256, metavar="N", help="default: 256")
    parser.add_argument(
        "--out",
        default="runs/teacher_cache",
        metavar="FOLDER",
        help="a folder begun earlier is completed; default: runs/teacher_cache",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compute nothing: compare every byte in --out with its SHA-256, and with --weights "
        "what it was made from",
    )
    parser.epilog = (
        "Examples:\n"
        "  kdtl cache --teacher mlp:128,64 --weights runs/distill/teacher.safetensors\n"
        "  kdtl cache --data mnist/ --teacher cnn:32,64 --weights teacher.safetensors \\\n"
        "      --top-k 5 --dtype float16 --out runs/cache\n"
        "  kdtl cache --out runs/cache --verify"
    )


def run(args: argparse.Namespace) -> int:
    """Writes, completes or verifies a cache; returns the exit code."""
    folder = Path(args.out)
    if args.verify:
        return _verify(folder, args)
    if args.weights is None:
        raise UsageError(
            "--weights: name the teacher's safetensors file, for example "
            "runs/distill/teacher.safetensors."
        )
    splits, net, variables = _teacher(args)
    arrays = {"inputs": splits.train.inputs}
    taps = args.taps
    if taps == [ALL]:
        taps = sorted(_networks.shapes(net, 1, arrays["inputs"][:1]))
    apply, lowered = _in_precision(net.apply, variables, args.precision)
    if args.precision != "float32":
        _state_fidelity(net.apply, variables, apply, lowered, arrays["inputs"], args.precision)
    with _progress() as tell:
        plan = teacher_cache.write(
            folder,
            apply,
            lowered,
            arrays,
            batch_size=args.batch_size,
            # Standardization is in the data's digest, the model in the names of its weights.
            preprocessing={} if args.precision == "float32" else {"precision": args.precision},
            taps=taps,
            top_k=args.top_k,
            temperature=args.temperature,
            dtype=args.dtype,
            weights=teacher_cache.digest(variables),
            progress=tell,
        )
    cache = teacher_cache.open_cache(folder, expect=None, contents=False)
    _describe(folder, plan)
    if "logits" in taps and splits.train.classes:
        right = np.mean(_most_likely(cache) == splits.train.labels)
        print(f"teacher: {100 * right:.1f} % of these examples right")
    return 0


def _verify(folder: Path, args: argparse.Namespace) -> int:
    problems = teacher_cache.verify(folder)
    for problem in problems:
        print(f"damaged: {problem}", file=sys.stderr)
    if problems:
        print(f"kdtl cache: write {folder} again to compute what is damaged.", file=sys.stderr)
        return 1
    made_from = ""
    if args.weights is not None:
        splits, _, variables = _teacher(args)
        expect = teacher_cache.fingerprint(variables, {"inputs": splits.train.inputs})
        # The form is the folder's own; weights and data must be these.
        loose = dict.fromkeys(("taps", "logits", "dtype", "preprocessing", "views"))
        teacher_cache.open_cache(folder, expect=expect._replace(**loose), contents=False)
        made_from = ", made by these weights from these data"
    cache = teacher_cache.open_cache(folder, expect=None, contents=False)
    _describe(folder, cache.plan)
    print(f"whole: every byte is as it was written{made_from}")
    return 0


def _teacher(args: argparse.Namespace) -> tuple[Splits, _networks.Network, Variables]:
    """The data, the network, and its variables from the file."""
    if not Path(args.weights).exists():
        raise ValueError(f"--weights {args.weights}: no such file.")
    splits = _specs.splits(args)
    example = jnp.asarray(splits.train.inputs[:1])
    net = _networks.network(_specs.model(args.teacher, splits.train.classes), example)
    return splits, net, _networks.load(args.weights, net, example)


def _in_precision(model: ModelFn, variables: Variables, name: str) -> tuple[ModelFn, Variables]:
    if name == "float32":
        return model, variables
    if name == "int8":
        lowered = precision.quantize(variables.params)
        return precision.with_int8(model), Variables(lowered, variables.model_state)
    return precision.compute_in(model, jnp.dtype(name)), variables


def _state_fidelity(
    model: ModelFn,
    variables: Variables,
    lower_model: ModelFn,
    lowered: Variables,
    inputs: np.ndarray,
    name: str,
) -> None:
    """Says how well the teacher in a lower precision reproduces its float32 logits."""
    few = inputs[:COMPARED]
    reference, found = (
        jax.jit(fn)(v.params, v.model_state, few)[0].get("logits")
        for fn, v in ((model, variables), (lower_model, lowered))
    )
    if reference is None or found is None:
        return
    measured = precision.fidelity(found, reference)
    print(
        f"{name} against float32 on {len(few):,} examples: same class in "
        f"{100 * float(measured.agreement):.2f} %, KL {float(measured.kl):.2g} nats, largest logit "
        f"error {float(measured.largest_error):.2g}"
    )


def _most_likely(cache: teacher_cache.Cache) -> np.ndarray:
    found = []
    for start in range(0, cache.plan.size, 4096):
        rows = np.arange(start, min(start + 4096, cache.plan.size))
        logits = teacher_cache.rows(cache, rows)["logits"]
        cut = isinstance(logits, TopK)
        found.append(logits.indices[..., 0] if cut else np.argmax(logits, axis=-1))
    return np.concatenate(found)


def _describe(folder: Path, plan: teacher_cache.Plan) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.npy"))
    form = "" if plan.top_k is None else f", logits as {plan.fingerprint.logits}"
    print(
        f"{folder}: {plan.size:,} examples, {', '.join(plan.fingerprint.taps or ())} in "
        f"{plan.fingerprint.dtype}{form}, {size:,} bytes"
    )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line now and then in a log."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _lines()
        return
    columns = TextColumn("examples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("examples", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _lines() -> Callable[[int, int], None]:
    start, last = time.perf_counter(), -LINE_SECONDS

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter() - start
        if now - last >= LINE_SECONDS or done == total:
            last = now
            print(f"{now:5.1f} s  {done:,} of {total:,} examples", file=sys.stderr, flush=True)

    return tell


def _names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("expected names, as in logits,hidden_0")
    return found


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value
