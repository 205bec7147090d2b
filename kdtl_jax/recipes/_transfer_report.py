"""The report of `kdtl transfer`."""

from typing import Any

from kdtl_jax import transforms
from kdtl_jax.datasets import Dataset, Splits
from kdtl_jax.recipes import _evidence, _students, _targets
from kdtl_jax.recipes._measures import Measure
from kdtl_jax.recipes._targets import BASELINE, FAMILY, Comparison, StartingWeights
from kdtl_jax.run import report


def results(
    settings: Any,  # `transfer.Settings`
    measure: Measure,
    target: Splits,
    source: StartingWeights,
    source_part: Dataset,
    comparison: Comparison,
    programs: str,
) -> report.Results:
    """The report: the recommended target, and the data and weights of all methods.

    A source trained here saw `source_part`; `programs` is a summary of the compiled ones.
    """
    part, labels_per_class = target.train, settings.labels_per_class or 0
    examples_text = f"with all {len(part.labels)} training examples"
    if labels_per_class:
        examples_text = f"with {labels_per_class} labels each, drawn anew for every seed"
    outputs = f"{part.classes} {measure.kind if part.classes > 1 else 'number'} {examples_text}"
    trained_on = f"{len(source_part.labels)} examples of {source_part.classes} classes"
    where = settings.source_weights or f"one source model per seed, trained on {trained_on}"
    scores = ", ".join(f"{name} {score.mean:.2f}" for name, score in comparison.scores.items())
    best, predictions, sections = _students.best_row(comparison.rows), comparison.predictions, []
    if best is not None and measure.kind == "classes":
        student = predictions[best.method]
        baseline = predictions.get(BASELINE, student).classes
        sections = _evidence.sections(target.test, student, baseline, teacher_name="baseline")
    baselines = {FAMILY: BASELINE} if BASELINE in comparison.models else {}
    return report.Results(
        "kdtl transfer: a trained model's weights on a new task",
        {
            "name": part.name,
            "target_train": labels_per_class * part.classes or len(part.labels),
            "validation": len(target.validation.labels),
            "test": len(target.test.labels),
            "source": settings.source_weights or f"{len(source_part.labels)} source examples",
            "transferability": {name: score.mean for name, score in comparison.scores.items()},
            "recommended": best and best.settings["file"],
        },
        report.compared(comparison.rows, baselines),
        comparison.learning,
        {},
        [
            f"Source: {where}; {copied_share(comparison.surgery, source, part.classes)}",
            f"Target: {outputs}; {len(target.validation.labels)} validation and "
            f"{len(target.test.labels)} test examples. Learning rate and strength are chosen "
            "on the validation split, never on the test split.",
            f"Transferability before any training: {scores or 'no features to score'}. Higher "
            "is better when comparing sources for this target.",
            *_students.diverged(comparison.rows),
            programs,
            *_students.notes(comparison.rows, BASELINE),
        ],
        sections=sections,
        score=measure.score_name,
    )


def copied_share(surgery: transforms.Report, source: StartingWeights, outputs: int) -> str:
    """The share of a target copied from its source, and which modules are new."""
    paths = [path.removeprefix("params/") for path in surgery.sizes.keys() - surgery.transferred]
    new = ", ".join(sorted({path.split("/")[0] for path in paths}))
    head = _targets.source_head(source.tree)
    width = None if head is None else head["kernel"].shape[-1]
    head_note = "" if width is None else f" ({width} outputs there, {outputs} here)"
    share = f"{100 * surgery.fraction:.1f}% of the target's parameters are copied from it"
    return f"{share}; new in the target: {new}{head_note}." if new else f"{share}."
