"""Makes a release of the checkout: the Hub repository of the bundled demo model, and the package (`make release`).

The folder then holds calm-demo/, a repository that loads without this package, and dist/, with wheel and sdist.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import EvalResult

from calm_transformers import CALMConfig, __version__
from calm_transformers.command_line import InputError, Parser, command, known_errors, require_package
from calm_transformers.conversion.bundle_files import model_card, write_supporting_files
from calm_transformers.conversion.convert import push_to_hub
from calm_transformers.files import new_folder
from calm_transformers.model.configuration_calm import VERSION

ROOT = Path(__file__).parents[2]
ABOUT = """## The demo model

It was trained on TinyStories alone, so it only writes short stories for children. Its head, `token_chain`, is not
one of the paper's: it samples the tokens of a patch one after the other.

BrierLM is the paper's metric: it compares samples at T = 1 with the true text, and higher is better. Times 100, on 300
held-out stories, it is 16.49 (95 % interval 15.69 to 17.24), and 17.94 of a Transformer with the same training FLOPs:
`calm evaluate brier_lm --model . --data DIR/tinystories-validation.jsonl.xz --append_eos --block_size 512
--max_positions 40000`.

**Licence.** MIT ([LICENSE](LICENSE)), code and weights. TinyStories (CDLA-Sharing-1.0) is not part of this
repository."""
BRIER_LM = EvalResult(
    *("text-generation", "roneneldan/TinyStories", "TinyStories, 300 held-out stories", "brierlm"),
    **{"dataset_split": "validation", "metric_name": "BrierLM, ×100", "metric_value": 16.49},
)
LOAD = """
import sys
sys.modules["calm_transformers"] = None  # the code must be the folder's
import transformers
pipe = transformers.pipeline("text-generation", sys.argv[1], trust_remote_code=True)
saved = transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).code_version
assert pipe.model.config.code_version == saved, "config.json states another code_version"
(output,) = pipe("Once upon a time", max_new_tokens=20, do_sample=False)
assert len(output["generated_text"]) > len("Once upon a time"), "the text ends at once"
print(f"transformers {transformers.__version__}: {output['generated_text']}")
"""


def check_version(version: str) -> None:
    """Raises InputError, which names what differs, unless everything that states a version states this one."""
    stated = {"calm_transformers.__version__": __version__, "VERSION of configuration_calm.py": VERSION}
    for file, pattern in (("CITATION.cff", r"^version: (.*)$"), ("CHANGELOG.md", r"^## \[(.*?)\]")):
        found = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        stated[file] = found[1] if found else "missing"
    if wrong := ", ".join(f"{place} is {it}" for place, it in stated.items() if it != version):
        raise InputError(f"The release is to be {version}, but {wrong}.")


def write_model(folder: Path, name: str) -> None:
    """Writes the Hub repository of the demo model in `folder`; `name` is what its card loads."""
    config = CALMConfig.from_pretrained(ROOT)
    metadata = {"language": "en", "license": "mit", "datasets": BRIER_LM.dataset_type, "model_name": name}
    card = model_card(name, config, "Once upon a time", ABOUT, eval_results=[BRIER_LM], **metadata)
    write_supporting_files(folder, config, ROOT, card)
    for file in ("model.safetensors", "LICENSE"):
        shutil.copy(ROOT / file, folder)


def check_loads(folder: Path, python: str) -> str:
    """Generates a text from a model folder with the folder's own code, offline, in a fresh process of `python`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with tempfile.TemporaryDirectory() as home:
        environment = inherited | {"HF_HOME": home, "HF_HUB_OFFLINE": "1"}
        return run([python, "-I", "-c", LOAD, str(folder)], f"{folder.name} can't be loaded", env=environment)


def run(words: list[str], failure: str, **settings) -> str:
    """Runs a program and returns what it prints; raises InputError with `failure` and its last line if it fails."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, **settings)
    if done.returncode:
        *_, last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise InputError(f"{failure} with {words[0]}: {last}")
    return done.stdout.strip()


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm_transformers.conversion.release", __doc__)
    parser.add_argument("--version", required=True, help="the version to release, as a check")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new folder to write")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="each must load the model")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the model, with the tag vVERSION")
    args = parser.parse_args(argv)
    with known_errors(InputError, OSError), new_folder(args.output) as folder:
        require_package(["build", "twine"], "release", "A release")
        check_version(args.version)
        model, dist = folder / "calm-demo", folder / "dist"
        model.mkdir()
        write_model(model, args.push_to_hub or model.name)
        for python in args.python:
            print(check_loads(model, python))
        run([sys.executable, "-m", "build", "-n", "-o", str(dist), str(ROOT)], "The package can't be built")
        run([sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())], "The package is invalid")
    if args.push_to_hub:
        push_to_hub(args.output / model.name, args.push_to_hub, f"Version {args.version}", f"v{args.version}")
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    sys.exit(main())
