"""The links of the documents lead to files and headings that are there."""

import re
from pathlib import Path

from commands import ROOT

LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_link_of_the_documents_leads_somewhere():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, *found) for page in pages for found in LINK.findall(page.read_text(encoding="utf-8"))]
    wrong = []
    for page, file, anchor in links:
        target = page.parent / file if file else page
        if not target.exists() or anchor and anchor not in anchors(target):
            wrong.append((page.name, file, anchor))
    assert len(links) > 20 and not wrong
