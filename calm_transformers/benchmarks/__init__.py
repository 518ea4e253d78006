"""Benchmarks. Invalid options raise an InputError or ValueError; docstrings don't repeat it."""
