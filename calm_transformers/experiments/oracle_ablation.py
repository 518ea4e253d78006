"""Oracle ablation: scores a CALM with one part after another replaced by a near-perfect one.

    python -m calm_transformers.experiments.oracle_ablation --model MODEL --language DIR

- solver: more solver steps of a flow or diffusion head; the gain is the solver's error.
- head: the multi-token prediction (MTP) head that the backbone was trained with samples the patch token by token; the
  gain is the patch head's error, what remains is the backbone's.
- head and backbone: patches are sampled from the language itself and passed through the autoencoder (encode, sample
  the posterior, decode); what remains is the autoencoder's error.

Axes: P patches, L tokens, N samples, K tokens per patch, D hidden size, S hidden states of the language.
"""

import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from calm_transformers.command_line import InputError, command, known_errors
from calm_transformers.evaluation.branching import BlockReader, CalmReader, SamplingReader
from calm_transformers.evaluation.brier import MAX_N
from calm_transformers.evaluation.report import write_json
from calm_transformers.experiments.language import HiddenMarkovLanguage
from calm_transformers.experiments.optimal_fraction import evaluate, format_fraction, load_blocks, parse_block_options
from calm_transformers.loading import is_calm, load_causal_lm
from calm_transformers.model.configuration_calm import CALMConfig
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.progress import print_above_bars
from calm_transformers.training.auxiliary import AUXILIARY_FILE, MultiTokenLoss
from calm_transformers.training.trainer import last_checkpoint

STEPS_PER_CALL = 5 / 2  # solver steps per network call of the trained head: five times a flow head's steps


class MtpReader(CalmReader):
    """A CALM whose patches are sampled by an MTP head, token by token."""

    def __init__(self, model: CALMForCausalLM, mtp: MultiTokenLoss):
        super().__init__(model)
        self.mtp = mtp

    def draw(self, states_D: Tensor, num_samples: int, generator=None) -> Tensor:
        return self.mtp.sample(states_D, num_samples, generator)


class LanguageReader(BlockReader):
    """Samples patches from the language and passes them through an autoencoder; its states are beliefs (S,)."""

    def __init__(self, language: HiddenMarkovLanguage, autoencoder):
        self.language, self.autoencoder = language, autoencoder

    def read(self, patches_BPK: Tensor) -> Tensor:
        beliefs_BLS = self.language.beliefs(self.language.to_symbols(patches_BPK.flatten(1).numpy()))
        K = patches_BPK.shape[-1]
        return torch.from_numpy(np.ascontiguousarray(beliefs_BLS[:, K::K]))

    def extend(self, *_) -> Tensor:
        raise NotImplementedError("continuations are one patch")

    @torch.no_grad()
    def draw(self, beliefs_S: Tensor, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        transitions, emissions = (torch.from_numpy(matrix) for matrix in self.language.matrices)

        def sample_last_axis(probabilities: Tensor) -> Tensor:
            rows = probabilities.flatten(0, -2)
            return rows.multinomial(1, generator=generator).view(probabilities.shape[:-1])

        states = sample_last_axis(beliefs_S.expand(num_samples, *beliefs_S.shape))
        symbols = []
        for _ in range(self.autoencoder.config.patch_size):
            symbols.append(sample_last_axis(emissions[states]))
            states = sample_last_axis(transitions[states])
        ids = self.language.to_ids(torch.stack(symbols, dim=-1))
        mean, log_std = self.autoencoder.encode(ids.reshape(1, -1))
        latents = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
        return self.autoencoder.decode_tokens(latents[0]).view(ids.shape)


def make_readers(model: CALMForCausalLM, language: HiddenMarkovLanguage, folder: Path) -> dict[str, SamplingReader]:
    """Returns the name of the replaced part → reader; "nothing", the unchanged model, comes first."""
    config, readers = model.config, dict[str, SamplingReader](nothing=CalmReader(model))
    if model.head.network_calls > 1:
        more_steps = {"sampling_steps": int(STEPS_PER_CALL * model.head.network_calls)}
        accurate_model = CALMForCausalLM(CALMConfig(**{**config.to_dict(), **more_steps})).eval()
        accurate_model.load_state_dict(model.state_dict())
        readers["solver"] = CalmReader(accurate_model)
    mtp_file = (last_checkpoint(folder) or folder) / AUXILIARY_FILE
    if mtp_file.exists():
        mtp = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
        weights = safetensors.torch.load_file(mtp_file)
        mtp.load_state_dict({name.removeprefix("auxiliary."): value for name, value in weights.items()})
        readers["head"] = MtpReader(model, mtp.eval())
    if config.patch_size >= MAX_N:  # otherwise branches are extended, which `LanguageReader` can't
        readers["head and backbone"] = LanguageReader(language, model.autoencoder)
    return readers


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_block_options("python -m calm_transformers.experiments.oracle_ablation", __doc__, argv)
    with known_errors(ValueError, OSError):
        model = load_causal_lm(args.model, device="cpu")
        if not is_calm(model):
            raise InputError(f"{args.model} is not a CALM.")
        language, blocks_BL = load_blocks(model, args)
        readers = make_readers(model, language, Path(args.model))
    patch_size, results = model.config.patch_size, {}
    for name, reader in readers.items():
        description = f"{name} replaced"
        results[name] = evaluate(reader, patch_size, language, blocks_BL, args.draws, args.batch_size, description)
        print_above_bars(f"{description}: {format_fraction(results[name])}")
    write_json(args.json, results)


if __name__ == "__main__":
    sys.exit(main())
