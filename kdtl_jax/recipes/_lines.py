"""Lines of plain text as token ids, in three disjoint parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdtl_jax import _files

LONGEST = 2**20  # characters of a line


class Lines(NamedTuple):
    """Token ids `[N, L]` and the mask of tokens, for three disjoint sets of lines."""

    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


def read_lines(path: str | Path, *, at_least: int = 15) -> list[str]:
    """The distinct lines of a text of at least `at_least` characters, in order.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is not UTF-8 text, or a line is longer than any sentence.
    """
    found: dict[str, None] = {}
    try:
        with _files.regular(Path(path)).open(encoding="utf-8") as file:
            while text := file.readline(LONGEST + 1):
                if len(text) > LONGEST:
                    raise ValueError(f"{path}: a line has more than {LONGEST:,} characters.")
                lines = map(str.strip, text.splitlines())
                found |= dict.fromkeys(line for line in lines if len(line) >= at_least)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}).") from None
    return list(found)


def split(
    ids: Sequence[Sequence[int]], *, validation: int, test: int, batch_size: int, padding: int
) -> Lines:
    """Padded token ids in three parts, drawn with a fixed seed.

    Raises:
      ValueError: if there are too few lines.
    """
    held = validation + test
    if len(ids) < held + batch_size:
        raise ValueError(
            f"{len(ids)} distinct lines, but {held} are held out and a batch needs "
            f"{batch_size}. Give more text, or hold out less."
        )
    width = max(map(len, ids))
    tokens = np.full((len(ids), width), padding, np.int32)
    mask = np.zeros((len(ids), width), np.bool_)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    order = np.random.default_rng(0).permutation(len(ids))
    cuts = np.split(order, [test, held])
    last, middle, first = ({"tokens": tokens[r], "mask": mask[r]} for r in cuts)
    return Lines(first, middle, last)
