"""The documents' links, imports and test names exist."""

import re
from pathlib import Path

import pytest
from commands import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)")


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, in GitHub's format."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_link_of_the_documents_has_a_target():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, *found) for page in pages for found in LINK.findall(page.read_text(encoding="utf-8"))]
    wrong = []
    for page, file, anchor in links:
        target = page.parent / file if file else page
        if not target.exists() or anchor and anchor not in anchors(target):
            wrong.append((page.name, file, anchor))
    assert len(links) > 20 and not wrong


def imports() -> set[str]:
    line = re.compile(r"^ *(from calm_transformers[\w.]* import [\w, ]+)", re.MULTILINE)
    return {found for page in DOCUMENTS for found in line.findall(page.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("statement", sorted(imports()))
def test_every_import_of_the_documents_works(statement):
    exec(statement, {})


def test_every_test_of_the_paper_map_exists():
    text = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
    names = re.findall(r"`(?:(test_\w+\.py))?(?:::)?(test_\w+)?`", text)
    code = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    files = {file for file, _ in names if file}
    functions = {function for _, function in names if function}
    assert files <= code.keys()
    assert [function for function in functions if not any(f"def {function}(" in each for each in code.values())] == []
    assert len(files) > 10 and len(functions) > 10
