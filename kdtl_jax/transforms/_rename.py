"""Renaming leaves: by ordered rules of regular expressions, or by a function."""

import re
from collections.abc import Callable, Sequence

from kdtl_jax import trees

Rename = Sequence[tuple[str, str | None]] | Callable[[str], str | Sequence[str] | None]


def destinations(names: Sequence[str], rename: Rename) -> dict[str, tuple[str, ...]]:
    """`{source path: target paths}`; a dropped leaf has none. Raises ValueError for wrong rules."""
    if callable(rename):
        targets_by_source = {name: _as_paths(name, rename(name)) for name in names}
    else:
        targets_by_source = _by_rules(names, rename)
    source_by_target: dict[str, str] = {}
    for source, targets in targets_by_source.items():
        for target in targets:
            if target in source_by_target:
                raise ValueError(
                    f"rename sends both {source_by_target[target]!r} and {source!r} to {target!r}. "
                    "Rename one of them elsewhere, or drop it with the rule (path, None)."
                )
            source_by_target[target] = source
    return targets_by_source


def _by_rules(
    names: Sequence[str], rules: Sequence[tuple[str, str | None]]
) -> dict[str, tuple[str, ...]]:
    is_sequence = isinstance(rules, Sequence) and not isinstance(rules, str)
    if not is_sequence or not all(isinstance(rule, tuple) and len(rule) == 2 for rule in rules):
        repair = " Write list(rules.items())." if isinstance(rules, dict) else ""
        raise ValueError(
            "rename must be rules [(regex, new path or None), ...] or a function path -> path, "
            f"got {rules!r}.{repair}"
        )
    patterns = [_compile(pattern) for pattern, _ in rules]
    is_used = [False] * len(rules)

    def renamed(name: str) -> str | None:
        for i, (pattern, (_, replacement)) in enumerate(zip(patterns, rules, strict=True)):
            match = pattern.fullmatch(name)
            if match:
                is_used[i] = True
                return None if replacement is None else _expand(match, replacement)
        return name

    new_paths = {name: renamed(name) for name in names}
    for (pattern, _), was_used in zip(rules, is_used, strict=True):
        if not was_used:
            nearest = ", ".join(map(repr, trees.nearest(pattern, list(names))))
            raise ValueError(
                f"the rename rule {pattern!r} matches no path of the source, or earlier "
                f"rules take all it matches. It must match a whole path; nearest: {nearest}."
            )
    _no_cycles(new_paths)
    return {name: () if new is None else (new,) for name, new in new_paths.items()}


def _no_cycles(renamed: dict[str, str | None]) -> None:
    # Every rule is applied once, so a swap would be well defined. But it looks like two rules that
    # undo each other, which is the more common mistake.
    for start in renamed:
        visited, current = [start], renamed[start]
        while current is not None and current in renamed and current not in visited:
            visited.append(current)
            current = renamed[current]
        if current == start and len(visited) > 1:
            raise ValueError(
                f"the rename rules form a cycle: {' -> '.join([*visited, start])}. If a swap is "
                "meant, pass a function path -> path instead of rules."
            )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"the rename rule {pattern!r} is not a regular expression ({error})."
        ) from None


def _expand(match: re.Match[str], replacement: str) -> str:
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
