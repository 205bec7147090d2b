"""`kdtl transfer --task sentences`: a sentence encoder's layers as a student, on any text."""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from kdtl_jax.cli import _config, _output
from kdtl_jax.interop import huggingface
from kdtl_jax.recipes import sentences as recipe
from kdtl_jax.run import report

QUICK = {"steps": 4, "held_out": 60}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the task."""
    defaults = recipe.Settings()
    group = parser.add_argument_group("--task sentences")
    group.add_argument(
        "--encoder",
        metavar="FOLDER",
        help="a Hugging Face folder of the BERT kind with tokenizer.json: all-MiniLM-L6-v2, say",
    )
    group.add_argument("--text", metavar="FILE", help="UTF-8 text, one sentence a line")
    group.add_argument(
        "--layers",
        type=_positions,
        default=",".join(map(str, defaults.layers)),
        metavar="LIST",
        help="the encoder's layers that the student takes, from 0; default: "
        + ",".join(map(str, defaults.layers)),
    )
    for name, what in (
        ("steps", "of each student"),
        ("max_length", "tokens of a line, the special ones included; what is longer is cut"),
        ("held_out", "lines of the comparison"),
        ("sentence_seeds", "students of each kind"),
    ):
        known = {"held_out": defaults.test, "sentence_seeds": defaults.seeds}
        default = known[name] if name in known else getattr(defaults, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=_at_least(1 if name == "sentence_seeds" else 4),
            default=default,
            metavar="N",
            help=f"{what}; default: {default}",
        )


def run(args: argparse.Namespace) -> int:
    """Distills the students and writes the run folder; returns the exit code."""
    for name in ("encoder", "text"):
        if getattr(args, name) is None:
            raise _config.UsageError(f"--task sentences needs --{name}; see kdtl transfer --help")
    settings = recipe.Settings(
        layers=tuple(map(int, args.layers.split(","))),
        steps=args.steps,
        max_length=args.max_length,
        test=args.held_out,
        validation=max(4, 2 * args.held_out // 5),
        seeds=args.sentence_seeds,
    )
    if args.quick:
        settings = settings._replace(rounds=1, checks=1)
    folder = _output.run_folder(args)
    progress = _output.progress()
    progress("reading")
    lines = recipe.read_lines(args.text)
    try:
        encode = recipe.tokenizer(args.encoder)
    except ImportError as error:
        raise RuntimeError(str(error)) from None
    ids = encode(lines, settings.max_length)
    config = json.loads((Path(args.encoder) / "config.json").read_bytes())
    parts = recipe.split(ids, settings, padding=config.get("pad_token_id") or 0)
    outcome = recipe.run(args.encoder, parts, settings, progress)
    print(outcome.surgery)
    results = report.Results(
        task="kdtl transfer: a sentence encoder's layers, distilled into a shallow student",
        data={
            "name": Path(args.text).name,
            "train": len(parts.train["tokens"]),
            "validation": len(parts.validation["tokens"]),
            "test": len(parts.test["tokens"]),
            "tokens_per_line": parts.train["tokens"].shape[1],
            "encoder": args.encoder,
        },
        rows=report.compared(outcome.rows, {recipe.FAMILY: recipe.BASELINE}),
        learning=outcome.learning,
        alpha={},
        notes=_notes(settings),
    )
    student = outcome.student
    huggingface.save(folder / "student", student.params, student.rules, config=student.config)
    shutil.copyfile(Path(args.encoder) / "tokenizer.json", folder / "student" / "tokenizer.json")
    _output.write_run(folder, args, results)
    print(table(outcome.rows))
    print(f"student: {folder / 'student'}\nreport: {folder / 'report.html'}")
    return 0


def table(rows: Sequence[report.Row]) -> str:
    """Fidelity, size and speed, one line per encoder."""
    head = ("", "mean cosine", "agreement@10", "parameters", "sentences/s", "trained in s")
    body = [
        (
            row.label,
            f"{row.settings['mean_cosine']:.4f}",
            f"{row.test.mean:.4f}",
            f"{row.parameters:,}",
            f"{row.settings['sentences_per_second']:,.0f}",
            f"{row.seconds:.0f}" if row.seconds else "–",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *body)
    )


def _notes(settings: recipe.Settings) -> list[str]:
    return [
        f"“Accuracy” here is agreement@{recipe.NEIGHBORS}: the share of a held-out line's nearest "
        "held-out lines that student and teacher both name. The mean cosine of their embeddings "
        "and the speed stand with each method's settings; the speed is that of this machine during "
        "this run, tokens ready, encoders taking turns.",
        f"The student takes layers {', '.join(map(str, settings.layers))}, the embeddings and the "
        "pooler of its teacher; its twin starts at random. Both are trained alike, on the "
        "teacher's hidden states, embeddings and their distances, without labels.",
    ]


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return int(text)

    return parse


def _positions(text: str) -> str:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected layers as in 1,3,5, got {text!r}")
    return text
