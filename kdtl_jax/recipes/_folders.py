"""Run folders: creating, locking and resuming them, and the record of the run."""

import contextlib
import datetime
import secrets
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdtl_jax import _files, _locks, _text
from kdtl_jax.recipes import _stored_results, _students, yaml_files
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import checkpoint, processes, record, report

# Written before the work begins: all that remains of a run that fails before training.
SETTINGS = {"config.yaml", "env.json", record.FILE}
# Settings that may differ between a run and its continuation.
FREE_SETTINGS = {"resume", "force", "out", "log", "process", "coordinator", "quick"}
# Files that a run replaces; its folders have their own marks.
WRITTEN = {"metrics.jsonl", "results.json", "report.html", "sweep.csv", "bench.json"} | SETTINGS


class RunFolder(NamedTuple):
    """A run's folder, and the identity of the run, which its checkpoints carry."""

    path: Path
    run: str


@contextlib.contextmanager
def run_folder(
    settings: Any,
    command: str,
    files: Mapping[str, record.Paths] | None = None,
    *,
    saves: Sequence[str] = (),
    models: Sequence[str] = (),
) -> Iterator[RunFolder]:
    """Opens the run folder, locked, with `config.yaml` and `env.json` in it.

    The folder is new, or holds only the settings of a run that failed early. With
    `settings.force`, it may be an earlier run's, recognized by its record; only files that a run
    writes are removed. With `resume`, it is the folder of a run with the same settings and inputs.

    Args:
      settings: of the recipe, with `out` and `force`.
      command: its name, for `config.yaml`.
      files: the data and the weights to read, by role.
      saves: the checkpoint folders to write, as paths within the run folder, checked for foreign
        files now rather than after training.
      models: the model folders to write within the run folder, checked likewise.

    Raises:
      ValueError: if the folder is not empty, is a file, or belongs to a run on other content; or if
        foreign files are where records, checkpoints or models will be saved.
      UsageError: if the run to resume had other settings.
      RuntimeError: if another process uses the folder.
    """
    folder = Path(settings.out)
    config = yaml_files.as_yaml(settings, command, force=False, resume=False)
    with contextlib.ExitStack() as stack:

        def check() -> bool:
            is_resumed, is_ours = _resumes(settings), record.is_kept(folder)
            for name in saves:
                checkpoint.check_removable(folder / name)
            for name in models:
                _check_model(folder / name, is_ours=is_ours or is_resumed)
            _files.check_free(folder / _students.FOLDER, _students.FOLDER)
            if folder.is_dir() and not is_ours and not is_resumed:
                entries = list(folder.iterdir())
                _files.refuse(
                    folder, [x for x in entries if x.name in WRITTEN or x.suffix == ".safetensors"]
                )
            for name in WRITTEN:
                if folder.is_dir():
                    _files.check_place(folder / name)  # a pipe there would lose the results
            return is_resumed

        def begin() -> str:
            stack.enter_context(_locks.checked_lock(folder, check))
            is_resumed = _resumes(settings)
            for name in ("", _students.FOLDER, _stored_results.FOLDER, *models):
                _files.remove_unfinished(folder / name)
            contents = record.made_from(files or {})
            if is_resumed:
                run = _check_same(folder, config, command)
                for notice in record.compare(folder, contents):
                    print(f"note: {notice}", file=sys.stderr)
                return run
            (folder / "metrics.jsonl").unlink(missing_ok=True)
            _files.remove(folder / _students.FOLDER, _students.FOLDER)
            if foreign := checkpoint.remove(folder / "checkpoints"):
                names = ", ".join(map(_text.shown, foreign))
                print(f"note: not ours, and left alone in {folder}/checkpoints: {names}")
            record.keep(folder, contents)
            run = secrets.token_hex(8)
            start = {"run": run, "command": _command_line(command), "begun": _now()}
            _files.write_json(folder / "env.json", {**report.environment(), **start})
            # Written last: this file makes the run resumable, which needs the other two.
            _files.write_atomic(folder / "config.yaml", config.encode(errors="replace"))
            return run

        yield RunFolder(folder, processes.decide(begin))


def check_out(settings: Any, command: str) -> None:
    """Raises, before anything is read, the errors of `run_folder` that need only the settings.

    Settings that are None may depend on the data; `run_folder` compares them.

    Raises:
      ValueError: if the folder is not empty, or is a file.
      UsageError: if there is no run to resume, or it had other settings.
    """

    def check() -> None:
        if _resumes(settings):
            unset = [name for name, value in vars(settings).items() if value is None]
            config = yaml_files.as_yaml(settings, command, force=False, resume=False)
            _check_same(Path(settings.out), config, command, ignore=unset)

    processes.decide(check)


def _resumes(settings: Any) -> bool:
    """Whether the settings resume a run; if not, raises ValueError unless the folder is free."""
    folder, resume = Path(settings.out), getattr(settings, "resume", False)
    if resume and settings.force:
        raise UsageError("--resume continues a run and --force overwrites it: give one of them.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file. Name a folder.")
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"--out {_text.shown(str(folder.absolute()), 200)}: the name is not UTF-8, so no "
            "checkpoint can be saved there. Name another folder."
        ) from None
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names = {name for name in names - {".lock"} if not name.endswith(_files.TEMPORARY)}
    if resume:
        if "config.yaml" not in names:
            raise UsageError(f"--resume: there is no run in {folder}. Start without it.")
        return True
    if not any((folder / _stored_results.FOLDER).glob("*.npz")):
        names -= {_stored_results.FOLDER}
    few = names == SETTINGS or names <= SETTINGS - {"config.yaml"}
    failed_early = few and record.is_kept(folder)
    if names and not failed_early and not settings.force:
        raise ValueError(
            f"--out {folder} is not empty, and nothing in it is overwritten. Name another "
            "folder, or pass --force."
        )
    return False


def _check_model(folder: Path, *, is_ours: bool) -> None:
    """Raises ValueError if a model's folder is a link or has files that no run wrote."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is a link or a file. Remove it, or choose another --out.")
    if folder.is_dir() and not is_ours:
        _files.refuse(folder, folder.iterdir())


def _check_same(folder: Path, config: str, command: str, ignore: Sequence[str] = ()) -> str:
    """Compares the settings with those of the run to resume; returns its identity."""
    file = folder / "config.yaml"
    try:
        stored = yaml_files.read(file)
        run = _files.read_json(folder / "env.json")["run"]
        if not isinstance(run, str):
            raise ValueError("its run has no name")
    except (OSError, ValueError, KeyError) as error:
        message = _text.shown(str(error), 200)
        raise ValueError(f"{file} or env.json beside it cannot be read ({message}).") from None
    current = yaml_files.parse(config.encode(errors="replace"))
    names = [*current, *(name for name in stored if name not in current)]
    pairs = {name: (stored.get(name), current.get(name)) for name in names}
    differences = [
        f"{_text.shown(name)} ({_text.shown(old)}, now {_text.shown(new)})"
        for name, (old, new) in pairs.items()
        if name not in {*FREE_SETTINGS, *ignore} and old != new
    ]
    if differences:
        more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise UsageError(
            f"--resume: {folder} was run with other settings: {', '.join(differences[:8])}{more}. "
            f"Resume with: kdtl {command} --config {file} --resume --out {folder}"
        )
    return run


def run_record(folder: Path) -> dict[str, Any]:
    """The command line, the start and end times, and every setting.

    If the records are damaged, prints a note instead of failing, so the results are still written.
    """
    try:
        start = _files.read_json(folder / "env.json")
        settings = yaml_files.read(folder / "config.yaml")
    except (OSError, ValueError) as error:
        print(f"note: how it was run is left out ({_text.shown(str(error), 200)})", file=sys.stderr)
        start, settings = {}, {}
    fields = {name: start[name] for name in ("command", "begun") if name in start}
    return {**fields, "ended": _now(), **{k: v for k, v in settings.items() if k != "command"}}


def _command_line(name: str) -> str:
    """The command line as typed, or the name of the command if called from Python."""
    is_ours = Path(sys.argv[0]).name in ("kdtl", "__main__.py")
    return shlex.join(["kdtl", *sys.argv[1:]]) if is_ours else f"kdtl {name}, called from Python"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")
