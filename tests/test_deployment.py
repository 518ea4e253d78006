"""The files that run the server elsewhere: systemd takes the unit, and the Dockerfile names what is there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from model_copies import ROOT

from calm_transformers.serving import serve
from calm_transformers.serving.connections import KEEP_ALIVE_SECONDS

DOCS = ROOT / "docs"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    unit = (DOCS / "calm.service").read_text()
    assert "/opt/calm/.venv/bin/calm" in unit
    path = tmp_path / "calm.service"
    path.write_text(unit.replace("/opt/calm/.venv/bin/calm", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "calm.service" not in done.stderr, done.stderr
    path.write_text(unit)  # the check sees that the interpreter isn't there
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60)
    assert Path("/opt/calm").exists() or "calm.service" in done.stderr


@pytest.mark.parametrize("file", ["calm.service", "Dockerfile"])
def test_their_commands_are_options_of_the_server(file):
    text = (DOCS / file).read_text()
    used = set(re.findall(r"--(?:host|port|model_name|grace|[a-z]+_[a-z_]+)\b", text))
    options = serve.parse(["model", *(word for option in sorted(used) for word in (option, "1"))])
    assert used and all(hasattr(options, option.removeprefix("--")) for option in used)


def test_the_proxy_is_first_to_close_a_connection_that_is_kept():
    (seconds,) = re.findall(r"keepalive_timeout (\d+)s;", (DOCS / "nginx.conf").read_text())
    assert int(seconds) < KEEP_ALIVE_SECONDS > 60  # which is nginx's default, too


def test_what_the_dockerfile_copies_is_there():
    text = (DOCS / "Dockerfile").read_text()
    assert (ROOT / "constraints.txt").is_file() and "/source/constraints.txt" in text
    assert "serve =" in (ROOT / "setup.cfg").read_text() and "/source[serve]" in text
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ".git" in ignored and not {"setup.cfg", "training", "*.py"} & set(ignored)
