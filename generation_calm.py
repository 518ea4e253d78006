"""Placeholder until the sampler lands."""


class CALMGenerationMixin:
    pass
