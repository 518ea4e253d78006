"""Training. Errors that the caller can fix raise `InputError`; docstrings here don't repeat it."""
