"""What test_convert_checkpoint does in fresh processes; transformers is therefore imported inside the functions."""

import torch
from published import FIXTURES
from safetensors.torch import load_file


def errors_of_bundles(folder, head_types):
    """In a fresh process: relative errors of the bundles' outputs against the published implementation's."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    def error(ours, theirs):
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    errors = {}
    for head_type in head_types:
        bundle = f"{folder}/{head_type}/bundle"
        model = AutoModelForCausalLM.from_pretrained(bundle, trust_remote_code=True)
        backbone = AutoModel.from_pretrained(bundle, trust_remote_code=True)
        golden = load_file(FIXTURES / f"{head_type}_k4" / "golden.safetensors")
        draws = {
            "energy": lambda g: {"noise": g["head.uniform"] - 0.5, "num_samples": 8},
            "flow": lambda g: {"noise": g["head.x0"].view(1, 2, 6, -1)},
            "diffusion": lambda g: {
                "noise": g["head.x_T"].view(1, 2, 6, -1),
                "step_noise": g["head.step_noise"].view(100, 1, 2, 6, -1),
            },
        }[head_type](golden)
        with torch.no_grad():
            mean, log_std = model.autoencoder.encoder(golden["input_ids"])
            hidden = model.model(input_ids=golden["input_ids"]).last_hidden_state
            latents = model.head.sample(hidden, **draws)
            errors[head_type] = {
                "config": AutoConfig.from_pretrained(bundle, trust_remote_code=True).head_type,
                "ae.mean": error(mean, golden["ae.mean"]),
                "ae.log_std": error(log_std, golden["ae.log_std"]),
                "ae.logits": error(model.autoencoder.decoder(golden["ae.latents"]).flatten(1, 2), golden["ae.logits"]),
                "calm.hidden_states": error(hidden, golden["calm.hidden_states"]),
                "head.latents": error(latents.view_as(golden["head.latents"]), golden["head.latents"]),
                "AutoModel": error(backbone(golden["input_ids"]).last_hidden_state, golden["calm.hidden_states"]),
            }
    return errors


def push_convert_push(calm, autoencoder, published, bundle, output):
    """Pushes a published pair from folders, converts it by its Hub ids, and pushes the bundle; returns its files."""
    from huggingface_hub import HfApi

    from calm_transformers.conversion.convert import main

    for folder in (calm, autoencoder):
        repo_id = f"{published}-{folder.rsplit('/')[-1]}"
        HfApi().create_repo(repo_id)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder)
    code = main(
        ["--calm", f"{published}-calm", "--autoencoder", f"{published}-autoencoder"]
        + ["--output", output, "--push-to-hub", bundle]
    )
    return {"code": code, "files": HfApi().list_repo_files(bundle)}
