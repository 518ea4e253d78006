"""Deployment files: the systemd unit, the Dockerfile and the nginx configuration."""

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
def test_systemd_verifies_the_unit(tmp_path):
    unit = (DOCS / "calm@.service").read_text()
    assert "/opt/calm/.venv/bin/calm" in unit
    path = tmp_path / "calm@8001.service"
    path.write_text(unit.replace("/opt/calm/.venv/bin/calm", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "calm@8001.service" not in done.stderr, done.stderr
    path.write_text(unit)  # fails, as that interpreter doesn't exist
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60)
    assert Path("/opt/calm").exists() or "calm@8001.service" in done.stderr


@pytest.mark.parametrize("file", ["calm@.service", "Dockerfile"])
def test_commands_use_existing_options(file):
    text = (DOCS / file).read_text()
    used = set(re.findall(r"--(?:host|port|model_name|grace|[a-z]+_[a-z_]+)\b", text))
    options = serve.parse(["model", *(word for option in sorted(used) for word in (option, "1"))])
    assert used and all(hasattr(options, option.removeprefix("--")) for option in used)


def test_the_proxy_closes_idle_connections_before_the_server():
    (seconds,) = re.findall(r"keepalive_timeout (\d+)s;", (DOCS / "nginx.conf").read_text())
    assert int(seconds) < KEEP_ALIVE_SECONDS > 60  # nginx's default


def test_the_dockerfile_copies_existing_files():
    text = (DOCS / "Dockerfile").read_text()
    assert (ROOT / "constraints.txt").is_file() and "/source/constraints.txt" in text
    assert "serve =" in (ROOT / "setup.cfg").read_text() and "/source[serve]" in text
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ".git" in ignored and not {"setup.cfg", "training", "*.py"} & set(ignored)
