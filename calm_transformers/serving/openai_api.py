"""OpenAI's completions and chat completions: the fields of requests, their meaning, and the shape of answers.

A field is supported, or accepted at values that have no effect, or answered with an error that names it. Fields that
filter a distribution filter a step's candidates; those that change logits change the decoder's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator
from pydantic.json_schema import WithJsonSchema, models_json_schema
from starlette.responses import JSONResponse
from starlette.routing import Route
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calm_transformers import __version__
from calm_transformers.grammars import Grammar
from calm_transformers.model.generation_calm_samplers import SamplingMethod
from calm_transformers.serving.batcher import Batcher

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_FIELDS = 100
MAX_BIASES = 1024
MAX_SCHEMA_BYTES = 2**16
MAX_TOKEN_ID_DIGITS = 18
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
FIELDS_OF_OPTIONS = {"num_logprobs": "logprobs", "min_new_tokens": "min_tokens"}  # those of other names
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}

NO_TOOLS = "tools are not supported."
# Field → the values besides null that are accepted because they have no effect, and why others are not supported.
UNSUPPORTED_FIELDS: dict[str, tuple[tuple, str]] = {
    "best_of": ((1,), "texts are not ranked; use n."),
    "suffix": (("",), "CALM continues a prompt and doesn't infill."),
    "modalities": ((["text"],), "only text is supported."),
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
}
# Fields that are accepted and ignored: they don't change the text.
IGNORED_FIELDS = (
    *("user", "metadata", "store", "service_tier"),
    *("parallel_tool_calls", "safety_identifier", "prompt_cache_key"),
)


def _encodable_line(text: str) -> str:
    """Returns text of a request, such as a field's name, for an answer: one line without lone surrogates."""
    return " ".join(text.encode(errors="backslashreplace").decode().splitlines())


class ApiError(Exception):
    """An error answer in OpenAI's shape.

    Args:
        status: HTTP status.
        message: one sentence.
        param: the invalid field.
        code: OpenAI's name for the error, if it has one.
        headers: headers of the answer.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(_encodable_line(message))
        self.status, self.code, self.headers = status, code, headers
        self.param = None if param is None else _encodable_line(param)

    def body(self) -> dict[str, Any]:
        error_type = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": error_type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


class BadRequest(ApiError):
    """A 400: a field of the request is invalid."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(400, message, param, code)

    @classmethod
    def from_value_error(cls, error: ValueError, request: GenerationRequest) -> BadRequest:
        """Returns the answer to an error of `Batcher.prepare`, with the field that sets the invalid option."""
        options = getattr(error, "options", ())  # of an OptionError, whose class may be a remote model's
        fields = [FIELDS_OF_OPTIONS.get(option, option) for option in options]
        param = next((field for field in fields if field in request.model_fields_set), None)
        return cls(str(error).replace("use do_sample=False", "send 0"), param)


# JSON schemas for the API's description, of fields that validators check
STRING, IDS = {"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}}
TEXT = {"type": "object", "properties": {"type": {"const": "text"}, "text": STRING}, "required": ["type", "text"]}
LISTS = [{"type": "array", "items": each, "minItems": 1} for each in (STRING, IDS, IDS["items"])]
PROMPTS = {"anyOf": [STRING, *LISTS]}
STRINGS, TEXTS = ({"anyOf": [STRING, {"type": "array", "items": each}, {"type": "null"}]} for each in (STRING, TEXT))

ReadLogprobs = tuple[str, float, dict[str, float]]  # token, its log-probability, the most probable ones


@dataclass
class Prompt:
    """The ids of one prompt of a request, and the text that `echo` puts before the generated text."""

    ids: list[int]
    echo: str = ""


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ApiRequest(_StrictModel):
    """The body of a request."""

    model: str | None = None

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Returns the JSON schema of the fields, with those that are accepted and have no effect."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, (neutral_values, reason) in UNSUPPORTED_FIELDS.items():
            schema["properties"][name] = {"enum": [*neutral_values, None], "description": reason}
        schema["properties"] |= {name: {"description": "ignored"} for name in IGNORED_FIELDS}
        return schema

    @classmethod
    def parse(cls, body: bytes, ignore_unknown_fields: bool = False) -> Self:
        """Returns the request in a JSON body.

        Raises:
            BadRequest: the body is not JSON, or a field is unknown, missing or invalid.
        """
        try:
            fields = json.loads(body)
            if ignore_unknown_fields and isinstance(fields, dict):
                known = {*cls.model_fields, *UNSUPPORTED_FIELDS}
                fields = {name: value for name, value in fields.items() if name in known}
            return cls.model_validate(fields)
        except RecursionError:
            raise BadRequest("The body is nested too deeply.") from None
        except ValidationError as error:
            raise validation_error_to_bad_request(error) from None
        except ValueError as error:
            raise BadRequest(f"The body is not JSON: {error}.") from None

    @model_validator(mode="before")
    @classmethod
    def drop_fields_without_effect(cls, fields: Any) -> Any:
        """Returns the supported fields that are not null; `BadRequest` if an unsupported one would have an effect."""
        if not isinstance(fields, dict):
            return fields
        if len(fields) > MAX_FIELDS:
            raise BadRequest(f"A request may have at most {MAX_FIELDS} fields.")
        biases = fields.get("logit_bias")
        if isinstance(biases, dict) and len(biases) > MAX_BIASES:
            raise BadRequest(f"logit_bias: may hold at most {MAX_BIASES} tokens.", "logit_bias")
        supported = {}
        for name, value in fields.items():
            if name in IGNORED_FIELDS or value is None:
                continue
            if name in UNSUPPORTED_FIELDS:
                neutral_values, reason = UNSUPPORTED_FIELDS[name]
                if not any(_is_same(value, neutral) for neutral in neutral_values):
                    raise BadRequest(f"{name}: {reason}", name)
                continue
            check_encodable(name, value)
            supported[name] = value
        return supported


RequestT = TypeVar("RequestT", bound=ApiRequest)


class StreamOptions(_StrictModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage in every chunk
    include_obfuscation: bool | None = None


class ResponseFormat(_StrictModel):
    """{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": ...}}."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_json_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and not isinstance((self.json_schema or {}).get("schema"), dict):
            raise ValueError('must hold {"json_schema": {"schema": ...}}')
        return self

    @property
    def grammar_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the text must match, or None."""
        if self.type == "json_object":
            return {"type": "object"}
        return self.json_schema["schema"] if self.type == "json_schema" and self.json_schema else None


class CountPenalty:
    """OpenAI's frequency and presence penalties as a logits processor.

    logit − frequency · count − presence · [count > 0], where count is of generated tokens, without the prompt's.

    Args:
        frequency, presence: penalties in [−2, 2].
        prompt_length: tokens of the prompt.
    """

    def __init__(self, frequency: float, presence: float, prompt_length: int = 0):
        self.frequency, self.presence, self.prompt_length = frequency, presence, prompt_length

    def after_prompt(self, length: int) -> CountPenalty:
        """Returns the processor of a sequence whose prompt has `length` tokens."""
        return CountPenalty(self.frequency, self.presence, length)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns penalised logits (M, V) of the token after ids (M, L)."""
        new_ML = input_ids[:, self.prompt_length :]
        counts_MV = torch.zeros_like(scores).scatter_add_(1, new_ML, torch.ones_like(new_ML, dtype=scores.dtype))
        return scores - self.frequency * counts_MV - self.presence * (counts_MV > 0)


class GenerationRequest(ApiRequest):
    """The fields of both endpoints. Those after `response_format` are not OpenAI's."""

    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[Any, WithJsonSchema(STRINGS)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    top_k: int | None = Field(None, ge=-1)  # -1, as in vLLM, disables it
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)  # with others logits may overflow
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    num_candidates: int | None = Field(None, ge=1)
    sampling_method: SamplingMethod | None = None

    default_max_tokens: ClassVar[int | None] = None  # None: the rest of the context
    # Some requests have properties of these names.
    num_prompts: ClassVar[Any] = 1
    num_logprobs: ClassVar[Any] = None  # most probable tokens to tell of each one; None tells none
    length_field: ClassVar[Any] = "max_tokens"  # with which the client set the length

    @field_validator("stop")
    @classmethod
    def check_stop(cls, stop: Any) -> Any:
        stop = [stop] if isinstance(stop, str) else stop
        if stop is not None and not (isinstance(stop, list) and all(isinstance(each, str) for each in stop)):
            raise ValueError("must be a string or a list of strings")
        return stop

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        return bool(self.includes_usage and self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling_options(self) -> dict[str, Any]:
        """Returns the sampling options of `Batcher.submit`; temperature 0 turns sampling off, as in OpenAI's API."""
        options: dict[str, Any] = {"num_candidates": self.num_candidates, "sampling_method": self.sampling_method}
        options |= {"top_p": self.top_p, "min_p": self.min_p}
        options["top_k"] = 0 if self.top_k == -1 else self.top_k
        if self.temperature == 0:
            options["do_sample"] = False
        elif self.temperature is not None:
            options |= {"do_sample": True, "temperature": self.temperature}
        return options

    def processor_options(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
        """Returns the options of `Batcher.submit` that act on logits.

        Raises:
            BadRequest: `logit_bias` has a key that is not a token id, or `response_format` is not supported.
        """
        options: dict[str, Any] = {}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        if self.logit_bias:
            biases = self.logit_bias.items()
            options["sequence_bias"] = {(_parse_token_id(key, vocab_size),): bias for key, bias in biases}
        processors = []
        if self.frequency_penalty or self.presence_penalty:
            processors.append(CountPenalty(self.frequency_penalty or 0.0, self.presence_penalty or 0.0))
        if self.response_format is not None and self.response_format.grammar_schema is not None:
            for name in ("min_tokens", "ignore_eos"):
                if getattr(self, name):
                    raise BadRequest(f"{name}: not supported with a response_format, which ends the text.", name)
            schema = json.dumps(self.response_format.grammar_schema)
            try:
                if len(schema) > MAX_SCHEMA_BYTES:
                    raise ValueError(f"the schema is larger than {MAX_SCHEMA_BYTES} bytes.")
                processors.append(Grammar(tokenizer, json_schema=schema))
            except (ImportError, ValueError) as error:
                raise BadRequest(f"response_format: {error}", "response_format") from None
        return options | {"logits_processor": processors}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[Any, WithJsonSchema(PROMPTS)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    default_max_tokens: ClassVar[int | None] = DEFAULT_COMPLETION_TOKENS
    prompt_field: ClassVar = "prompt"
    id_prefix: ClassVar = "cmpl"
    response_object: ClassVar = "text_completion"
    chunk_object: ClassVar = "text_completion"

    @field_validator("prompt")
    @classmethod
    def check_prompt(cls, prompt: Any) -> Any:
        """Returns a list of strings or of lists of ids; the batcher checks the ids."""
        if isinstance(prompt, str):
            return [prompt]
        if prompt == []:
            raise ValueError("is an empty list; pass a string, a list of strings, or token ids")
        item_type = type(prompt[0]) if isinstance(prompt, list) else None
        if item_type not in (str, int, list) or not all(type(item) is item_type for item in prompt):
            raise ValueError("must be a string, a list of strings, or token ids")
        return [prompt] if item_type is int else prompt

    @model_validator(mode="after")
    def check_echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise BadRequest("logprobs: not supported with echo, as a prompt has none here.", "logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)

    def prompts(self, batcher: Batcher) -> list[Prompt]:
        """Returns the request's prompts as ids.

        Raises:
            BadRequest: a prompt is invalid.
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

    def choice_fields(self, text: str, logprobs: list[ReadLogprobs] | None = None) -> dict[str, Any]:
        """Returns the fields of a choice that hold its text, and its tokens with their log-probabilities."""
        if logprobs is None:
            return {"text": text, "logprobs": None}
        tokens, values, tops = map(list, zip(*logprobs, strict=True)) if logprobs else ([], [], [])
        return {"text": text, "logprobs": {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}}

    def first_chunk_fields(self, echo: str) -> dict[str, Any] | None:
        """Returns `choice_fields` of a choice's first chunk in a stream, or None if there is no such chunk."""
        return self.choice_fields(echo) if echo else None

    chunk_fields = choice_fields  # of a chunk


class Message(BaseModel):
    """A chat message; other fields are passed to the chat template unless they are null."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, WithJsonSchema(TEXTS)] = None

    @field_validator("content")
    @classmethod
    def join_parts(cls, content: Any) -> str:
        """Returns the content as one string."""
        if content is None or isinstance(content, str):
            return content or ""
        if not isinstance(content, list):
            raise ValueError("must be a string or a list of text parts")
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError('must be a string or a list of parts {"type": "text", "text": ...}')
        return "".join(part["text"] for part in content)

    def to_template_dict(self) -> dict[str, Any]:
        others = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        return others | {"role": self.role, "content": self.content}


def encode_messages(messages: list[Message], batcher: Batcher, add_generation_prompt: bool = True) -> list[int]:
    """Returns the ids of a conversation.

    Raises:
        BadRequest: there is no chat template, or it raises an error for these messages.
    """
    if getattr(batcher.tokenizer, "chat_template", None) is None:
        hint = "use /v1/completions, or start the server with --chat_template FILE"
        raise BadRequest(f"messages: this model has no chat template; {hint}.", "messages")
    try:
        return batcher.encode_chat([message.to_template_dict() for message in messages], add_generation_prompt)
    except Exception as error:  # a template is a program, and its errors are about the messages
        raise BadRequest(f"messages: the chat template raised an error: {error}", "messages") from None


class TokenizeRequest(ApiRequest):
    """POST /tokenize, as in vLLM: of a prompt or of chat messages."""

    prompt: str | None = None
    messages: Annotated[list[Message], FailFast()] = []
    add_special_tokens: bool = True  # of a prompt; the chat template adds those of messages
    add_generation_prompt: bool = True  # of messages

    def tokens(self, batcher: Batcher) -> list[int]:
        """Returns the ids; raises `BadRequest` if they can't be made."""
        if (self.prompt is None) != bool(self.messages):
            raise BadRequest("prompt: give a prompt or messages.", "prompt")
        if self.messages:
            return encode_messages(self.messages, batcher, self.add_generation_prompt)
        try:
            return batcher.encode(self.prompt or "", self.add_special_tokens)
        except ValueError as error:
            raise BadRequest(f"prompt: {error}", "prompt") from None


class DetokenizeRequest(ApiRequest):
    """POST /detokenize, as in vLLM."""

    tokens: Annotated[list[int], FailFast()]

    def text(self, batcher: Batcher) -> str:
        """Returns the text, special tokens included; raises `BadRequest` if there is no such id."""
        try:
            return batcher.decode(batcher.encode(self.tokens), skip_special_tokens=False)
        except ValueError as error:
            raise BadRequest(f"tokens: {error}", "tokens") from None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. For `choice_fields` and the other `…_fields` see `CompletionRequest`."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    prompt_field: ClassVar = "messages"
    id_prefix: ClassVar = "chatcmpl"
    response_object: ClassVar = "chat.completion"
    chunk_object: ClassVar = "chat.completion.chunk"

    @model_validator(mode="after")
    def prefer_max_completion_tokens(self) -> ChatRequest:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def length_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def prompts(self, batcher: Batcher) -> list[Prompt]:
        return [Prompt(encode_messages(self.messages, batcher))]

    def choice_fields(self, text: str, logprobs: list[ReadLogprobs] | None = None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._format_logprobs(logprobs)}

    def first_chunk_fields(self, echo: str) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def chunk_fields(self, text: str, logprobs: list[ReadLogprobs] | None = None) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": self._format_logprobs(logprobs)}

    @staticmethod
    def _format_logprobs(logprobs: list[ReadLogprobs] | None) -> dict[str, Any] | None:
        def entry(token: str, logprob: float) -> dict[str, Any]:
            return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

        if logprobs is None:
            return None
        content = [
            entry(token, logprob) | {"top_logprobs": [entry(*each) for each in top.items()]}
            for token, logprob, top in logprobs
        ]
        return {"content": content, "refusal": None}


def check_encodable(name: str, value: Any) -> None:
    """Raises `BadRequest` for a lone surrogate or a number that is not finite: `json.loads` accepts both."""
    try:
        json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{name}: holds a lone surrogate, which is not valid text.", name) from None
    except ValueError:
        raise BadRequest(f"{name}: holds a number that is not finite.", name) from None


def _parse_token_id(key: str, vocab_size: int) -> int:
    """Returns the token id that a key of `logit_bias` spells; raises `BadRequest` if it is none."""
    if not key.isascii() or not key.isdigit() or len(key) > MAX_TOKEN_ID_DIGITS or int(key) >= vocab_size:
        raise BadRequest(f"logit_bias: {key!r} is not a token id in 0 … {vocab_size - 1}.", "logit_bias")
    return int(key)


def _is_same(value: Any, neutral: Any) -> bool:
    """Whether two JSON values are equal; True and 1 are not."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def validation_error_to_bad_request(error: ValidationError) -> BadRequest:
    """Returns the answer that names the first unknown field, or else the first invalid one."""
    problems = error.errors(include_url=False, include_input=False)
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    path = [str(part) for part in problem["loc"]]
    if not path:
        return BadRequest("The body must be a JSON object.")
    reasons = {"extra_forbidden": "there is no such field", "missing": "is missing"}
    message = problem["msg"].removeprefix("Value error, ")
    reason = reasons.get(problem["type"], message[:1].lower() + message[1:])
    return BadRequest(f"{'.'.join(path)}: {reason}.", path[0])


def describe_api(routes: Iterable[Route], request_classes: dict[str, type[ApiRequest]]) -> dict[str, Any]:
    """Returns the OpenAPI description of the routes; `request_classes` are those of the paths that take a body."""
    template, answers = "#/components/schemas/{model}", {"default": {"description": "the answer, or an error"}}
    _, schemas = models_json_schema([(c, "validation") for c in request_classes.values()], ref_template=template)
    paths: dict[str, Any] = {}
    for route in routes:
        names, request_class = route.param_convertors, request_classes.get(route.path)
        parameters = [{"name": name, "in": "path", "required": True, "schema": STRING} for name in names]
        operation: dict[str, Any] = {"parameters": parameters, "responses": answers}
        if request_class is not None:
            schema = {"$ref": template.format(model=request_class.__name__)}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[route.path_format] = {"get" if request_class is None else "post": operation}
    info = {"title": "CALM", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas["$defs"]}}


def to_event(body: dict[str, Any]) -> str:
    """Returns a server-sent event in ASCII, because some clients split lines at U+0085, U+2028 and U+2029."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
