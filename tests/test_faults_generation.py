"""Failed steps, many processes, odd folder names and huge numbers: the same text everywhere, in bounded memory."""

import multiprocessing
import pickle
import shutil
from pathlib import Path

import fresh_process
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

PROMPT, BILLION = [1, 10, 11, 12, 13, 14], 10**9


def text_of(model, **settings) -> list[int]:
    options = {"do_sample": True, "temperature": 0.5, "num_candidates": 20, "max_new_tokens": 12, "eos_token_id": None}
    generator = torch.Generator().manual_seed(0)
    return model.generate(torch.tensor([PROMPT]), generator=generator, **{**options, **settings})[0].tolist()


def load_text(folder: str) -> list[int]:
    from transformers import AutoModelForCausalLM

    return text_of(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))


class FailingAt(TorchDispatchMode):
    """Raises an error at the n-th operation of PyTorch; counts them."""

    def __init__(self, error: BaseException | None = None, number: int = 0):
        super().__init__()
        self.error, self.number, self.count = error, number, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            raise self.error
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("head_type", ["energy", "flow", "diffusion", "token_chain"])
def test_an_error_in_any_operation_or_callback_changes_no_later_text(head_type, cache):
    from tiny import tiny_model

    model, settings = tiny_model(head_type), {"cache_implementation": cache}
    expected = text_of(model, **settings)
    with FailingAt() as whole:
        text_of(model, **settings)
    for number, error in enumerate(4 * [torch.OutOfMemoryError("full"), KeyboardInterrupt(), RuntimeError("bug")], 1):
        with pytest.raises(type(error)), FailingAt(error, whole.count * number // 13):
            text_of(model, **settings)
        assert text_of(model, **settings) == expected
    for callback in ("streamer", "stopping_criteria", "logits_processor"):

        def fails(*_, **__):
            raise ZeroDivisionError

        value = type("Streamer", (), {"put": fails})() if callback == "streamer" else [fails]
        with pytest.raises(ZeroDivisionError):
            text_of(model, **settings, **{callback: value})
        assert text_of(model, **settings) == expected


def test_a_billion_is_refused_or_costs_no_more():
    from tiny import tiny_model

    model, static = tiny_model(), {"cache_implementation": "static"}
    refused = [{name: BILLION} for name in ("num_candidates", "num_return_sequences", "forced_eos_token_id")]
    refused += [{name: BILLION, **static} for name in ("max_new_tokens", "max_cache_len")]
    for settings in (*refused, {"temperature": 1 / BILLION}, {"pad_token_id": -1}, {"bos_token_id": [[1]]}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            text_of(model, **settings)
    for name in ("num_hidden_layers", "num_mlp_layers", "num_context_layers"):
        with pytest.raises(ValueError, match=f"{name}={BILLION}: must lie in"):
            tiny_model(**{name: BILLION})
    for name in ("top_k", "min_new_tokens", "no_repeat_ngram_size", "prefill_chunk_size"):
        assert len(text_of(model, **{name: BILLION})) == len(PROMPT) + 12
    ends = [lambda ids, _, **__: ids[:, -1] >= 0]
    assert len(text_of(model, max_new_tokens=BILLION, stopping_criteria=ends)) == len(PROMPT) + 1


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 4096])
def test_memory_grows_like_the_prompt_up_to_100_thousand_tokens(chunk_size):
    from test_convert_checkpoint import peak_memory
    from tiny import seeded, tiny_model

    model = tiny_model(max_position_embeddings=2**15)
    for length in (1000, 10_000, 100_000):
        ids = torch.randint(3, 95, (1, length), generator=seeded())
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory()
        model.generate(ids, do_sample=True, max_new_tokens=8, prefill_chunk_size=chunk_size, num_candidates=20)
        assert peak_memory() - before < 2e7 + 2000 * length


def load_in_processes(folders: list[str]) -> list[list[int]]:
    """In a fresh process: the models' texts with their own code, here, in forked and in spawned processes."""
    import transformers

    assert transformers.LlamaForCausalLM  # imported before the fork
    with multiprocessing.get_context("fork").Pool(8) as pool:  # they share an empty cache of modules
        texts = pool.map(load_text, 8 * folders[:1], 1)
    models = [transformers.AutoModelForCausalLM.from_pretrained(it, trust_remote_code=True) for it in folders]
    for method in ("spawn", "fork"):  # the spawned process has loaded nothing before
        with multiprocessing.get_context(method).Pool(1) as pool:
            texts.append(pool.apply(text_of, (models[0],)))
            assert pool.apply(getattr, (models[0].config, "patch_size")) == 4
    assert all(type(model).__module__.startswith("transformers_modules") for model in models)
    return [*texts, *map(text_of, models), text_of(pickle.loads(pickle.dumps(models[0])))]


@pytest.mark.slow
def test_processes_and_folders_of_any_name_load_their_own_code(tiny_folder, tmp_path):
    names = ("a/model", "v1.0 of the model", "model.", "modèle 模型", "class", "b/model")
    folders = [str(shutil.copytree(tiny_folder, tmp_path / name)) for name in names]
    for name in ("configuration_calm.py", "generation_calm.py"):  # of the two that end alike, each has its own code
        file = tmp_path / "b/model" / name
        file.write_text(file.read_text().replace("append(sample.patches)", "append(sample.patches * 0 + 7)") + "# b\n")
    found = fresh_process.call(load_in_processes, tmp_path / "home", folders=folders).result
    assert found.pop(-2) == [*PROMPT, *12 * [7]] and found == 16 * [load_text(str(tiny_folder))]
