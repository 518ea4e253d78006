"""Writes the demo model's text: `python -m calm.training.demo_corpus --corpus DIR --output runs/demo-corpus`.

The simplest texts of a corpus folder, the simplest of all several times over, in a fixed random order: a model of a
few million parameters that sees a few ten million tokens learns a narrow language best.
"""

import json
import os
import random
import sys
from pathlib import Path

from calm.command_line import CommandError, Parser, command, known_errors
from calm.training.extras import MissingPackage, need

# File → how often its documents are repeated; of the books only those of the lowest reading level.
REPEATS = {"tinystories-mini": 16, "storybooks": 5, "books": 1}
SIMPLEST_LEVEL = 0


def simplest_texts(path: Path) -> list[str]:
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(path), split="train", streaming=True)
    return [row["text"] for row in rows if row.get("lvl", SIMPLEST_LEVEL) == SIMPLEST_LEVEL]


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm.training.demo_corpus", __doc__)
    parser.add_argument("--corpus", required=True, type=Path, help="folder with NAME-train.jsonl.xz, NAME-validation…")
    parser.add_argument("--output", default=Path("runs/demo-corpus"), type=Path)
    options = parser.parse_args(argv)
    with known_errors(MissingPackage):
        need("datasets", "train", "demo_corpus")
    sources = {part: {n: options.corpus / f"{n}-{part}.jsonl.xz" for n in REPEATS} for part in ("train", "validation")}
    missing = [str(path) for files in sources.values() for path in files.values() if not path.is_file()]
    if missing:
        raise CommandError(f"{missing[0]}: no such file.")
    options.output.mkdir(parents=True, exist_ok=True)
    for part, files in sources.items():
        texts = [t for name, p in files.items() for t in simplest_texts(p) * (REPEATS[name] if part == "train" else 1)]
        random.Random(0).shuffle(texts)
        unfinished = options.output / f"{part}.jsonl.tmp"
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        os.replace(unfinished, options.output / f"{part}.jsonl")
        print(f"{part}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    sys.exit(main())
