"""Makes the bundled demo model anew: every phase, from the corpus to the files at the root.

    python -m calm.training.demo_model --corpus DIR

It can be stopped at any moment; the same command goes on where it was. `--dry_run` prints the phases, each a command
that can be given by hand. DIR holds stories for children, one document {"text": ...} a line:

    tinystories-train.jsonl.xz  tinystories-validation.jsonl.xz

Every constant of the trainings stands in the recipes demo-tokenizer, demo-autoencoder, demo-backbone and demo.
"""

import argparse
import filecmp
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from calm import calibrate_radius
from calm.bundle_files import code_files
from calm.command_line import InputError, Parser, command, known_errors, positive
from calm.training import train_autoencoder, train_calm, train_tokenizer
from calm.training.recipe import Recipe, load_recipe, parse_command_line

UNFINISHED = ".unfinished"  # what has this ending gets its name when it is complete
WEIGHTS = "model.safetensors"
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)
RADIUS_STEPS = 64  # docs/speed.md
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Phase:
    """One command, and what stands there only when it went well.

    Args:
        module: of the command.
        words: its command line.
        result: file or folder. A folder is made under another name by the command, and gets its own at the end.
        before: makes, of nothing, the folder that the command then completes.
    """

    module: ModuleType
    words: list[str]
    result: Path
    before: Callable[[Path], None] | None = None

    @property
    def is_finished(self) -> bool:
        return self.result.exists()

    def recipe(self) -> Recipe | None:
        """Of a training: as it will be saved in its folder."""
        if self.words[0] != "--recipe":
            return None
        return load_recipe(self.words[1], parse_command_line(self.words[2:]))

    def run(self) -> int:
        """The command's exit code; if it isn't 0 the command has said why."""
        folder = _unfinished(self.result)
        shutil.rmtree(folder, ignore_errors=True)
        if self.before:
            self.before(folder)
        code = self.module.main(self.words)
        if code == 0 and folder.exists():
            os.replace(folder, self.result)
        return code

    def __str__(self) -> str:
        return shlex.join(["python", "-m", self.module.__name__, *self.words])


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


def phases(corpus: Path, runs: Path, max_steps: int | None = None) -> list[Phase]:
    """All phases, in order. The result of the last one is a folder with the finished model.

    Args:
        corpus: see the module's description.
        runs: folder of everything that is made on the way.
        max_steps: at most so many steps of each training, to try the whole thing out.
    """
    files = {part: corpus / f"tinystories-{part}.jsonl.xz" for part in ("train", "validation")}
    folders = {name: runs / name for name in ("demo-tokenizer", "demo-autoencoder", "demo-backbone", "demo")}
    calibrated = runs / "demo-calibrated"
    train = ["--train_files", str(files["train"])]
    data = [*train, "--validation_files", str(files["validation"]), "--cache_dir", str(runs / "tokens")]
    data += ["--tokenizer", str(folders["demo-tokenizer"])]

    def training(module, recipe: str, *words: str) -> Phase:
        fields = ["--recipe", recipe, *data, *words, "--output_dir", str(folders[recipe])]
        if max_steps:
            steps = min(load_recipe(recipe).training["max_steps"], max_steps)
            fields += ["--max_steps", str(steps), "--save_steps", str(max(1, steps // 2)), "--logging_steps", "1"]
        return Phase(module, fields, folders[recipe] / "trainer_state.json")

    tokenizer = ["--recipe", "demo-tokenizer", *train, "--output_dir", str(_unfinished(folders["demo-tokenizer"]))]
    radius_steps = min(max(max_steps or RADIUS_STEPS, 2), RADIUS_STEPS)  # one half measures, the other checks
    measure = ["--model", str(_unfinished(calibrated)), "--steps", str(radius_steps)]
    return [
        Phase(train_tokenizer, tokenizer, folders["demo-tokenizer"]),
        training(train_autoencoder, "demo-autoencoder"),
        training(train_calm, "demo-backbone", "--autoencoder", str(folders["demo-autoencoder"])),
        training(train_calm, "demo", "--init_from", str(folders["demo-backbone"])),
        Phase(calibrate_radius, [*measure, "--save"], calibrated, before=partial(bundle, folders["demo"])),
    ]


def check_recipes(all_phases: Iterable[Phase]) -> None:
    """Nothing that was trained by another recipe is taken for this one.

    Raises:
        InputError: the first such training.
    """
    for phase in all_phases:
        recipe = phase.recipe()
        if recipe is None:
            continue
        saved = Path(recipe.output_dir) / "recipe.yaml"
        if saved.exists() and load_recipe(str(saved)) != recipe:
            raise InputError(
                f"{saved.parent} was trained by another recipe than {recipe.name} is now: remove it, and what was "
                "made of it, or choose another --runs."
            )


def bundle(trained: Path, folder: Path) -> None:
    """Copies a trained model, without code and log, to the new folder."""
    shutil.copytree(trained, folder, ignore=lambda _, names: [name for name in names if name not in FILES])


def write(model: Path, output: Path) -> list[str]:
    """Puts the finished model's files in place, each written aside and renamed, the weights last.

    Returns:
        the names of those that were not there as they are, in the order in which they were written.
    """
    output.mkdir(parents=True, exist_ok=True)
    files = [model / name for name in FILES]
    if not output.samefile(PACKAGE):  # where the code is
        files = [*map(Path, code_files()), *files]
    changed = [f for f in files if not _is_same(f, output / f.name)]
    for file in changed:
        shutil.copyfile(file, _unfinished(output / file.name))
        os.replace(_unfinished(output / file.name), output / file.name)
    return [file.name for file in changed]


def _is_same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m calm.training.demo_model", __doc__)
    parser.add_argument("--corpus", required=True, type=Path, metavar="DIR")
    parser.add_argument("--output", type=Path, help="where the model's files go (default: demo-model in --runs)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of what is made on the way")
    parser.add_argument("--max_steps", type=positive, help="at most so many steps of each training, to try it out")
    parser.add_argument("--dry_run", action="store_true", help="print the phases, and exit")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    output = args.output or args.runs / "demo-model"
    with known_errors(InputError, OSError):
        all_phases = phases(args.corpus, args.runs, args.max_steps)
        if not args.dry_run:
            check_recipes(all_phases)
    for number, phase in enumerate(all_phases, start=1):
        state = "finished before" if phase.is_finished else "to do" if args.dry_run else "..."
        print(f"{number}/{len(all_phases)} {phase}: {state}", flush=True)
        if not (args.dry_run or phase.is_finished) and (code := phase.run()):
            return code
    if args.dry_run:
        print(f"then {', '.join(FILES)} in {output}")
        return 0
    with known_errors(OSError):
        written = write(all_phases[-1].result, output)
    print(f"{output}: " + (f"wrote {', '.join(written)}" if written else "all files are there already"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
