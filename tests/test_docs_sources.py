"""Papers are cited alike wherever they are: one year, one first author per arXiv number."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMBER = r"\d{4}\.\d{5}|1[0-4]\d\d\.\d{4}"  # since 2015 of five digits
YEAR = r"(?:19|20)\d\d"
DATED = re.compile(rf"(?P<year>{YEAR})\s+\((?P<number>{NUMBER})\)")
LISTED = re.compile(rf"(?P<number>{NUMBER}), (?P<year>{YEAR})")
FIRST_AUTHOR = re.compile(rf"(?P<author>[^\W\d_]+) et al\.,? \(?(?P<number>{NUMBER})\b")


def sources() -> Iterator[tuple[str, str]]:
    """Places and their text: code, whose docstrings may break a line anywhere, and pages."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for path in (*(ROOT / "kdtl_jax").rglob("*.py"), *pages):
        yield str(path.relative_to(ROOT)), path.read_text()


def wrong_years(places: Iterator[tuple[str, str]]) -> list[str]:
    """Numbers with several years, or with one that a paper of that month cannot have."""
    years = defaultdict(lambda: defaultdict(list))
    for place, text in places:
        for result in (*DATED.finditer(text), *LISTED.finditer(text)):
            years[result["number"]][result["year"]].append(place)
    faults = []
    for number, places_of in sorted(years.items()):
        submitted = 2000 + int(number[:2])
        if len(places_of) > 1 or any(not 0 <= int(y) - submitted <= 2 for y in places_of):
            faults.append(f"{number}: {dict(places_of)}")
    return faults


def wrong_authors(places: Iterator[tuple[str, str]]) -> list[str]:
    """Numbers with several first authors."""
    authors = defaultdict(set)
    for _, text in places:
        for result in FIRST_AUTHOR.finditer(text):
            authors[result["number"]].add(result["author"])
    return [f"{number}: {names}" for number, names in sorted(authors.items()) if len(names) > 1]


def test_a_paper_has_one_year() -> None:
    assert wrong_years(sources()) == []


def test_a_paper_has_one_first_author() -> None:
    assert wrong_authors(sources()) == []


def test_citations_that_differ_are_found() -> None:
    twice = iter([("a", "Wei et al., 2020 (2012.15828)."), ("b", "Wei, 2012.15828, 2021")])
    assert len(wrong_years(twice)) == 1
    assert len(wrong_years(iter([("a", "Wei et al., 2019 (2012.15828).")]))) == 1
    assert wrong_years(iter([("a", "Wei et al., 2021\n  (2012.15828).")])) == []
    twice = iter([("a", "Wei et al. 2012.15828"), ("b", "Ma et al., 2012.15828, 2021")])
    assert len(wrong_authors(twice)) == 1
