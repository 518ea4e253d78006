"""Uploads a run's checkpoints and its model to a URL that fsspec opens, in the background."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from calm_transformers.command_line import InputError, format_error


class Upload(TrainerCallback):
    """Copies a run's folder to `url` while the training continues: each checkpoint, and at the end the model.

    Of each the file TRAINER_STATE_NAME comes last, so that a copy without it is known as incomplete. If checkpoints
    are saved faster than they are copied, only the newest waits for its turn. A copy that fails is printed.

    Raises:
        InputError: the URL can't be written, tried with `recipe_file`.
    """

    def __init__(self, url: str, recipe_file: Path):
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.url_to_fs(self.url)
            self._copy_file(recipe_file, recipe_file.name)
        except Exception as error:  # each file system has its own
            raise InputError(f"upload_to {url}: cannot be written ({format_error(error)}).") from error
        self._thread = ThreadPoolExecutor(1)
        self._newest: Path | None = None

    def on_save(self, args: Any, state, control, **kwargs):
        if state.is_world_process_zero:
            name = f"checkpoint-{state.global_step}"
            self.start(Path(args.output_dir) / name, f"{name}/")

    def finish(self, folder: Path) -> None:
        """Copies the model of the run's `folder` and waits for it; raises InputError if that failed."""
        error = self.start(folder).result()
        if error:
            raise InputError(f"the model is in {folder}, but not at {self.url}: {format_error(error)}") from error

    def start(self, folder: Path, prefix: str = "") -> Future[Exception | None]:
        self._newest = folder
        return self._thread.submit(self._copy, folder, prefix)

    def _copy(self, folder: Path, prefix: str) -> Exception | None:
        if folder != self._newest:
            return None
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        files = [path for path in files if not path.parts[0].startswith("checkpoint-")]
        marker = f"{self._root}/{prefix}{TRAINER_STATE_NAME}"
        try:
            if self._files.exists(marker):  # of an earlier copy
                self._files.rm_file(marker)
            for path in sorted(files, key=lambda path: path.name == TRAINER_STATE_NAME):
                self._copy_file(folder / path, f"{prefix}{path.as_posix()}")
        except Exception as error:  # the training continues
            print(f"warning: {folder} was not uploaded to {self.url}: {format_error(error)}", flush=True)
            return error
        return None

    def _copy_file(self, file: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(file), target)
