"""Transfer objectives: TLL's and the authors' numbers."""

from collections.abc import Mapping

from jax import Array

from golden_maps import Golden
from kdtl_jax import penalties


def numbered(x: Mapping[str, Array], name: str) -> dict[str, Array]:
    """`{"0": x["name_0"], "1": x["name_1"], ...}`."""
    keys = [key for key in x if key.startswith(f"{name}_")]
    return {key.removeprefix(f"{name}_"): x[key] for key in keys}


METHODS: dict[str, Golden] = {
    "l2_sp": lambda x, h: penalties.l2_sp(numbered(x, "param"), numbered(x, "source")),
    "l2": lambda x, h: penalties.l2(numbered(x, "param")),
}
