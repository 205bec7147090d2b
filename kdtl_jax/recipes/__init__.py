"""Recipes: one flat readable file each, from data to results. Copy one and change it.

`run(settings)` raises UsageError if settings contradict each other, OSError or ValueError if files
or data cannot be read or do not fit, and SystemExit after a signal, with what was trained saved.
"""
