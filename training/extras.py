"""Packages of the optional extras: where one is missing, one sentence in place of a traceback."""

import importlib.util


class MissingPackage(ValueError):
    """An optional package that isn't installed; the message says how to get it."""


def need(package: str, extra: str, what: str) -> None:
    """
    Args:
        package: name that is imported.
        extra: of setup.cfg, which installs it.
        what: that needs it, the subject of the message.

    Raises:
        MissingPackage: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingPackage(f'{what} needs {package}: pip install "calm-transformers[{extra}]".')
