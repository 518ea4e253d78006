"""Small hidden Markov languages, and an oracle model that reaches the optimal scores."""

import torch

from calm_transformers.evaluation.branching import gather_rows
from calm_transformers.experiments.language import HiddenMarkovLanguage
from calm_transformers.training.tokenizer import SPECIAL_TOKENS

# B blocks, P patches (or tokens), K tokens per patch, N branches, S hidden states, V symbols

S, V = 3, 4
LANGUAGE = HiddenMarkovLanguage(S, V, transition_concentration=0.3, emission_concentration=0.3, seed=4)
OTHER = HiddenMarkovLanguage(S, V, transition_concentration=0.3, emission_concentration=0.3, seed=5)


def sample_ids(num_blocks, length, seed=2):
    """Samples documents as token ids (B, L)."""
    return torch.from_numpy(LANGUAGE.to_ids(LANGUAGE.sample(num_blocks, length, seed)))


def continuation_probabilities(language, belief, length):
    """Returns the probabilities of all continuations of a belief, an array with `length` axes of size V."""
    symbols_Xn, probability_X = language.likely_continuations(belief, length, min_probability=0.0)
    assert len(symbols_Xn) == language.vocab_size**length
    return probability_X.reshape((language.vocab_size,) * length)


class Oracle:
    """An optimal model of a language. Its states are beliefs, or next-token logits if `patch_size` is None;
    `positions` records where continuations start."""

    def __init__(self, language, patch_size=None):
        self.language, self.patch_size, self.positions = language, patch_size, []
        self.transitions, self.emissions = map(torch.from_numpy, language.matrices)

    def read(self, units_BP):
        symbols_BL = self.language.to_symbols(units_BP.flatten(1).numpy())
        step = self.patch_size or 1
        self.beliefs_BPS = torch.from_numpy(self.language.beliefs(symbols_BL))[:, step::step]
        return self._states(self.beliefs_BPS)

    def start(self, positions_BN):
        self.positions += sorted(set(positions_BN[0].tolist()))
        self.beliefs_BNS = gather_rows(self.beliefs_BPS, positions_BN)

    def extend(self, parents_BN, units_BN):
        belief_BNS = gather_rows(self.beliefs_BNS, parents_BN)
        units_BNK = units_BN[..., None] if self.patch_size is None else units_BN
        for symbols_BN in self.language.to_symbols(units_BNK).unbind(-1):
            joint_BNS = belief_BNS * self.emissions.T[symbols_BN]
            belief_BNS = joint_BNS / joint_BNS.sum(-1, keepdim=True) @ self.transitions
        self.beliefs_BNS = belief_BNS
        return self._states(belief_BNS)

    def _states(self, belief_BNS):
        if self.patch_size is not None:
            return belief_BNS
        special = torch.zeros(*belief_BNS.shape[:-1], len(SPECIAL_TOKENS))
        return torch.cat([special, belief_BNS @ self.emissions], dim=-1).log()

    def draw(self, states, num_samples, generator=None, temperature=1.0):
        belief, patches = states.expand(num_samples, *states.shape).flatten(0, -2), []
        state = belief.multinomial(1, generator=generator)[:, 0]
        for _ in range(self.patch_size):
            patches.append(self.emissions[state].multinomial(1, generator=generator)[:, 0])
            state = self.transitions[state].multinomial(1, generator=generator)[:, 0]
        ids = torch.stack(patches, dim=-1) + len(SPECIAL_TOKENS)
        return ids.unflatten(0, (num_samples, *states.shape[:-1]))
