"""A Gradio page that streams a CALM's text patch by patch, with the candidates of each patch.

It imports nothing from this package, as a Space copies this file as page.py. Models are loaded with transformers' Auto
classes and called through `generate` only.
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

ALL_CANDIDATES = 2**31 - 1  # a top-k without effect, except that a step samples all N candidates at T = 1, too
MAX_SHOWN_CANDIDATES = 8
NUM_CONTEXT_TOKENS = 8  # decoded together with a candidate
UPDATE_INTERVAL_SECONDS = 0.1
PROMPT = "Once upon a time, there was a little girl named Lily."

STYLE = """
.calm { --even: #e4eefb; --odd: #fdeed9; --ink: #1d1f24; --soft: #62666f; --card: #ffffff; --line: #dedbd4;
  --bar: #3671c6; --chosen: #c05f14; --error: #a8231b; position: relative; color: var(--ink);
  max-width: 54rem; }
.dark .calm { --even: #22344c; --odd: #45351e; --ink: #e7e6e2; --soft: #a4aab5; --card: #1e2127; --line: #3a404a;
  --bar: #6da6f2; --chosen: #f0a35b; --error: #ff9c94; }
.calm .name { display: flex; flex-wrap: wrap; gap: 0 1rem; justify-content: space-between; font-weight: 600;
  border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
.calm .hint, .calm h1, .calm p { font-family: system-ui, sans-serif; }
.calm h1 { font-size: 1.35rem; margin: 0; padding-bottom: .4rem; }
.calm .intro { font-size: 1rem; line-height: 1.5; margin: 0; }
.calm .name span, .calm .hint { color: var(--soft); font-weight: 400; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
.calm .name b { white-space: nowrap; }
.calm .text { position: relative; font: 1.15rem/2 Georgia, "Times New Roman", serif; white-space: pre-wrap;
  overflow-wrap: anywhere; padding: .5rem 0; min-height: 4rem; }
.calm .prompt { color: var(--soft); }
.calm .patch { background: var(--even); border-radius: .2em; padding: .12em 0; cursor: default; outline: none; }
.calm .patch.odd { background: var(--odd); }
.calm .break::before { content: "↵"; color: var(--soft); font-style: normal; }
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
#controls input[type=range]::-webkit-slider-thumb { background: #3671c6; }
@media (max-width: 36rem) {
  #controls input[type=range] { height: 2.75rem; }
  #controls .tab-like-container { height: 2.5rem; margin: 0; }
  #controls .reset-button { min-width: 2.75rem; }
}
"""


@dataclass
class Settings:
    """Values of the page's controls; models ignore the fields that they don't support."""

    temperature: float = 0.5
    num_candidates: int = 200
    max_new_tokens: int = 120
    top_p: float = 1.0
    seed: int = 0
    show_candidates: bool = True

    def check(self) -> None:
        """Raises ValueError for a field that is not a number or out of range."""
        for name, (label, low, high) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{label}: must be a number {bound}.")


# Field of Settings → label, minimum, maximum.
RANGES = {
    "temperature": ("Temperature", 0.05, 2.0),
    "num_candidates": ("Candidates", 1, 1000),
    "max_new_tokens": ("Tokens", 1, math.inf),
    "top_p": ("Top-p", 0.05, 1),
    "seed": ("Seed", 0, 2**53),
}


@dataclass
class Candidate:
    """A candidate of a patch: its text, its weight, and how often it was sampled."""

    text: str
    weight: float
    count: int
    is_chosen: bool


@dataclass
class Step:
    """A generated patch (or token), the candidates that are shown, and the number of distinct candidates."""

    text: str
    candidates: list[Candidate] = field(default_factory=list)
    num_candidates: int = 0


class IncrementalDetokenizer:
    """Decodes a growing sequence; holds back the bytes of an incomplete character."""

    def __init__(self, tokenizer, ids: Sequence[int] = ()):
        self.tokenizer, self.ids = tokenizer, list(ids)
        self.length = len(self._decode())  # of the text that was returned

    def append(self, tokens: Sequence[int], is_last: bool = False) -> str:
        """Appends tokens and returns the text that they add."""
        self.ids += tokens
        text = self._decode() if is_last else self._decode().rstrip("\ufffd")
        added, self.length = text[self.length :], max(self.length, len(text))
        return added

    def _decode(self) -> str:
        return self.tokenizer.decode(self.ids)


class GenerationState:
    """The text generated so far, updated by the events of a `QueueStreamer`; each step has `step_size` tokens."""

    def __init__(self, prompt: str, tokenizer, prompt_ids: Sequence[int], step_size: int):
        self.prompt, self.step_size = prompt, step_size
        self.detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids)
        self.steps: list[Step] = []
        self.next_step = Step("")
        self.num_tokens, self.seconds, self.is_done = 0, 0.0, False

    def update(self, event: str, value: Any) -> None:
        """Updates the state by "scores" (a step's `CandidateScores`, as lists), by a "token", or by the "end"."""
        if event == "scores":
            patches, counts, weights, chosen, *_ = value
            candidates = self._shown_candidates(patches, counts, weights, chosen)
            self.next_step = Step("", candidates, sum(1 for count in counts if count))
        elif event == "token":
            if self.num_tokens % self.step_size == 0:
                self.steps.append(self.next_step)
                self.next_step = Step("")
            self.num_tokens += 1
            self.steps[-1].text += self.detokenizer.append([value])
        else:
            self.is_done = True
            if self.steps:
                self.steps[-1].text += self.detokenizer.append([], is_last=True)

    def _shown_candidates(self, patches, counts, weights, chosen: int) -> list[Candidate]:
        """Returns the first candidates; the chosen one replaces the last of them if it is not among them."""
        shown = list(range(min(MAX_SHOWN_CANDIDATES, len(patches))))
        if chosen not in shown:
            shown[-1] = chosen
        decoder = self.detokenizer
        return [
            Candidate(text_after(decoder.tokenizer, decoder.ids, patches[i]), weights[i], counts[i], i == chosen)
            for i in shown
            if counts[i]
        ]


class GenerationStopped(Exception):
    """Raised in `generate` once the page no longer needs the text."""


class QueueStreamer(BaseStreamer):
    """Sends tokens and candidates to another thread; ends `generate` once `stop_requested` is set."""

    def __init__(self):
        self.events: queue.Queue = queue.Queue()
        self.stop_requested = threading.Event()
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, and then with each token."""
        if self.is_prompt:
            self.is_prompt = False
            return
        self._send("token", int(value[0]))

    def put_scores(self, scores) -> None:
        """Called by a CALM with the `CandidateScores` of a patch, before its tokens."""
        self._send("scores", [values[0].tolist() for values in scores])

    def end(self) -> None:
        self._send("end", None)

    def _send(self, event: str, value: Any) -> None:
        if self.stop_requested.is_set():
            raise GenerationStopped
        self.events.put((event, value))


class PageModel:
    """A CALM or another causal LM (in eval mode) with its tokenizer and the name that the page displays."""

    def __init__(self, name: str, model, tokenizer):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.is_calm = model.config.model_type == "calm"
        self.step_size = model.config.patch_size if self.is_calm else 1
        self.max_tokens = (getattr(model.config, "max_position_embeddings", None) or 2**20) * self.step_size

    @classmethod
    def load(cls, name: str, trust_remote_code: bool = False, device: str | None = None) -> PageModel:
        """Loads model and tokenizer of a folder or Hub id; a CALM needs `trust_remote_code`."""
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code, dtype="auto")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(name, model.to(device).eval(), tokenizer)

    def stream(self, prompt: str, settings: Settings) -> Iterator[GenerationState]:
        """Generates in a thread and yields its state repeatedly; a ValueError if the prompt or a setting is invalid.

        Closing the iterator stops the generation.
        """
        settings.check()
        ids = self._prompt_ids(prompt, int(settings.max_new_tokens))
        streamer = QueueStreamer()
        thread = threading.Thread(target=self._generate, args=(ids, settings, streamer), daemon=True)
        state = GenerationState(prompt, self.tokenizer, ids, self.step_size)
        start = last_update = time.perf_counter()
        thread.start()
        try:
            while not state.is_done:
                event, value = streamer.events.get()
                if event == "error":
                    raise value
                state.update(event, value)
                state.seconds = time.perf_counter() - start
                if state.is_done or time.perf_counter() - last_update > UPDATE_INTERVAL_SECONDS:
                    last_update = time.perf_counter()
                    yield state
        finally:
            streamer.stop_requested.set()
            thread.join()

    def _prompt_ids(self, prompt: str, max_new_tokens: int) -> list[int]:
        """Returns the prompt's ids, or BOS for an empty prompt; raises ValueError if it is too long."""
        ids = list(self.tokenizer(prompt).input_ids)
        bos_token_id = self.model.generation_config.bos_token_id
        if not ids and bos_token_id is None:
            raise ValueError(f"{self.name} needs a prompt: it has no bos_token_id to start an empty one.")
        ids = ids or [bos_token_id]
        if len(ids) + max_new_tokens > self.max_tokens:
            raise ValueError(
                f"{len(ids)} prompt tokens + {max_new_tokens} new tokens exceed the {self.max_tokens} tokens that "
                f"{self.name} supports: shorten the prompt or generate fewer."
            )
        return ids

    def _generate(self, ids: list[int], settings: Settings, streamer: QueueStreamer) -> None:
        """Generates to the streamer; the target of a thread, so an exception is sent as an event."""
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
                streamer=streamer,
                return_dict_in_generate=True,
                output_scores=self.is_calm and settings.show_candidates,
                **options,
            )
        except GenerationStopped:
            pass
        except Exception as error:
            streamer.events.put(("error", error))

    def _calm_options(self, settings: Settings) -> dict[str, Any]:
        generator = torch.Generator(self.model.device).manual_seed(int(settings.seed))
        options: dict[str, Any] = {"num_candidates": int(settings.num_candidates), "generator": generator}
        if settings.show_candidates:  # sample all N, at T = 1 too
            options |= {"sampling_method": "batch", "top_k": ALL_CANDIDATES}
        return options

    def _token_options(self, settings: Settings) -> dict[str, Any]:
        """Seeds torch, and returns options of `generate` for a token-level model."""
        torch.manual_seed(int(settings.seed))  # upstream's generate takes no generator
        return {"top_k": 0, "pad_token_id": self.model.generation_config.pad_token_id or 0}


def text_after(tokenizer, ids: Sequence[int], tokens: Sequence[int]) -> str:
    """Returns the text that tokens add after `ids`, where spaces and bytes may merge; keeps special tokens."""
    context = list(ids[-NUM_CONTEXT_TOKENS:])
    before, after = tokenizer.decode(context), tokenizer.decode([*context, *tokens])
    return after[len(before) :] if after.startswith(before) else tokenizer.decode(list(tokens))


def visible(text: str) -> str:
    """Returns a candidate's or a patch's text on one line, with signs for line breaks and tabs, and for no text."""
    return text.replace("\n", "↵").replace("\t", "⇥") or "∅"


# HTML


def render_intro(patch_size: int) -> str:
    """Returns the HTML of the title, and of two sentences for someone who has never heard of CALM."""
    return f"""<div class="calm"><h1>A language model that writes patch by patch</h1>
<p class="intro">An ordinary language model generates one token, a word or a piece of one, per step; a CALM generates a
patch of {patch_size} tokens per step. Each tint is a patch: hover over it or tap it to see which patches were sampled
for its place, how often, and with which weight one of them was chosen.</p></div>"""


def render(model: PageModel, state: GenerationState | None = None, error: str = "") -> str:
    """Returns the HTML of a model's text or error."""
    body = ""
    if state is not None:
        spans = [_render_step(number, step) for number, step in enumerate(state.steps)]
        body = f'<div class="text"><span class="prompt">{html.escape(state.prompt)}</span>{"".join(spans)}</div>'
    elif not error:
        body = '<div class="text"><span class="hint">Press Generate.</span></div>' if model.is_calm else ""
    if error:
        body += f'<p class="error" role="alert">{html.escape(error)}</p>'
    name = html.escape(model.name)
    return f'<div class="calm"><div class="name">{name}<span>{_render_speed(model, state)}</span></div>{body}</div>'


def _render_speed(model: PageModel, state: GenerationState | None) -> str:
    if state is None or not state.num_tokens or not state.seconds:
        return f"{model.step_size} tokens per patch" if model.is_calm else "1 token per step"
    speed = f"{state.num_tokens / state.seconds:.0f} tokens/s"
    steps = f" in {len(state.steps)} patches" if model.is_calm else ""
    return f"{state.num_tokens} tokens{steps} · {state.seconds:.1f} s · <b>{speed}</b>"


def _render_step(number: int, step: Step) -> str:
    css_class = "patch odd" if number % 2 else "patch"
    text = html.escape(step.text).replace("\n", '<i class="break"></i>\n')
    if not step.candidates:
        return f'<span class="{css_class}">{text}</span>'
    card = [f"<b>{step.num_candidates} candidates for patch {number + 1}</b>"]
    for candidate in step.candidates:
        card.append(
            f'<span class="row{" chosen" if candidate.is_chosen else ""}">'
            f"<code>{html.escape(visible(candidate.text))}</code>"
            f'<span>{candidate.count} ×</span><i style="--weight:{candidate.weight:.1%}"></i>'
            f"<span>{candidate.weight:.1%}</span></span>"
        )
    return f'<span class="{css_class}" tabindex="0">{text}<span class="card">{"".join(card)}</span></span>'


def stream_html(models: Sequence[PageModel], prompt: str, settings: Settings) -> Iterator[tuple[str, ...]]:
    """Generates with one model after the other and yields the HTML of all; errors are shown in place of the text."""
    outputs = [render(model) for model in models]
    for i, model in enumerate(models):
        try:
            for state in model.stream(prompt, settings):
                outputs[i] = render(model, state)
                yield tuple(outputs)
        except ValueError as error:
            outputs[i] = render(model, error=" ".join(str(error).split()))
        except Exception as error:
            logging.exception("%s failed to generate", model.name)
            outputs[i] = render(model, error=f"{model.name} failed to generate: {type(error).__name__}.")
        yield tuple(outputs)


def create_page(models: Sequence[PageModel], prompt: str = PROMPT):
    """Returns the page, a `gradio.Blocks`, of a CALM and optionally a second model."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr  # pyright: ignore[reportMissingImports]  # of the extra [app]

    config = models[0].model.generation_config
    default = Settings(config.temperature or 1.0, getattr(config, "num_candidates", None) or 200)
    default.max_new_tokens = min(default.max_new_tokens, models[0].max_tokens // 2)
    with gr.Blocks(title="CALM", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(render_intro(models[0].step_size), elem_id="intro")
        with gr.Row(equal_height=True):
            text = gr.Textbox(prompt, label="Prompt", lines=2, max_lines=8, scale=4, min_width=280, elem_id="prompt")
            with gr.Column(scale=1, min_width=240):
                start = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", elem_id="stop")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=280), gr.Row(equal_height=False):
                outputs = []
                for i, model in enumerate(models):
                    with gr.Column(min_width=280):
                        output = gr.HTML(render(model), min_height=320, elem_id=f"text{i}", elem_classes="calm-view")
                    outputs.append(output)
            with gr.Column(scale=1, min_width=240, elem_id="controls"):
                controls = _controls(gr, default, models[0].max_tokens)

        def write(prompt, *values):
            for html_of_models in stream_html(models, prompt or "", Settings(*values)):
                yield html_of_models if len(models) > 1 else html_of_models[0]  # as gradio wants a single output

        listener = {"fn": write, "inputs": [text, *controls], "outputs": outputs, "show_progress": "hidden"}
        listener |= {"concurrency_id": "write", "concurrency_limit": 1}
        running = [start.click(**listener, api_name="write"), text.submit(**listener, api_visibility="private")]
        stop.click(None, cancels=running, api_visibility="private")
    return page


def _controls(gr, default: Settings, max_tokens: int) -> list:
    """Returns one control per field of `Settings`, in the same order; `gr` is the module gradio."""
    steps = {"temperature": 0.05, "num_candidates": 1, "max_new_tokens": 1, "top_p": 0.05}
    sliders = []
    for name, step in steps.items():
        label, low, high = RANGES[name]
        high = min(high, max(min(max_tokens, 2000) - 1, 1)) if name == "max_new_tokens" else high
        slider = gr.Slider(low, high, getattr(default, name), step=step, label=label, elem_id=name)
        slider.preprocess = lambda value: value  # Settings.check has clearer messages
        sliders.append(slider)
    checkbox = {"label": "Show candidates", "info": "Samples and decodes all N; a CALM is faster without."}
    return [
        *sliders,
        gr.Number(default.seed, precision=0, label=RANGES["seed"][0], elem_id="seed"),
        gr.Checkbox(default.show_candidates, elem_id="show_candidates", **checkbox),
    ]


def launch(page, **options) -> None:
    """Serves a page of `create_page` until the process ends, without requests to other servers.

    options: options of `gradio.Blocks.launch`.
    """
    import gradio as gr  # pyright: ignore[reportMissingImports]  # of the extra [app]

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "Consolas", "monospace"]}
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="stone", **fonts)
    theme.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")  # for contrast
    page.queue().launch(theme=theme, css=STYLE, ssr_mode=False, footer_links=[], **options)
