"""Turns an experiments file such as language.yaml into commands that train and evaluate, in order of dependency."""

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
STUDIES = {  # key in the YAML file → module, whether of the first seed alone, and options
    "replacements": ("oracle_ablation", True, {}),
    "sharpening": ("temperature_fidelity", True, {}),
    "distillation": ("temperature_fidelity", False, {"methods": "batch", "candidates": 200}),
}


class Run(NamedTuple):
    """A command, and the file that exists once it has finished (the results, if it is an evaluation)."""

    args: list[str]
    result: Path
    is_evaluation: bool

    @property
    def log(self) -> Path:
        """Where the output goes: beside the results of an evaluation, or beside the folder of a training."""
        path = self.result if self.is_evaluation else self.result.parent
        return path.with_name(f"{path.name}.log")

    def execute(self) -> bool:
        """Runs the command and returns whether it succeeded."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
        with self.log.open("a", encoding="utf-8") as log:
            command = [sys.executable, "-m", *self.args]
            return subprocess.run(command, stdout=log, stderr=log, env=environment).returncode == 0

    def record(self) -> dict[str, Any]:
        """Returns the results of an evaluation and the cost of training its model."""
        results = json.loads(self.result.read_text(encoding="utf-8"))
        results = results[0] if isinstance(results, list) else results
        cost = training_cost(self.result.parent)
        return {name: value for name, value in results.items() if name != "model"} | {"cost": cost}


def training_cost(folder: Path) -> dict[str, float]:
    """Returns tokens, FLOPs and CPU seconds of a finished training, including those of the model it began with."""
    recipe = load_recipe(str(folder / "recipe.yaml"))
    state = json.loads((folder / "trainer_state.json").read_text())
    tokens = state["max_steps"] * recipe.training["per_device_train_batch_size"] * recipe.data.block_size
    flops = tokens * sum(recipe_cost(recipe, load_config(str(folder))).train_flops.values())
    speeds = [entry["tokens_per_cpu_second"] for entry in state["log_history"] if "tokens_per_cpu_second" in entry]
    cost = {"tokens": tokens, "flops": flops, "cpu_seconds": tokens * mean(1 / speed for speed in speeds)}
    if source := recipe.init_backbone or recipe.init_from:
        initial = training_cost(Path(source))
        cost = {name: cost[name] + initial[name] for name in cost}
    return cost


class Plan:
    """The runs of an experiments file by name, each after those that it depends on.

    Args:
        file: tables, and the models of their rows by recipe and fields.
        output: folder for all results.
        corpus: folder of the text files that the file names, if any.
        groups: tables and studies to run; None runs all.
    """

    def __init__(self, file: Path, output: Path, corpus: Path | None, groups: list[str] | None):
        self.content, self.name = yaml.safe_load(file.read_text(encoding="utf-8")), file.stem
        self.folder, self.runs = output / self.name, dict[str, Run]()
        self.tables = [table for table in self.content["tables"] if not groups or table["group"] in groups]
        self.studies = {study: self.content.get(study, []) for study in STUDIES if not groups or study in groups}
        self.is_language = "language" in self.content
        if self.is_language:
            self.tokenizer = self.folder / "language"  # written with its text
            self.train, self.held_out = self.tokenizer / "train.jsonl", self.tokenizer / "validation.jsonl"
            options = {**self.content["language"], "output": self.tokenizer}
            self._add("language", "calm_transformers.experiments.language", options, self.tokenizer / "language.json")
        else:
            text_files = self.content["text"].values()
            if corpus is None or not all((corpus / name).is_file() for name in text_files):
                source = file.name if corpus is None else corpus
                names = " and ".join(text_files)
                raise InputError(f"{source}: give --corpus (make: CORPUS=) the folder that holds {names}.")
            self.train, self.held_out = (corpus / self.content["text"][part] for part in ("train", "validation"))
            self.tokenizer = self._add_training("tokenizer", {"recipe": self.content["tokenizer"]}, "tokenizer.json")
        names_by_row = [self.models(row["model"]) for table in self.tables for row in table["rows"]]
        # All rows with the first seed come before the second, so that an interrupted run leaves whole comparisons.
        for names_of_seed in zip_longest(*names_by_row):
            for name in filter(None, names_of_seed):  # None: a row with fewer seeds
                self._add_model(name)
        for study, models in self.studies.items():
            module, is_of_one_seed, options = STUDIES[study]
            options = {"language": self.tokenizer, **options}
            if study == "replacements":
                options |= self.content["evaluation"]
            for name in (name for model in models for name in self.models(model)[: 1 if is_of_one_seed else None]):
                self._add_evaluation(self._add_model(name), study, f"calm_transformers.experiments.{module}", options)

    def models(self, name: str) -> list[str]:
        """Returns the names of a model's trainings, one per seed."""
        return [f"{name}-seed{seed}" for seed in self.content["models"][name]["seeds"]]

    def _add_model(self, name: str) -> Path:
        """Adds the training and evaluation of MODEL-seedN, after those of the models it needs; returns its folder."""
        entry, _, seed = name.rpartition("-seed")
        fields, options = {**self.content["models"][entry], "seed": seed}, dict(self.content["evaluation"])
        del fields["seeds"]
        options["max_positions"] = fields.pop("max_positions", options["max_positions"])
        if "autoencoder" in fields:
            autoencoder = fields["autoencoder"]
            recipe = self.content["autoencoders"][autoencoder]
            fields["autoencoder"] = self._add_training(f"autoencoders/{autoencoder}", recipe)
            module = "calm_transformers.evaluation.autoencoder_report"
            noise_options = {"data": self.held_out, "max_patches": 10_000}
            self._add_evaluation(fields["autoencoder"], "noise", module, noise_options)
        for source in fields.keys() & {"init_backbone", "init_from"}:
            fields[source] = self._add_model(f"{fields[source]}-seed{seed}")
        folder = self._add_training(f"models/{name}", {"tokenizer": self.tokenizer, **fields})
        text = {"language": self.tokenizer} if self.is_language else {"data": self.held_out}
        module = "experiments.optimal_fraction" if self.is_language else "evaluation.brier_lm"
        self._add_evaluation(folder, "score", f"calm_transformers.{module}", {**options, **text})
        return folder

    def _add_training(self, name: str, fields: dict[str, Any], result: str = "trainer_state.json") -> Path:
        """Adds a training, finished once its folder holds the file `result`, and returns the folder."""
        folder, recipe = self.folder / name, FOLDER / "recipes" / f"{fields['recipe']}.yaml"
        options = {**fields, "train_files": self.train, "output_dir": folder}
        if result == "trainer_state.json":  # a model, not a tokenizer
            options |= {"tokenizer": self.tokenizer, "cache_dir": self.folder / "tokens"}
        del options["recipe"]
        kind = load_recipe(str(recipe), parse_command_line(to_arguments(options))).kind  # raises for unknown fields
        self._add(name, f"calm_transformers.training.train {kind}", {"recipe": recipe, **options}, folder / result)
        return folder

    def _add_evaluation(self, model: Path, name: str, module: str, options: dict[str, Any]) -> None:
        """Adds an evaluation of a model that writes NAME.json to its folder."""
        result = model / f"{name}.json"
        options = {"model": model, **options, "json": result}
        self._add(f"{model.relative_to(self.folder)}/{name}", module, options, result, is_evaluation=True)

    def _add(self, name: str, module: str, options: dict[str, Any], result: Path, is_evaluation: bool = False) -> None:
        run = Run([*module.split(), *to_arguments(options)], result, is_evaluation)
        self.runs.setdefault(f"{self.name}/{name}", run)


def to_arguments(options: dict[str, Any]) -> list[str]:
    """Converts options to command-line arguments; True is a flag without a value."""
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return arguments
