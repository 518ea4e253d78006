"""What all commands share: how options are read, and one sentence on stderr with exit code 2 for what is wrong.

@command
def main(argv: list[str] | None = None) -> int | None:
    options = parse(argv)
    with known_errors():
        text = read(options.text)
    ...
"""

import argparse
import functools
import importlib.util
import io
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

WRONG = 2  # exit code for what the user can put right, as argparse's own
INTERRUPTED, CLOSED = 130, 141  # as shells say of Ctrl-C and of a closed pipe


class InputError(ValueError):
    """What the caller can put right (an option, a file, a missing package), in one sentence.

    PyTorch puts the traceback before what a worker of a DataLoader raises: it is left out again.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{__name__}.InputError: ")[2].strip())


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations, that keeps the lines of its description.

    Args:
        prog: the command as one types it.
        description: usually the module's docstring.

    Raises:
        InputError: from `parse_args`, where argparse would print its usage and exit.
    """

    def __init__(self, prog: str, description: str | None, **settings):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removesuffix('.')} (see {self.prog} --help).")


def writable(path: str) -> Path:
    """For `type=` of an option that names a file to write: refused before any work where it can be none."""
    if not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: its folder does not exist.")
    if Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path}: is a folder; name a file.")
    return Path(path)


def picture(path: str) -> Path:
    """For `type=` of an option that names a picture to write, in a format that matplotlib has."""
    if Path(path).suffix not in (".png", ".svg", ".pdf", ".jpg"):
        raise argparse.ArgumentTypeError(f"{path}: a picture ends with .png, .svg, .pdf or .jpg.")
    return writable(path)


def positive(text: str) -> int:
    """For `type=` of an option that says how many."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1.")
    return int(text)


def natural(text: str) -> int:
    """For `type=` of a seed, in the range that every generator of random numbers takes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 0 to 2**32 - 1.")
    return int(text)


def utf8(word: str) -> str:
    """For `type=` of an option that a model reads: refused where the terminal sent other bytes than UTF-8."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        hint = "send UTF-8, in a locale of UTF-8"
        raise argparse.ArgumentTypeError(f"{word!r}: is no text at character {error.start + 1}; {hint}.") from None
    return word


def need(package: str, extra: str, what: str) -> None:
    """Raises `InputError` where an optional package is missing.

    Args:
        package: name that is imported.
        extra: of setup.cfg, which installs it.
        what: that needs it, the subject of the message.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f'{what} needs {package}: pip install "calm-transformers[{extra}]".')


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """`main`, which from now on returns an exit code: its own, 0 for None, or after one line on stderr 2 for a
    `InputError` and 130 for Ctrl-C. Characters that the terminal can't show are escaped, and a reader that closes
    stdout, as `head` does, ends it without a word."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            code = main(*args, **kwargs) or 0
            sys.stdout.flush()
            return code
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return WRONG
        except KeyboardInterrupt:
            print("error: interrupted.", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
            return CLOSED

    return run


@contextmanager
def known_errors(*types: type[Exception]) -> Iterator[None]:
    """Turns errors of these types, or without any of all types, into a `InputError`.

    All types where files, options and the environment are read, whose libraries raise whatever they like. In a
    computation such an error is a fault of ours, whose traceback tells more than its message.
    """
    try:
        yield
    except InputError:
        raise
    except types or (Exception,) as error:  # noqa: B030
        raise InputError(sentence(error)) from error


def sentence(error: BaseException) -> str:
    """One line that says what is wrong; of an error of the operating system, with the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listen(host: str, port: int) -> socket.socket:
    """A socket bound before the model is loaded, so that a port in use is known at once.

    Raises:
        OSError: it can't be bound.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except Exception as error:  # OverflowError of a port, TypeError of a host
        listening.close()
        raise OSError(f"{host}:{port} can't be listened on ({getattr(error, 'strerror', None) or error})") from None
    return listening
