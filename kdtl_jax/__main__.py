"""`python -m kdtl_jax`: the same as `kdtl`."""

import sys

from kdtl_jax.cli import main

sys.exit(main())
