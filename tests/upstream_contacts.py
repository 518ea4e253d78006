"""Where this package touches transformers' inner parts, and how transformers itself uses them.

    python tests/upstream_contacts.py      records the installed version in upstream_contacts.json

A contact is (1) an attribute that one of our classes defines over a class of transformers, (2) a name with a leading
underscore that our code reads and transformers defines, (3) what the travelling code imports: a function, the
`__init__` of a class (an output's has its fields), the `forward` of a module, or (4) the fields of `GenerationConfig`.
Of each, the signature (names, kinds, defaults; the value of a plain attribute) is found, and of names with a leading
underscore the places in transformers' source that use it: that call it, read it, import it, or name it in a string.
"""

import ast
import functools
import importlib
import inspect
import json
import textwrap
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

import torch
import transformers
from commands import MODULES, PACKAGE, ROOT

RECORDS = Path(__file__).with_suffix(".json")
UPSTREAM = Path(transformers.__file__).parent
# Where something can use a model, its configuration or a Trainer.
SOURCES = (
    *("*.py", "generation/**/*.py", "integrations/*.py", "cli/serve.py", "cli/serving/*.py", "utils/generic.py"),
    *("pipelines/__init__.py", "pipelines/base.py", "pipelines/text_generation.py"),
    *("models/auto/*.py", "models/llama/*.py"),
)


class Uses(ast.NodeVisitor):
    """What transformers' source says: which names it defines, and where it uses each."""

    def __init__(self):
        self.places: dict[str, set[str]] = {}
        self.defined: set[str] = set()

    def read(self, file: str, source: str) -> None:
        self.place, self.modules = [file], {"logger", "nn", "F"}
        self.visit(ast.parse(source))

    def note(self, name: str) -> None:
        file, *scope = self.place
        self.places.setdefault(name, set()).add(f"{file}: {'.'.join(scope)}" if scope else file)

    def visit_Import(self, node):
        self.modules |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}

    def visit_ImportFrom(self, node):
        for alias in node.names:
            self.note(alias.name)

    def visit_ClassDef(self, node):
        self.defined.add(node.name)
        self.place.append(node.name)
        self.generic_visit(node)
        self.place.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef

    def visit_Attribute(self, node):
        if not (isinstance(node.value, ast.Name) and node.value.id in self.modules):
            self.note(node.attr)
            if isinstance(node.ctx, ast.Store):
                self.defined.add(node.attr)
        self.generic_visit(node)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store) and len(self.place) > 1:
            self.defined.add(node.id)

    def visit_Constant(self, node):
        if isinstance(node.value, str) and node.value.isidentifier():
            self.note(node.value)


def upstream_uses() -> Uses:
    uses = Uses()
    for path in sorted({path for pattern in SOURCES for path in UPSTREAM.glob(pattern)}):
        uses.read(str(path.relative_to(UPSTREAM)), path.read_text(encoding="utf-8"))
    return uses


def parsed(paths: Iterable[Path]) -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(paths)]


def is_upstream(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "transformers"


def our_classes() -> list[type]:
    """Every class of the package that has a base in transformers."""
    modules = [importlib.import_module(name) for name in MODULES]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    ours = {cls for cls in classes if cls.__module__.startswith("calm_transformers.")}
    return sorted((cls for cls in ours if any(map(is_upstream, cls.__mro__))), key=lambda cls: cls.__name__)


def names_in_body(cls: type) -> list[str]:
    """The attributes that a class statement gives a value."""
    body, names = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body, []
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(statement.name)
        elif isinstance(statement, ast.Assign):
            names += [target.id for target in statement.targets if isinstance(target, ast.Name)]
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            names.append(statement.target.id)
    return names


def overrides(classes: list[type]) -> dict[str, tuple[type, str]]:
    """ "GenerationMixin._sample" → that class of transformers and the name, of all that the classes override."""
    found = {}
    for cls in classes:
        for name in names_in_body(cls):
            base = next((base for base in cls.__mro__[1:] if is_upstream(base) and name in vars(base)), None)
            if base is not None:
                found[f"{base.__name__}.{name}"] = (base, name)
    return found


def inner_names(sources: list[ast.Module]) -> set[str]:
    """Names with one leading underscore that our code reads of some object, and gives to none."""
    read, ours = set(), set()
    for node in (node for tree in sources for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            (read if isinstance(node.ctx, ast.Load) else ours).add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            ours.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            ours.add(node.id)
    inner = {name for name in read - ours if name.startswith("_") and not name.startswith("__")}
    return {name for name in inner if not hasattr(torch.nn.Module(), name)}  # torch's


def imported_callables(sources: list[ast.Module]) -> dict[str, object]:
    """What is imported of transformers: functions by whole name, of classes "Class.__init__" and "Class.forward"."""
    found = {}
    for node in (node for tree in sources for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        if (node.module or "").partition(".")[0] != "transformers":
            continue
        for alias in node.names:
            value = getattr(importlib.import_module(node.module), alias.name, None)
            if isinstance(value, type) and not issubclass(value, Enum):
                for part in ("__init__", "forward"):
                    base = next((base for base in value.__mro__ if is_upstream(base) and part in vars(base)), None)
                    if base is not None:
                        found[f"{base.__name__}.{part}"] = vars(base)[part]
            elif callable(value) or value is None:
                found[f"{node.module}.{alias.name}"] = value
    return found


def signature(value) -> str:
    """Without annotations, which the versions write differently; the value of a plain attribute."""
    if isinstance(value, property):
        return "a property"
    if isinstance(value, staticmethod | classmethod):
        return f"{type(value).__name__} {signature(value.__func__)}"
    if callable(value):
        value = inspect.unwrap(value)
    if not inspect.isfunction(value):
        return repr(value)
    given, nothing = inspect.signature(value), inspect.Parameter.empty
    parameters = [parameter.replace(annotation=nothing) for parameter in given.parameters.values()]
    return str(given.replace(parameters=parameters, return_annotation=nothing))


@functools.cache
def found_contacts() -> dict[str, dict]:
    """Of the installed version: contact → {"signature": …, "used by": […]}."""
    uses, classes, contacts = upstream_uses(), our_classes(), {}

    def note(contact: str, shape: str, name: str = "") -> None:
        is_inner = name.startswith("_") and not name.startswith("__")
        contacts[contact] = {"signature": shape, "used by": sorted(uses.places.get(name, ())) if is_inner else []}

    for contact, value in imported_callables(parsed(ROOT.glob("*_calm*.py"))).items():
        note(contact, "is not there" if value is None else signature(value))
    for contact, (base, name) in overrides(classes).items():
        note(contact, signature(vars(base)[name]), name)
    bases = [base for cls in classes for base in cls.__mro__ if is_upstream(base)]
    ours = parsed([*ROOT.glob("*_calm*.py"), *PACKAGE.rglob("*.py")])
    for name in inner_names(ours) & uses.defined:
        base = next((base for base in bases if name in vars(base)), None)
        note(name if base is None else f"{base.__name__}.{name}", signature(vars(base)[name]) if base else "", name)
    note("GenerationConfig", ", ".join(sorted(vars(transformers.GenerationConfig()))))
    return dict(sorted(contacts.items()))


def differences(recorded: dict[str, dict], found: dict[str, dict]) -> list[str]:
    """What has changed, a sentence for each: which contact, and how."""
    sentences = [f"{contact}: is touched and has no record." for contact in found if contact not in recorded]
    for contact, old in recorded.items():
        new = found.get(contact)
        if new is None:
            sentences.append(f"{contact}: is recorded, and no longer there or no longer touched.")
            continue
        if old["signature"] != new["signature"]:
            sentences.append(f"{contact}: its signature was {old['signature']} and is {new['signature']}.")
        gone, added = (sorted(set(a["used by"]) - set(b["used by"])) for a, b in ((old, new), (new, old)))
        sentences += [f"{contact}: no longer used by {place}." for place in gone]
        sentences += [f"{contact}: now used by {place}." for place in added]
    return sentences


def read_records() -> dict[str, dict]:
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def record() -> None:
    records = read_records()
    records[transformers.__version__] = found_contacts()
    versions = []
    for version, contacts in sorted(records.items()):
        lines = [f"  {json.dumps(contact)}: {json.dumps(found)}" for contact, found in contacts.items()]
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    RECORDS.write_text("{\n" + ",\n".join(versions) + "\n}\n")
    print(f"{len(records[transformers.__version__])} contacts with transformers {transformers.__version__} recorded")


if __name__ == "__main__":
    record()
