"""The logits processors of one text, which a batcher writes among others."""

import copy
from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList


def processors_of_text(
    model, prompt_length: int, max_new_tokens: int, logits_processor: Sequence | None = None, **settings
) -> LogitsProcessorList | None:
    """The logits processors of one text, as `generate` makes them; `None` if there are none.

    Args:
        model: that writes.
        prompt_length: tokens of its prompt.
        max_new_tokens: that may follow.
        logits_processor: the caller's own.
        **settings: those of `PROCESSOR_SETTINGS` that are not to be the generation configuration's.

    Raises:
        ValueError: a setting makes no sense.
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
