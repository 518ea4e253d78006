"""files.unfinished: a file or folder stands under its name only when it is complete."""

import pytest

from calm_transformers.command_line import InputError
from calm_transformers.files import atomic_write


def test_a_file_takes_the_place_of_the_old_one_unless_there_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with atomic_write(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_of_an_interrupted_run_is_not_mixed_with_the_next(tmp_path):
    left = tmp_path / "model.unfinished"
    left.mkdir()
    (left / "old").touch()
    with atomic_write(tmp_path / "model") as aside:
        aside.mkdir()
        (aside / "new").touch()
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["new"] and not left.exists()


def test_one_process_writes_at_a_time(tmp_path):
    path = tmp_path / "model"
    with atomic_write(path) as aside:
        aside.mkdir()
        with pytest.raises(InputError, match="model is being written by another process"), atomic_write(path):
            pass
        (aside / "whole").touch()
    assert [p.name for p in path.iterdir()] == ["whole"] and [p.name for p in tmp_path.iterdir()] == ["model"]
