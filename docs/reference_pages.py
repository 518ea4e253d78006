"""Fills the reference pages with the help of every command and with the recipes, when mkdocs builds the site."""

import contextlib
import importlib
import io
from itertools import takewhile
from pathlib import Path

from calm_transformers.cli import COMMANDS

RECIPES = Path(__file__).parents[1] / "calm_transformers" / "training" / "recipes"


def command_help(words: list[str]) -> str:
    """Returns what `calm WORDS --help` prints."""
    name = " ".join(words) if " ".join(words) in COMMANDS else words[0]
    module = importlib.import_module(f"calm_transformers.{COMMANDS[name][0]}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        module.main([*words[len(name.split()) :], "--help"])
    return printed.getvalue()


def commands() -> str:
    names = [*COMMANDS, *(f"train {kind}" for kind in ("tokenizer", "autoencoder", "calm", "ar"))]
    sections = (f"## calm {name}\n\n```text\n{command_help(name.split())}```\n" for name in sorted(names))
    return "\n".join(sections)


def recipes() -> str:
    rows = []
    for path in sorted(RECIPES.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
        base = next((line.removeprefix("base: ") for line in lines if line.startswith("base: ")), "")
        rows.append(f"| `{path.stem}` | {comment} | {base} |")
    return "\n".join(["| recipe | what it is | starts from |", "| --- | --- | --- |", *rows])


PAGES = {"reference/cli.md": commands, "reference/recipes.md": recipes}


def on_page_markdown(markdown: str, page, **_) -> str:
    """Replaces `<!-- generated -->`; a hook of mkdocs."""
    generate = PAGES.get(page.file.src_uri)
    return markdown.replace("<!-- generated -->", generate()) if generate else markdown
