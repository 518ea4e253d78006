"""What keeps a CALM from the best score: its parts replaced, one after the other, by something that has no fault.

    python -m calm_transformers.experiments.replacements --model MODEL --language DIR

- solver: a flow or diffusion head with more steps; what is gained was lost by the solver.
- head: the multi-token loss that the backbone was trained with draws the patch in the head's place, token by token;
  what is left was lost by the backbone.
- head and backbone: patches are drawn by the language's own law, encoded, drawn from the posterior and decoded; what
  is left was lost by the autoencoder.

Axes: B blocks, M positions, N draws, K tokens per patch, D hidden size, V vocabulary, S hidden states of the language.
"""

import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from calm_transformers.command_line import InputError, command, known_errors
from calm_transformers.evaluation.branching import CalmReader
from calm_transformers.evaluation.brier import MAX_N
from calm_transformers.evaluation.report import write_json
from calm_transformers.experiments.language import HiddenMarkovLanguage
from calm_transformers.experiments.share import measure, parse_with_blocks, parser_of, share_of, text_of
from calm_transformers.loading import is_calm, load_causal_lm
from calm_transformers.model.configuration_calm import CALMConfig
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.progress import print_above_bars
from calm_transformers.training.auxiliary import AUXILIARY_FILE, MultiTokenLoss
from calm_transformers.training.trainer import last_checkpoint

STEPS_PER_CALL = 5 / 2  # of a finer solver for a network call of the model's: five times a flow head's steps


class ChainReader(CalmReader):
    """A CALM whose patches are drawn by a multi-token loss, token by token."""

    def __init__(self, model: CALMForCausalLM, chain: MultiTokenLoss):
        super().__init__(model)
        self.chain = chain

    def draw(self, states_D: Tensor, num_samples: int, generator=None) -> Tensor:
        return self.chain.draw(states_D, num_samples, generator)


class TruthReader:
    """The language's own law through an autoencoder: what a CALM without fault would draw. States are beliefs."""

    def __init__(self, language: HiddenMarkovLanguage, autoencoder):
        self.language, self.autoencoder = language, autoencoder

    def read(self, patches_BPK: Tensor) -> Tensor:
        beliefs_BLS = self.language.beliefs(self.language.symbols(patches_BPK.flatten(1).numpy()))
        K = patches_BPK.shape[-1]
        return torch.from_numpy(np.ascontiguousarray(beliefs_BLS[:, K::K]))

    @torch.no_grad()
    def draw(self, beliefs_S: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        moves, emissions = (torch.from_numpy(law) for law in self.language.laws)

        def one(probabilities):
            rows = probabilities.flatten(0, -2)
            return rows.multinomial(1, generator=generator).view(probabilities.shape[:-1])

        state = one(beliefs_S.expand(num_samples, *beliefs_S.shape))
        symbols = []
        for _ in range(self.autoencoder.config.patch_size):
            symbols.append(one(emissions[state]))
            state = one(moves[state])
        ids = self.language.ids(torch.stack(symbols, dim=-1))
        mean, log_std = self.autoencoder.encode(ids.reshape(1, -1))
        latents = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
        return self.autoencoder.decode_tokens(latents[0]).view(ids.shape)


def readers(
    model: CALMForCausalLM, language: HiddenMarkovLanguage, folder: Path
) -> dict[str, CalmReader | TruthReader]:
    """Replaced part → reader; the model as it is comes first."""
    config = model.config
    found: dict[str, CalmReader | TruthReader] = {"nothing": CalmReader(model)}
    if model.head.network_calls > 1:
        finer = {"sampling_steps": int(STEPS_PER_CALL * model.head.network_calls)}
        fine = CALMForCausalLM(CALMConfig(**{**config.to_dict(), **finer})).eval()
        fine.load_state_dict(model.state_dict())
        found["solver"] = CalmReader(fine)
    auxiliary = (last_checkpoint(folder) or folder) / AUXILIARY_FILE
    if auxiliary.exists():
        chain = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
        weights = safetensors.torch.load_file(auxiliary)
        chain.load_state_dict({name.removeprefix("auxiliary."): value for name, value in weights.items()})
        found["head"] = ChainReader(model, chain.eval())
    if config.patch_size >= MAX_N:  # else a continuation goes on from the patches drawn
        found["head and backbone"] = TruthReader(language, model.autoencoder)
    return found


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_with_blocks(parser_of("python -m calm_transformers.experiments.replacements", __doc__), argv)
    with known_errors(ValueError, OSError):
        model = load_causal_lm(args.model, device="cpu")
        if not is_calm(model):
            raise InputError(f"{args.model}: is no CALM, so there is nothing to replace.")
        language, blocks_BL = text_of(model, args)
        of = readers(model, language, Path(args.model))
    options, results = (model.config.patch_size, language, blocks_BL, args.draws, args.batch_size), {}
    for name, reader in of.items():
        results[name] = measure(reader, *options, what=f"{name} replaced")
        print_above_bars(f"{name} replaced: {share_of(results[name])}")
    write_json(args.json, results)


if __name__ == "__main__":
    sys.exit(main())
