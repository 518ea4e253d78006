"""Long commands show one bar, with rate and time left, where stderr is a terminal; in a pipe they show none."""

import io
import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from evaluation_folder import folder, tiny_llama  # noqa: F401 (a fixture)
from language_oracle import LANGUAGE, V
from model_copies import ROOT
from published import PublishedRepository, write_tokenizer
from test_experiments import FILE, corpus, plan_in  # noqa: F401 (a fixture)
from tiny import tiny_model, tiny_tokenizer
from training_helpers import make_workshop, train, write_corpus

import calm.demo as demo
from calm import calibrate_radius, convert_checkpoint, serve
from calm.evaluation import autoencoder_report, brier_lm, calibration, invented_words, prompt_alignment
from calm.evaluation.models import load_causal_lm
from calm.experiments import language, replacements, share, sharpening, stages
from calm.modeling_calm_autoencoder import CALMAutoencoder
from calm.progress import is_first_process, load_with_bar, progress_bar, say, unbroken

# ruff: noqa: F811 (pytest hands the fixture over under its own name)

STATE = re.compile(
    r"([^\r\n]*?): +(\d+)%\|[^|]*\| ([\d.]+)[kMG]?/([\d.]+)[kMG]? "  # what: percent|bar| done/total
    r"\[(\S+)<(\S+), +(\S+?)(?:, [^\]]*)?\]"  # [time gone<time left, rate, more]
)
RATE = re.compile(r"[\d.]+([kMG]?B/s|[a-z]+/s|s/[a-z]+)")


class Terminal:
    """A new pseudo-terminal, what was written to it, and the bars in that."""

    def __init__(self):
        self.reading, writing = os.openpty()
        self.file = open(writing, "w", buffering=1, encoding="utf-8")
        self.written = b""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self.reading, 1 << 16)
            except OSError:  # the other end is closed
                return
            if not piece:
                return
            self.written += piece

    def close(self) -> None:
        self.file.close()
        self.reader.join(10)
        os.close(self.reading)

    @property
    def text(self) -> str:
        return self.written.decode()

    @property
    def states(self) -> list[tuple[str, ...]]:
        """What, percent, done, total, time gone, time left, rate."""
        return [match.groups() for line in re.split(r"[\r\n]+", self.text) if (match := STATE.match(line))]

    def bars(self) -> list[str]:
        """What each bar that was shown is of, in order; each must have come to its end, and one at a time.

        Two bars on the screen need the cursor to be moved up.
        """
        assert "\x1b[A" not in self.text, self.text
        names, states = [], self.states
        for number, state in enumerate(states):
            if number == 0 or state[0] != states[number - 1][0] or int(state[1]) < int(states[number - 1][1]):
                names.append(state[0])
            is_last = number == len(states) - 1 or states[number + 1][0] != state[0]
            if is_last:
                assert state[1] == "100" and state[2] == state[3], self.text
                assert RATE.fullmatch(state[6]) and state[5] == "00:00", state
        return names


@contextmanager
def on_terminal(monkeypatch, stdout: bool = False):
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal.file)
        if stdout:
            patched.setattr(sys, "stdout", terminal.file)
        try:
            yield terminal
        finally:
            terminal.close()


def shown(monkeypatch, capsys, main, *words) -> tuple[list[str], str]:
    """The bars of a command in a terminal, and its stdout, which must be the same when stderr is no terminal.

    There it must show nothing of a bar.
    """
    capsys.readouterr()
    words = [str(word) for word in words]
    with on_terminal(monkeypatch) as terminal:
        assert main(words) == 0, terminal.text
    printed = capsys.readouterr().out
    assert main(words) == 0
    quiet = capsys.readouterr()
    assert "\r" not in quiet.err and "%|" not in quiet.err
    assert quiet.out == printed
    return terminal.bars(), printed


# evaluation and calibration

LOADING = "Loading weights"


def test_brier_lm_shows_a_bar_for_each_model(folder, monkeypatch, capsys):
    models = ["--model", folder / "calm", folder / "ar"]
    data = ["--data", folder / "text.jsonl.xz", "--block_size", 12, "--plot", folder / "plot.png"]
    bars, table = shown(monkeypatch, capsys, brier_lm.main, *models, *data)
    assert bars == [LOADING, "BrierLM"] * 2
    assert table.count("\n") == 4


def test_calibration_shows_one_over_all_checkpoints(folder, tmp_path, monkeypatch, capsys):
    for step in (2, 10, 12):
        tiny_llama(seed=step).save_pretrained(tmp_path / f"checkpoint-{step}")
    tiny_tokenizer().save_pretrained(tmp_path)
    words = ["--run", tmp_path, "--data", folder / "text.jsonl.xz", "--block_size", 24, "--max_positions", 100]
    bars, _ = shown(monkeypatch, capsys, calibration.main, *words)
    assert bars == ["Checkpoints"]


def test_the_other_evaluations_show_one(folder, tmp_path, monkeypatch, capsys):
    text = ["--data", folder / "text.jsonl.xz"]
    model = ["--model", folder / "calm"]
    bars, _ = shown(monkeypatch, capsys, autoencoder_report.main, *model, *text, "--max_patches", 50)
    assert bars == [LOADING, "Decoding"]
    bars, _ = shown(monkeypatch, capsys, prompt_alignment.main, *model, *text, "--prompts", 20)
    assert bars == [LOADING, "Continuing"]
    write = ["--text", folder / "text.jsonl.xz", "--num_texts", 2, "--max_new_tokens", 9, "--temperature", 1, 0.5]
    bars, table = shown(monkeypatch, capsys, invented_words.main, *model, *write, "--num_candidates", 4)
    assert bars == [LOADING, "Reading", "Writing"]
    assert table.count("\n") == 4


def test_invented_words_come_to_the_end_where_texts_end_early(folder, monkeypatch, capsys):
    """An ordinary model's, whose every token may be EOS: the bar says all steps of each temperature."""
    model = tiny_llama()
    with monkeypatch.context() as patched, on_terminal(patched) as terminal:
        with invented_words.counted_steps(model, 5, times=2) as finish:
            for _ in range(2):
                for _ in range(3):
                    model.get_input_embeddings()(torch.tensor([1]))
                finish()
    assert terminal.bars() == ["Writing"] and terminal.states[-1][2] == "10"


def test_calibrating_the_radius_shows_its_steps(tmp_path, monkeypatch, capsys):
    tiny_model().save_pretrained(tmp_path)
    words = ["--model", tmp_path, "--device", "cpu", "--num_candidates", 10, "--steps", 4]
    bars, printed = shown(monkeypatch, capsys, calibrate_radius.main, *words)
    assert bars == [LOADING, "Writing"] and "repetition_radius" in printed


# conversion and loading


def test_conversion_shows_bytes(tmp_path, monkeypatch, capsys):
    for name in ("calm", "autoencoder"):
        PublishedRepository(f"energy_k4/{name}", tmp_path / name)
    write_tokenizer(tmp_path / "calm")
    words = ["--calm", tmp_path / "calm", "--autoencoder", tmp_path / "autoencoder", "--output"]
    with on_terminal(monkeypatch) as terminal:
        assert convert_checkpoint.main([str(word) for word in [*words, tmp_path / "one"]]) == 0
    assert terminal.bars() == ["Converting"] and terminal.states[-1][6].endswith("B/s")
    capsys.readouterr()
    assert convert_checkpoint.main([str(word) for word in [*words, tmp_path / "other"]]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_loading_counts_the_weights_of_one_file_or_many(tmp_path, monkeypatch, capsys, shard):
    for name, model in (("calm", tiny_model()), ("llama", tiny_llama())):
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        files = list((tmp_path / name).glob("*.safetensors"))
        assert (len(files) > 1) == (shard == "20KB")
        capsys.readouterr()
        with on_terminal(monkeypatch) as terminal:
            loaded = load_causal_lm(str(tmp_path / name), torch.bfloat16)
        assert terminal.bars() == [LOADING]
        assert int(terminal.states[-1][2]) == len(dict(loaded.named_parameters())) > 10
        load_causal_lm(str(tmp_path / name))
        assert capsys.readouterr().err == ""


def test_what_a_model_has_no_place_for_is_counted_and_the_bar_ends_with_an_error(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    with on_terminal(monkeypatch) as terminal:
        load_causal_lm(str(tmp_path))
    assert terminal.bars() == [LOADING]

    def failing(name):
        load_causal_lm(name)
        raise ValueError("no")

    with on_terminal(monkeypatch) as terminal:
        with pytest.raises(ValueError, match="no"):
            load_with_bar(failing, str(tmp_path))
        print("error: no", file=sys.stderr)
    assert re.search(r"\]\s*\n\s*error: no", terminal.text)


def test_the_server_and_the_demo_show_what_they_load(folder, monkeypatch, capsys):
    options = serve.parse([str(folder / "calm"), "--device", "cpu"])
    with on_terminal(monkeypatch) as terminal:
        serve.load_batcher(options).close()
    assert terminal.bars() == [LOADING]
    words = ["--model", ROOT, "--max_new_tokens", 4]
    bars, _ = shown(monkeypatch, capsys, demo.main, *words)
    assert bars == [LOADING]


# training


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def trained_on_terminal(monkeypatch, kind, **fields) -> Terminal:
    with on_terminal(monkeypatch, stdout=True) as terminal:
        assert train(kind, **fields) == 0
    return terminal


def assert_untorn(text: str, beginning: str) -> None:
    """Each line that begins so has a line of the screen for itself: a new one, or what was there is wiped out."""
    before = [text[: match.start()] for match in re.finditer(re.escape(beginning), text)]
    assert before
    for one in before:
        assert one.endswith(("\n", "\r")) and not re.search(r"[^\s][^\r\n]*\r$", one[one[:-1].rfind("\r") + 1 :]), one


def test_training_shows_one_bar_and_its_log_lines_above_it(workshop, tmp_path, monkeypatch, capsys):
    fields = {"eval_steps": 2, "save_steps": 2, "output_dir": str(tmp_path / "run"), **workshop}
    terminal = trained_on_terminal(monkeypatch, "calm", **{**fields, "cache_dir": str(tmp_path / "tokens")})
    assert terminal.bars() == [LOADING, "Tokenising, validation", "Training"]  # of the same file as the training text
    assert terminal.states[-1][2:4] == ("4", "4")
    assert "evaluating 1/" in terminal.text
    assert_untorn(terminal.text, "{'loss'")
    assert_untorn(terminal.text, "{'eval_loss'")
    capsys.readouterr()
    assert train("calm", **fields | {"output_dir": str(tmp_path / "quiet")}) == 0
    quiet = capsys.readouterr()
    assert quiet.err == "" and quiet.out.count("'loss'") == terminal.text.count("'loss'") == 4


def test_a_resumed_training_begins_its_bar_where_it_stands(workshop, tmp_path, monkeypatch):
    fields = {**workshop, "eval_strategy": "no", "save_steps": 3, "output_dir": str(tmp_path)}
    assert train("ar", **fields, max_steps=3) == 0
    terminal = trained_on_terminal(monkeypatch, "ar", **fields, max_steps=6)
    steps = [state for state in terminal.states if state[0] == "Training"]
    assert steps[0][2:4] == ("3", "6") and steps[-1][2:4] == ("6", "6")


def test_only_the_first_process_shows_a_bar(workshop, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not is_first_process()
    with on_terminal(monkeypatch) as terminal:
        for _ in progress_bar(range(3), "Working", "piece"):
            pass
        load_with_bar(CALMAutoencoder.from_pretrained, workshop["autoencoder"])
    assert terminal.text == ""


def test_a_training_that_fails_says_so_on_a_line_of_its_own(workshop, tmp_path, monkeypatch):
    fields = {**workshop, "eval_strategy": "no", "output_dir": str(tmp_path), "learning_rate": 1e30}
    with on_terminal(monkeypatch) as terminal:
        assert train("ar", **fields, max_grad_norm=0, lr_scheduler_type="constant") == 2
    assert re.search(r"\]\s*\n\s*error: step ", terminal.text), terminal.text


def test_the_tokenizer_shows_what_it_reads(tmp_path, monkeypatch, capsys):
    text = write_corpus(tmp_path / "corpus.jsonl")
    for number, more in enumerate(({}, {"max_documents": 150})):
        fields = {"train_files": str(text), "output_dir": str(tmp_path / str(number)), **more}
        terminal = trained_on_terminal(monkeypatch, "tokenizer", **fields)
        assert terminal.bars() == ["Counting words"]
        assert terminal.states[-1][6].endswith("document/s" if more else "B/s")
        capsys.readouterr()
        assert train("tokenizer", **fields) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.xz", ".jsonl.gz", ".jsonl.zst", ".parquet", ".parquet.gz"])
def test_reading_counts_the_bytes_of_every_format(tmp_path, monkeypatch, ending):
    import gzip
    import lzma

    import datasets
    import zstandard

    from calm.training.documents import documents
    from calm.training.recipe import DataOptions

    plain = write_corpus(tmp_path / "corpus.jsonl")
    path = tmp_path / f"text{ending}"
    parquet = tmp_path / "text.parquet"
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([json.loads(line) for line in plain.read_text().splitlines()]).to_parquet(parquet)
    data = (parquet if ".parquet" in ending else plain).read_bytes()
    pack = {".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(pack.get(path.suffix, bytes)(data))
    with on_terminal(monkeypatch) as terminal:
        texts = list(documents(DataOptions(train_files=[str(path)]), "train", "Reading")[0])
    assert len(texts) == 200 and terminal.bars() == ["Reading"]


# experiments


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A language, and a CALM of its tokens."""
    folder = tmp_path_factory.mktemp("language")
    language.write(LANGUAGE, folder, {"train": (2, 64), "validation": (20, 64)})
    size = V + 4
    model = tiny_model(vocab_size=size, autoencoder_config={"vocab_size": size}, pad_token_id=3)
    model.save_pretrained(folder / "calm")
    return folder


def test_the_language_shows_what_it_writes(tmp_path, monkeypatch, capsys):
    words = ["--train_documents", 1, "--validation_documents", 1, "--output"]
    monkeypatch.setattr(language.HiddenMarkovLanguage, "text", lambda self, symbols: "a")
    with on_terminal(monkeypatch) as terminal:
        assert language.main([str(word) for word in [*words, tmp_path / "one"]]) == 0
    assert terminal.bars() == ["Writing 1 texts"] * 2
    capsys.readouterr()
    assert language.main([str(word) for word in [*words, tmp_path / "other"]]) == 0
    assert capsys.readouterr().err == ""


def test_shares_show_their_blocks(world, monkeypatch, capsys):
    words = ["--model", world / "calm", "--language", world, "--block_size", 32, "--max_positions", 70]
    bars, _ = shown(monkeypatch, capsys, share.main, *words, "--batch_size", 4)
    assert bars == [LOADING, "Share"]
    bars, _ = shown(monkeypatch, capsys, replacements.main, *words, "--batch_size", 4)
    assert bars == [LOADING, "nothing replaced", "head and backbone replaced"]


def test_sharpening_shows_its_contexts(world, monkeypatch, capsys):
    monkeypatch.setattr(sharpening, "TRUE_RECORD", 2**12)
    monkeypatch.setattr(sharpening, "SETTINGS", sharpening.SETTINGS[:2])
    words = ["--model", world / "calm", "--language", world, "--contexts", 2, "--draws", 5]
    bars, _ = shown(monkeypatch, capsys, sharpening.main, *words, "--recorded", 2**14)
    assert bars == [LOADING, "Sampling"]


class AtOnce:
    """A stage that ends when it begins, the training of a Llama badly."""

    log = "its log"

    def __init__(self, plan, stage, threads):
        self.plan, self.stage, self.has_ended = plan, stage, True
        path = stages.result_file(plan, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        positions = {"positions": 10**9, "block_size": plan.evaluation["block_size"]}
        path.write_text(json.dumps(positions))

    def conclude(self) -> bool:
        if self.stage.name == "models/ar":
            say(f"  {self.stage.name} failed", file=sys.stderr)
            return False
        return True

    def stop(self) -> None: ...


def test_experiments_show_the_stages_and_go_on_where_they_stand(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "Running", AtOnce)
    monkeypatch.setattr(stages, "SECONDS_BETWEEN_LOOKS", 0.001)
    plan = plan_in(corpus, tmp_path)
    chosen = plan.of_groups(["loss"])
    assert stages.run(plan, chosen[:3]) == []
    with on_terminal(monkeypatch, stdout=True) as terminal:
        assert stages.run(plan, chosen) == []
    assert terminal.bars() == [plan.name]
    assert terminal.states[0][2:4] == ("3", str(len(chosen)))
    assert_untorn(terminal.text, f"{len(chosen)}/{len(chosen)} models")
    everything = plan.of_groups(None)
    with on_terminal(monkeypatch, stdout=True) as terminal:
        assert "models/ar" in stages.run(plan, everything)
    assert terminal.bars() == [plan.name]
    assert_untorn(terminal.text, "  models/ar failed")
    capsys.readouterr()
    stages.run(plan, everything)
    assert capsys.readouterr().err == ""


# the bar itself


def test_rate_and_time_left_are_of_what_this_run_does(monkeypatch):
    """90 of 100 were done before: the ten that are left take a tenth of a second each."""
    with on_terminal(monkeypatch) as terminal:
        bar = progress_bar(None, "Working", "piece", 100, done=90)
        for _ in range(10):
            time.sleep(0.11)
            bar.update()
        bar.close()
    middle = terminal.states[len(terminal.states) // 2]
    assert 5 < float(middle[6].removesuffix("piece/s")) < 10 and middle[5] in ("00:00", "00:01")
    assert terminal.states[0][2] == "90"


def test_a_bar_inside_another_is_not_shown(monkeypatch):
    with on_terminal(monkeypatch) as terminal:
        for _ in progress_bar(range(2), "Outer", "piece"):
            for _ in progress_bar(range(2), "Inner", "piece"):
                pass
        for _ in progress_bar(range(2), "Next", "piece"):
            pass
    assert terminal.bars() == ["Outer", "Next"]


def test_what_is_printed_warned_and_logged_while_a_bar_runs_does_not_tear_it(monkeypatch):
    with on_terminal(monkeypatch, stdout=True) as terminal:
        logger = logging.getLogger("transformers")
        handler = logging.StreamHandler(sys.stderr)
        with monkeypatch.context() as patched:
            patched.setattr(logger, "handlers", [handler])
            with unbroken(), progress_bar(None, "Working", "piece", 3) as bar:
                bar.update()
                say("printed")
                bar.update()
                warnings.warn("warned", stacklevel=1)
                logger.error("logged")
                bar.update()
    assert terminal.bars() == ["Working"]
    for words in ("printed", str(Path(__file__)), "logged"):
        assert_untorn(terminal.text, words)


def test_say_prints_as_print_does_where_there_is_no_bar(capsys):
    say("a line")
    say("another", file=sys.stderr)
    assert capsys.readouterr() == ("a line\n", "another\n")


def test_a_stream_that_is_no_file_of_the_system_can_be_a_terminal(monkeypatch):
    class Fake(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Fake())
    for _ in progress_bar(range(3), "Working", "piece"):
        pass
    assert "3/3" in sys.stderr.getvalue()
