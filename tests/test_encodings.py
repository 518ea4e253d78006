"""Text files are read and written in UTF-8, whatever the locale is."""

import ast
import subprocess

from commands import ROOT

TEXT = {"open": 0, "read_text": None, "write_text": None}  # the place of a method's mode
BINARY = ("lzma", "gzip", "os", "archive")  # whose `open` returns bytes unless told otherwise


def calls_without_encoding(source: str) -> list[int]:
    """Lines of calls that open a text file in the encoding of the locale."""
    lines = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        is_method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if is_method else getattr(call.func, "id", None)
        if name not in TEXT or (is_method and getattr(call.func.value, "id", None) in BINARY):
            continue
        place = TEXT[name] if is_method else 1
        mode = ast.unparse(call.args[place]) if place is not None and len(call.args) > place else ""
        if "b" not in mode:
            lines.append(call.lineno)
    return lines


def test_every_text_file_has_its_encoding():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in files.stdout.split() if not name.startswith("tests/") and (ROOT / name).exists()]
    found = {name: calls_without_encoding((ROOT / name).read_text(encoding="utf-8")) for name in names}
    assert len(found) > 50 and {name: lines for name, lines in found.items() if lines} == {}


def test_a_call_without_one_is_found():
    wrong = 'open(p)\nopen(p, "w")\np.open("a")\np.read_text()\np.write_text("x")\n'
    right = 'open(p, "rb")\np.open("wb")\np.read_text(encoding="utf-8")\ngzip.open(p)\nsafe_open(p)\n'
    assert calls_without_encoding(wrong + right) == [1, 2, 3, 4, 5]
