"""Adapters to other frameworks and file formats; each module imports its own framework."""

from kdtl_jax.interop._function import function as function
