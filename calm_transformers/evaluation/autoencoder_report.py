"""Reports an autoencoder's reconstruction accuracy under latent noise and statistics of its posterior.

    calm evaluate autoencoder --model AUTOENCODER_OR_CALM --data FILE_OR_DATASET

The latents sampled by the generative head are inexact, so the decoder must be robust to noise.
"""

# P patches, K tokens per patch, Z latent size

import sys

import torch

from calm_transformers.command_line import Parser, command, known_errors, positive, seed_number, writable
from calm_transformers.evaluation.blocks import add_data_arguments, read_blocks
from calm_transformers.evaluation.report import markdown, write_json
from calm_transformers.loading import (
    check_tokenizer,
    load_causal_lm,
    load_checked,
    load_config,
    load_tokenizer,
    resolve_device,
)
from calm_transformers.model.configuration_calm import CALMConfig
from calm_transformers.model.modeling_calm_autoencoder import ACTIVE_NATS, CALMAutoencoder
from calm_transformers.progress import progress_bar

SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.25, 1.5)


@torch.no_grad()
def noise_accuracy(autoencoder: CALMAutoencoder, patches_PK: torch.Tensor, sigmas=SIGMAS, seed: int = 0) -> list[dict]:
    """Returns per sigma the accuracy of tokens and of whole patches decoded from mean + sigma * noise."""
    mean_PZ, _ = posterior(autoencoder, patches_PK)
    generator = torch.Generator(mean_PZ.device).manual_seed(seed)
    noise_PZ = torch.randn(mean_PZ.shape, generator=generator, device=mean_PZ.device, dtype=mean_PZ.dtype)
    rows = []
    for sigma in progress_bar(sigmas, "Decoding", "level"):
        is_correct_PK = autoencoder.decode_tokens(mean_PZ + sigma * noise_PZ) == patches_PK
        is_correct = {"token_accuracy": is_correct_PK, "patch_accuracy": is_correct_PK.all(-1)}
        rows.append({"sigma": sigma} | {name: value.double().mean().item() for name, value in is_correct.items()})
    return rows


@torch.no_grad()
def posterior(autoencoder: CALMAutoencoder, patches_PK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and log standard deviation of the posterior of each patch, (P, Z) each."""
    chunks = [autoencoder.encoder(chunk.reshape(1, -1)) for chunk in patches_PK.split(4096)]
    return torch.cat([mean[0] for mean, _ in chunks]), torch.cat([log_std[0] for _, log_std in chunks])


def posterior_statistics(mean_PZ: torch.Tensor, log_std_PZ: torch.Tensor) -> dict[str, float]:
    """Returns mean posterior sigma, RMS of the means, KL to N(0, 1) (nats per patch, not clipped), active dimensions.

    A dimension is active if its mean KL exceeds ACTIVE_NATS, as in the training log.
    """
    mean_PZ, log_std_PZ = mean_PZ.float(), log_std_PZ.float()
    kl_PZ = 0.5 * (mean_PZ.square() + (2 * log_std_PZ).exp() - 1 - 2 * log_std_PZ)
    return {
        "posterior_sigma": log_std_PZ.exp().mean().item(),
        "latent_rms": mean_PZ.square().mean().sqrt().item(),
        "kl": kl_PZ.sum(-1).mean().item(),
        "active_dimensions": int((kl_PZ.mean(0) > ACTIVE_NATS).sum()),
        "latent_size": mean_PZ.shape[-1],
    }


def load_autoencoder(name: str) -> CALMAutoencoder:
    """Loads an autoencoder, or the autoencoder of a CALM, from a folder or Hub id."""
    if isinstance(load_config(name), CALMConfig):
        autoencoder = load_causal_lm(name).autoencoder
        assert isinstance(autoencoder, CALMAutoencoder), "every CALM has an autoencoder"
        return autoencoder
    return load_checked(CALMAutoencoder.from_pretrained, name, dtype="auto").to(resolve_device(None)).eval()


def report(rows: list[dict], statistics: dict, num_patches: int) -> str:
    """Returns Markdown: a table of accuracy by noise, then the posterior statistics."""
    lines = [[f"{r['sigma']:.2f}", f"{r['token_accuracy']:.4%}", f"{r['patch_accuracy']:.4%}"] for r in rows]
    table = markdown(["noise sigma", "token accuracy", "patch accuracy"], lines)
    posterior = (
        "posterior sigma {posterior_sigma:.3f} (mean), RMS of the means {latent_rms:.3f}, KL {kl:.1f} nats per patch, "
        "{active_dimensions} of {latent_size} dimensions active"
    )
    title = f"{num_patches} patches; noise is added to the posterior mean, sigma in latent units"
    return f"{title}\n\n{table}\n\n{posterior.format(**statistics)}"


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm evaluate autoencoder", __doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of an autoencoder or of a CALM")
    parser.add_argument("--tokenizer", help="tokenizer folder or Hub id (default: the model's own)")
    add_data_arguments(parser)
    parser.add_argument("--max_patches", type=positive, default=10_000)
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--json", type=writable, help="write the results")
    args = parser.parse_args(argv)
    with known_errors():
        autoencoder = load_autoencoder(args.model)
        tokenizer = load_tokenizer(args.tokenizer or args.model)
        check_tokenizer(autoencoder, tokenizer, args.tokenizer or args.model)
        patches_PK = read_blocks(args, tokenizer, autoencoder.config.patch_size, args.max_patches)
    patches_PK = patches_PK.to(autoencoder.device)
    rows = noise_accuracy(autoencoder, patches_PK, seed=args.seed)
    statistics = posterior_statistics(*posterior(autoencoder, patches_PK))
    print(report(rows, statistics, len(patches_PK)))
    write_json(args.json, {**statistics, "patches": len(patches_PK), "noise": rows})


if __name__ == "__main__":
    sys.exit(main())
