"""OpenAI's completions and chat completions: which fields a request has, what each comes to, the shapes of answers.

A field either works, or asks for nothing at its value, or is refused with its name in one sentence. Fields that act on
a distribution act on a step's candidates, those that act on logits on the decoder's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator
from starlette.responses import JSONResponse
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calm_transformers.grammars import Grammar
from calm_transformers.model.generation_calm_samplers import SamplingMethod
from calm_transformers.serving.batcher import Batcher

MOST_CHOICES = 128
MOST_DIGITS = 18  # of a token id
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}

NO_LOGPROBS = "CALM has no token probabilities to return."
NO_TOOLS = "tools are not called here."
# Field → the values besides null at which it asks for nothing, and why others are refused.
WITHOUT_EFFECT: dict[str, tuple[tuple, str]] = {
    "logprobs": ((False,), NO_LOGPROBS),
    "top_logprobs": ((0,), NO_LOGPROBS),
    "best_of": ((1,), "CALM has no token probabilities to rank texts by; ask for n texts."),
    "suffix": (("",), "CALM writes on from a prompt and fills nothing in."),
    "modalities": ((["text"],), "only text can be asked for."),
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
}
# Fields of a client's own, which change no text.
NOT_READ = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
)


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field that is wrong.
        code: OpenAI's name for the error, where it has one.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


class BadRequest(ApiError):
    """What is wrong with a request."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(400, message, param, code)

    @classmethod
    def of(cls, error: ValueError, request: GenerationRequest) -> BadRequest:
        """A refusal of the batcher's, in the API's words."""
        message = str(error).replace("use do_sample=False", "send 0")
        named = [name for name in re.findall(r"(\w+)[=:]", message) if name in request.model_fields_set]
        return cls(message, named[0] if named else None)


@dataclass
class Prompt:
    """One prompt of a request, as ids, and the text that `echo` puts before what is written."""

    ids: list[int]
    echo: str = ""


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Fields):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(_Fields):
    """{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": ...}}."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and not isinstance((self.json_schema or {}).get("schema"), dict):
            raise ValueError('must hold {"json_schema": {"schema": ...}}')
        return self

    @property
    def schema_of(self) -> dict[str, Any] | None:
        if self.type == "json_object":
            return {"type": "object"}
        return self.json_schema["schema"] if self.type == "json_schema" and self.json_schema else None


class CountPenalty:
    """OpenAI's penalties as a logits processor: of tokens that a text has, by how often and by that alone.

    logit − frequency · count − presence · [count > 0]; the prompt doesn't count.

    Args:
        frequency, presence: in [−2, 2].
        prompt_length: tokens of the prompt.
    """

    def __init__(self, frequency: float, presence: float, prompt_length: int = 0):
        self.frequency, self.presence, self.prompt_length = frequency, presence, prompt_length

    def after_prompt(self, length: int) -> CountPenalty:
        return CountPenalty(self.frequency, self.presence, length)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (M, V) after ids (M, L)."""
        new_ML = input_ids[:, self.prompt_length :]
        counts_MV = torch.zeros_like(scores).scatter_add_(1, new_ML, torch.ones_like(new_ML, dtype=scores.dtype))
        return scores - self.frequency * counts_MV - self.presence * (counts_MV > 0)


class GenerationRequest(_Fields):
    """What both endpoints take. Those after `response_format` are not OpenAI's."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Any = None  # a text or a list of texts
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    top_k: int | None = Field(None, ge=-1)  # -1, as vLLM has it, is all
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    num_candidates: int | None = Field(None, ge=1)
    sampling_method: SamplingMethod | None = None

    default_max_tokens: ClassVar[int | None] = None  # None: what the context leaves

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """
        Raises:
            BadRequest: no JSON, or a field that is unknown, missing, of another type or refused.
        """
        try:
            return cls.model_validate(json.loads(body))
        except RecursionError:
            raise BadRequest("The body is nested too deep.") from None
        except ValidationError as error:
            raise sentence_of(error) from None
        except ValueError as error:
            raise BadRequest(f"The body is no JSON: {error}.") from None

    @model_validator(mode="before")
    @classmethod
    def leave_out_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        kept = {}
        for name, value in fields.items():
            if name in NOT_READ:
                continue
            if name in WITHOUT_EFFECT:
                neutral, why = WITHOUT_EFFECT[name]
                if value is not None and not any(_same(value, each) for each in neutral):
                    raise BadRequest(f"{name}: {why}", name)
                continue
            check_encodable(name, value)
            kept[name] = value
        return kept

    @field_validator("stop")
    @classmethod
    def check_stop(cls, stop: Any) -> Any:
        stop = [stop] if isinstance(stop, str) else stop
        if stop is not None and not (isinstance(stop, list) and all(isinstance(each, str) for each in stop)):
            raise ValueError("must be a text or a list of texts")
        return stop

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def length_field(self) -> str:
        """The name by which the client asked for a length."""
        return "max_tokens"

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> dict[str, Any]:
        """The options of a text's law. Temperature 0 is OpenAI's way to ask for the most frequent patch."""
        options: dict[str, Any] = {"num_candidates": self.num_candidates, "sampling_method": self.sampling_method}
        options |= {"top_p": self.top_p, "min_p": self.min_p}
        options["top_k"] = 0 if self.top_k == -1 else self.top_k
        if self.temperature == 0:
            options["do_sample"] = False
        elif self.temperature is not None:
            options |= {"do_sample": True, "temperature": self.temperature}
        return options

    def rules(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
        """The options of a text that act on logits.

        Raises:
            BadRequest: a bias of what is no token, or a format that can't be written here.
        """
        options: dict[str, Any] = {}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        if self.logit_bias:
            options["sequence_bias"] = {
                (self._token(name, vocab_size),): bias for name, bias in self.logit_bias.items()
            }
        processors = []
        if self.frequency_penalty or self.presence_penalty:
            processors.append(CountPenalty(self.frequency_penalty or 0.0, self.presence_penalty or 0.0))
        if self.response_format is not None and self.response_format.schema_of is not None:
            for name in ("min_tokens", "ignore_eos"):
                if getattr(self, name):
                    why = "a text of a response_format ends where its schema does; leave it out."
                    raise BadRequest(f"{name}: {why}", name)
            try:
                processors.append(Grammar(tokenizer, json_schema=self.response_format.schema_of))
            except (ImportError, ValueError) as error:
                raise BadRequest(f"response_format: {error}", "response_format") from None
        return options | {"logits_processor": processors}

    @staticmethod
    def _token(name: str, vocab_size: int) -> int:
        if not name.isascii() or not name.isdigit() or len(name) > MOST_DIGITS or int(name) >= vocab_size:
            raise BadRequest(f"logit_bias: {name!r} is no token id in 0 … {vocab_size - 1}.", "logit_bias")
        return int(name)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Any  # a text, ids, or a list of either
    echo: bool | None = None

    default_max_tokens: ClassVar[int | None] = COMPLETION_TOKENS
    prompt_field: ClassVar = "prompt"
    id_prefix: ClassVar = "cmpl"
    answer_object: ClassVar = "text_completion"
    chunk_object: ClassVar = "text_completion"

    @field_validator("prompt")
    @classmethod
    def check_prompt(cls, prompt: Any) -> Any:
        """Texts, or lists that should be ids, of one kind; the batcher looks at each id."""
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list):
            raise ValueError("must be a text, a list of texts, or token ids")
        if not prompt:
            raise ValueError("is an empty list; give a text, a list of texts, or token ids")
        kind = type(prompt[0])
        if kind not in (str, int, list) or not all(type(each) is kind for each in prompt):
            raise ValueError("must be a text, a list of texts, or token ids")
        return [prompt] if kind is int else prompt

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)

    def prompts(self, batcher: Batcher) -> list[Prompt]:
        """
        Raises:
            BadRequest: one can't be read.
        """
        prompts = []
        for prompt in self.prompt:
            try:
                ids = batcher.encode(prompt)
            except ValueError as error:
                raise BadRequest(f"prompt: {error}", "prompt") from None
            text = (prompt if isinstance(prompt, str) else batcher.decode(ids)) if self.echo else ""
            prompts.append(Prompt(ids, text))
        return prompts

    def choice(self, text: str) -> dict[str, Any]:
        """The text's part of a choice of an answer."""
        return {"text": text, "logprobs": None}

    def opening(self, echo: str) -> dict[str, Any] | None:
        """The text's part of a stream's first chunk of a choice."""
        return self.choice(echo) if echo else None

    def delta(self, text: str) -> dict[str, Any]:
        """The text's part of a choice of a chunk."""
        return self.choice(text)


class Message(BaseModel):
    """Of its other fields some clients send a few, all null; templates may read them."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None  # a text, or a list of text parts

    @field_validator("content")
    @classmethod
    def join_parts(cls, content: Any) -> str:
        if content is None or isinstance(content, str):
            return content or ""
        if not isinstance(content, list):
            raise ValueError("must be a text or a list of text parts")
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError('must be a text or a list of parts {"type": "text", "text": ...}')
        return "".join(part["text"] for part in content)

    def as_template_reads_it(self) -> dict[str, Any]:
        others = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        return others | {"role": self.role, "content": self.content}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    prompt_field: ClassVar = "messages"
    id_prefix: ClassVar = "chatcmpl"
    answer_object: ClassVar = "chat.completion"
    chunk_object: ClassVar = "chat.completion.chunk"

    @model_validator(mode="after")
    def take_the_newer_name(self) -> ChatRequest:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    @property
    def length_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def prompts(self, batcher: Batcher) -> list[Prompt]:
        """
        Raises:
            BadRequest: there is no chat template, or it refuses the messages.
        """
        if getattr(batcher.tokenizer, "chat_template", None) is None:
            raise BadRequest(
                "messages: this model has no chat template; use /v1/completions, or start the server with "
                "--chat_template FILE.",
                "messages",
            )
        messages = [message.as_template_reads_it() for message in self.messages]
        try:
            return [Prompt(batcher.encode_chat(messages))]
        except Exception as error:  # a template is a program; what it raises is about the messages
            raise BadRequest(f"messages: the chat template refuses them: {error}", "messages") from None

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None}

    def opening(self, echo: str) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": None}


def check_encodable(name: str, value: Any) -> None:
    """
    Raises:
        BadRequest: it holds half a surrogate pair or a number that is not finite, which `json.loads` lets pass.
    """
    try:
        json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        name = name.encode("ascii", "backslashreplace").decode()
        raise BadRequest(f"{name}: holds half a surrogate pair, which is no text.", name) from None
    except ValueError:
        raise BadRequest(f"{name}: holds a number that is not finite.", name) from None


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def sentence_of(error: ValidationError) -> BadRequest:
    """The first thing that is wrong, with the field's name."""
    problems = error.errors(include_url=False, include_input=False)
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    place = [str(part) for part in problem["loc"]]
    if not place:
        return BadRequest("The body must be a JSON object.")
    if problem["type"] == "extra_forbidden":
        what = "there is no such field"
    elif problem["type"] == "missing":
        what = "is missing"
    else:
        what = problem["msg"].removeprefix("Value error, ")
        what = what[0].lower() + what[1:]
    return BadRequest(f"{'.'.join(place)}: {what}.", place[0])


def event(body: dict[str, Any]) -> str:
    """A server-sent event, in ASCII: some clients take U+0085, U+2028 and U+2029 for ends of lines."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
