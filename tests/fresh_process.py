"""Calls a function of a test file in a fresh Python process with its own Hugging Face home.

Loading with `trust_remote_code` is tested this way because a process silently reuses classes that it loaded before.
"""

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_SECONDS = 300
MAIN = """
import importlib, json, sys
module, function, arguments, result = sys.argv[1:]
function = getattr(importlib.import_module(module), function)
assert "transformers" not in sys.modules, f"{module} imports transformers: the process would not be fresh"
value = function(**json.loads(arguments))
open(result, "w", encoding="utf-8").write(json.dumps(value))
"""
# Lines that upstream prints on stderr for any model.
UPSTREAM_LINES = re.compile(
    r"(it|B)/s\]"  # progress bars
    r"|^Device set to use"  # the pipeline
    r"|`torch_dtype` is deprecated"  # an argument of the model card's snippet
    r"|Passing `generation_config` together with|Both `max_new_tokens`"  # the pipeline of transformers 5.17
    r"|Ignoring clean_up_tokenization_spaces=True"  # the same
    r"|^Failed to load CPU gemm_4bit_forward"  # bitsandbytes, which peft imports if installed
    r"|^Failed to load \S*/torchao/|^W\d+ .*torch/utils/_pytree\.py"  # torchao, which transformers imports
)


@dataclass
class FreshCall:
    result: object
    stderr: str

    @property
    def complaints(self):
        """The lines on stderr other than those that upstream prints for any model."""
        return [line for line in re.split(r"[\r\n]+", self.stderr) if line.strip() and not UPSTREAM_LINES.search(line)]


def call(function, home, environment=None, **arguments):
    """Runs `function(**arguments)` in a fresh process.

    Args:
        function: at the top level of a file in this folder that doesn't import transformers; takes and returns JSON.
        home: HF_HOME (cache and copied remote code) and working directory of the process.
        environment: variables to set; by default the process is offline.

    Raises:
        AssertionError: the process failed; the message holds its stderr.
    """
    home.mkdir(parents=True, exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))}
    environment = {"HF_HUB_OFFLINE": "1"} if environment is None else environment
    here = Path(inspect.getfile(function)).parent
    result = home / "result.json"
    done = subprocess.run(
        [sys.executable, "-c", MAIN, function.__module__, function.__name__, json.dumps(arguments), str(result)],
        env={**inherited, "HF_HOME": str(home), "PYTHONPATH": str(here), **environment},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, f"{function.__name__}({arguments}) failed in a fresh process:\n{done.stderr}"
    return FreshCall(json.loads(result.read_text(encoding="utf-8")), done.stderr)
