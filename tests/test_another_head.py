"""A user-defined head: configuration, training, saving, generation, evaluation and the dry run."""

import math
import re

import pytest
import torch
from tiny import BOS, tiny_config, tiny_model
from torch import nn
from training_helpers import losses_of, make_workshop, train

from calm_transformers.evaluation.models import brier_counts
from calm_transformers.model.configuration_calm import HEADS
from calm_transformers.model.heads_calm import GenerativeHead, zero_linear
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.training.cost import calm_cost


class GaussianHead(GenerativeHead, head_type="gaussian"):
    """One Gaussian per patch, fitted by maximum likelihood."""

    network_calls = 3

    def __init__(self, config):
        super().__init__(config)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = zero_linear(config.hidden_size, 2 * config.latent_size)
        self.spread = nn.Parameter(torch.empty(1))

    @classmethod
    def check(cls, config):
        super().check(config)
        if config.num_samples > 16:
            raise ValueError(f"num_samples={config.num_samples}: the Gaussian head has 16 at most.")

    def init_own_weights(self):
        nn.init.constant_(self.spread, 2.0)

    def _distribution(self, context):
        mean, log_std = self.out(self.hidden(context).tanh()).chunk(2, dim=-1)
        return mean, log_std + self.spread.log()

    def from_noise(self, noise, context, generator):
        mean, log_std = self._distribution(context)
        return mean + log_std.exp() * noise

    def compute_loss(self, context, target, generator, posterior_noise=None):
        mean, log_std = self._distribution(context)
        targets = target.sample_latents(self.num_samples, generator, posterior_noise)
        deviation = ((targets - mean) / log_std.exp()).square() / 2 + log_std + math.log(2 * math.pi) / 2
        return deviation.sum(-1).mean(0)


pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    fields = {"head_type": "gaussian", "learning_rate": 0.01, "lr_scheduler_type": "constant", "eval_strategy": "no"}
    return make_workshop(tmp_path_factory.mktemp("workshop")) | fields | {"max_steps": 8, "save_steps": 4}


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert train("calm", **workshop, output_dir=str(folder)) == 0
    return folder


def test_it_is_registered():
    assert HEADS["gaussian"] is GaussianHead
    with pytest.raises(ValueError, match="num_samples=17: the Gaussian head has 16 at most"):
        tiny_config("gaussian", num_samples=17)
    with pytest.raises(ValueError, match=r"head_type='gauss': must be one of \('.*gaussian'\)"):
        tiny_config("gauss")


def test_it_is_initialised_trained_and_resumed(trained, workshop, tmp_path):
    new = CALMForCausalLM(tiny_config("gaussian")).head
    assert not new.out.weight.any() and new.hidden.weight.any() and new.spread.item() == 2.0
    losses = losses_of(trained)
    assert losses[-1] < losses[0] - 1
    assert train("calm", **workshop | {"max_steps": 4}, output_dir=str(tmp_path)) == 0
    assert train("calm", **workshop, output_dir=str(tmp_path)) == 0
    assert losses_of(tmp_path) == losses


def test_it_is_saved_and_loaded_and_generates_the_same(trained, tmp_path):
    loaded, sequences = CALMForCausalLM.from_pretrained(trained), []
    loaded.save_pretrained(tmp_path)
    for model in (loaded, CALMForCausalLM.from_pretrained(tmp_path)):
        torch.manual_seed(0)
        settings = {"do_sample": True, "temperature": 0.5, "num_candidates": 20, "max_new_tokens": 13}
        sequences.append(model.eval().generate(torch.tensor([[BOS, 10, 11]]), eos_token_id=None, **settings))
    assert torch.equal(*sequences) and sequences[0].shape == (1, 3 + 13)


def test_it_is_scored_and_a_dry_run_counts_it(workshop, capsys):
    assert brier_counts(tiny_model("gaussian"), torch.randint(3, 90, (2, 24)), batch_size=1).score().positions > 0
    config = tiny_config("gaussian")
    size, latent = config.hidden_size, config.latent_size
    cost = calm_cost(config, 64)
    assert cost.inference_flops["head"] * 4 == 2 * size * (size + 2 * latent)
    assert cost.train_flops["head"] == 3 * cost.inference_flops["head"]
    assert cost.parameters["head"] == (size + 1) * (size + 2 * latent) + 1
    assert train("calm", **workshop, dry_run=[]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n  head +[\d.]+ M\n", printed) and "one sample of the head: 3 network calls" in printed
