"""Converts the published CALM checkpoints into one bundled Hugging Face repository.

    calm convert --calm ID_OR_DIR --autoencoder ID_OR_DIR --output DIR

The published weights are two repositories without code, a language model and its autoencoder. The bundle holds both in
one model.safetensors, with configuration, code, tokenizer and model card, so that `transformers` loads it with
trust_remote_code=True.

Sizes and head type are inferred from the tensors; missing and unexpected tensors are errors. Memory holds one tensor
at a time. A failure is one line on stderr and exit code 2, and leaves no file behind.
"""

import functools
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import PretrainedConfig

from calm_transformers.command_line import InputError, Parser, command, first_line, known_errors
from calm_transformers.conversion.bundle_files import TOKENIZER_FILES, converted_card, write_supporting_files
from calm_transformers.conversion.checkpoint_files import DTYPES, Repository, StoredTensor, fetch, write_safetensors
from calm_transformers.files import new_folder
from calm_transformers.model.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder

# Published tensor name → ours. If a pattern has two targets, the matrix is split into two halves of its columns.
# Several published tensors may have the same target (tied or stored twice); they must be equal.
AUTOENCODER_MAPPING = (
    (r"(encoder|decoder)\.\1_layers\.(\d+)\.layernorm\.(\w+)", r"autoencoder.\1.layers.\2.norm.\3"),
    (r"(encoder|decoder)\.\1_layers\.(\d+)\.mlp\.(.+)", r"autoencoder.\1.layers.\2.mlp.\3"),
    (r"(encoder\.(?:embed_tokens|squeeze_layer|norm|hidden_to_latent)\.\w+)", r"autoencoder.\1"),
    (r"(decoder\.(?:latent_to_hidden|expand_layer|norm)\.\w+)", r"autoencoder.\1"),
    (r"decoder\.lm_head_weight", r"autoencoder.encoder.embed_tokens.weight"),
)
ENERGY = r"(?:mlp_generator|generative_head)\."  # published energy models store their head under both names
NET = r"generative_head\.net\."  # flow matching and diffusion
LANGUAGE_MODEL_MAPPING = (
    (r"transformer\.(.+)", r"model.\1"),
    (r"embed_proj\.(.+)", r"model.embed_proj.\1"),
    (ENERGY + r"noise_embd\.(\w+)", r"head.noise_embed.\1"),
    (ENERGY + r"hidden_embd\.(\w+)", r"head.context_embed.\1"),
    (ENERGY + r"norm_noise\.(\w+)", r"head.norm_noise.\1"),
    (ENERGY + r"norm_hidden\.(\w+)", r"head.norm_context.\1"),
    (ENERGY + r"mlp_blocks\.(\d+)\.in_ln\.(\w+)", r"head.blocks.\1.norm.\2"),
    (
        ENERGY + r"mlp_blocks\.(\d+)\.linears\.0\.weight",
        (r"head.blocks.\1.sample_proj.weight", r"head.blocks.\1.context_proj.weight"),
    ),
    (ENERGY + r"mlp_blocks\.(\d+)\.linears\.0\.bias", r"head.blocks.\1.context_proj.bias"),
    (ENERGY + r"mlp_blocks\.(\d+)\.linears\.2\.(\w+)", r"head.blocks.\1.hidden_proj.\2"),
    (ENERGY + r"mlp_blocks\.(\d+)\.linears\.4\.(\w+)", r"head.blocks.\1.gate_up_proj.\2"),
    (ENERGY + r"mlp_blocks\.(\d+)\.down_proj\.(\w+)", r"head.blocks.\1.down_proj.\2"),
    (ENERGY + r"final_layer\.in_ln\.(\w+)", r"head.norm_out.\1"),
    (ENERGY + r"final_layer\.linears\.0\.(\w+)", r"head.out_hidden.\1"),
    (ENERGY + r"final_layer\.linears\.2\.(\w+)", r"head.out_proj.\1"),
    (NET + r"time_embed\.mlp\.(\d)\.(\w+)", r"head.net.time_embed.\1.\2"),
    (NET + r"cond_embed\.(\w+)", r"head.net.context_embed.\1"),
    (NET + r"input_proj\.(\w+)", r"head.net.input_proj.\1"),
    (NET + r"res_blocks\.(\d+)\.in_ln\.(\w+)", r"head.net.blocks.\1.norm.\2"),
    (NET + r"res_blocks\.(\d+)\.mlp\.(\d)\.(\w+)", r"head.net.blocks.\1.mlp.\2.\3"),
    (NET + r"res_blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"head.net.blocks.\1.modulation.\2"),
    (NET + r"final_layer\.linear\.(\w+)", r"head.net.out_proj.\1"),
    (NET + r"final_layer\.adaLN_modulation\.1\.(\w+)", r"head.net.out_modulation.\1"),
    *((r"ae_model\." + pattern, target) for pattern, target in AUTOENCODER_MAPPING),
)

# Fields of a published config.json on files and classes, not on the model; our autoencoder is always tied.
IGNORED_FIELDS = {*PretrainedConfig().to_dict(), "ae_path", "auto_map", "tie_word_embeddings", "torch_dtype"}
# Fields that no tensor determines, for which a default could be silently wrong. Defaults of other fields are checked
# against the tensors, or only affect training.
REQUIRED_FIELDS = {
    CALMConfig: (
        *("num_attention_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps", "hidden_act"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    ),
    CALMAutoencoderConfig: ("rms_norm_eps", "hidden_act"),
}
TIED = {f"autoencoder.{name}" for name in CALMAutoencoder._tied_weights_keys}  # not stored


InferredFields = dict[str, tuple[int | str, StoredTensor]]  # config field → value, the tensor it is inferred from


def infer_autoencoder_fields(repository: Repository) -> InferredFields:
    """Infers fields of a `CALMAutoencoderConfig` from the shapes of the published tensors."""
    embedding = repository.matrix("encoder.embed_tokens.weight")
    squeeze = repository.matrix("encoder.squeeze_layer.weight")
    to_latent = repository.matrix("encoder.hidden_to_latent.weight")
    gate = repository.matrix("encoder.encoder_layers.0.mlp.gate_proj.weight")
    return {
        "vocab_size": (embedding.shape[0], embedding),
        "hidden_size": (embedding.shape[1], embedding),
        "intermediate_size": (gate.shape[0], gate),
        "patch_size": (divide_axis(squeeze, 1, embedding.shape[1]), squeeze),
        "latent_size": (divide_axis(to_latent, 0, 2), to_latent),
        "num_encoder_layers": repository.count_layers("encoder.encoder_layers"),
        "num_decoder_layers": repository.count_layers("decoder.decoder_layers"),
    }


def infer_language_model_fields(repository: Repository) -> InferredFields:
    """Infers fields of a `CALMConfig` from the shapes of the published tensors."""
    embedding = repository.matrix("transformer.embed_tokens.weight")
    projection = repository.matrix("embed_proj.0.weight")
    gate = repository.matrix("transformer.layers.0.mlp.gate_proj.weight")
    return {
        "vocab_size": (embedding.shape[0], embedding),
        "hidden_size": (embedding.shape[1], embedding),
        "intermediate_size": (gate.shape[0], gate),
        "num_hidden_layers": repository.count_layers("transformer.layers"),
        "patch_size": (divide_axis(projection, 1, embedding.shape[1]), projection),
        **infer_head_fields(repository),
    }


def infer_head_fields(repository: Repository) -> InferredFields:
    """Infers the fields of a `CALMConfig` that describe the generative head."""
    if any(name.startswith("generative_head.net.") for name in repository.tensors):
        out_proj = repository.matrix("generative_head.net.final_layer.linear.weight")
        input_proj = repository.matrix("generative_head.net.input_proj.weight")
        latent_size = input_proj.shape[1]
        # Diffusion predicts the noise and the variance of each latent dimension, flow matching a velocity.
        head_type = {latent_size: "flow", 2 * latent_size: "diffusion"}.get(out_proj.shape[0])
        if head_type is None:
            raise InputError(f"{out_proj} fits neither flow matching nor diffusion, whose input is {input_proj}.")
        return {
            "head_type": (head_type, out_proj),
            "latent_size": (latent_size, input_proj),
            "num_mlp_layers": repository.count_layers("generative_head.net.res_blocks"),
        }
    is_mlp_generator = any(name.startswith("mlp_generator.") for name in repository.tensors)  # see `ENERGY`
    prefix = "mlp_generator" if is_mlp_generator else "generative_head"
    noise = repository.matrix(f"{prefix}.noise_embd.weight")
    out_proj = repository.matrix(f"{prefix}.final_layer.linears.2.weight")
    return {
        "head_type": ("energy", noise),
        "noise_size": (noise.shape[1], noise),
        "latent_size": (out_proj.shape[0], out_proj),
        "num_mlp_layers": repository.count_layers(f"{prefix}.mlp_blocks"),
    }


def divide_axis(stored: StoredTensor, axis: int, divisor: int) -> int:
    """Returns the tensor's size along `axis` divided by `divisor`; raises InputError if it is not divisible."""
    if stored.shape[axis] % divisor:
        raise InputError(f"{stored} should have a multiple of {divisor} {('rows', 'columns')[axis]}.")
    return stored.shape[axis] // divisor


def merge_config_fields(repository: Repository, inferred: InferredFields, config_class: type) -> dict:
    """Returns the arguments of `config_class`: those of its fields that config.json states or that were inferred.

    An unknown field is an error because it may change what the model computes, like logit soft-capping.
    """
    for field, (value, stored) in inferred.items():
        if repository.config.get(field) not in (None, value):
            stated = repository.config[field]
            raise InputError(f"{repository.config_path} says {field} is {stated}, but {stored} makes it {value}.")
    stated_fields = {field: value for field, value in repository.config.items() if value is not None}
    calm_fields = {*CALMConfig().to_dict(), "rope_scaling", "rope_theta"} - {"autoencoder_config"}
    autoencoder_fields = {*CALMAutoencoderConfig().to_dict()}
    # Published autoencoder configs also have fields of Llama's attention, which the autoencoder lacks.
    known = IGNORED_FIELDS | calm_fields | autoencoder_fields
    if unknown := [field for field in stated_fields if field not in known and not field.startswith("_")]:
        raise InputError(
            f"{repository.config_path} has unknown fields: {', '.join(unknown)}; remove those that don't change "
            "what the model computes."
        )
    accepted = (calm_fields if config_class is CALMConfig else autoencoder_fields) - IGNORED_FIELDS
    fields = {field: value for field, value in stated_fields.items() if field in accepted}
    for field in REQUIRED_FIELDS[config_class]:
        if field not in fields and not (field == "rope_theta" and "rope_parameters" in fields):
            raise InputError(f"{repository.config_path} lacks {field}, which can't be inferred from the tensors.")
    return fields | {field: value for field, (value, _) in inferred.items()}


def build_config(language_model: Repository, autoencoder: Repository) -> tuple[CALMConfig, dict[str, tuple[int, ...]]]:
    """Returns the bundle's configuration, and the model's tensor shapes (name → shape)."""
    inferred, nested_inferred = infer_language_model_fields(language_model), infer_autoencoder_fields(autoencoder)
    for field in ("patch_size", "latent_size", "vocab_size"):
        (value, stored), (nested_value, nested_stored) = inferred[field], nested_inferred[field]
        if value != nested_value:
            values = f"{field} is {value} by {stored}, but {nested_value} by {nested_stored}"
            raise InputError(f"The repositories don't match: {values}.")
    fields = merge_config_fields(language_model, inferred, CALMConfig)
    nested_fields = merge_config_fields(autoencoder, nested_inferred, CALMAutoencoderConfig)
    try:
        config = CALMConfig(**{**fields, "autoencoder_config": nested_fields})
        with torch.device("meta"):
            model = CALMForCausalLM(config)
    except Exception as error:  # an invalid configuration raises many types
        paths = f"{language_model.config_path} and {autoencoder.config_path}"
        raise InputError(f"{paths} define no valid model: {error}") from None
    return config, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in TIED}


def map_name(name: str, mapping: tuple) -> tuple[str, ...]:
    """Returns our names for a published tensor: one, two if it is split, or none if it is not in the mapping."""
    for pattern, targets in mapping:
        if match := re.fullmatch(pattern, name):
            return tuple(match.expand(target) for target in ((targets,) if isinstance(targets, str) else targets))
    return ()


def assign_sources(language_model: Repository, autoencoder: Repository, shapes: dict) -> dict[str, list[StoredTensor]]:
    """Returns for each tensor of our model (`shapes`: name → shape) its published sources, which must be equal."""
    sources_of: dict[str, list[StoredTensor]] = {name: [] for name in shapes}
    # The autoencoder's own repository comes first: of equally wide sources the first is written.
    for repository, mapping in ((autoencoder, AUTOENCODER_MAPPING), (language_model, LANGUAGE_MODEL_MAPPING)):
        for stored in repository.tensors.values():
            targets = map_name(stored.name, mapping)
            if not targets or not sources_of.keys() >= set(targets):
                raise InputError(f"Unexpected {stored}: the model has no such tensor.")
            for target, source in zip(targets, stored.split_columns(len(targets)), strict=True):
                if source.shape != shapes[target]:
                    raise InputError(f"The {stored} does not fit {target}, which is {shapes[target]}.")
                sources_of[target].append(source)
    for name, sources in sources_of.items():
        if not sources:
            repository = autoencoder if name.startswith("autoencoder.") else language_model
            raise InputError(f"{repository.weights_path} lacks the tensor for {name} {shapes[name]}.")
    return sources_of


def read_merged(sources: list[StoredTensor], dtype: torch.dtype) -> torch.Tensor:
    """Reads the source of the widest dtype, checks others equal it in their dtypes, and casts it to `dtype`."""
    first, *others = sorted(sources, key=lambda source: -source.dtype.itemsize)
    tensor = check_finite(first.read(), first)
    for other in others:
        other_tensor = check_finite(other.read(), other)
        if not torch.equal(tensor.to(other_tensor.dtype), other_tensor):
            raise InputError(f"The {first} and the {other} should be equal.")
    return check_finite(tensor.to(dtype), first)


def check_finite(tensor: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    """Returns the tensor; raises InputError, which names `stored`, unless all values are finite."""
    extremes = torch.stack(tensor.aminmax())  # unlike isfinite, makes no copies; keeps NaN
    if not extremes.isfinite().all():
        raise InputError(f"The {stored} holds values that are infinite or not numbers in {tensor.dtype}.")
    return tensor


def convert(
    calm: str, autoencoder: str, output: Path, tokenizer: str | None = None, dtype: str | None = None, name: str = ""
) -> None:
    """Converts a published language model and its autoencoder to one repository in the new folder `output`.

    Args:
        calm: Hub id or folder of the published language model.
        autoencoder: Hub id or folder of the published autoencoder.
        output: folder to write, new or empty.
        tokenizer: Hub id or folder with tokenizer.json; by default the language model's.
        dtype: "float32", "bfloat16" or "float16"; by default one that holds every published tensor exactly.
        name: model name in the model card; by default the folder's name.

    Raises:
        InputError, OSError: the conversion failed; no file is left behind.
    """
    with new_folder(output) as folder:
        repositories = Repository(calm, "language model"), Repository(autoencoder, "autoencoder")
        config, shapes = build_config(*repositories)
        sources_of = assign_sources(*repositories, shapes)
        dtypes = (source.dtype for stored in sources_of.values() for source in stored)
        config.dtype = written_dtype = DTYPES[dtype] if dtype else functools.reduce(torch.promote_types, dtypes)
        tokenizer_folder = fetch(tokenizer, TOKENIZER_FILES, "tokenizer") if tokenizer else repositories[0].folder
        card = converted_card(name or output.absolute().name, config, *repositories)
        write_supporting_files(folder, config, tokenizer_folder, card)
        weights = folder / "model.safetensors"
        write_safetensors(weights, shapes, written_dtype, lambda key: read_merged(sources_of[key], written_dtype))


def push_to_hub(folder: Path, repo_id: str, message: str, tag: str | None = None) -> None:
    """Uploads a finished bundle to the Hub, which checks its card first, and tags it; raises InputError on failure."""
    try:
        HfApi().create_repo(repo_id, exist_ok=True)
        commit = HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        if tag:
            HfApi().create_tag(repo_id, tag=tag, revision=commit.oid)
    except Exception as error:  # the client's exceptions differ between its versions
        raise InputError(f"{folder} is finished, but {repo_id} did not take it: {first_line(error)}") from None


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm convert", "Converts published CALM checkpoints to one repository.")
    parser.add_argument("--calm", required=True, metavar="ID_OR_DIR", help="the published language model")
    parser.add_argument("--autoencoder", required=True, metavar="ID_OR_DIR", help="the published autoencoder")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new folder to write")
    parser.add_argument("--tokenizer", metavar="ID_OR_DIR", help="repository with tokenizer.json (default: --calm)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the widest published one)")
    names = "--push_to_hub", "--push-to-hub"
    parser.add_argument(*names, metavar="REPO", help="upload the finished folder to this Hub repository")
    args = parser.parse_args(argv)
    with known_errors(InputError, OSError):
        convert(args.calm, args.autoencoder, args.output, args.tokenizer, args.dtype, args.push_to_hub or "")
        if args.push_to_hub:
            push_to_hub(args.output, args.push_to_hub, "Bundle of a published CALM")
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    sys.exit(main())
