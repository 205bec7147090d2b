"""Reports of transfers: printing, and collapsing layers into one line."""

import re

import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st

from kdtl_jax import transforms
from kdtl_jax.transforms import _report


def test_the_report_collapses_layers_only_where_they_are_equal() -> None:
    source = {f"layers_{i}": {"w": jnp.ones((2, 2))} for i in range(12)}
    source["layers_3"]["w"] = jnp.ones((3, 2))
    source["layers_7"]["w"] = jnp.ones((4, 2))
    target = {f"layers_{i}": {"w": jnp.zeros((2, 2))} for i in range(12)}
    _, report = transforms.transfer(source, target, on_mismatch=transforms.crop)
    rows = [line.split(maxsplit=2) for line in str(report).splitlines()[1:]]
    assert [row[:2] for row in rows] == [
        ["copied", "layers_{0..2,4..6,8..11}/w"],
        ["adapted", "layers_3/w"],
        ["adapted", "layers_7/w"],
    ]
    assert rows[1][2] == "[3, 2] -> [2, 2] by crop"


@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1))
def test_collapsed_paths_name_exactly_the_given_ones(numbers: set[tuple[int, int]]) -> None:
    given_paths = {f"layer_{a}/part{b}/w" for a, b in numbers}
    collapsed = _report.collapse_paths(sorted(given_paths))
    every = {f"layer_{a}/part{b}/w" for a in range(13) for b in range(4)}
    named = [path for row in collapsed for path in every if _names(row, path)]
    assert sorted(named) == sorted(given_paths)


def _names(row: str, path: str) -> bool:
    shown = re.split(r"(\{[^}]*\}|\d+)", row)[1::2]
    return all(
        int(n) in _members(group) for n, group in zip(re.findall(r"\d+", path), shown, strict=True)
    )


def _members(group: str) -> set[int]:
    out: set[int] = set()
    for piece in group.strip("{}").split(","):
        low, _, high = piece.partition("..")
        out |= set(range(int(low), int(high or low) + 1))
    return out


def test_nothing_to_transfer_is_everything() -> None:
    params, report = transforms.transfer({"n": 1}, {"n": jnp.array(2)})
    assert report.fraction == 1 and params["n"] == 2


def test_numbers_with_leading_zeros_are_other_names() -> None:
    names = ("a/01/w", "a/1/w", "a/2/w", "a" + "1" * 5000)
    sizes: dict[str, int] = {name: 1 for name in names}
    shown = str(transforms.Report(copied=names, sizes=sizes)).splitlines()[1:]
    assert [line.split()[1] for line in shown] == ["a/01/w", "a/{1,2}/w", names[-1]]
