"""Evaluation. Input that can't be evaluated raises a ValueError; docstrings here don't repeat it."""
