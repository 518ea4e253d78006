"""The shapes of OpenAI's answers: completions, chat completions, chunks of a stream, errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from calm.serving.batcher import Batcher
from calm.serving.openai_api import BadRequest, ChatRequest, CompletionRequest, GenerationRequest

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


@dataclass
class Prompt:
    """One prompt of a request, as ids, and the text that `echo` puts before what is written."""

    ids: list[int]
    echo: str = ""


class Form:
    """One endpoint's requests, and the shape of its answers."""

    request_type: type[GenerationRequest]
    prompt_field: str
    prefix: str
    answer: str
    chunk: str

    def prompts(self, batcher: Batcher, request: Any) -> list[Prompt]:
        """What a request asks to be gone on with.

        Raises:
            BadRequest: it can't be read.
        """
        raise NotImplementedError

    def choice(self, text: str) -> dict[str, Any]:
        """The text's part of a choice of an answer."""
        raise NotImplementedError

    def opening(self, echo: str) -> dict[str, Any] | None:
        """The text's part of a stream's first chunk of a choice."""
        raise NotImplementedError

    def delta(self, text: str) -> dict[str, Any]:
        """The text's part of a choice of a chunk."""
        raise NotImplementedError


class Completions(Form):
    request_type, prompt_field = CompletionRequest, "prompt"
    prefix, answer, chunk = "cmpl", "text_completion", "text_completion"

    def prompts(self, batcher: Batcher, request: CompletionRequest) -> list[Prompt]:
        prompts = []
        for prompt in request.prompt:
            try:
                ids = batcher.encode(prompt)
            except ValueError as error:
                raise BadRequest(f"prompt: {error}", "prompt") from None
            text = (prompt if isinstance(prompt, str) else batcher.decode(ids)) if request.echo else ""
            prompts.append(Prompt(ids, text))
        return prompts

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text, "logprobs": None}

    def opening(self, echo: str) -> dict[str, Any] | None:
        return self.choice(echo) if echo else None

    def delta(self, text: str) -> dict[str, Any]:
        return self.choice(text)


class Chat(Form):
    request_type, prompt_field = ChatRequest, "messages"
    prefix, answer, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def prompts(self, batcher: Batcher, request: ChatRequest) -> list[Prompt]:
        if getattr(batcher.tokenizer, "chat_template", None) is None:
            raise BadRequest(
                "messages: this model has no chat template; use /v1/completions, or start the server with "
                "--chat_template FILE.",
                "messages",
            )
        messages = [message.as_template_reads_it() for message in request.messages]
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


def event(body: dict[str, Any]) -> str:
    """A server-sent event, in ASCII: some clients take U+0085, U+2028 and U+2029 for ends of lines."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
