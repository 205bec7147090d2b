"""The teacher's outputs on disk: what a run needs, what a cache has, and reading."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdtl_jax import methods
from kdtl_jax._types import Variables
from kdtl_jax.interop import networks
from kdtl_jax.methods import Entry
from kdtl_jax.recipes import _models
from kdtl_jax.recipes._pair import Pair
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import teacher_cache


def taps(entries: Sequence[Entry], pair: Pair) -> list[str]:
    """The teacher's outputs that methods read: its logits, or all if any method reads more."""
    published = methods.table()  # what a user's method reads is unknown
    if all(entry in published and entry.needs in ("labels", "logits") for entry in entries):
        return ["logits"]
    return sorted(networks.output_shapes(pair.teacher, pair.example))


def check_folder(folder: Path, *, has_teacher: bool) -> None:
    """Rejects an unsuitable existing cache before the data are read.

    Raises:
      UsageError: if the cache is unsuitable, naming the flag that helps.
    """
    plan, _ = _plan(folder)
    if plan is None:
        return
    if not has_teacher:
        raise UsageError(
            f"--teacher-cache {folder} holds the outputs of a teacher. Name its weights with "
            "--teacher-weights, or another folder for those of a teacher trained here."
        )
    if (plan.fingerprint.logits or "dense") != "dense":
        raise UsageError(
            f"--teacher-cache {folder} holds {plan.fingerprint.logits}, but these methods read all "
            "classes. Write another with kdtl cache without --top-k."
        )


def check(
    folder: Path, pair: Pair, entries: Sequence[Entry], *, precision: str = "float32"
) -> None:
    """Rejects an unsuitable existing cache before anything is trained.

    Raises:
      UsageError: if the cache is unsuitable, naming what differs and the flag that helps.
    """
    plan, is_whole = _plan(folder)
    if plan is None:
        return
    needed, held = taps(entries, pair), plan.fingerprint.taps or ()
    lacking = [tap for tap in needed if tap not in held]
    if lacking:
        readers = [entry.name for entry in entries if taps([entry], pair) != ["logits"]]
        raise UsageError(
            f"--teacher-cache {folder} holds {', '.join(held)}, but {', '.join(readers)} read "
            f"{', '.join(lacking)} too. Write another with kdtl cache --taps all, or leave these "
            "methods out."
        )
    try:
        if is_whole:
            expected = _expected(pair, pair.given, needed)
            teacher_cache.open_cache(folder, expect=expected, contents=False)
        elif pair.given is not None:  # the teacher will complete it here
            made = _expected(pair, pair.given, held)._replace(
                dtype="float32", preprocessing=_preprocessing(precision)
            )
            teacher_cache.begun(folder, expect=made)
    except ValueError as error:
        complete = "" if is_whole else " It is not finished: complete it with kdtl cache."
        raise UsageError(f"--teacher-cache: {error}{complete}") from None


def outputs(
    folder: Path, pair: Pair, frozen: Variables, precision: str, needed: Sequence[str]
) -> Any:
    """The outputs in a cache, which is filled, completed or repaired first if necessary.

    A complete cache of this teacher on these data is accepted in any precision (`kdtl cache
    --dtype`, `--precision`) and with any additional outputs: its maker chose those.
    """
    net, inputs = pair.teacher, {"inputs": pair.arrays["inputs"]}
    expected = _expected(pair, frozen, needed)
    try:
        return teacher_cache.load(teacher_cache.open_cache(folder, expect=expected))
    except (FileNotFoundError, ValueError):  # `write` repairs it, or says what differs
        plan = _begun(folder)
        held = needed if plan is None else plan.fingerprint.taps or needed
        teacher_cache.write(
            folder, net.apply, frozen, inputs, batch_size=512, taps=held, **_made_of(pair),
            preprocessing=_preprocessing(precision),
        )  # fmt: skip
    return teacher_cache.load(teacher_cache.open_cache(folder, expect=expected, contents=False))


def _plan(folder: Path) -> tuple[teacher_cache.Plan | None, bool]:
    """The plan of a cache, if there is one, and whether the cache is complete."""
    try:
        return teacher_cache.open_cache(folder, expect=None, contents=False).plan, True
    except (FileNotFoundError, ValueError):  # there is none, or it must be completed or repaired
        return _begun(folder), False


def _begun(folder: Path) -> teacher_cache.Plan | None:
    """The plan of a cache that has to be completed or repaired."""
    try:
        return teacher_cache.begun(folder)
    except ValueError:  # `write` says what is wrong with it
        return None


def _preprocessing(precision: str) -> dict[str, str]:
    return {} if precision == "float32" else {"precision": precision}


def _made_of(pair: Pair) -> dict[str, Any]:
    return {
        "model": _models.identity(pair.teacher_text),
        "classes": pair.splits.train.class_names(),
    }


def _expected(
    pair: Pair, variables: Variables | None, needed: Sequence[str]
) -> teacher_cache.Fingerprint:
    made = teacher_cache.fingerprint(
        variables, {"inputs": pair.arrays["inputs"]}, taps=needed, **_made_of(pair)
    )
    return made._replace(dtype=None, preprocessing=None)
