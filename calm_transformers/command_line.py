"""What all commands share: option parsing, and user errors as one line on stderr with exit code 2.

@command
def main(argv: list[str] | None = None) -> int | None:
    options = parser.parse_args(argv)
    with known_errors():
        text = read_text(options.text)
    ...
"""

import argparse
import functools
import importlib.util
import io
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

EXIT_INPUT_ERROR = 2  # the code of argparse
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # the codes of shells for SIGINT and SIGPIPE


class InputError(ValueError):
    """An error that the user can fix (an option, a file, a missing package), in one sentence.

    The traceback that PyTorch puts before an error of a DataLoader worker is cut off.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{__name__}.InputError: ")[2].strip())


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that allows no abbreviations and keeps the line breaks of its description.

    Args:
        prog: the command as typed.
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
    """Returns the path of an output file that can be written, checked before any work; an argparse `type=`."""
    if not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: its folder does not exist.")
    if Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path}: is a folder; name a file.")
    return Path(path)


def image_path(path: str) -> Path:
    """Returns the path of an output image in one of matplotlib's formats; an argparse `type=`."""
    if Path(path).suffix not in (".png", ".svg", ".pdf", ".jpg"):
        raise argparse.ArgumentTypeError(f"{path}: an image file must end with .png, .svg, .pdf or .jpg.")
    return writable(path)


def positive(text: str) -> int:
    """Parses a positive integer; an argparse `type=`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer of at least 1.")
    return int(text)


def seed_number(text: str) -> int:
    """Parses a seed, an integer in the range that every random number generator accepts; an argparse `type=`."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer from 0 to 2**32 - 1.")
    return int(text)


def utf8(text: str) -> str:
    """Returns the text of an option; raises unless the terminal sent valid UTF-8. An argparse `type=`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        hint = "send UTF-8, in a locale of UTF-8"
        raise argparse.ArgumentTypeError(f"{text!r}: invalid UTF-8 at character {error.start + 1}; {hint}.") from None
    return text


def require_package(packages: str | Sequence[str], extra: str, feature: str) -> None:
    """Raises InputError unless packages are installed that `feature` needs and an `extra` of setup.cfg holds."""
    packages = [packages] if isinstance(packages, str) else packages
    if missing := ", ".join(package for package in packages if importlib.util.find_spec(package) is None):
        raise InputError(f'{feature} needs {missing}: pip install "calm-transformers[{extra}]".')


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Makes a `main` return an exit code: its own, or 0 for None; 2 for InputError and 130 for Ctrl-C, with one
    line on stderr; 141 silently if the reader of stdout closed the pipe. Characters that the terminal can't show are
    escaped."""

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
            return EXIT_INPUT_ERROR
        except KeyboardInterrupt:
            print("error: interrupted.", file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
            return EXIT_BROKEN_PIPE

    return run


@contextmanager
def known_errors(*types: type[Exception]) -> Iterator[None]:
    """Converts errors of these types, or by default every Exception, to `InputError`.

    The default suits code that reads files, options and the environment, whose libraries raise many types. In
    computations an unexpected error is a bug, and its traceback is worth more than its message.
    """
    try:
        yield
    except InputError:
        raise
    except types or (Exception,) as error:  # noqa: B030
        raise InputError(format_error(error)) from error


def format_error(error: BaseException) -> str:
    """Returns an error's message on one line, with the file name for errors of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename2 or error.filename  # of a copy the second is the one that is written
        return f"{name}: {error.strerror}." if name else f"{error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def bind_socket(host: str, port: int) -> socket.socket:
    """Returns a bound socket; called before the model is loaded, so that a port in use is reported at once.

    Raises:
        OSError: host or port can't be bound.
    """
    bound_socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound_socket.bind((host, port))
    except Exception as error:  # OverflowError of a port, TypeError of a host
        bound_socket.close()
        raise OSError(f"{host}:{port} can't be listened on ({getattr(error, 'strerror', None) or error})") from None
    return bound_socket
