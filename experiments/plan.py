"""What a file like language.yaml asks for, as stages: which training or evaluation, with which fields, after which.

Axes: K tokens per patch, L tokens of a block, V vocabulary.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from math import ceil
from pathlib import Path
from typing import Any

import yaml
from transformers import LlamaConfig

from calm.command_line import InputError
from calm.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm.evaluation.brier import MAX_N
from calm.experiments.language import HiddenMarkovLanguage
from calm.training.auxiliary import AUXILIARY_FILE
from calm.training.configuration import make_config
from calm.training.cost import Cost, recipe_cost
from calm.training.recipe import BACKBONE_FIELDS, Recipe, load_recipe, parse_command_line

FOLDER = Path(__file__).parent
UNFINISHED = ".unfinished"  # what has this ending gets its name when it is complete
LANGUAGE = "language"
STUDIES = ("replacements", "sharpening")  # of single models of the language
BEFORE = ("init_from", "init_backbone")  # fields that name the model whose training went before


@dataclass
class Stage:
    """One training, or the evaluation of a trained model.

    Args:
        name: as in "models/calm-k4" or "models/calm-k4/score"; also its place under the output folder.
        kind: "language" (text of language.py); "tokenizer", "autoencoder", "calm", "ar" (trained by
            calm.training.train_KIND); "score" (BrierLM), "share" (of the language's best BrierLM), "replacements",
            "sharpening" (the commands of that name) or "noise" (the autoencoder's accuracy).
        needs: names of the stages that must be finished first.
        recipe: file of the recipe (trainings).
        fields: what differs from the recipe, given on the command line.
        options: command line of an evaluation; None is the value of a flag.
    """

    name: str
    kind: str
    needs: list[str] = field(default_factory=list)
    recipe: Path | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_training(self) -> bool:
        return self.recipe is not None

    def arguments(self) -> list[str]:
        """The fields as the command line of a training takes them."""
        words = []
        for name, value in self.fields.items():
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]  # JSON is YAML
        return words

    def resolved(self) -> Recipe:
        """The recipe with the fields laid over it, as the training will save it."""
        return _resolved(str(self.recipe), tuple(self.arguments()))


@cache
def _resolved(recipe: str, arguments: tuple[str, ...]) -> Recipe:
    return load_recipe(recipe, parse_command_line(list(arguments)))


@dataclass
class Row:
    """One line of a table: a model, trained once or with several seeds."""

    label: str
    models: list[str]
    paper: float | None = None
    why_missing: str | None = None


@dataclass
class Table:
    group: str
    title: str
    rows: list[Row]


class Plan:
    """The experiments file, resolved against an output folder and, where it asks for one, a corpus.

    Args:
        file: language.yaml or one like it.
        output: folder that everything is written under.
        corpus: folder with the text files that the file names; of no use where the text is the language's.
        max_steps: at most so many steps of every training, to try the whole thing out.

    Raises:
        InputError: a name that nothing stands for, or no corpus where there must be one.
        InputError: a field that no recipe has.
    """

    def __init__(self, file: Path, output: Path, corpus: Path | None = None, max_steps: int | None = None):
        self.content, self.name = yaml.safe_load(file.read_text(encoding="utf-8")), file.stem
        self.corpus, self.output, self.max_steps = corpus, output, max_steps
        self.texts, self.evaluation = self.content["text"], self.content["evaluation"]
        if not self.is_language and corpus is None:
            raise InputError(f"{file.name} is about text files: give --corpus the folder that holds them.")
        self.stages: dict[str, Stage] = {}
        self._costs: dict[str, Cost] = {}
        self.tables = [self._table(**table) for table in self.content["tables"]]
        self.studies = {kind: self._studies(kind, self.content.get(kind, [])) for kind in STUDIES}

    def of_groups(self, groups: list[str] | None) -> list[Stage]:
        """Stages that these tables and studies need, each once, in an order in which they can run."""
        ordered: dict[str, Stage] = {}

        def add(name: str) -> None:
            for needed in self.stages[name].needs:
                add(needed)
            ordered.setdefault(name, self.stages[name])

        rows = [row for table in self.tables if not groups or table.group in groups for row in table.rows]
        # All rows with the first seed before the second: a run that is stopped leaves whole comparisons.
        for same_seed in zip_longest(*(row.models for row in rows)):
            for model in filter(None, same_seed):
                add(f"models/{model}/score")
                for stage in [s for s in ordered.values() if s.kind == "autoencoder"]:
                    add(f"{stage.name}/noise")
        for kind, studies in self.studies.items():
            for study in studies if not groups or kind in groups else []:
                add(study.name)
        return list(ordered.values())

    @property
    def groups(self) -> list[str]:
        """Of tables and studies."""
        return [*(table.group for table in self.tables), *(kind for kind, studies in self.studies.items() if studies)]

    def folder(self, stage: Stage) -> Path:
        return self.output / stage.name

    @property
    def is_language(self) -> bool:
        """Whether the text is made by language.py."""
        return LANGUAGE in self.texts

    def text(self, part: str) -> Path:
        """File of the "train" or "validation" part."""
        if self.is_language:
            return self.output / LANGUAGE / f"{part}.jsonl"
        assert self.corpus is not None, "checked when the plan was made"
        return self.corpus / self.texts[part]

    # reading the file

    def _table(self, group: str, title: str, rows: list[dict]) -> Table:
        return Table(group, title, [self._row(**row) for row in rows])

    def _row(self, label: str, model: str | None = None, paper: float | None = None, why_missing: str | None = None):
        if model is None:
            return Row(label, [], paper, why_missing)
        seeds = self._entry("models", model).get("seeds", [None])
        return Row(label, [self._model(model, seed) for seed in seeds], paper)

    def _entry(self, kind: str, name: str) -> dict:
        entries = self.content[kind]
        if name not in entries:
            raise InputError(f"{kind}: there is no {name!r}, only {', '.join(entries)}.")
        return dict(entries[name])

    def _model(self, name: str, seed: int | None = None) -> str:
        """Adds the stages of a model, what it needs included; the name with its seed."""
        entry = self._entry("models", name)
        entry.pop("seeds", None)
        full_name = name if seed is None else f"{name}-seed{seed}"
        if f"models/{full_name}" in self.stages:
            return full_name
        needs = []
        for field_name in BEFORE:
            if field_name in entry:
                before = self.stages[f"models/{self._model(entry[field_name], seed)}"]
                needs.append(before.name)
                entry |= {field_name: str(self.folder(before)), "tokenizer": before.fields["tokenizer"]}
        if "init_from" in entry:
            entry.pop("autoencoder", None)  # is in the model
        elif "autoencoder" in entry:
            autoencoder = self._autoencoder(entry["autoencoder"])
            needs.append(autoencoder.name)
            entry["autoencoder"] = str(self.folder(autoencoder))
            entry["tokenizer"] = autoencoder.fields["tokenizer"]
        else:
            needs.append(self._tokenizer(entry.get("tokenizer")).name)
            entry["tokenizer"] = str(self.output / needs[-1])
        if seed is not None:
            entry["seed"] = seed
        stage = self._training(f"models/{full_name}", entry, needs)
        self._add_score(stage)
        return full_name

    def _autoencoder(self, name: str) -> Stage:
        if f"autoencoders/{name}" in self.stages:
            return self.stages[f"autoencoders/{name}"]
        entry = self._entry("autoencoders", name)
        tokenizer = self._tokenizer(entry.get("tokenizer"))
        entry["tokenizer"] = str(self.folder(tokenizer))
        stage = self._training(f"autoencoders/{name}", entry, [tokenizer.name])
        options = {"model": self.folder(stage), "data": self.text("validation"), "max_patches": 10_000}
        self._put(Stage(f"{stage.name}/noise", "noise", [stage.name], options=options))
        return stage

    def _tokenizer(self, name: str | None) -> Stage:
        """The language's, which comes with its text, or a trained one."""
        if self.is_language:
            return self.stages.get(LANGUAGE) or self._put(
                Stage(LANGUAGE, LANGUAGE, options=self.texts[LANGUAGE] or {})
            )
        entry = self._entry("tokenizers", str(name))
        return self.stages.get(f"tokenizers/{name}") or self._training(f"tokenizers/{name}", entry, [])

    def _training(self, name: str, entry: dict, needs: list[str]) -> Stage:
        recipe = FOLDER / "recipes" / f"{entry.pop('recipe')}.yaml"
        fields = {"train_files": str(self.text("train")), **entry, "output_dir": str(self.output / name)}
        stage = Stage(name, load_recipe(str(recipe)).kind, needs, recipe, fields)
        if stage.kind == "tokenizer":
            fields["output_dir"] += UNFINISHED
        else:
            fields["cache_dir"] = str(self.output / "tokens")
            if self.max_steps:
                fields["max_steps"] = min(self.max_steps, stage.resolved().training["max_steps"])
                fields["logging_steps"] = 1  # the costs are read from the log
        stage.resolved()  # refuses unknown fields now, not hours later
        return self._put(stage)

    def _add_score(self, trained: Stage) -> None:
        block_size = self.evaluation["block_size"]
        patch_size = 1 if trained.kind == "ar" else self.config(trained).patch_size
        per_block = block_size // patch_size - ceil(MAX_N / patch_size)
        options = {
            "model": self.folder(trained),
            "block_size": block_size,
            "max_positions": self.evaluation.get("positions") or self.evaluation["blocks"] * per_block,
            "batch_size": self.evaluation["batch_size"],
        }
        if self.evaluation.get("append_eos"):
            options["append_eos"] = None
        options |= {"language": self.output / LANGUAGE} if self.is_language else {"data": self.text("validation")}
        kind = "share" if self.is_language else "score"
        self._put(Stage(f"{trained.name}/score", kind, [trained.name], options=options))

    def _studies(self, kind: str, models: list[str]) -> list[Stage]:
        """Of each model's first seed."""
        stages = []
        for name in models:
            trained = self.stages[f"models/{self._row('', name).models[0]}"]
            options = {"model": self.folder(trained), "language": self.output / LANGUAGE}
            if kind == "replacements":
                last = self.folder(trained) / f"checkpoint-{trained.resolved().training['max_steps']}"
                text = {"max_positions": self.evaluation["positions"], "block_size": self.evaluation["block_size"]}
                options |= {"auxiliary": last / AUXILIARY_FILE, **text}
            stages.append(self._put(Stage(f"{trained.name}/{kind}", kind, [trained.name], options=options)))
        return stages

    def _put(self, stage: Stage) -> Stage:
        self.stages[stage.name] = stage
        return stage

    # what a training is and costs

    def config(self, stage: Stage):
        """The configuration that the training will make, before anything exists."""
        recipe = stage.resolved()
        assert recipe.tokenizer is not None, "every training that is planned here names its tokenizer"
        values = {**recipe.model, "vocab_size": self._vocab_size(self.stages[_place(recipe.tokenizer, self.output)])}
        if stage.kind == "calm":
            first = stage
            while first.fields.get("init_from"):
                first = self.stages[_place(first.fields["init_from"], self.output)]
                values = {**first.resolved().model, **values}
            if first.fields.get("init_backbone"):
                llama = self.config(self.stages[_place(first.fields["init_backbone"], self.output)])
                values = {name: getattr(llama, name) for name in BACKBONE_FIELDS if hasattr(llama, name)} | values
            autoencoder = self.config(self.stages[_place(first.fields["autoencoder"], self.output)])
            values |= {"patch_size": autoencoder.patch_size, "latent_size": autoencoder.latent_size}
            return make_config(CALMConfig, {**values, "autoencoder_config": autoencoder.to_dict()})
        if stage.kind == "autoencoder":
            return make_config(CALMAutoencoderConfig, values)
        return make_config(LlamaConfig, values)

    def _vocab_size(self, tokenizer: Stage) -> int:
        if tokenizer.kind == LANGUAGE:
            return len(HiddenMarkovLanguage(vocab_size=tokenizer.options["vocab_size"]).tokenizer())
        return tokenizer.resolved().model["vocab_size"]

    def cost(self, stage: Stage) -> Cost:
        name = stage.name.partition("-seed")[0]  # the seeds cost the same
        if name not in self._costs:
            self._costs[name] = recipe_cost(stage.resolved(), self.config(stage))
        return self._costs[name]

    def phases(self, stage: Stage) -> list[Stage]:
        """The trainings that made the model, the first one first: itself and what it goes on from."""
        before = [self.stages[_place(stage.fields[name], self.output)] for name in BEFORE if name in stage.fields]
        return [*(phase for other in before for phase in self.phases(other)), stage]

    def tokens(self, stage: Stage) -> int:
        """Tokens of one training."""
        recipe = stage.resolved()
        return recipe.training["max_steps"] * recipe.training["per_device_train_batch_size"] * recipe.data.block_size


def _place(folder: str, output: Path) -> str:
    """Folder of a stage → its name."""
    return Path(folder).relative_to(output).as_posix()
