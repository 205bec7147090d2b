"""Recipes: one flat readable file each, from data to results. Copy one and change it."""
