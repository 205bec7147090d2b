"""Run folders: made, locked, resumed, and their record of how the run was made."""

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

# What a run writes before its work: all that remains if it fails before training anything.
SETTINGS = {"config.yaml", "env.json", record.FILE}
# Settings that may differ between a run and its continuation.
FREE = {"resume", "force", "out", "log", "process", "coordinator", "quick"}
# Other files that a run replaces, and its folders, which have their own marks.
WRITTEN = {"metrics.jsonl", "results.json", "report.html", "sweep.csv", "bench.json"} | SETTINGS


class Folder(NamedTuple):
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
) -> Iterator[Folder]:
    """The run folder, locked, with `config.yaml` and `env.json` in it.

    A new folder, or one that holds only the settings of a run that failed early. With
    `settings.force`, an earlier run's folder, recognized by its record; only what a run writes is
    removed. With `resume`, the folder of a run with the same settings and content.

    Args:
      settings: of the recipe, with `out` and `force`.
      command: its name, for `config.yaml`.
      files: the data and the weights to read, by role.
      saves: the checkpoint folders to write, as paths within the run folder; what is in their way
        is refused now, not after training.
      models: the model folders to write within the run folder; likewise.

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
            taken_up, is_ours = _is_taken_up(settings), record.is_kept(folder)
            for name in saves:
                checkpoint.check_removable(folder / name)
            for name in models:
                _check_model(folder / name, is_ours=is_ours or taken_up)
            _files.check_free(folder / _students.FOLDER, _students.FOLDER)
            if folder.is_dir() and not is_ours and not taken_up:
                there = list(folder.iterdir())
                _files.refuse(
                    folder, [x for x in there if x.name in WRITTEN or x.suffix == ".safetensors"]
                )
            for name in WRITTEN:
                if folder.is_dir():
                    _files.check_place(folder / name)  # a pipe there would lose the results
            return taken_up

        def begin() -> str:
            stack.enter_context(_locks.checked_lock(folder, check))
            taken_up = _is_taken_up(settings)
            for unfinished in folder.glob(f".*{_files.TEMPORARY}"):
                if unfinished.is_file():
                    unfinished.unlink()
            made = record.made_from(files or {})
            if taken_up:
                run = _check_same(folder, config, command)
                for notice in record.compare(folder, made):
                    print(f"note: {notice}", file=sys.stderr)
                return run
            (folder / "metrics.jsonl").unlink(missing_ok=True)
            _files.remove(folder / _students.FOLDER, _students.FOLDER)
            if kept := checkpoint.remove(folder / "checkpoints"):
                left = ", ".join(map(_text.shown, kept))
                print(f"note: not ours, and left alone in {folder}/checkpoints: {left}")
            record.keep(folder, made)
            run = secrets.token_hex(8)
            begun = {"run": run, "command": _command(command), "begun": _now()}
            _files.write_json(folder / "env.json", {**report.environment(), **begun})
            # Last, because this file makes the run resumable, which needs the other two.
            _files.write_atomic(folder / "config.yaml", config.encode(errors="replace"))
            return run

        yield Folder(folder, processes.decide(begin))


def check_out(settings: Any, command: str) -> None:
    """Refuses, before anything is read, what `run_folder` would refuse from the settings alone.

    Settings that are None may depend on the data; `run_folder` compares those.

    Raises:
      ValueError: if the folder is not empty, or is a file.
      UsageError: if there is no run to resume, or it had other settings.
    """

    def check() -> None:
        if _is_taken_up(settings):
            open_ = [name for name, value in vars(settings).items() if value is None]
            config = yaml_files.as_yaml(settings, command, force=False, resume=False)
            _check_same(Path(settings.out), config, command, but=open_)

    processes.decide(check)


def _is_taken_up(settings: Any) -> bool:
    """Whether the settings resume the run in their folder; if not, the folder must be free."""
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
    """Refuses a model's folder that is a link or has files that no run wrote."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is a link or a file. Remove it, or choose another --out.")
    if folder.is_dir() and not is_ours:
        _files.refuse(folder, folder.iterdir())


def _check_same(folder: Path, config: str, command: str, but: Sequence[str] = ()) -> str:
    """The identity of the run to resume, after comparing most of its settings."""
    file = folder / "config.yaml"
    try:
        known = yaml_files.read(file)
        run = _files.read_json(folder / "env.json")["run"]
        if not isinstance(run, str):
            raise ValueError("its run has no name")
    except (OSError, ValueError, KeyError) as error:
        said = _text.shown(str(error), 200)
        raise ValueError(f"{file} or env.json beside it cannot be read ({said}).") from None
    now = yaml_files.parse(config.encode(errors="replace"))
    other = [
        f"{_text.shown(name)} ({_text.shown(known.get(name))}, now {_text.shown(now.get(name))})"
        for name in [*now, *(name for name in known if name not in now)]
        if name not in {*FREE, *but} and known.get(name) != now.get(name)
    ]
    if other:
        more = f" and {len(other) - 8} more" if len(other) > 8 else ""
        raise UsageError(
            f"--resume: {folder} was run with other settings: {', '.join(other[:8])}{more}. "
            f"Resume with: kdtl {command} --config {file} --resume --out {folder}"
        )
    return run


def how_it_was_run(folder: Path) -> dict[str, Any]:
    """The command line, when it began and ended, and every setting.

    Damaged records do not cost a run its results.
    """
    try:
        begun = _files.read_json(folder / "env.json")
        settings = yaml_files.read(folder / "config.yaml")
    except (OSError, ValueError) as error:
        print(f"note: how it was run is left out ({_text.shown(str(error), 200)})", file=sys.stderr)
        begun, settings = {}, {}
    known = {name: begun[name] for name in ("command", "begun") if name in begun}
    return {**known, "ended": _now(), **{k: v for k, v in settings.items() if k != "command"}}


def _command(name: str) -> str:
    """The command line as typed, or only the command if Python called it."""
    is_ours = Path(sys.argv[0]).name in ("kdtl", "__main__.py")
    return shlex.join(["kdtl", *sys.argv[1:]]) if is_ours else f"kdtl {name}, called from Python"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")
