"""Serves a web page on which a CALM generates text patch by patch: `make app`, or `calm app MODEL`.

It shows the candidates of each patch. `--baseline` adds a token-level language model. `--space FOLDER` writes a folder
for a Hugging Face Space in place of serving: the page, its requirements, and the model, by reference (Hub id) or as a
copy (folder).
"""

import json
import re
import signal
import sys
from argparse import Namespace
from pathlib import Path

from calm_transformers.command_line import InputError, Parser, bind_socket, command, known_errors, require_package
from calm_transformers.files import new_folder
from calm_transformers.loading import is_calm, load_calm, load_causal_lm, load_tokenizer
from calm_transformers.model.configuration_calm import TRANSFORMERS
from calm_transformers.pages.app_page import PageModel, create_page, launch

PROGRAM = "calm app"
ROOT = Path(__file__).parents[2]  # of a clone, whose files are those of the demo model
SDK_VERSION = "6.17.3"  # the tested version of gradio
REQUIREMENTS = ("torch>=2.6", TRANSFORMERS, "safetensors>=0.4.3", "accelerate>=1.1")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

SPACE_APP = '''"""Launches the page of this Space (page.py)."""

from pathlib import Path

from page import PageModel, create_page, launch

HERE = Path(__file__).parent
MODEL, BASELINE = {model!r}, {baseline!r}


def load(name, **options):
    """Loads a model from a Hub id or a subfolder."""
    folder = HERE / name
    model = PageModel.load(str(folder) if folder.is_dir() else name, **options)
    model.name = {names!r}.get(name, name)
    return model


if __name__ == "__main__":
    models = [load(MODEL, trust_remote_code=True)]
    if BASELINE:
        models.append(load(BASELINE))
    launch(create_page(models))
'''

SPACE_CARD = """---
title: {title}
emoji: 🧩
colorFrom: blue
colorTo: yellow
sdk: gradio
sdk_version: {sdk_version}
app_file: app.py
pinned: false
short_description: A language model that generates patches of tokens
{models}---

# {title}

A CALM, a continuous autoregressive language model ([arXiv 2510.27688](https://arxiv.org/abs/2510.27688)), generates a
patch of several tokens per step. Hover over a patch, or tap it, to see its candidates.

To run it locally: `pip install -r requirements.txt gradio=={sdk_version}`, then `python app.py`.
"""


@command
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.space is not None:
        with known_errors(OSError):
            write_space(options.space, options.model, options.baseline)
        print(
            f"{options.space}: app.py launches the page; upload the folder with: hf upload NAME {options.space} "
            "--repo-type space"
        )
        return
    serve(options)


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("model", nargs="?", default=".", help="folder or Hub id of a CALM (default: this folder)")
    parser.add_argument("--baseline", help="folder or Hub id of a token-level language model to compare with")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: localhost only)")
    parser.add_argument("--port", type=int, default=7860, help="0: any free port (default: 7860)")
    parser.add_argument("--device", help="default: a GPU if available")
    parser.add_argument("--space", type=Path, metavar="FOLDER", help="write a Space to this new folder, and exit")
    return parser.parse_args(argv)


def serve(options: Namespace) -> None:
    """Loads the models and serves the page until the process ends."""
    require_package("gradio", "app", "the page")
    with known_errors(OSError), bind_socket(options.host, options.port) as bound_socket:
        port = bound_socket.getsockname()[1]  # checked before the models are loaded
    page = create_page(load_models(options.model, options.baseline, options.device))
    print(f"{options.model} is served at http://{options.host}:{port}", flush=True)
    with known_errors(OSError):
        launch(page, server_name=options.host, server_port=port, quiet=True)


def load_models(model: str, baseline: str | None, device: str | None) -> list[PageModel]:
    """Loads the CALM, and the baseline if one is named, with their tokenizers."""
    models = [PageModel(display_name(model), *load_calm(model, device))]
    if baseline is not None:
        with known_errors():
            causal_lm = load_causal_lm(baseline, device=device)
            if is_calm(causal_lm):
                raise ValueError(f"--baseline {baseline} is a CALM: use a token-level language model.")
            models.append(PageModel(display_name(baseline), causal_lm, load_tokenizer(baseline)))
    return models


def write_space(folder: Path, model: str, baseline: str | None = None) -> None:
    """Writes a folder for a Space atomically.

    Args:
        folder: a new or empty folder.
        model: a Hub id, or a folder, which is copied.
        baseline: the same for a token-level language model.
    """
    with new_folder(folder) as temporary:
        sources = {name: source for name, source in (("model", model), ("baseline", baseline)) if source}
        # A copied model is loaded from its subfolder ("model" or "baseline"), another one from the Hub.
        loaded_from = {name: copy_if_local(source, temporary / name) for name, source in sources.items()}
        names = {name: display_name(source) for name, source in sources.items() if loaded_from[name] == name}
        hub_ids = [source for name, source in sources.items() if loaded_from[name] == source]
        title = display_name(model)
        card = SPACE_CARD.format(
            title=json.dumps(title)[1:-1],
            sdk_version=SDK_VERSION,
            models="models:\n" + "".join(f"- {hub_id}\n" for hub_id in hub_ids) if hub_ids else "",
        )
        files = {
            "app.py": SPACE_APP.format(model=loaded_from["model"], baseline=loaded_from.get("baseline"), names=names),
            "page.py": Path(__file__).with_name("app_page.py").read_text(encoding="utf-8"),
            "requirements.txt": "\n".join(REQUIREMENTS) + "\n",
            "README.md": card,
            ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        }
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")


def display_name(model: str) -> str:
    """Returns the folder's name, "CALM demo" for the demo model's, or the whole Hub id."""
    if Path(model).resolve() == ROOT:
        return "CALM demo"
    return Path(model).absolute().name if Path(model).is_dir() else model


def copy_if_local(model: str, target: Path) -> str:
    """Saves a local model with code and tokenizer to `target`, returns `target.name`; returns a Hub id unchanged."""
    if not Path(model).is_dir():
        if HUB_ID.fullmatch(model):
            return model
        raise InputError(f"{model}: no such folder, and not a Hub id.")
    with known_errors():
        parts = load_causal_lm(model, device="cpu"), load_tokenizer(model)
    for part in parts:
        part.save_pretrained(target)
    return target.name


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.exit(main())
