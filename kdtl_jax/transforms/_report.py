"""The report of a transfer: printable data by path, with shapes."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kdtl_jax import _text, trees

Shape = tuple[int, ...]
WIDEST = 200  # characters of the column of paths; longer paths overrun it
LONGEST = 10_000  # characters of a path or a detail
# A number as str() writes it: `01` is not `1`, and is not collapsed.
_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9][0-9]{0,17})(?!\d)")


class Adapted(NamedTuple):
    """A leaf whose shape a policy changed."""

    path: str
    source_shape: Shape
    target_shape: Shape
    policy: str


class Kept(NamedTuple):
    """A target leaf that keeps its own value, and why."""

    path: str
    reason: str


class Cast(NamedTuple):
    """A leaf converted to the target's dtype."""

    path: str
    source_dtype: str
    target_dtype: str


class Report(NamedTuple):
    """The outcome for every leaf. Paths are the target's, except in `extra` and `unused`.

    Each target leaf is in exactly one of `copied`, `scaled`, `adapted`, `merged`, `kept` and
    `missing`; an adapted leaf may have been multiplied by alpha as well (`factors`). `str(report)`
    is a table in which layer indices are collapsed only where shape and status are equal.
    """

    copied: tuple[str, ...] = ()  # bit for bit, up to the dtype
    scaled: tuple[str, ...] = ()  # times alpha
    adapted: tuple[Adapted, ...] = ()
    kept: tuple[Kept, ...] = ()
    missing: tuple[str, ...] = ()  # the source has no such leaf; the target keeps its own
    extra: tuple[str, ...] = ()  # the target has no such leaf
    unused: tuple[str, ...] = ()  # outside `where`, or dropped by a rename
    cast: tuple[Cast, ...] = ()
    nonfinite: tuple[str, ...] = ()  # results that hold NaN or infinity
    untied: tuple[tuple[str, ...], ...] = ()  # shared one array in the target, no longer do
    merged: tuple[str, ...] = ()  # combined from several models' leaves
    shapes: Mapping[str, Shape] = {}  # of every target array; sizes count floating-point ones
    sizes: Mapping[str, int] = {}
    factors: Mapping[str, float | None] = {}  # alphas other than 1; None is traced or an array

    @property
    def transferred(self) -> tuple[str, ...]:
        """The paths that were filled from the source."""
        return (*self.copied, *self.scaled, *(leaf.path for leaf in self.adapted), *self.merged)

    @property
    def fraction(self) -> float:
        """The fraction of the target's parameters (scalars) that came from the source."""
        total = sum(self.sizes.values())
        return sum(self.sizes[path] for path in self.transferred) / total if total else 1.0

    def __str__(self) -> str:
        total, filled = sum(self.sizes.values()), sum(self.sizes[p] for p in self.transferred)
        lines = [
            f"{len(self.transferred)} of {len(self.sizes)} leaves, {filled:,} of {total:,} "
            f"parameters ({100 * self.fraction:.1f}%) from the source"
        ]
        rows = _rows(self)
        status_width = max((len(status) for status, *_ in rows), default=0)
        path_width = min(WIDEST, max((len(path) for _, path, _ in rows), default=0))
        lines += [
            f"  {status:<{status_width}}  {path:<{path_width}}  {detail}".rstrip()
            for status, path, detail in rows
        ]
        return "\n".join(lines)


def _rows(report: Report) -> list[tuple[str, str, str]]:
    """(status, collapsed paths, detail), in the order of the fields."""

    def shape(path: str) -> str:
        return str(list(report.shapes[path])) if path in report.shapes else ""

    def times(path: str) -> str:
        if path not in report.factors:
            return ""
        factor = report.factors[path]
        return " × alpha" if factor is None else f" × {factor:g}"

    def change(a: Adapted) -> str:
        return f"{list(a.source_shape)} -> {list(a.target_shape)} by {a.policy}{times(a.path)}"

    facts = [("copied", path, shape(path)) for path in report.copied]
    facts += [("scaled", path, shape(path) + times(path)) for path in report.scaled]
    facts += [("adapted", leaf.path, change(leaf)) for leaf in report.adapted]
    facts += [("merged", path, shape(path)) for path in report.merged]
    facts += [("kept", k.path, f"{shape(k.path)} {k.reason}".strip()) for k in report.kept]
    facts += [("missing", path, shape(path)) for path in report.missing]
    facts += [("extra", path, "") for path in report.extra]
    facts += [("unused", path, "") for path in report.unused]
    facts += [("cast", c.path, f"{c.source_dtype} -> {c.target_dtype}") for c in report.cast]
    facts += [("NaN or inf", path, shape(path)) for path in report.nonfinite]
    facts += [("untied", group[0], "from " + ", ".join(group[1:])) for group in report.untied]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for status, path, detail in facts:
        groups.setdefault((status, re.sub(_NUMBER, "#", path), detail), []).append(path)
    return [  # foreign names may hold line ends and escape codes
        (status, _text.shown(collapsed, LONGEST), _text.shown(detail, LONGEST))
        for (status, _, detail), paths in groups.items()
        for collapsed in collapse_paths(paths)
    ]


def collapse_paths(paths: Sequence[str]) -> list[str]:
    """`["a/0/w", "a/1/w", "a/2/w"] -> ["a/{0..2}/w"]`, for paths that differ only in numbers.

    Two paths are joined only if all their other numbers agree, so the result names exactly the
    given paths.
    """
    words = re.split(_NUMBER, paths[0])
    items = [
        tuple(frozenset((int(n),)) for n in re.findall(_NUMBER, path))
        for path in sorted(paths, key=trees.natural_key)
    ]
    for position in range(len(words) - 1):
        merged: dict[tuple[frozenset[int], ...], frozenset[int]] = {}
        for item in items:
            others = item[:position] + item[position + 1 :]
            merged[others] = merged.get(others, frozenset()) | item[position]
        items = [(*others[:position], n, *others[position:]) for others, n in merged.items()]
    return [
        words[0] + "".join(_numbers(n) + word for n, word in zip(item, words[1:], strict=True))
        for item in items
    ]


def _numbers(values: frozenset[int]) -> str:
    """`{0..2,5}` for more than one number, `7` for one."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    ranges = [f"{a}" if a == b else f"{a},{b}" if b == a + 1 else f"{a}..{b}" for a, b in runs]
    return ranges[0] if len(values) == 1 else "{" + ",".join(ranges) + "}"
