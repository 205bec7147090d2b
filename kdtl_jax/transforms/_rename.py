"""Renaming leaves: by ordered rules of regular expressions, or by a function."""

import re
from collections.abc import Callable, Sequence

from kdtl_jax import trees

Rename = Sequence[tuple[str, str | None]] | Callable[[str], str | Sequence[str] | None]


def destinations(names: Sequence[str], rename: Rename) -> dict[str, tuple[str, ...]]:
    """`{source path: target paths}`; a dropped leaf has none.

    Raises:
      ValueError: if two source leaves get the same target path, a rule is never used or is not a
        regular expression, or the rules form a cycle.
    """
    if callable(rename):
        found = {name: _as_paths(name, rename(name)) for name in names}
    else:
        found = _by_rules(names, rename)
    taken: dict[str, str] = {}
    for source, targets in found.items():
        for target in targets:
            if target in taken:
                raise ValueError(
                    f"rename sends both {taken[target]!r} and {source!r} to {target!r}. "
                    "Rename one of them elsewhere, or drop it with the rule (path, None)."
                )
            taken[target] = source
    return found


def _by_rules(
    names: Sequence[str], rules: Sequence[tuple[str, str | None]]
) -> dict[str, tuple[str, ...]]:
    listed = isinstance(rules, Sequence) and not isinstance(rules, str)
    if not listed or not all(isinstance(rule, tuple) and len(rule) == 2 for rule in rules):
        repair = " Write list(rules.items())." if isinstance(rules, dict) else ""
        raise ValueError(
            "rename must be rules [(regex, new path or None), ...] or a function path -> path, "
            f"got {rules!r}.{repair}"
        )
    patterns = [_compiled(pattern) for pattern, _ in rules]
    used = [False] * len(rules)

    def renamed(name: str) -> str | None:
        for i, (pattern, (_, replacement)) in enumerate(zip(patterns, rules, strict=True)):
            match = pattern.fullmatch(name)
            if match:
                used[i] = True
                return None if replacement is None else _expanded(match, replacement)
        return name

    single = {name: renamed(name) for name in names}
    for (pattern, _), was_used in zip(rules, used, strict=True):
        if not was_used:
            near = ", ".join(map(repr, trees.nearest(pattern, list(names))))
            raise ValueError(
                f"the rename rule {pattern!r} matches no path of the source, or earlier "
                f"rules take all it matches. It must match a whole path; nearest: {near}."
            )
    _no_cycles(single)
    return {name: () if new is None else (new,) for name, new in single.items()}


def _no_cycles(renamed: dict[str, str | None]) -> None:
    # Every rule is applied once, so a swap would be well defined; but a reader cannot tell it
    # from two rules that undo each other, and the commonest cause is the latter.
    for start in renamed:
        seen, here = [start], renamed[start]
        while here is not None and here in renamed and here not in seen:
            seen.append(here)
            here = renamed[here]
        if here == start and len(seen) > 1:
            raise ValueError(
                f"the rename rules form a cycle: {' -> '.join([*seen, start])}. If a swap is "
                "meant, pass a function path -> path instead of rules."
            )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"the rename rule {pattern!r} is not a regular expression ({error})."
        ) from None


def _expanded(match: re.Match[str], replacement: str) -> str:
    try:
        return match.expand(replacement)
    except (re.error, IndexError) as error:
        raise ValueError(
            f"the replacement {replacement!r} of the rename rule {match.re.pattern!r} "
            f"cannot be filled in ({error})."
        ) from None


def _as_paths(name: str, result: str | Sequence[str] | None) -> tuple[str, ...]:
    paths = (result,) if isinstance(result, str) else () if result is None else result
    if not isinstance(paths, Sequence) or not all(isinstance(path, str) for path in paths):
        raise ValueError(
            f"rename must return a path, several paths or None, got {result!r} for {name!r}."
        )
    return tuple(paths)
