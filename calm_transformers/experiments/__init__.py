"""Experiments. Invalid input raises an InputError, ValueError or OSError; docstrings don't repeat it."""
