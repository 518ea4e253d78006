"""The logits processors of one sequence of a batch."""

import copy
from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList


def make_logits_processors(
    model, prompt_length: int, max_new_tokens: int, logits_processor: Sequence | None = None, **settings
) -> LogitsProcessorList | None:
    """Returns the logits processors that `generate` would use for one sequence, or `None` if there are none.

    Args:
        model: the model that generates.
        prompt_length: tokens of the prompt.
        max_new_tokens: the most new tokens.
        logits_processor: the caller's own processors.
        **settings: those of `PROCESSOR_SETTINGS` that replace the generation configuration's.

    Raises:
        ValueError: a setting is invalid.
    """
    config = copy.copy(model.generation_config)
    for name, value in settings.items():
        setattr(config, name, value)
    config.max_length = prompt_length + max_new_tokens
    eos = config.eos_token_id
    config._eos_token_tensor = None if eos is None else torch.tensor([eos] if isinstance(eos, int) else eos)
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=prompt_length,
        logits_processor=logits_processor,
        device=torch.device("cpu") if model.device.type == "meta" else model.device,
    )
    return processors.of_row(0, prompt_length) if processors else None
