"""Packages of the optional extras: where one is missing, one sentence in place of a traceback."""

import importlib.util

from calm.command_line import InputError


def need(package: str, extra: str, what: str) -> None:
    """
    Args:
        package: name that is imported.
        extra: of setup.cfg, which installs it.
        what: that needs it, the subject of the message.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f'{what} needs {package}: pip install "calm-transformers[{extra}]".')
