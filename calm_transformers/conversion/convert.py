"""Converts the published CALM checkpoints into one bundled Hugging Face repository.

    calm convert --calm ID_OR_DIR --autoencoder ID_OR_DIR --output DIR

The published weights come as two repositories, a language model and its autoencoder, without code. The bundle holds
both in one model.safetensors, with configuration, code, tokenizer and model card beside it, so that `transformers`
loads it with trust_remote_code=True.

Nothing is guessed: sizes and the head's type are read off the tensors, every published tensor must have its place,
every place its tensor. Tensors pass through memory one at a time, so the peak is set by the largest, not by the model.
A failure is one sentence on stderr and exit code 2, and leaves no file behind.
"""

import functools
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import PretrainedConfig

from calm_transformers.command_line import InputError, Parser, command, first_line, known_errors
from calm_transformers.conversion.bundle_files import TOKENIZER_FILES, write_beside_weights
from calm_transformers.conversion.checkpoint_files import DTYPES, Repository, StoredTensor, fetch, write_safetensors
from calm_transformers.files import new_folder
from calm_transformers.model.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder

# Published tensor name → ours. Where a pattern has two targets, the matrix is cut into two halves of its columns.
# Several published tensors may have the same target (tied or stored twice); they must then be equal.
AUTOENCODER_TABLE = (
    (r"(encoder|decoder)\.\1_layers\.(\d+)\.layernorm\.(\w+)", r"autoencoder.\1.layers.\2.norm.\3"),
    (r"(encoder|decoder)\.\1_layers\.(\d+)\.mlp\.(.+)", r"autoencoder.\1.layers.\2.mlp.\3"),
    (r"(encoder\.(?:embed_tokens|squeeze_layer|norm|hidden_to_latent)\.\w+)", r"autoencoder.\1"),
    (r"(decoder\.(?:latent_to_hidden|expand_layer|norm)\.\w+)", r"autoencoder.\1"),
    (r"decoder\.lm_head_weight", r"autoencoder.encoder.embed_tokens.weight"),
)
ENERGY = r"(?:mlp_generator|generative_head)\."  # published energy models store their head under both names
NET = r"generative_head\.net\."  # flow matching and diffusion
LANGUAGE_MODEL_TABLE = (
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
    *((r"ae_model\." + pattern, target) for pattern, target in AUTOENCODER_TABLE),
)

# What a published config.json says about files and classes, not about the model; our autoencoder is always tied.
NOT_ARCHITECTURE = {*PretrainedConfig().to_dict(), "ae_path", "auto_map", "tie_word_embeddings", "torch_dtype"}
# What no tensor tells, and a default would get wrong without a word. Of other fields the defaults are checked against
# the tensors, or concern training alone.
REQUIRED = {
    CALMConfig: (
        *("num_attention_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps", "hidden_act"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    ),
    CALMAutoencoderConfig: ("rms_norm_eps", "hidden_act"),
}
TIED = {f"autoencoder.{name}" for name in CALMAutoencoder._tied_weights_keys}  # not stored


Facts = dict[str, tuple[int | str, StoredTensor]]  # field of the configuration → its value, the tensor that says so


def autoencoder_facts(repository: Repository) -> Facts:
    embedding = repository.matrix("encoder.embed_tokens.weight")
    squeeze = repository.matrix("encoder.squeeze_layer.weight")
    to_latent = repository.matrix("encoder.hidden_to_latent.weight")
    gate = repository.matrix("encoder.encoder_layers.0.mlp.gate_proj.weight")
    return {
        "vocab_size": (embedding.shape[0], embedding),
        "hidden_size": (embedding.shape[1], embedding),
        "intermediate_size": (gate.shape[0], gate),
        "patch_size": (quotient(squeeze, 1, embedding.shape[1]), squeeze),
        "latent_size": (quotient(to_latent, 0, 2), to_latent),
        "num_encoder_layers": repository.count_layers("encoder.encoder_layers"),
        "num_decoder_layers": repository.count_layers("decoder.decoder_layers"),
    }


def language_model_facts(repository: Repository) -> Facts:
    embedding = repository.matrix("transformer.embed_tokens.weight")
    projection = repository.matrix("embed_proj.0.weight")
    gate = repository.matrix("transformer.layers.0.mlp.gate_proj.weight")
    return {
        "vocab_size": (embedding.shape[0], embedding),
        "hidden_size": (embedding.shape[1], embedding),
        "intermediate_size": (gate.shape[0], gate),
        "num_hidden_layers": repository.count_layers("transformer.layers"),
        "patch_size": (quotient(projection, 1, embedding.shape[1]), projection),
        **head_facts(repository),
    }


def head_facts(repository: Repository) -> Facts:
    if any(name.startswith("generative_head.net.") for name in repository.tensors):
        out = repository.matrix("generative_head.net.final_layer.linear.weight")
        into = repository.matrix("generative_head.net.input_proj.weight")
        latent_size = into.shape[1]
        # Diffusion predicts the noise and the variance of each latent dimension, flow matching a velocity.
        head_type = {latent_size: "flow", 2 * latent_size: "diffusion"}.get(out.shape[0])
        if head_type is None:
            raise InputError(f"{out} fits neither flow matching nor diffusion, whose input is {into}.")
        return {
            "head_type": (head_type, out),
            "latent_size": (latent_size, into),
            "num_mlp_layers": repository.count_layers("generative_head.net.res_blocks"),
        }
    is_under_first_name = any(name.startswith("mlp_generator.") for name in repository.tensors)
    prefix = "mlp_generator" if is_under_first_name else "generative_head"
    noise = repository.matrix(f"{prefix}.noise_embd.weight")
    out = repository.matrix(f"{prefix}.final_layer.linears.2.weight")
    return {
        "head_type": ("energy", noise),
        "noise_size": (noise.shape[1], noise),
        "latent_size": (out.shape[0], out),
        "num_mlp_layers": repository.count_layers(f"{prefix}.mlp_blocks"),
    }


def quotient(stored: StoredTensor, axis: int, divisor: int) -> int:
    if stored.shape[axis] % divisor:
        raise InputError(f"{stored} should have a multiple of {divisor} {('rows', 'columns')[axis]}.")
    return stored.shape[axis] // divisor


def config_fields(repository: Repository, facts: Facts, config_class: type) -> dict:
    """What config.json and the tensors say together; fields that are in neither keep our defaults, the published ones.

    An unknown field may change what the model computes, as a soft cap of its logits would, so it is not left out.

    Raises:
        InputError: config.json contradicts a tensor, or has a field too many or too few.
    """
    for field, (value, stored) in facts.items():
        if repository.config.get(field) not in (None, value):
            said = repository.config[field]
            raise InputError(f"{repository.config_path} says {field} is {said}, but {stored} makes it {value}.")
    stated = {field: value for field, value in repository.config.items() if value is not None}
    of_classes = {each: {*each().to_dict()} - {"autoencoder_config"} for each in REQUIRED}
    of_classes[CALMConfig] |= {"rope_scaling", "rope_theta"}
    # A published autoencoder's has fields of Llama's, whose attention it lacks.
    known = NOT_ARCHITECTURE.union(*of_classes.values())
    if unknown := [field for field in stated if field not in known and not field.startswith("_")]:
        raise InputError(
            f"{repository.config_path} has fields that this conversion doesn't know: {', '.join(unknown)}; it would "
            "drop them, so remove those that don't change what the model computes."
        )
    fields = {field: value for field, value in stated.items() if field in of_classes[config_class] - NOT_ARCHITECTURE}
    for field in REQUIRED[config_class]:
        if field not in fields and not (field == "rope_theta" and "rope_parameters" in fields):
            raise InputError(f"{repository.config_path} lacks {field}, which no tensor tells.")
    return fields | {field: value for field, (value, _) in facts.items()}


def build_config(language_model: Repository, autoencoder: Repository) -> tuple[CALMConfig, dict[str, tuple[int, ...]]]:
    """The bundle's configuration, and the shapes of the tensors that a model of it has.

    Raises:
        InputError: config.json contradicts the tensors, or the two repositories are no pair.
    """
    facts, nested_facts = language_model_facts(language_model), autoencoder_facts(autoencoder)
    for field in ("patch_size", "latent_size", "vocab_size"):
        (value, stored), (nested_value, nested_stored) = facts[field], nested_facts[field]
        if value != nested_value:
            raise InputError(
                f"The repositories are no pair: {field} is {value} by {stored}, but {nested_value} by {nested_stored}."
            )
    fields = config_fields(language_model, facts, CALMConfig)
    nested_fields = config_fields(autoencoder, nested_facts, CALMAutoencoderConfig)
    try:
        config = CALMConfig(**{**fields, "autoencoder_config": nested_fields})
        with torch.device("meta"):
            model = CALMForCausalLM(config)
    except Exception as error:  # a configuration can be wrong in as many ways as there are classes of errors
        paths = f"{language_model.config_path} and {autoencoder.config_path}"
        raise InputError(f"{paths} make no model: {error}") from None
    return config, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in TIED}


def translate(name: str, table: tuple) -> tuple[str, ...]:
    """Our name of a published tensor, two where it is cut in two, none where the table has none."""
    for pattern, targets in table:
        if match := re.fullmatch(pattern, name):
            return tuple(match.expand(target) for target in ((targets,) if isinstance(targets, str) else targets))
    return ()


def place(language_model: Repository, autoencoder: Repository, shapes: dict) -> dict[str, list[StoredTensor]]:
    """Each tensor of our model (name → shape), and the published ones that make it. Several must turn out equal.

    Raises:
        InputError: a tensor is missing, left over or of the wrong shape.
    """
    places = {name: [] for name in shapes}
    # The autoencoder's own repository goes first, for the first piece is the one that is written.
    for repository, table in ((autoencoder, AUTOENCODER_TABLE), (language_model, LANGUAGE_MODEL_TABLE)):
        for stored in repository.tensors.values():
            targets = translate(stored.name, table)
            if not targets or not set(targets) <= set(places):
                raise InputError(f"The model has no place for the {stored}.")
            for target, piece in zip(targets, stored.cut(len(targets)), strict=True):
                if piece.shape != shapes[target]:
                    raise InputError(f"The {stored} does not fit {target}, which is {shapes[target]}.")
                places[target].append(piece)
    for name, pieces in places.items():
        if not pieces:
            repository = autoencoder if name.startswith("autoencoder.") else language_model
            raise InputError(f"{repository.weights} lacks the tensor for {name} {shapes[name]}.")
    return places


def merge(pieces: list[StoredTensor], dtype: torch.dtype) -> torch.Tensor:
    """Reads the piece of the widest type, compares the others with it in theirs, and casts.

    Raises:
        InputError: two pieces differ, or a value is not finite, maybe by the cast.
    """
    first, *others = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    tensor = finite(first.read(), first)
    for other in others:
        theirs = finite(other.read(), other)
        if not torch.equal(tensor.to(theirs.dtype), theirs):
            raise InputError(f"The {first} and the {other} should be equal.")
    return finite(tensor.to(dtype), first)


def finite(tensor: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    extremes = torch.stack(tensor.aminmax())  # unlike isfinite of all, makes no copies; a NaN comes through
    if not extremes.isfinite().all():
        raise InputError(f"The {stored} holds values that are infinite or not numbers in {tensor.dtype}.")
    return tensor


def convert(
    calm: str, autoencoder: str, output: Path, tokenizer: str | None = None, dtype: str | None = None, name: str = ""
) -> None:
    """Writes the bundle of a published language model and its autoencoder to the new folder `output`.

    Args:
        calm: the published language model, a Hub id or folder.
        autoencoder: the published autoencoder, likewise.
        output: the bundle's folder, new or empty.
        tokenizer: Hub id or folder with tokenizer.json; `None` takes the language model's.
        dtype: "float32", "bfloat16" or "float16"; `None` takes the one that holds every published tensor exactly.
        name: what the model card calls the model; the folder's name by default.

    Raises:
        InputError, OSError: no file is left behind.
    """
    with new_folder(output) as folder:
        sources = Repository(calm, "language model"), Repository(autoencoder, "autoencoder")
        config, shapes = build_config(*sources)
        places = place(*sources, shapes)
        published = (piece.dtype for pieces in places.values() for piece in pieces)
        config.dtype = written_dtype = DTYPES[dtype] if dtype else functools.reduce(torch.promote_types, published)
        tokenizer_folder = fetch(tokenizer, TOKENIZER_FILES, "tokenizer") if tokenizer else sources[0].folder
        write_beside_weights(folder, name or output.absolute().name, config, tokenizer_folder, *sources)
        weights = folder / "model.safetensors"
        write_safetensors(weights, shapes, written_dtype, lambda key: merge(places[key], written_dtype))


def push(folder: Path, repo_id: str) -> None:
    """Uploads a finished bundle to the Hub, and raises `InputError` where that refuses or is out of reach."""
    try:
        HfApi().create_repo(repo_id, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Bundle of a published CALM")
    except Exception as error:  # the client's exceptions differ between its versions
        raise InputError(f"{folder} is finished, but {repo_id} did not take it: {first_line(error)}") from None


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm convert", "Converts published CALM checkpoints into one bundled repository.")
    parser.add_argument("--calm", required=True, metavar="ID_OR_DIR", help="the published language model")
    parser.add_argument("--autoencoder", required=True, metavar="ID_OR_DIR", help="the published autoencoder")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new folder to write")
    parser.add_argument("--tokenizer", metavar="ID_OR_DIR", help="where tokenizer.json is (default: where --calm is)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the widest published one)")
    parser.add_argument(
        "--push_to_hub", "--push-to-hub", metavar="REPO", help="upload the finished folder to this Hub repository"
    )
    args = parser.parse_args(argv)
    name = args.push_to_hub or args.output.absolute().name
    with known_errors(InputError, OSError):
        convert(args.calm, args.autoencoder, args.output, args.tokenizer, args.dtype, name)
        if args.push_to_hub:
            push(args.output, args.push_to_hub)
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    sys.exit(main())
