"""Doors to other frameworks and file formats; each module imports its own framework."""
