"""A page on which a CALM writes patch by patch: `make app`, or `calm app MODEL`.

It shows what each patch was chosen from. `--baseline` puts an ordinary language model beside it. `--space FOLDER`
writes a folder for a Space of the Hugging Face Hub in place of serving: the page, what it needs, and the model,
named (a Hub id) or copied in (a folder).
"""

import importlib.util
import json
import re
import signal
import sys
from pathlib import Path

from calm_transformers.command_line import InputError, Parser, bind_socket, command, known_errors
from calm_transformers.files import atomic_write
from calm_transformers.loading import is_calm, load_calm, load_causal_lm, load_tokenizer
from calm_transformers.model.configuration_calm import TRANSFORMERS
from calm_transformers.pages.app_page import Writer, create_page, launch

PROGRAM = "calm app"
SDK_VERSION = "6.17.3"  # of gradio, with which the page is tested
REQUIREMENTS = ("torch>=2.6", TRANSFORMERS, "safetensors>=0.4.3", "accelerate>=1.1")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

SPACE_APP = '''"""The page of this Space; page.py is the whole of it."""

from pathlib import Path

from page import Writer, create_page, launch

HERE = Path(__file__).parent
MODEL, BASELINE = {model!r}, {baseline!r}


def load(name, **options):
    """A Hub id, or a folder beside this file."""
    folder = HERE / name
    writer = Writer.load(str(folder) if folder.is_dir() else name, **options)
    writer.name = {names!r}.get(name, name)
    return writer


if __name__ == "__main__":
    writers = [load(MODEL, trust_remote_code=True)]  # a CALM brings its own code
    if BASELINE:
        writers.append(load(BASELINE))
    launch(create_page(writers))
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
short_description: A language model that writes several tokens at a time
{models}---

# {title}

A CALM, a continuous autoregressive language model ([arXiv 2510.27688](https://arxiv.org/abs/2510.27688)), writes a
patch of several tokens in one step. Point at a patch, or tap it, to see what it was chosen from.

On a machine of your own: `pip install -r requirements.txt gradio=={sdk_version}`, then `python app.py`.
"""


@command
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.space is not None:
        with known_errors(OSError):
            write_space(options.space, options.model, options.baseline)
        print(
            f"{options.space}: app.py runs the page; upload the folder with: hf upload NAME {options.space} "
            "--repo-type space"
        )
        return
    serve(options)


def parse(argv: list[str] | None):
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("model", nargs="?", default=".", help="folder or Hub id of a CALM (default: this folder)")
    parser.add_argument("--baseline", help="folder or Hub id of an ordinary language model, which writes beside it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one (default: 7860)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--space", type=Path, metavar="FOLDER", help="write a Space in this new folder, and end")
    return parser.parse_args(argv)


def serve(options) -> None:
    """Loads the models and shows the page until the process is told to stop."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError('the page needs gradio: pip install "calm-transformers[app]".')
    with known_errors(OSError), bind_socket(options.host, options.port) as listening:
        port = listening.getsockname()[1]  # known to be free before models are loaded
    writers = load_writers(options.model, options.baseline, options.device)
    page = create_page(writers)
    print(f"{options.model} writes at http://{options.host}:{port}", flush=True)
    with known_errors(OSError):
        launch(page, server_name=options.host, server_port=port, quiet=True)


def load_writers(model: str, baseline: str | None, device: str | None) -> list:
    """
    Raises:
        InputError: one can't be loaded, or is not of its kind.
    """
    writers = [Writer(display_name(model), *load_calm(model, device))]
    if baseline is not None:
        with known_errors():
            ordinary = load_causal_lm(baseline, device=device)
            if is_calm(ordinary):
                raise ValueError(f"--baseline {baseline} is a CALM: name an ordinary language model.")
            writers.append(Writer(display_name(baseline), ordinary, load_tokenizer(baseline)))
    return writers


def write_space(folder: Path, model: str, baseline: str | None = None) -> None:
    """Writes a folder for a Space, aside, and renames it.

    Args:
        folder: which must be new, or empty.
        model: a Hub id, or a folder, which is copied in.
        baseline: the same of an ordinary language model.

    Raises:
        InputError: the folder holds something, or the model is neither.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--space {folder}: is not empty; name a new folder.")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"--space {folder}: the folder that it would be in does not exist.")
    with atomic_write(folder.absolute()) as aside:
        aside.mkdir()
        sources = {"model": model, "baseline": baseline}
        inside = {name: put_model(source, aside / name) for name, source in sources.items() if source}
        names = {name: display_name(source) for name, source in sources.items() if source and inside[name] == name}
        on_hub = [source for name, source in sources.items() if source and inside[name] == source]
        title = f"{display_name(model)} writes"
        card = SPACE_CARD.format(
            title=json.dumps(title)[1:-1],
            sdk_version=SDK_VERSION,
            models="models:\n" + "".join(f"- {name}\n" for name in on_hub) if on_hub else "",
        )
        files = {
            "app.py": SPACE_APP.format(model=inside["model"], baseline=inside.get("baseline"), names=names),
            "page.py": Path(__file__).with_name("app_page.py").read_text(encoding="utf-8"),
            "requirements.txt": "\n".join(REQUIREMENTS) + "\n",
            "README.md": card,
            ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        }
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")


def display_name(model: str) -> str:
    """Of a folder its name, of a Hub id all of it."""
    if model == ".":
        return "CALM"
    return Path(model).absolute().name if Path(model).is_dir() else model


def put_model(model: str, target: Path) -> str:
    """Saves a folder's model, with its code, in `target`, and returns that folder's name; of a Hub id just the id.

    Raises:
        InputError: it is neither, or a folder without a language model and its tokenizer.
    """
    if not Path(model).is_dir():
        if HUB_ID.fullmatch(model):
            return model
        raise InputError(f"{model}: there is no such folder, and it is no Hub id.")
    with known_errors():
        load_causal_lm(model, device="cpu").save_pretrained(target)
        load_tokenizer(model).save_pretrained(target)
    return target.name


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.exit(main())
