"""Conversion. A repository that can't be converted raises an InputError; docstrings here don't repeat it."""
