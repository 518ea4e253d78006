"""A Gradio page on which a CALM writes patch by patch, with what each patch was chosen from.

Of this package it needs nothing: a Space copies this file as page.py. It loads models with transformers' Auto classes
and asks them through `generate` alone.
"""

from __future__ import annotations

import html
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

ALL_CANDIDATES = 2**31 - 1  # a top-k that keeps all, yet lets a step at T = 1 draw N
SHOWN = 8  # candidates of a patch
CONTEXT = 8  # tokens before a candidate that its text is read after
SECONDS_BETWEEN_VIEWS = 0.1
PROMPT = "Once upon a time, there was a little girl named Lily."

STYLE = """
.calm { --even: #e4eefb; --odd: #fdeed9; --ink: #1d1f24; --soft: #686c76; --card: #ffffff; --line: #dedbd4;
  --bar: #3671c6; --chosen: #c05f14; --error: #a8231b; position: relative; color: var(--ink);
  max-width: 54rem; }
.dark .calm { --even: #22344c; --odd: #45351e; --ink: #e7e6e2; --soft: #9aa0ab; --card: #1e2127; --line: #3a404a;
  --bar: #6da6f2; --chosen: #f0a35b; --error: #ff9c94; }
.calm .name { display: flex; flex-wrap: wrap; gap: 0 1rem; justify-content: space-between; font-weight: 600;
  border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
.calm .hint { font-family: system-ui, sans-serif; }
.calm .name span, .calm .hint { color: var(--soft); font-weight: 400; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
.calm .text { position: relative; font: 1.15rem/2 Georgia, "Times New Roman", serif; white-space: pre-wrap;
  overflow-wrap: anywhere; padding: .5rem 0; min-height: 4rem; }
.calm .prompt { color: var(--soft); }
.calm .patch { background: var(--even); border-radius: .2em; padding: .12em 0; cursor: default; outline: none; }
.calm .patch.odd { background: var(--odd); }
.calm .patch:hover, .calm .patch:focus { box-shadow: 0 0 0 2px var(--bar); }
.calm .card { display: none; }
.calm .patch:hover .card, .calm .patch:focus .card { display: block; position: absolute; left: 0; z-index: 20;
  width: min(24rem, 100%); background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .8rem; margin-top: .2rem; box-shadow: 0 6px 22px rgb(0 0 0 / .22);
  font: .875rem/1.5 system-ui, sans-serif; white-space: normal; pointer-events: none; }
.calm .card > b { display: block; font-weight: 400; color: var(--soft); font-size: .8rem; }
.calm .row { display: grid; grid-template-columns: minmax(0, 1fr) 2.5rem minmax(1.5rem, 22%) 3.2rem; gap: .4rem;
  align-items: center; font-variant-numeric: tabular-nums; text-align: right; }
.calm .row code { justify-self: start; max-width: 100%; font: .9em ui-monospace, Consolas, monospace; white-space: pre;
  overflow: hidden; text-overflow: ellipsis; background: color-mix(in srgb, var(--ink) 8%, transparent);
  color: inherit; border: 0; padding: 0 .2em; border-radius: .2em; }
.calm .row.chosen code { background: color-mix(in srgb, var(--chosen) 30%, transparent); font-weight: 600; }
.calm .row i { height: .6rem; border-radius: .2rem; background: linear-gradient(var(--bar) 0 0) left / var(--weight)
  100% no-repeat, color-mix(in srgb, var(--ink) 9%, transparent); }
.calm .row.chosen i { background: linear-gradient(var(--chosen) 0 0) left / var(--weight) 100% no-repeat,
  color-mix(in srgb, var(--ink) 9%, transparent); }
.calm .error { color: var(--error); margin: .6rem 0; }
.calm-view { overflow: visible !important; }
"""


@dataclass
class Settings:
    """What the page's controls say; the fields that a model has no use for are left alone."""

    temperature: float = 0.5
    num_candidates: int = 200
    max_new_tokens: int = 120
    top_p: float = 1.0
    seed: int = 0
    shows_candidates: bool = True

    def check(self) -> None:
        """Raise ValueError, with a sentence, for a field that is no number or outside its range."""
        for name, (label, least, most) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                bound = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                raise ValueError(f"{label}: must be a number {bound}.")


# Field of Settings → its label, and what may be chosen.
RANGES = {
    "temperature": ("Temperature", 0.05, 2.0),
    "num_candidates": ("Candidates", 1, 1000),
    "max_new_tokens": ("Tokens", 1, math.inf),
    "top_p": ("Top-p", 0.05, 1),
    "seed": ("Seed", 0, 2**53),
}


@dataclass
class Candidate:
    """What might have been written: its text, its share in the choice, and how often it was drawn."""

    text: str
    weight: float
    count: int
    is_chosen: bool


@dataclass
class Step:
    """What one step wrote, and the likeliest of what it chose from; of how many."""

    text: str
    candidates: list[Candidate] = field(default_factory=list)
    num_candidates: int = 0


class Written:
    """A text while it is written, by what a `StepQueue` sends.

    Args:
        prompt: what it begins with.
        tokenizer: of the model.
        prompt_ids: the prompt as the model reads it.
        step_size: tokens of a step.
    """

    def __init__(self, prompt: str, tokenizer, prompt_ids: Sequence[int], step_size: int):
        self.prompt, self.tokenizer, self.ids, self.step_size = prompt, tokenizer, list(prompt_ids), step_size
        self.num_prompt, self.shown = len(self.ids), len(self._text())
        self.steps: list[Step] = []
        self.next_step = Step("")
        self.seconds, self.is_done = 0.0, False

    @property
    def num_tokens(self) -> int:
        return len(self.ids) - self.num_prompt

    def read(self, kind: str, value: Any) -> None:
        if kind == "scores":
            patches, counts, weights, chosen, *_ = value
            candidates = self._candidates(patches, counts, weights, chosen)
            self.next_step = Step("", candidates, sum(1 for count in counts if count))
        elif kind == "token":
            if self.num_tokens % self.step_size == 0:
                self.steps.append(self.next_step)
                self.next_step = Step("")
            self.ids.append(value)
            self._extend(is_end=False)
        else:
            self.is_done = True
            if self.steps:
                self._extend(is_end=True)

    def _extend(self, is_end: bool) -> None:
        text = self._text()
        if not is_end:
            text = text.rstrip("\ufffd")  # a character that is not complete
        self.steps[-1].text += text[self.shown :]
        self.shown = max(self.shown, len(text))

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def _candidates(self, patches, counts, weights, chosen: int) -> list[Candidate]:
        shown = list(range(min(SHOWN, len(patches))))
        if chosen not in shown:
            shown[-1] = chosen
        return [
            Candidate(text_after(self.tokenizer, self.ids, patches[i]), weights[i], counts[i], i == chosen)
            for i in shown
            if counts[i]
        ]


class Stopped(Exception):
    """Nobody waits for the text any more."""


class StepQueue(BaseStreamer):
    """Hands tokens, and what they were chosen from, to another thread; ends `generate` once `stop` is set."""

    def __init__(self):
        self.events: queue.Queue = queue.Queue()
        self.stop = threading.Event()
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self._send("token", int(value[0]))

    def put_scores(self, scores) -> None:
        """Called by a CALM before a patch's tokens, with its `CandidateScores`."""
        self._send("scores", [values[0].tolist() for values in scores])

    def end(self) -> None:
        self._send("end", None)

    def _send(self, kind: str, value: Any) -> None:
        if self.stop.is_set():
            raise Stopped
        self.events.put((kind, value))


class Writer:
    """A model that writes on the page, a CALM or an ordinary one.

    Args:
        name: what the page calls it.
        model: in eval mode.
        tokenizer: its tokenizer.
    """

    def __init__(self, name: str, model, tokenizer):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.is_calm = model.config.model_type == "calm"
        self.step_size = model.config.patch_size if self.is_calm else 1
        self.longest = (getattr(model.config, "max_position_embeddings", None) or 2**20) * self.step_size

    @classmethod
    def load(cls, name: str, trust_remote_code: bool = False, device: str | None = None) -> Writer:
        """The model of a folder or Hub id; a CALM brings its own code, which `trust_remote_code` lets it run."""
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code, dtype="auto")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(name, model.to(device).eval(), tokenizer)

    def write(self, prompt: str, settings: Settings) -> Iterator[Written]:
        """Yields the same text again and again as it grows. Closing the iterator ends the writing.

        Raises:
            ValueError: a prompt or a setting that the model can't take, in a sentence.
        """
        settings.check()
        ids = self._prompt_ids(prompt, int(settings.max_new_tokens))
        yield from self._write(prompt, ids, settings)

    def _prompt_ids(self, prompt: str, max_new_tokens: int) -> list[int]:
        ids = list(self.tokenizer(prompt).input_ids)
        start = self.model.generation_config.bos_token_id
        if not ids and start is None:
            raise ValueError(f"{self.name} needs a prompt: it has no token that a text without one could begin with.")
        ids = ids or [start]
        if len(ids) + max_new_tokens > self.longest:
            raise ValueError(
                f"The prompt has {len(ids)} tokens and {max_new_tokens} are to be written, but {self.name} takes "
                f"{self.longest} together: shorten the prompt or write fewer."
            )
        return ids

    def _write(self, prompt: str, ids: list[int], settings: Settings) -> Iterator[Written]:
        sending = StepQueue()
        thread = threading.Thread(target=self._generate, args=(ids, settings, sending), daemon=True)
        written = Written(prompt, self.tokenizer, ids, self.step_size)
        begin = last_view = time.perf_counter()
        thread.start()
        try:
            while not written.is_done:
                kind, value = sending.events.get()
                if kind == "error":
                    raise value
                written.read(kind, value)
                written.seconds = time.perf_counter() - begin
                if written.is_done or time.perf_counter() - last_view > SECONDS_BETWEEN_VIEWS:
                    last_view = time.perf_counter()
                    yield written
        finally:
            sending.stop.set()
            thread.join()

    def _generate(self, ids: list[int], settings: Settings, sending: StepQueue) -> None:
        try:
            input_ids = torch.tensor([ids], device=self.model.device)
            options = self._calm_options(settings) if self.is_calm else self._token_options(settings)
            self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=int(settings.max_new_tokens),
                do_sample=True,
                temperature=float(settings.temperature),
                top_p=float(settings.top_p),
                streamer=sending,
                return_dict_in_generate=True,
                output_scores=self.is_calm and settings.shows_candidates,
                **options,
            )
        except Stopped:
            pass
        except Exception as error:
            sending.events.put(("error", error))

    def _calm_options(self, settings: Settings) -> dict[str, Any]:
        options: dict[str, Any] = {
            "num_candidates": int(settings.num_candidates),
            "generator": torch.Generator(self.model.device).manual_seed(int(settings.seed)),
        }
        if settings.shows_candidates:  # all of them are drawn, at T = 1 too
            options |= {"sampling_method": "batch", "top_k": ALL_CANDIDATES}
        return options

    def _token_options(self, settings: Settings) -> dict[str, Any]:
        torch.manual_seed(int(settings.seed))  # upstream's generate takes no generator
        return {"top_k": 0, "pad_token_id": self.model.generation_config.pad_token_id or 0}


def text_after(tokenizer, ids: Sequence[int], tokens: Sequence[int]) -> str:
    """What tokens add to the text of ids, which is not what they are alone; special ones by their names."""
    context = list(ids[-CONTEXT:])
    before, after = tokenizer.decode(context), tokenizer.decode([*context, *tokens])
    return after[len(before) :] if after.startswith(before) else tokenizer.decode(list(tokens))


# What the page shows


def view(writer: Writer, written: Written | None = None, error: str = "") -> str:
    """HTML of a text, or of why there is none."""
    inside = ""
    if written is not None:
        spans = [_step(number, step) for number, step in enumerate(written.steps)]
        inside = f'<div class="text"><span class="prompt">{html.escape(written.prompt)}</span>{"".join(spans)}</div>'
    elif not error:
        hint = "Press Write. Each tint is a patch; point at one, or tap it, to see what it was chosen from."
        inside = f'<div class="text"><span class="hint">{hint}</span></div>' if writer.is_calm else ""
    if error:
        inside += f'<p class="error" role="alert">{html.escape(error)}</p>'
    name = html.escape(writer.name)
    return f'<div class="calm"><div class="name">{name}<span>{_figures(writer, written)}</span></div>{inside}</div>'


def _figures(writer: Writer, written: Written | None) -> str:
    if written is None or not written.num_tokens or not written.seconds:
        return f"{writer.step_size} tokens a patch" if writer.is_calm else "a token at a time"
    rate = f"{written.num_tokens / written.seconds:.0f} tokens/s"
    steps = f" in {len(written.steps)} patches" if writer.is_calm else ""
    return f"{written.num_tokens} tokens{steps} · {written.seconds:.1f} s · <b>{rate}</b>"


def _step(number: int, step: Step) -> str:
    kind = "patch odd" if number % 2 else "patch"
    text = html.escape(step.text) or ("⏹" if step.candidates else "")
    if not step.candidates:
        return f'<span class="{kind}">{text}</span>'
    lines = [f"<b>{step.num_candidates} candidates for patch {number + 1}</b>"]
    for candidate in step.candidates:
        shown = html.escape(candidate.text.replace("\n", "⏎").replace("\t", "⇥")) or "∅"
        lines.append(
            f'<span class="row{" chosen" if candidate.is_chosen else ""}"><code>{shown}</code>'
            f'<span>{candidate.count} ×</span><i style="--weight:{candidate.weight:.1%}"></i>'
            f"<span>{candidate.weight:.1%}</span></span>"
        )
    return f'<span class="{kind}" tabindex="0">{text}<span class="card">{"".join(lines)}</span></span>'


def views(writers: Sequence[Writer], prompt: str, settings: Settings) -> Iterator[tuple[str, ...]]:
    """HTML of each writer, as they write one after the other; what goes wrong is shown where the text would be."""
    shown = [view(writer) for writer in writers]
    for i, writer in enumerate(writers):
        try:
            for written in writer.write(prompt, settings):
                shown[i] = view(writer, written)
                yield tuple(shown)
        except ValueError as error:
            shown[i] = view(writer, error=" ".join(str(error).split()))
        except Exception as error:
            logging.exception("%s could not write", writer.name)
            shown[i] = view(writer, error=f"{writer.name} could not write this: {type(error).__name__}.")
        yield tuple(shown)


def create_page(writers: Sequence[Writer], prompt: str = PROMPT):
    """The page, a `gradio.Blocks`, of a CALM and, if there are two, of a model beside it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr  # pyright: ignore[reportMissingImports]  # of the extra [app]

    calm = writers[0]
    stated = calm.model.generation_config
    default = Settings(
        temperature=stated.temperature or 1.0, num_candidates=getattr(stated, "num_candidates", None) or 200
    )
    default.max_new_tokens = min(default.max_new_tokens, calm.longest // 2)
    with gr.Blocks(title="CALM", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(equal_height=True):
            text = gr.Textbox(prompt, label="Prompt", lines=2, max_lines=8, scale=4, min_width=280, elem_id="prompt")
            with gr.Column(scale=1, min_width=240):
                start = gr.Button("Write", variant="primary", elem_id="write")
                stop = gr.Button("Stop", elem_id="stop")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=280), gr.Row(equal_height=False):
                outputs = []
                for i, writer in enumerate(writers):
                    with gr.Column(min_width=280):
                        shown = gr.HTML(view(writer), min_height=320, elem_id=f"text{i}", elem_classes="calm-view")
                    outputs.append(shown)
            with gr.Column(scale=1, min_width=240):
                controls = _controls(gr, default, calm.longest)

        def write(prompt, *values):
            for shown in views(writers, prompt or "", Settings(*values)):
                yield shown if len(writers) > 1 else shown[0]

        asked = {"fn": write, "inputs": [text, *controls], "outputs": outputs, "show_progress": "hidden"}
        asked |= {"concurrency_id": "write", "concurrency_limit": 1}
        begun = [start.click(**asked, api_name="write"), text.submit(**asked, api_visibility="private")]
        stop.click(None, cancels=begun, api_visibility="private")
    return page


def _controls(gr, default: Settings, longest: int) -> list:
    """One for each field of `Settings`, in their order."""
    steps = {"temperature": 0.05, "num_candidates": 1, "max_new_tokens": 1, "top_p": 0.05}
    found = []
    for name, step in steps.items():
        label, least, most = RANGES[name]
        most = min(most, max(min(longest, 2000) - 1, 1)) if name == "max_new_tokens" else most
        slider = gr.Slider(least, most, getattr(default, name), step=step, label=label, elem_id=name)
        slider.preprocess = lambda typed: typed  # Settings.check says more of what is wrong
        found.append(slider)
    shows = {"label": "Show candidates", "info": "Draws and decodes all of them; without, a CALM is faster."}
    return [
        *found,
        gr.Number(default.seed, precision=0, label=RANGES["seed"][0], elem_id="seed"),
        gr.Checkbox(default.shows_candidates, elem_id="shows_candidates", **shows),
    ]


def launch(page, **options) -> None:
    """Serves the page until the process ends; no font, script or figure comes from or goes to anywhere else.

    Args:
        page: of `create_page`.
        options: of `gradio.Blocks.launch`.
    """
    import gradio as gr  # pyright: ignore[reportMissingImports]  # of the extra [app]

    theme = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    page.queue().launch(theme=theme, css=STYLE, ssr_mode=False, footer_links=[], **options)
