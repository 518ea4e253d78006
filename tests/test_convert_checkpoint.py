"""Conversion of checkpoints: files read and written, and errors. test_goldens.py checks the numbers."""

import json
import os
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from goldens import HEAD_TYPES
from model_copies import AUTO_MAP, CODE_FILES
from published import BUNDLE_FILES, LAYOUTS, PublishedRepository, write_tokenizer
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from calm_transformers.conversion import convert
from calm_transformers.model.configuration_calm import CALMConfig

COPIES = ("mlp_generator.", "generative_head.", "ae_model.")  # prefixes of tensors that are stored twice


class ConversionSetup:
    """A published language model and autoencoder in their own folder, and the command that converts them."""

    def __init__(self, folder: Path, capsys, head_type: str = "energy"):
        self.folder, self.capsys = folder, capsys
        self.calm = PublishedRepository(f"{head_type}_k4/calm", folder / "calm")
        self.autoencoder = PublishedRepository(f"{head_type}_k4/autoencoder", folder / "autoencoder")
        self.output = folder / "bundle"
        write_tokenizer(self.calm.folder)

    def write(self, layout: str = "bin"):
        for source in (self.calm, self.autoencoder):
            source.write(layout)

    def run(self, *more: str) -> int:
        return convert.main(
            ["--calm", str(self.calm.folder), "--autoencoder", str(self.autoencoder.folder)]
            + ["--output", str(self.output), *more]
        )

    def convert(self, *more: str) -> dict[str, torch.Tensor]:
        code = self.run(*more)
        assert code == 0, self.capsys.readouterr().err
        return load_file(self.output / "model.safetensors")

    def fail(self, *mentions: object, more: tuple[str, ...] = (), code: int = 2) -> None:
        """Checks that converting fails with the exit code and one line with `mentions`, and leaves no files."""
        before = sorted(self.folder.rglob("*"))
        assert self.run(*more) == code
        message = self.capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        for mention in mentions:
            assert str(mention) in message
        assert sorted(self.folder.rglob("*")) == before

    def config(self) -> dict:
        return json.loads((self.output / "config.json").read_text())


@pytest.fixture
def setup(tmp_path, capsys):
    return ConversionSetup(tmp_path, capsys)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A setup after a conversion without options, for tests that only read."""
    setup = ConversionSetup(tmp_path_factory.mktemp("converted"), None)
    assert setup.run() == 0
    return setup


def test_a_bundle_is_complete_and_missing_config_fields_get_the_published_values(converted):
    assert {path.name for path in converted.output.iterdir()} == CODE_FILES | BUNDLE_FILES
    config = converted.config()
    nested = config["autoencoder_config"]
    assert (config["auto_map"], config["architectures"]) == (AUTO_MAP, ["CALMForCausalLM"])
    assert config["model_type"] == "calm" and config["rope_parameters"]["rope_theta"] == 10000.0
    assert "ae_path" not in config and str(converted.folder) not in json.dumps(config)
    assert (config["num_samples"], config["num_posterior_samples"], config["beta"]) == (8, 100, 1.0)
    assert (nested["ae_dropout"], nested["kl_clamp"], nested["kl_weight"]) == (0.15, 0.5, 1e-3)
    settings = GenerationConfig.from_pretrained(converted.output)
    assert (settings.do_sample, settings.temperature, settings.num_candidates) == (True, 0.5, 200)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 95)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_fields_missing_in_config_json_are_inferred_from_tensors(tmp_path, capsys, head_type):
    setup = ConversionSetup(tmp_path, capsys, head_type)
    shared = {"vocab_size": 96, "patch_size": 4, "latent_size": 16}
    sizes = shared | {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_mlp_layers": 2}
    nested = shared | {"hidden_size": 32, "intermediate_size": 64, "num_encoder_layers": 2, "num_decoder_layers": 2}
    for source, fields in ((setup.calm, [*sizes, "noise_size", "beta", "architectures"]), (setup.autoencoder, nested)):
        source.config = {name: value for name, value in source.config.items() if name not in fields}
    setup.write()
    setup.convert()
    config = CALMConfig.from_pretrained(setup.output)
    assert config.head_type == head_type and (head_type != "energy" or config.noise_size == 8)
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert {name: getattr(config.autoencoder_config, name) for name in nested} == nested


def test_the_model_card_names_its_sources_and_no_path(setup):
    setup.convert("--dtype", "bfloat16")
    card = (setup.output / "README.md").read_text()
    front, text = card.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: transformers" in front and "pipeline_tag: text-generation" in front
    assert "base_model" not in front  # a folder is no repository of the Hub
    assert "`calm`" in text and "`autoencoder`" in text and "bfloat16" in text and '"energy"' in text
    assert 'model="bundle"' in text and '"The key to life is", max_new_tokens=20, do_sample=True' in text
    assert "icence" in text and str(setup.folder) not in card and "{" not in card


@pytest.mark.parametrize("layout, omitted", [*((layout, None) for layout in LAYOUTS), *(("bin", x) for x in COPIES)])
def test_every_file_layout_and_omitted_copies_give_the_same_bundle(setup, converted, layout, omitted):
    if omitted is not None:
        setup.calm.tensors = {name: t for name, t in setup.calm.tensors.items() if not name.startswith(omitted)}
    setup.write(layout)
    if layout == "safetensors":  # takes precedence over pickles
        (setup.calm.folder / "pytorch_model.bin").write_bytes(b"not read")
    weights, expected = setup.convert(), load_file(converted.output / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_an_energy_block_is_split_and_tied_or_repeated_tensors_are_written_once(converted):
    weights = load_file(converted.output / "model.safetensors")
    published = converted.calm.tensors["mlp_generator.mlp_blocks.1.linears.0.weight"]
    assert torch.equal(weights["head.blocks.1.sample_proj.weight"], published[:, :48])
    assert torch.equal(weights["head.blocks.1.context_proj.weight"], published[:, 48:])
    once = [t for name, t in converted.autoencoder.tensors.items() if name != "decoder.lm_head_weight"]
    once += [t for name, t in converted.calm.tensors.items() if not name.startswith(("generative_head.", "ae_model."))]
    assert sum(tensor.numel() for tensor in weights.values()) == sum(tensor.numel() for tensor in once)


@pytest.mark.parametrize(
    "calm, autoencoder, has_copy, option, written",
    [
        ("bfloat16", "float32", True, None, "float32"),
        ("bfloat16", "float16", False, None, "float32"),  # which holds both
        ("bfloat16", "bfloat16", True, None, "bfloat16"),
        ("float32", "float32", True, "bfloat16", "bfloat16"),
    ],
)
def test_the_widest_published_or_the_requested_dtype_is_written(setup, calm, autoencoder, has_copy, option, written):
    """Of two copies of a tensor the wider is written; they are compared in the narrower dtype."""
    for source, dtype in ((setup.calm, calm), (setup.autoencoder, autoencoder)):
        source.tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in source.tensors.items()}
    if not has_copy:
        setup.calm.tensors = {name: t for name, t in setup.calm.tensors.items() if not name.startswith("ae_model.")}
    setup.write()
    weights = setup.convert(*(["--dtype", option] if option else []))
    dtype = getattr(torch, written)
    assert {tensor.dtype for tensor in weights.values()} == {dtype} and setup.config()["dtype"] == written
    assert torch.equal(weights["model.norm.weight"], setup.calm.tensors["transformer.norm.weight"].to(dtype))
    name = "encoder.embed_tokens.weight"
    copies = [setup.autoencoder.tensors[name], setup.calm.tensors.get(f"ae_model.{name}")][: 1 + has_copy]
    widest = max(copies, key=lambda tensor: tensor.dtype.itemsize)
    assert torch.equal(weights[f"autoencoder.{name}"], widest.to(dtype))


def peak_memory():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's resettable peak memory")
def test_peak_memory_stays_below_the_file_written(setup, monkeypatch):
    monkeypatch.setattr("calm_transformers.conversion.checkpoint_files.REMAP_BYTES", 2**22)
    mlp = {"gate_proj": (6144, 48), "up_proj": (6144, 48), "down_proj": (48, 6144)}
    layer = {name: t for name, t in setup.calm.tensors.items() if name.startswith("transformer.layers.0.")}
    for number in range(26):  # 92 MB of layers of 3.5 MB
        for name, tensor in layer.items():
            shape = mlp.get(name.split(".")[-2], tensor.shape)
            setup.calm.tensors[name.replace(".0.", f".{number}.", 1)] = torch.rand(shape)
    setup.calm.config |= {"num_hidden_layers": 26, "intermediate_size": 6144}
    setup.calm.write()
    setup.calm.tensors.clear()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    code = setup.run("--dtype", "bfloat16")
    written = (setup.output / "model.safetensors").stat().st_size
    assert code == 0 and written > 40e6
    assert peak_memory() - before < 0.5 * written


@pytest.mark.transformers
def test_the_tokenizer_pads_on_the_left_with_the_models_pad_token(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted.output, trust_remote_code=True)
    batch = tokenizer(["abc", "abcde"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0].tolist() == [95, 95, *batch["input_ids"][1, :3].tolist()]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 95)
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "abc"
    assert tokenizer.chat_template is None


def test_the_tokenizer_may_be_in_another_folder(setup):
    (setup.calm.folder / "tokenizer.json").rename(setup.folder / "tokenizer.json")
    setup.fail(setup.calm.folder / "tokenizer.json", "--tokenizer")
    setup.convert("--tokenizer", str(setup.folder))


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NAMED = json.dumps({"chat_template": [{"name": "default", "template": TEMPLATE}]})


@pytest.mark.parametrize("name, text", [("chat_template.jinja", TEMPLATE), ("tokenizer_config.json", NAMED)])
def test_a_chat_template_is_copied_with_the_tokenizer(setup, name, text):
    (setup.calm.folder / name).write_text(text)
    setup.convert()
    tokenizer = AutoTokenizer.from_pretrained(setup.output, trust_remote_code=True)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_tokenizer_that_does_not_match_the_model_raises_an_error(setup):
    write_tokenizer(setup.calm.folder, size=97)
    setup.fail(setup.calm.folder / "tokenizer.json", "97 tokens", "96")
    write_tokenizer(setup.calm.folder, size=90)
    setup.fail(setup.calm.folder / "tokenizer.json", "pad_token_id 95")
    (setup.calm.folder / "tokenizer.json").write_text("{}")
    setup.fail(setup.calm.folder / "tokenizer.json")


# Repositories that don't match


def plus(number):
    return lambda value: value + number


def with_value(value):
    return lambda tensor: tensor.index_fill(0, torch.tensor([3]), value)


NEEDED = "num_attention_heads max_position_embeddings rope_theta rms_norm_eps hidden_act pad_token_id".split()
EMBEDDING, BIAS, NO_NUMBER = "embed_tokens.weight", "final_layer.linears.2.bias", "infinite or not numbers"
ERRORS = [
    # repository, config field or tensor, new value (None: removed), words of the error message; {calm} and
    # {autoencoder} are the weight files
    ("calm", "vocab_size", plus(1), ["vocab_size is 97", f"transformer.{EMBEDDING}", "{calm}"]),
    ("calm", "num_mlp_layers", plus(1), ["num_mlp_layers is", "mlp_generator.mlp_blocks.1", "{calm}"]),
    ("autoencoder", "num_decoder_layers", plus(1), ["num_dec", "decoder.decoder_layers.1", "{autoencoder}"]),
    *(("calm", field, None, [f"config.json lacks {field}"]) for field in NEEDED),
    *(("autoencoder", field, None, [f"config.json lacks {field}"]) for field in NEEDED[3:5]),
    ("calm", "beta", 3.0, ["config.json", "beta=3.0"]),
    ("autoencoder", f"encoder.{EMBEDDING}", torch.zeros(90, 32), ["don't match", "vocab_size", EMBEDDING]),
    ("calm", f"transformer.{EMBEDDING}", None, ["lacks the tensor transformer.embed", "{calm}"]),
    ("calm", "lm_head.weight", torch.zeros(48), ["Unexpected tensor lm_head.weight", "{calm}"]),
    ("calm", "embed_proj.3.bias", torch.zeros(47), ["embed_proj.3.bias (47,)", "(48,)", "{calm}"]),
    ("calm", "embed_proj.0.weight", torch.zeros(96, 191), ["embed_proj.0.weight", "multiple of 48"]),
    ("calm", f"transformer.{EMBEDDING}", torch.zeros(96), ["embed_tokens", "should be a matrix"]),
    ("calm", "embed_proj.3.bias", torch.zeros(48, dtype=torch.int64), ["embed_proj.3.bias", "torch.int64"]),
    ("calm", "embed_proj.3.bias", with_value(torch.nan), ["embed_proj.3.bias", "{calm}", NO_NUMBER]),
    ("calm", f"generative_head.{BIAS}", with_value(torch.inf), [f"generative_head.{BIAS}", NO_NUMBER]),  # a copy
    ("autoencoder", "decoder.lm_head_weight", plus(1e-3), ["lm_head_weight", "should be equal"]),
    ("calm", f"generative_head.{BIAS}", plus(1e-3), [f"generative_head.{BIAS}", "should be equal"]),
]


@pytest.mark.parametrize("repository, name, value, mentions", ERRORS)
def test_repositories_that_do_not_match_raise_errors(setup, repository, name, value, mentions):
    source = getattr(setup, repository)
    contents = source.tensors if "." in name or name.endswith("_weight") else source.config
    contents[name] = value(contents[name]) if callable(value) else value
    if value is None:
        del contents[name]
    source.write()
    files = {"calm": setup.calm.weights, "autoencoder": setup.autoencoder.weights}
    setup.fail(*(mention.format(**files) for mention in mentions))


def test_a_missing_head_and_values_too_large_for_the_dtype_raise_errors(setup):
    tensors = setup.calm.tensors
    setup.calm.tensors = {**tensors, "embed_proj.3.bias": torch.full((48,), 1e6)}
    setup.calm.write()
    setup.fail("embed_proj.3.bias", "float16", more=("--dtype", "float16"))
    setup.calm.tensors = {name: t for name, t in tensors.items() if not name.startswith(COPIES[:2])}
    setup.calm.write()
    setup.fail(setup.calm.weights, "generative_head.noise_embd.weight")


@pytest.mark.parametrize("repository", ["calm", "autoencoder"])
def test_an_unknown_config_field_raises_an_error_unless_it_is_harmless(setup, repository):
    source = getattr(setup, repository)
    harmless = {"_name_or_path": "x", "torch_dtype": "float32", "id2label": {}, "ae_path": "/x"}
    source.config |= {**harmless, "sliding_window": None}
    del setup.calm.config["rope_theta"]
    setup.calm.config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}  # as in newer versions
    setup.write()
    setup.convert()
    assert not harmless.keys() & setup.config().keys() and setup.config()["rope_parameters"]["rope_theta"] == 5e5
    setup.output = setup.folder / "again"
    source.config |= {"attn_logit_softcapping": 50.0, "qk_norm": True}
    source.write()
    setup.fail(source.folder / "config.json", "attn_logit_softcapping, qk_norm", "remove")


def test_an_unknown_head_type_raises_an_error(tmp_path, capsys):
    setup = ConversionSetup(tmp_path, capsys, "flow")
    name = "generative_head.net.final_layer.linear.weight"
    setup.calm.tensors[name] = torch.zeros(3 * 16, 48)  # flow matching has Z outputs, diffusion 2·Z
    setup.calm.write()
    setup.fail(name, setup.calm.weights)


@pytest.mark.parametrize("member", ["data/3", "data.pkl"])
def test_a_wrong_checksum_raises_an_error(setup, member):
    with zipfile.ZipFile(setup.calm.weights) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(f"/{member}"))
        content = archive.read(info)
    damaged = bytearray(setup.calm.weights.read_bytes())
    index = damaged.index(content) + (0 if member == "data/3" else damaged[damaged.index(content) :].index(b"bias"))
    damaged[index] ^= 1
    setup.calm.weights.write_bytes(damaged)
    setup.fail(setup.calm.weights, member)


def test_an_archive_without_checksums_is_read(setup):
    torch.serialization.set_crc32_options(False)
    try:
        setup.calm.write()
    finally:
        torch.serialization.set_crc32_options(True)
    setup.convert()


def test_a_pickle_of_other_objects_raises_an_error(setup):
    for content in ([torch.zeros(3)], {"transformer.norm.weight": [1.0]}, {0: torch.zeros(1)}):
        torch.save(content, setup.calm.weights)
        setup.fail(setup.calm.weights)


def test_a_tensor_in_two_shards_raises_an_error(setup):
    setup.calm.write("sharded safetensors")
    first, second = sorted(setup.calm.folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    setup.fail(first, second)


def test_a_path_is_not_looked_up_on_the_hub_and_an_unknown_id_is_named(setup, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    setup.fail("some/where is neither a folder nor a reachable Hub repository", more=("--calm", "some/where"))
    monkeypatch.setattr("calm_transformers.conversion.checkpoint_files.snapshot_download", None)
    for option, what in (("calm", "language model"), ("autoencoder", "autoencoder"), ("tokenizer", "tokenizer")):
        for path in ("./calm-m", "~/calm-m", str(setup.calm.folder / "config.json")):
            message = f"{path} is not a folder: name the folder with the {what}, or a Hub id"
            setup.fail(message, more=(f"--{option}", path))


def test_an_interrupted_conversion_leaves_no_files(setup, monkeypatch):
    monkeypatch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt()))
    setup.fail("error: interrupted.\n", code=130)


def test_the_output_must_be_new(setup):
    setup.output.mkdir()
    setup.convert()
    setup.fail(setup.output, "not an empty folder")
    setup.output = setup.calm.weights / "bundle"
    setup.fail(setup.calm.weights)


def test_a_failed_upload_is_one_line_and_the_bundle_is_kept(setup, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", Mock(side_effect=ConnectionError("no route to the Hub\nand more"))
    )
    assert setup.run("--push-to-hub", "someone/bundle") == 2
    message = setup.capsys.readouterr().err
    assert message.count("\n") == 1 and "someone/bundle" in message and "no route to the Hub" in message
    assert (setup.output / "model.safetensors").is_file()
