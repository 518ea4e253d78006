"""Atomic writes: a file or folder has its final name only when it is complete."""

import pytest

from calm_transformers.command_line import InputError
from calm_transformers.files import atomic_write


def test_a_file_replaces_the_old_one_unless_there_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_partial_folder_of_a_killed_process_is_removed(tmp_path):
    partial = tmp_path / "model.unfinished"
    partial.mkdir()
    (partial / "old").touch()
    with atomic_write(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["new"] and not partial.exists()


def test_one_process_writes_at_a_time(tmp_path):
    path = tmp_path / "model"
    with atomic_write(path) as temporary:
        temporary.mkdir()
        with pytest.raises(InputError, match="model is being written by another process"), atomic_write(path):
            pass
        (temporary / "whole").touch()
    assert [p.name for p in path.iterdir()] == ["whole"] and [p.name for p in tmp_path.iterdir()] == ["model"]
