"""Training. What the caller can put right raises `InputError`, of which the docstrings here don't tell each time."""
