"""Trains the bundled demo model from scratch, from the corpus to the files at the repository's root.

    python -m calm_transformers.training.demo_model --corpus DIR

Every phase is a command that is printed before it runs. After an interruption, the same command resumes. DIR contains
stories for children, one document {"text": ...} per line:

    tinystories-train.jsonl.xz  tinystories-validation.jsonl.xz

All settings of the trainings are in the recipes demo-tokenizer, demo-autoencoder, demo-backbone and demo.
"""

import shlex
import shutil
import sys
from pathlib import Path

from calm_transformers.command_line import Parser, command, known_errors, positive
from calm_transformers.files import atomic_write
from calm_transformers.training import train

REPOSITORY = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)


def phases(corpus: Path, runs: Path, max_steps: int | None = None) -> list[list[str]]:
    """Returns the arguments of `calm train` for each training, in order; they write to sub-folders of `runs`."""
    files = {part: str(corpus / f"tinystories-{part}.jsonl.xz") for part in ("train", "validation")}

    def arguments(kind: str, recipe: str, *options: str) -> list[str]:
        paths = ["--train_files", files["train"], "--output_dir", str(runs / recipe)]
        return [kind, "--recipe", recipe, *paths, *options]

    options = ["--validation_files", files["validation"], "--cache_dir", str(runs / "tokens")]
    options += ["--tokenizer", str(runs / "demo-tokenizer")]
    if max_steps:
        options += ["--max_steps", str(max_steps), "--save_steps", str(max(1, max_steps // 2)), "--logging_steps", "1"]
    return [
        arguments("tokenizer", "demo-tokenizer"),
        arguments("autoencoder", "demo-autoencoder", *options),
        arguments("calm", "demo-backbone", *options, "--autoencoder", str(runs / "demo-autoencoder")),
        arguments("calm", "demo", *options, "--init_from", str(runs / "demo-backbone")),
    ]


def write(model: Path, output: Path) -> None:
    """Copies a trained model's files atomically, the weights last, and its code unless `output` is this repository."""
    output.mkdir(parents=True, exist_ok=True)
    code = [] if output.samefile(REPOSITORY) else sorted(model.glob("*.py"))
    for file in [*code, *(model / name for name in FILES)]:
        with atomic_write(output / file.name) as temporary:
            shutil.copyfile(file, temporary)


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m calm_transformers.training.demo_model", __doc__)
    parser.add_argument("--corpus", required=True, type=Path, metavar="DIR")
    parser.add_argument("--output", type=Path, help="where the model's files go (default: demo-model in --runs)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the intermediate trainings")
    parser.add_argument("--max_steps", type=positive, help="steps of each training, for a trial")
    args = parser.parse_args(argv)
    output = args.output or args.runs / "demo-model"
    trainings = phases(args.corpus, args.runs, args.max_steps)
    if (args.runs / "demo-tokenizer" / "tokenizer_config.json").exists():
        trainings = trainings[1:]  # the others resume by themselves
    for arguments in trainings:
        print(shlex.join(["python", "-m", train.__name__, *arguments]), flush=True)
        if code := train.main(arguments):
            return code
    with known_errors(OSError):
        write(args.runs / "demo", output)
    print(f"wrote {', '.join(FILES)} in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
