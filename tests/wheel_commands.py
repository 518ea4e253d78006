"""Runs commands of the installed package one after another; a script that test_wheel.py runs outside the checkout.

    wheel_commands.py RESULT_FILE HIDDEN_PACKAGES COMMANDS     (the latter two as JSON)

Writes the exit code and the output of each command. One process runs them all because importing torch and transformers
takes most of the time. Without arguments it runs each `calm` command's `--help`, as `make test-newest` does before it
installs an extra; its exit code is 1 if one fails.
"""

import contextlib
import importlib
import io
import json
import runpy
import sys
import traceback
from importlib.machinery import PathFinder
from pathlib import Path


def hide(packages: list[str]) -> None:
    class HidingFinder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return None if name.partition(".")[0] in packages else PathFinder.find_spec(name, path, target)

        invalidate_caches = PathFinder.invalidate_caches
        find_distributions = PathFinder.find_distributions

    sys.meta_path[sys.meta_path.index(PathFinder)] = HidingFinder


def run(module: str, *arguments: str) -> dict:
    printed, code = io.StringIO(), 0
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):  # like the interpreter
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
    return {"code": code, "printed": printed.getvalue()}


def save_a_model(folder: str) -> list[str]:
    model = importlib.import_module("calm_transformers")
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "latent_size": 4}
    config = model.CALMConfig(**sizes, num_hidden_layers=1, num_attention_heads=1, autoencoder_config=sizes)
    model.CALMForCausalLM(config).save_pretrained(folder)
    return sorted(path.name for path in Path(folder).glob("*.py"))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        names = ["", *importlib.import_module("calm_transformers.cli").COMMANDS]
        outcomes = [run("calm_transformers.cli", *name.split(), "--help") for name in names]
        sys.exit("\n".join(each["printed"] for each in outcomes if each["code"]) or 0)
    result, hidden, commands = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    hide(hidden)
    outcome = {" ".join(words): run(*words) for words in commands}
    outcome["package"] = importlib.import_module("calm_transformers").__file__
    outcome["saved"] = save_a_model(str(result.with_name("saved")))
    result.write_text(json.dumps(outcome))
