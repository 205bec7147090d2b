"""The generated pages: all of them, and writing them."""

from collections.abc import Mapping
from pathlib import Path

import reference
import tables


def everything(root: Path) -> dict[str, str]:
    """Every generated page by its path below `docs/`; `root` holds the benchmarks."""
    return dict([*reference.pages(), *tables.pages(root)])


def write(folder: Path, made: Mapping[str, str]) -> None:
    """Writes the pages that changed, so that a second build is short; deletes stale ones."""
    for name, text in made.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    for inside in {Path(name).parent for name in made} - {Path()}:
        for path in (folder / inside).glob("*.md"):
            if str(path.relative_to(folder)) not in made:
                path.unlink()
