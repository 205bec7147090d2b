"""`kdtl demo`: the four foundation methods and KD on embedded real data."""

import argparse
from pathlib import Path

import jax
import numpy as np

from kdtl_jax.cli import _output
from kdtl_jax.datasets import Splits, Standardizer, digits, standardizer, stratified
from kdtl_jax.interop import safetensors
from kdtl_jax.recipes import demo_distill, demo_transfer
from kdtl_jax.run import checkpoint, report

BASELINES = {demo_distill.FAMILY: "student_alone", demo_transfer.FAMILY: "scratch"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl demo`."""
    _output.add_out(parser, "runs/demo")
    parser.add_argument("--quick", action="store_true", help="two seeds, few epochs: a smoke test")
    parser.epilog = "Example: kdtl demo --out runs/demo"


def run(args: argparse.Namespace) -> int:
    """Runs the demo and writes its run folder; returns the exit code."""
    folder = _output.run_folder(args)
    distill = demo_distill.QUICK if args.quick else demo_distill.Settings()
    transfer = demo_transfer.QUICK if args.quick else demo_transfer.Settings()
    raw = stratified(digits(), validation=0.2, test=0.3)
    measured = standardizer(raw.train)
    splits = Splits(*(measured.apply(part) for part in raw))
    progress = _output.progress()
    students = demo_distill.run(splits, distill, progress)
    targets = demo_transfer.run(splits, transfer, progress)
    results = report.Results(
        task="kdtl demo: knowledge from a large model to a small one, from one task to another",
        data=_data(splits, distill, transfer),
        rows=report.compared([*students.rows, *targets.rows], BASELINES),
        learning=students.learning | targets.learning,
        alpha=students.alpha,
        notes=_notes(splits, distill, transfer),
    )
    _save_models(folder, students, measured, distill)
    _output.write_run(folder, args, results)
    _output.print_table(results)
    print(f"report: {folder / 'report.html'}")
    return 0


def _save_models(
    folder: Path,
    students: demo_distill.Outcome,
    measured: Standardizer,
    settings: demo_distill.Settings,
) -> None:
    """`checkpoints/` with all seeds, `student.safetensors` with the first seed's KD student."""
    state = {"teachers": students.teachers, "students": students.students}
    kept = folder / "checkpoints"
    with checkpoint.open_folder(kept) as checkpoints:
        checkpoint.save(checkpoints, settings.epochs, state, {"method": "all"})
    student = jax.tree.map(lambda leaf: np.asarray(leaf[0]), students.students["kd"])
    widths = ",".join(map(str, settings.student_widths))
    safetensors.save(
        folder / "student.safetensors",
        student,
        metadata={
            "model": f"mlp:{widths}",
            "classes": "10",
            "method": "kd",
            "seed": "0",
            "input_mean": repr(measured.mean.tolist()),
            "input_scale": repr(measured.scale.tolist()),
        },
    )


def _data(
    splits: Splits, distill: demo_distill.Settings, transfer: demo_transfer.Settings
) -> dict[str, object]:
    return {
        "name": splits.train.name,
        "license": "CC BY 4.0, https://doi.org/10.24432/C50P49",
        "train": len(splits.train.labels),
        "validation": len(splits.validation.labels),
        "test": len(splits.test.labels),
        "student_images": 10 * distill.images_per_class,
        "target_images": 5 * transfer.labels_per_class,
    }


def _notes(
    splits: Splits, distill: demo_distill.Settings, transfer: demo_transfer.Settings
) -> list[str]:
    return [
        f"Data: {splits.train.name}, {len(splits.train.labels)} training, "
        f"{len(splits.validation.labels)} validation and {len(splits.test.labels)} test images. "
        "Settings are chosen on validation; the test split is only read off.",
        f"Distillation: a teacher sees all training images, its students only "
        f"{distill.images_per_class} per class, drawn anew for every seed, and the teacher's "
        "outputs on those same images. Projected outputs keep the teacher's selected hidden "
        "layers and refit the head alone.",
        f"Transfer: digits 0–4 are the source, 5–9 the target with {transfer.labels_per_class} "
        "labels per class, all at random places on a 12×12 canvas. (On the centered digits a copy "
        "does not beat training from scratch.)",
    ]
