"""Copies a run's checkpoints and its model to a URL that fsspec opens, in the background, and back."""

import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from calm_transformers.command_line import InputError, format_error
from calm_transformers.training.recipe import Recipe, allowed_changes, load_recipe

LINKS = "_upload-"  # before a checkpoint's name; uploads to the Hub leave out what begins so


class Upload(TrainerCallback):
    """Copies a run's folder to `url` while the training continues: checkpoints, and at the end the model.

    Of each the file TRAINER_STATE_NAME comes last, so that a copy without it is known as incomplete. If checkpoints
    are saved faster than they are copied, only the newest waits for its turn. A copy that fails is printed.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.url_to_fs(self.url)
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(f"{self._root}/_writable", b"")
            self._files.rm_file(f"{self._root}/_writable")
        except Exception as error:  # each file system has its own
            raise InputError(f"upload_to {url}: cannot be written ({format_error(error)}).") from error
        self._thread = ThreadPoolExecutor(1)
        self._newest: Path | None = None  # checkpoint

    def on_save(self, args: Any, state, control, **kwargs):
        if state.is_world_process_zero:
            self.start(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def start(self, checkpoint: Path) -> Future[Exception | None]:
        """Copies a checkpoint in the background, by links of its own, as Trainer may delete it meanwhile."""
        links = checkpoint.with_name(LINKS + checkpoint.name)
        shutil.rmtree(links, ignore_errors=True)
        shutil.copytree(checkpoint, links, copy_function=_link)
        self._newest = links
        return self._thread.submit(self._copy_checkpoint, links, f"{checkpoint.name}/")

    def finish(self, folder: Path) -> None:
        """Waits for the checkpoints, then copies the model of the run's `folder`; InputError if that fails."""
        error = self._thread.submit(self._copy, folder, "").result()
        if error:
            raise InputError(f"the model is in {folder}, but not at {self.url}: {format_error(error)}") from error

    def wait(self) -> None:
        """Waits until the last checkpoint is copied; nothing can be copied after that."""
        self._thread.shutdown()

    def restore(self, recipe: Recipe, has_checkpoint: bool, resume: str) -> None:
        """Copies the last complete checkpoint at the URL, with its recipe, to the run's folder, if it has none."""
        folder = Path(recipe.output_dir)
        for links in folder.glob(f"{LINKS}*"):  # a killed run's
            shutil.rmtree(links)
        step = self._last_step()
        if step is None and not self._files.exists(f"{self._root}/{TRAINER_STATE_NAME}"):
            return
        with tempfile.TemporaryDirectory() as temporary:
            saved_recipe = Path(temporary) / "recipe.yaml"
            self._get("recipe.yaml", saved_recipe)
            allowed_changes(load_recipe(str(saved_recipe)), recipe, self.url)
            if has_checkpoint or step is None:
                return
            if resume == "never":
                raise InputError(f"{self.url} has checkpoint-{step}: name another --upload_to, or let it resume.")
            shutil.copy(saved_recipe, folder)
        print(f"restoring checkpoint-{step} from {self.url}", flush=True)
        self._get(f"checkpoint-{step}", folder / f"checkpoint-{step}")

    def begin(self, recipe_file: Path) -> None:
        """Copies the recipe; an earlier model at the URL is no longer complete."""
        self._remove_marker("")
        self._put(recipe_file, recipe_file.name)

    def _put(self, file: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(file), target)

    def _last_step(self) -> int | None:
        found = self._files.glob(f"{self._root}/checkpoint-*/{TRAINER_STATE_NAME}")
        steps = [path.split("/")[-2].removeprefix("checkpoint-") for path in found]
        return max((int(step) for step in steps if step.isdecimal()), default=None)

    def _get(self, name: str, target: Path) -> None:
        """Copies a file or folder of the URL to `target`, which exists only when it is complete."""
        unfinished = target.with_name(f"{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        self._files.get(f"{self._root}/{name}", str(unfinished), recursive=True)
        shutil.rmtree(target, ignore_errors=True)  # an incomplete checkpoint
        os.replace(unfinished, target)

    def _remove_marker(self, prefix: str) -> None:
        if self._files.exists(marker := f"{self._root}/{prefix}{TRAINER_STATE_NAME}"):
            self._files.rm_file(marker)

    def _copy_checkpoint(self, links: Path, prefix: str) -> Exception | None:
        try:
            return self._copy(links, prefix) if links == self._newest else None
        finally:
            shutil.rmtree(links, ignore_errors=True)

    def _copy(self, folder: Path, prefix: str) -> Exception | None:
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        files = [path for path in files if not path.parts[0].startswith(("checkpoint-", LINKS))]
        try:
            self._remove_marker(prefix)
            for path in sorted(files, key=lambda path: path.name == TRAINER_STATE_NAME):
                self._put(folder / path, f"{prefix}{path.as_posix()}")
        except Exception as error:  # the training continues
            reason = f"{type(error).__name__}: {format_error(error)}"
            print(f"warning: {folder.name} was not uploaded to {self.url}: {reason}", flush=True)
            return error
        return None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not on this file system
        shutil.copy2(source, target)
