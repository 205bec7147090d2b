"""The report of `kdtl transfer`, and where its targets come from."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdtl_jax import transforms
from kdtl_jax.datasets import Dataset, Splits
from kdtl_jax.recipes import _evidence, _students, _targets, _training
from kdtl_jax.recipes._measures import Measure
from kdtl_jax.recipes._targets import BASELINE, FAMILY, Compared, Source
from kdtl_jax.run import report


def results(
    settings: Any,  # `transfer.Settings`
    measure: Measure,
    target: Splits,
    source: Source,
    source_part: Dataset,
    found: Compared,
    programs: str,
) -> report.Results:
    """The report: which target to use, and what its methods were given.

    Args:
      settings: completed with defaults.
      measure: of the targets.
      target: the task.
      source: what was copied.
      source_part: the training set of a source trained here.
      found: the results, whose rows name the files.
      programs: what was compiled, in words.
    """
    part, few = target.train, settings.labels_per_class or 0
    everything = f"with all {len(part.labels)} training examples"
    drawn = f"with {few} labels each, drawn anew for every seed" if few else everything
    outputs = f"{part.classes} {measure.kind if part.classes > 1 else 'number'} {drawn}"
    trained_on = f"{len(source_part.labels)} examples of {source_part.classes} classes"
    where = settings.source_weights or f"one source model per seed, trained on {trained_on}"
    scores = ", ".join(f"{name} {score.mean:.2f}" for name, score in found.scores.items())
    advice, sections = _students.note(found.rows, BASELINE), []
    if measure.kind == "classes":
        sections = evidence(target.test, found.named, found.rows)
    return report.Results(
        "kdtl transfer: a trained model's weights on a new task",
        {
            "name": part.name,
            "target_train": few * part.classes or len(part.labels),
            "validation": len(target.validation.labels),
            "test": len(target.test.labels),
            "source": settings.source_weights or f"{len(source_part.labels)} source examples",
            "transferability": {name: score.mean for name, score in found.scores.items()},
            "recommended": _students.recommended(found.rows),
        },
        report.compared(found.rows, {FAMILY: BASELINE} if BASELINE in found.models else {}),
        found.learning,
        {},
        [
            f"Source: {where}; {copied(found.surgery, source, part.classes)}",
            f"Target: {outputs}; {len(target.validation.labels)} validation and "
            f"{len(target.test.labels)} test examples. Learning rate and strength are chosen "
            "on the validation split, never on the test split.",
            f"Transferability before any training: {scores or 'no features to score'}. Higher "
            "is better when comparing sources for this target.",
            *_students.diverged(found.rows),
            programs,
            *([] if advice is None else [advice]),
        ],
        sections=sections,
        score=measure.score_name,
    )


def copied(surgery: transforms.Report, source: Source, outputs: int) -> str:
    """The share of a target copied from its source, and which modules are new."""
    paths = [path.removeprefix("params/") for path in surgery.sizes.keys() - surgery.transferred]
    new = ", ".join(sorted({path.split("/")[0] for path in paths}))
    first = _training.pick(source.tree, 0) if source.is_per_seed else source.tree
    head = _targets.source_head(first)
    had = "" if head is None else f" ({head['kernel'].shape[-1]} outputs there, {outputs} here)"
    share = f"{100 * surgery.fraction:.1f}% of the target's parameters are copied from it"
    return f"{share}; new in the target: {new}{had}." if new else f"{share}."


def evidence(
    test: Dataset, named: Mapping[str, _evidence.Named], rows: Sequence[report.Row]
) -> list[report.Section]:
    """What the recommended method confuses, and where it and the baseline differ."""
    first = _students.first(rows)
    if first is None:
        return []
    best = named[first.method]
    other = named.get(BASELINE, best).classes
    return _evidence.sections(test, best, other, called="baseline")
