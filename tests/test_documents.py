"""The documents' links, imports, files and tests exist, and their programs run."""

import importlib.util
import re
from pathlib import Path

import datasets
import pytest
from commands import ROOT

from calm_transformers.loading import load_calm

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = "log.md", "upstream_tests.md"  # they name what is gone, and what isn't ours
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)")


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, in GitHub's format."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_link_of_the_documents_has_a_target():
    pages, wrong = [*DOCUMENTS, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))], []
    links = [(page, *found) for page in pages for found in LINK.findall(page.read_text(encoding="utf-8"))]
    for page, file, anchor in links:
        target = page.parent / file if file else page
        if not target.exists() or anchor and anchor not in anchors(target):
            wrong.append((page.name, file, anchor))
    assert len(links) > 20 and not wrong


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_every_import_of_the_documents_works(page):
    for line in re.findall(r"^ *(from calm_transformers\S* import [\w, ]+)", page.read_text(encoding="utf-8"), re.M):
        exec(line, {})


def test_every_file_and_test_that_the_documents_name_exists():
    text = "".join(page.read_text(encoding="utf-8") for page in DOCUMENTS if page.name not in OTHERS)
    code = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")}
    folders = "calm_transformers", "docs", "examples"
    files = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    files |= {"page.py", *(path.name for path in ROOT.glob("*.py"))}  # the first is written for a Space
    assert set(re.findall(r"`(?:[\w/]*/)?(\w+\.py)", text)) <= files | code.keys()
    functions = set(re.findall(r"`(?:[\w/]*\.py::)?(test_\w+)`", text))
    assert [function for function in functions if not any(f"def {function}(" in each for each in code.values())] == []
    assert len(functions) > 10


PROGRAMS = {page: re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text(encoding="utf-8")) for page in DOCUMENTS}
# Run by test_plain_install.py; or they need a converted model, a server or a cluster, as in test_serve*.py.
OTHER_PROGRAMS = "README.md", "convert.md", "serve.md", "deploy.md"


@pytest.mark.slow
@pytest.mark.transformers
@pytest.mark.parametrize(
    "page", [p for p, found in PROGRAMS.items() if found and p.name not in OTHER_PROGRAMS], ids=lambda page: page.name
)
def test_the_programs_of_a_page_run(page, tmp_path, monkeypatch):
    """In order, on the demo model; a program that imports a package of an extra that isn't installed is left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held-out.txt").write_text("Once upon a time there was a little girl named Lily. " * 100)
    model, tokenizer = load_calm(str(ROOT), "cpu")
    dataset = datasets.Dataset.from_dict({"text": ["Once upon a time, there was a dog."] * 8})
    names = {"MODEL": str(ROOT), "model": model, "tokenizer": tokenizer, "dataset": dataset}
    names["inputs"] = tokenizer("Once upon a time", return_tensors="pt")
    for program in PROGRAMS[page]:
        packages = re.findall(r"(?m)^(?:from|import) (\w+)", program) + ["bitsandbytes"] * ("BitsAnd" in program)
        if all(importlib.util.find_spec(package) for package in packages):
            small = program.replace("max_steps=40", "max_steps=2").replace('mode="reduce-overhead"', 'backend="eager"')
            exec(small.replace('"."', repr(str(ROOT))), names)
