"""Training as a pipeline of values: steps, data sets, arguments; what a caller holds stays as it was."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from training_helpers import RECIPES
from transformers import PreTrainedTokenizerBase, TrainingArguments

from calm.command_line import InputError
from calm.training import trainer
from calm.training.data import Length, PatchCollator, blocks_per_epoch, data_sets
from calm.training.recipe import load_recipe
from calm.training.tokenizer import load_tokenizer
from calm.training.train import prepare


@pytest.fixture
def recipe(workshop, tmp_path):
    fields = {**workshop, "output_dir": str(tmp_path), "lr_scheduler_kwargs": {}, "max_steps": 2}
    return load_recipe(str(RECIPES / "calm.yaml"), fields)


@pytest.fixture
def tokenizer(workshop) -> PreTrainedTokenizerBase:
    return load_tokenizer(workshop["tokenizer"])


# steps


@pytest.mark.parametrize(
    "length, blocks, steps",
    [
        (Length(4), 8, 2),
        (Length(4), 9, 3),  # the last batch is a whole one, of the next epoch's blocks
        (Length(4, epochs=2), 9, 5),
        (Length(4, epochs=0.5), 9, 2),
        (Length(4, epochs=3, max_steps=7), 9, 7),
        (Length(100), 9, 1),
    ],
)
def test_steps_by_hand(length, blocks, steps):
    assert length.num_steps(blocks) == steps


def test_blocks_by_hand():
    assert blocks_per_epoch(24, 8) == 3
    assert blocks_per_epoch(31, 8) == 3
    assert blocks_per_epoch(24, 8, random_phase=True) == 2  # wherever among the first 8 tokens it begins
    with pytest.raises(InputError, match="14 tokens, too few for one block of block_size=8 and a random phase"):
        blocks_per_epoch(14, 8, random_phase=True)


# data


def make_sets(recipe, tokenizer, folder: Path, length=Length(4, max_steps=3), seed=0):  # noqa: B008 (is frozen)
    return data_sets(recipe.data, tokenizer, 4, length, seed, folder, evaluates=True)


def test_data_sets_are_finished(recipe, tokenizer, tmp_path):
    data = make_sets(recipe, tokenizer, tmp_path)
    assert (data.num_steps, len(data.train), len(data.validation)) == (3, 12, 8)
    by_epochs = make_sets(recipe, tokenizer, tmp_path, Length(4, epochs=2))
    assert len(by_epochs.train) == by_epochs.num_steps * 4 >= 2 * by_epochs.train.blocks_per_epoch
    again = make_sets(recipe, tokenizer, tmp_path)
    other = make_sets(recipe, tokenizer, tmp_path, seed=1)
    ids = [torch.stack([block["input_ids"] for block in sets.train]) for sets in (data, again, other)]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])


def test_labels_count_what_the_loss_predicts():
    """Rows of every length mod K: Trainer divides by the labels that are counted, the model by its targets · K."""
    model = tiny_model()
    rows = [{"input_ids": torch.arange(2, 2 + length)} for length in (16, 15, 9, 8, 5, 4)]
    batch = PatchCollator(4, pad_token_id=0)(rows)
    counted = (batch["labels"] != -100).sum()
    assert counted == 4 * (3 + 2 + 1 + 1 + 0 + 0)
    losses = []
    for number in (None, counted):
        generator = torch.Generator().manual_seed(0)
        losses.append(model(**batch, num_items_in_batch=number, generator=generator).loss)
    torch.testing.assert_close(losses[0], losses[1])


# what a caller holds


def test_a_run_changes_neither_the_recipe_nor_arguments_nor_data_sets(recipe, monkeypatch):
    arguments, sets, before = [], [], copy.deepcopy(recipe)

    def recorded(function, made, facts):
        def call(*args, **kwargs):
            value = function(*args, **kwargs)
            made.append((value, facts(value)))
            return value

        return call

    def lengths(data):
        return data.num_steps, len(data.train), len(data.validation)

    make, load = trainer.training_arguments, trainer.data_sets
    monkeypatch.setattr(trainer, "training_arguments", recorded(make, arguments, TrainingArguments.to_dict))
    monkeypatch.setattr(trainer, "data_sets", recorded(load, sets, lengths))
    prepare(recipe)
    assert recipe == before
    assert all(args.to_dict() == then for args, then in arguments)
    assert [args.num_train_epochs for args, _ in arguments] == [3, 1]  # stated, settled
    assert [args.max_steps for args, _ in arguments] == [2, 2]
    assert [(lengths(data), then) for data, then in sets] == [((2, 8, 8), (2, 8, 8))]
