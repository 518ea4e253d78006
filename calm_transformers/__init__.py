"""CALM for Transformers: importing it registers the models with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from calm_transformers.model.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm_transformers.model.modeling_calm import CALMForCausalLM, CALMModel
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder

__version__ = "0.1.0"
__all__ = ["CALMAutoencoder", "CALMAutoencoderConfig", "CALMConfig", "CALMForCausalLM", "CALMModel"]

AutoConfig.register("calm", CALMConfig)
AutoConfig.register("calm_autoencoder", CALMAutoencoderConfig)
AutoModel.register(CALMConfig, CALMModel)
AutoModel.register(CALMAutoencoderConfig, CALMAutoencoder)
AutoModelForCausalLM.register(CALMConfig, CALMForCausalLM)
