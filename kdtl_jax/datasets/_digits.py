"""The UCI handwritten digits, shipped inside the package.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, licensed under the Creative Commons Attribution
4.0 International license (CC BY 4.0). These are its 1,797 test images, as scikit-learn
distributes them, stored here as integers 0..16 without any other change.
"""

import importlib.resources

import numpy as np

from kdtl_jax.datasets._dataset import Dataset


def digits() -> Dataset:
    """1,797 gray images of handwritten digits, 8x8, values 0..16, ten classes.

    Returns:
      `Dataset` with `inputs` float32 `[1797, 8, 8, 1]`, `labels` int32 `[1797]`.
    """
    file = importlib.resources.files("kdtl_jax.datasets") / "digits.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]
    return Dataset(
        "UCI handwritten digits", images.astype(np.float32)[..., None], labels.astype(np.int32), 10
    )
