"""Memory of 10,000 samples of one row and their comparison: `python tests/memory_of_samples.py N`."""

import sys
from types import SimpleNamespace


def memory_of_samples(num_samples, temperature):
    """Returns MB beyond the latents, or None where unknown; K = 4, Z = 128, d = 512, V = 4,096, float32, CPU.

    The latents are distant, so that no attempt is accepted and all candidates are compared at the end.
    """
    import torch

    from calm_transformers.benchmarks.meters import PeakMemory
    from calm_transformers.model import generation_calm_samplers as samplers
    from calm_transformers.model.configuration_calm import CALMAutoencoderConfig
    from calm_transformers.model.generation_calm_candidates import LazyCandidateBatch
    from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder

    torch.manual_seed(0)
    autoencoder = CALMAutoencoder(CALMAutoencoderConfig(vocab_size=4096)).eval()
    latents_NZ = 5 * torch.randn(num_samples, 128)

    def sample(max_samples):
        def draw(_, num_samples, **__):
            return latents_NZ[batch.num_drawn :][:num_samples, None]

        head = SimpleNamespace(sample=draw, samples_tokens=False)
        batch = LazyCandidateBatch(head, torch.zeros(1, 1), samplers.StepRandomness(), autoencoder)
        attempts, generator = samplers.RepetitionAttempts(temperature), torch.Generator().manual_seed(0)
        samplers.exact_temperature_sample(batch, attempts, max_samples, generator)
        batch.compare(batch.rows_B)

    with torch.inference_mode():
        sample(64)  # one-time setup
        with PeakMemory(torch.device("cpu")) as memory:
            sample(num_samples)
    return None if memory.extra is None else (memory.extra - latents_NZ.nbytes) / 1e6


if __name__ == "__main__":
    print(memory_of_samples(int(sys.argv[1]), temperature=0.5), "MB")
