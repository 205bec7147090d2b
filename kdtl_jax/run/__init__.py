"""The host side of a run: loop, data, checkpoints, teacher caches, sharding and reports."""
