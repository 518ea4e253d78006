"""Asks a CALM server with the official `openai` client: a completion, a streamed one, and JSON of a schema.

python examples/serve_client.py                                       # starts `calm serve` itself
python examples/serve_client.py --base_url http://localhost:8000/v1   # asks a server that runs
"""

import argparse
import json
import socket
import subprocess
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(Path(__file__).parents[1]), help="folder or Hub id of a CALM")
parser.add_argument("--base_url", help="of a running server; without it, one is started")
parser.add_argument("--prompt", default="Once upon a time")
args = parser.parse_args()

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "pet": {"enum": ["cat", "dog"]}},
    "required": ["name", "pet"],
    "additionalProperties": False,
}


def ask(base_url: str) -> None:
    client = OpenAI(base_url=base_url, api_key="none", max_retries=12)  # retries until the server has started
    model = client.models.list().data[0].id
    common = {"model": model, "prompt": args.prompt, "temperature": 0.5, "seed": 0}

    completion = client.completions.create(**common, max_tokens=40, stop=["\n"])
    print(f"Completion: {completion.choices[0].text!r}, {completion.usage.completion_tokens} tokens")

    print("Streamed:", end="", flush=True)
    for chunk in client.completions.create(**common, max_tokens=40, stream=True):
        print(chunk.choices[0].text, end="", flush=True)

    response_format = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    completion = client.completions.create(**common, max_tokens=80, extra_body={"response_format": response_format})
    print("\nJSON:", json.loads(completion.choices[0].text))


if args.base_url:
    ask(args.base_url)
else:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    server = subprocess.Popen(["calm", "serve", args.model, "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        ask(f"http://127.0.0.1:{port}/v1")
    finally:
        server.terminate()
        server.wait()
