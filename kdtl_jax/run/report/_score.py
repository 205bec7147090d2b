"""What is scored: its name and how its numbers are formatted."""

import math
from typing import NamedTuple


class Score(NamedTuple):
    """A score for which larger is better."""

    key: str  # in results.json: test_<key>, validation_<key>
    name: str  # in words
    is_share: bool = True  # between 0 and 1, shown in percent

    @property
    def unit(self) -> str:
        """`%`, or nothing."""
        return "%" if self.is_share else ""

    @property
    def factor(self) -> float:
        """From the score to the number that is written."""
        return 100.0 if self.is_share else 1.0

    @property
    def axis(self) -> str:
        """The name with its unit, for plots and headings."""
        return f"{self.name}, %" if self.is_share else self.name

    def shown(self, value: float) -> str:
        """`accuracy 90.6%`, `R² 0.873`."""
        return f"{self.name} {self.number(value)}{'%' if self.is_share else ''}"

    def number(self, value: float, *, sign: bool = False) -> str:
        """`90.6`, `0.873`; with `sign`, also the plus of a difference."""
        if not math.isfinite(value):
            return "nan"
        digits = 1 if self.is_share else 3
        return f"{self.factor * value:{'+' if sign else ''}.{digits}f}"


ACCURACY = Score("accuracy", "accuracy")  # for tasks with one class per example
