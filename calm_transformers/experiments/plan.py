"""What a file like language.yaml asks for: trainings and evaluations as commands, each after those that it needs."""

import json
import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import yaml

from calm_transformers.command_line import InputError
from calm_transformers.loading import load_config
from calm_transformers.training.cost import recipe_cost
from calm_transformers.training.recipe import load_recipe, parse_command_line

FOLDER = Path(__file__).parent
STUDIES = ("replacements", "sharpening")


class Run(NamedTuple):
    """A command, and the file that is there when it is finished; of an evaluation, what it found."""

    words: list[str]
    result: Path
    measures: bool

    @property
    def log(self) -> Path:
        """What the command prints: beside the result, or beside the folder of a training."""
        path = self.result if self.measures else self.result.parent
        return path.with_name(f"{path.name}.log")

    def execute(self) -> bool:
        """Whether it went well."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
        with self.log.open("a", encoding="utf-8") as out:
            words = [sys.executable, "-m", *self.words]
            return subprocess.run(words, stdout=out, stderr=out, env=environment).returncode == 0

    def record(self) -> dict[str, Any]:
        """What an evaluation found, and what the trainings before it cost."""
        found = json.loads(self.result.read_text(encoding="utf-8"))
        found = found[0] if isinstance(found, list) else found
        return {name: value for name, value in found.items() if name != "model"} | {"cost": cost(self.result.parent)}


def cost(folder: Path) -> dict[str, float]:
    """Tokens, FLOPs and CPU seconds of a finished training, with those of the model that it began with."""
    recipe, training = (
        load_recipe(str(folder / "recipe.yaml")),
        json.loads((folder / "trainer_state.json").read_text()),
    )
    tokens = training["max_steps"] * recipe.training["per_device_train_batch_size"] * recipe.data.block_size
    flops = tokens * sum(recipe_cost(recipe, load_config(str(folder))).train_flops.values())
    rates = [entry["tokens_per_cpu_second"] for entry in training["log_history"] if "tokens_per_cpu_second" in entry]
    found = {"tokens": tokens, "flops": flops, "cpu_seconds": tokens * mean(1 / rate for rate in rates)}
    before = cost(Path(recipe.init_backbone)) if recipe.init_backbone else dict.fromkeys(found, 0)
    return {name: found[name] + before[name] for name in found}


class Plan:
    """What a file like language.yaml asks for: the runs by name, each after those that it needs.

    Args:
        file: tables, and the models in their rows by recipe and fields.
        output: folder that everything is written under.
        corpus: folder of the text files that the file names, if it names some.
        groups: the tables and studies that are wanted; None are all.
    """

    def __init__(self, file: Path, output: Path, corpus: Path | None, groups: list[str] | None):
        self.content, self.name = yaml.safe_load(file.read_text(encoding="utf-8")), file.stem
        self.folder, self.runs = output / self.name, dict[str, Run]()
        self.tables = [table for table in self.content["tables"] if not groups or table["group"] in groups]
        self.studies = {kind: self.content.get(kind, []) for kind in STUDIES if not groups or kind in groups}
        self.is_language = "language" in self.content
        if self.is_language:
            self.tokenizer = self.folder / "language"  # comes with its text
            self.train, self.held_out = self.tokenizer / "train.jsonl", self.tokenizer / "validation.jsonl"
            options = {**self.content["language"], "output": self.tokenizer}
            self._add("language", "calm_transformers.experiments.language", options, self.tokenizer / "language.json")
        else:
            names = self.content["text"].values()
            if corpus is None or not all((corpus / name).is_file() for name in names):
                where = file.name if corpus is None else corpus
                files = " and ".join(names)
                raise InputError(f"{where}: give --corpus (make: CORPUS=) the folder that holds {files}.")
            self.train, self.held_out = (corpus / self.content["text"][part] for part in ("train", "validation"))
            self.tokenizer = self._training("tokenizer", {"recipe": self.content["tokenizer"]}, "tokenizer.json")
        rows = [self.models(row["model"]) for table in self.tables for row in table["rows"]]
        # All rows with the first seed before the second: a run that is stopped leaves whole comparisons.
        for same_seed in zip_longest(*rows):
            for model in filter(None, same_seed):
                self._model(model)
        for kind, names in self.studies.items():
            for name in names:
                folder, options = self._model(self.models(name)[0]), {"language": self.tokenizer}
                if kind == "replacements":
                    options |= self.content["evaluation"]
                self._evaluation(folder, kind, f"calm_transformers.experiments.{kind}", options)

    def models(self, name: str) -> list[str]:
        """A model's name with each of its seeds."""
        return [f"{name}-seed{seed}" for seed in self.content["models"][name]["seeds"]]

    def _model(self, name: str) -> Path:
        """Folder of a model, whose training and score are added."""
        entry, _, seed = name.rpartition("-seed")
        fields, options = {**self.content["models"][entry], "seed": seed}, dict(self.content["evaluation"])
        del fields["seeds"]
        options["max_positions"] = fields.pop("max_positions", options["max_positions"])
        if "autoencoder" in fields:
            place = f"autoencoders/{fields['autoencoder']}"
            fields["autoencoder"] = self._training(place, self.content["autoencoders"][fields["autoencoder"]])
            noise = {"data": self.held_out, "max_patches": 10_000}
            self._evaluation(fields["autoencoder"], "noise", "calm_transformers.evaluation.autoencoder_report", noise)
        if "init_backbone" in fields:
            fields["init_backbone"] = self._model(f"{fields['init_backbone']}-seed{seed}")
        folder = self._training(f"models/{name}", {"tokenizer": self.tokenizer, **fields})
        text = {"language": self.tokenizer} if self.is_language else {"data": self.held_out}
        module = "calm_transformers.experiments.share" if self.is_language else "calm_transformers.evaluation.brier_lm"
        self._evaluation(folder, "score", module, {**options, **text})
        return folder

    def _training(self, place: str, fields: dict[str, Any], last: str = "trainer_state.json") -> Path:
        folder, recipe = self.folder / place, FOLDER / "recipes" / f"{fields['recipe']}.yaml"
        options = {**fields, "train_files": self.train, "output_dir": folder}
        if last == "trainer_state.json":
            options |= {"tokenizer": self.tokenizer, "cache_dir": self.folder / "tokens"}
        del options["recipe"]
        kind = load_recipe(str(recipe), parse_command_line(words_of(options))).kind  # refuses unknown fields now
        self._add(place, f"calm_transformers.training.train {kind}", {"recipe": recipe, **options}, folder / last)
        return folder

    def _evaluation(self, model: Path, kind: str, module: str, options: dict[str, Any]) -> None:
        result = model / f"{kind}.json"
        options = {"model": model, **options, "json": result}
        self._add(f"{model.relative_to(self.folder)}/{kind}", module, options, result, measures=True)

    def _add(self, place: str, module: str, options: dict[str, Any], result: Path, measures: bool = False) -> None:
        self.runs.setdefault(f"{self.name}/{place}", Run([*module.split(), *words_of(options)], result, measures))


def words_of(options: dict[str, Any]) -> list[str]:
    """A command line; True is the value of a flag."""
    words = []
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words
