"""README's file tree and the links of the documents speak of what is there."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("", "training", "serving", "evaluation", "benchmarks", "experiments", "docs")


def tree() -> str:
    return re.search(r"## Files\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]


def tracked() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()


def test_every_file_has_its_place_in_the_tree():
    """All but the tests' and the recipes'."""
    files = [name for name in tracked() if not name.startswith("tests/") and "recipes/" not in name]
    files = files or [str(f.relative_to(ROOT)) for folder in FOLDERS for f in (ROOT / folder).glob("*.py")]
    names = [name if name.startswith(".") else name.rpartition("/")[2] for name in files]
    missing = [name for name in names if not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", tree())]
    assert len(names) > 60 and not missing


def test_the_tree_names_nothing_that_is_gone():
    names = re.findall(r"(?<![\w*/])\w+\.(?:py|md|yaml|json)\b", tree())
    places = [ROOT / folder for folder in FOLDERS]
    gone = [name for name in names if not any((place / name).exists() for place in places)]
    assert len(names) > 60 and not gone


def test_every_link_of_the_documents_leads_somewhere():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    link = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
    links = [(page, found) for page in pages for found in link.findall(page.read_text())]
    assert links
    assert not [(page.name, found) for page, found in links if not (page.parent / found).exists()]


def test_code_files_import_each_other_flatly_and_are_those_that_the_tree_says_travel():
    travelling = re.findall(r"\w+_calm\w*\.py", tree().partition("commands\n")[0])
    tracked = subprocess.run(
        ["git", "ls-files", "*_calm*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    at_root = {name for name in tracked if "/" not in name} or {file.name for file in ROOT.glob("*_calm*.py")}
    assert set(travelling) == at_root
