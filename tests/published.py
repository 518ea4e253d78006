"""Writes repositories in the published layout: copies of the golden ones, modified by tests."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FIXTURES = Path(__file__).parent / "fixtures"
# Files besides code in a bundle, and in a repository to which a model and its tokenizer were pushed.
BUNDLE_FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
BUNDLE_FILES |= {"tokenizer_config.json"}
LAYOUTS = ("bin", "safetensors", "sharded bin", "sharded safetensors")


class PublishedRepository:
    """A copy of a golden repository; change `config` and `tensors`, then `write` it again."""

    def __init__(self, golden: str, folder: Path):
        """Copies a golden repository, for example "energy_k4/calm", to `folder`."""
        self.folder = folder
        shutil.copytree(FIXTURES / golden, folder)
        self.config = json.loads((folder / "config.json").read_text())
        path = next(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
        self.tensors = torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path)
        self.tensors = dict(self.tensors)

    @property
    def weights(self) -> Path:
        """The single weight file."""
        return next(path for path in self.folder.iterdir() if path.suffix in (".bin", ".safetensors"))

    def write(self, layout: str = "bin"):
        for path in [*self.folder.glob("*.bin"), *self.folder.glob("*.safetensors")]:
            path.unlink()
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save, name = (save_file, "model.safetensors") if "safetensors" in layout else (torch.save, "pytorch_model.bin")
        # safetensors refuses tensors that share memory, as those of the published .bin files do.
        tensors = {key: t.clone() for key, t in self.tensors.items()} if "safetensors" in layout else self.tensors
        if "sharded" not in layout:
            save(tensors, self.folder / name)
            return
        stem, suffix = name.split(".")
        shards = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
        weight_map = {key: shards[number % 2] for number, key in enumerate(sorted(tensors))}
        for shard in shards:
            save({key: tensors[key] for key, place in weight_map.items() if place == shard}, self.folder / shard)
        (self.folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tokenizer(folder: Path, size: int = 95) -> None:
    """Writes a tokenizer.json of `size` tokens: <unk>, <s> (1), </s> (2) and single bytes."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: number for number, token in enumerate(tokens[:size])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
