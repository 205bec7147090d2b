"""The one table of every loss: what it is, an example, its oracle, and what holds for it.

`tests/loss_cases/*.py` hold the rows, grouped as the package's modules are; this file joins them
and `tests/test_losses.py` runs the whole battery over the table.
"""

import importlib
import pkgutil

import loss_cases

LOSS_CASES: dict[str, loss_cases.LossCase] = {}
for _found in pkgutil.iter_modules(loss_cases.__path__):
    for _name, _case in importlib.import_module(f"loss_cases.{_found.name}").CASES.items():
        assert _name not in LOSS_CASES, f"two rows named {_name}"
        LOSS_CASES[_name] = _case
