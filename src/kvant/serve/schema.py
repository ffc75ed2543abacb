"""The bodies this server reads and writes, in OpenAI's shapes, with kvant's extra sampling fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_CHOICES = 128

# Fields that cannot change what is generated here.
IGNORED = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "safety_identifier",
        "verbosity",
        "parallel_tool_calls",
        "prediction",
    ]
)
# Fields that ask for something kvant does not do, and the values with which they ask for nothing. With any other value
# they are refused: to ignore them would give a wrong answer silently.
NOTHING_ASKED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "suffix": ("",),
        "best_of": (1,),
    }
)


class StreamOptions(BaseModel):
    """`include_usage`: one last chunk with the token counts. `include_obfuscation` has no effect."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(BaseModel):
    """What both endpoints understand; what is left out, or null, is as the model recommends."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        unused = {"tools", "functions"} if "none" in (data.get("tool_choice"), data.get("function_call")) else set()
        return {
            name: value
            for name, value in data.items()
            if value is not None
            and name not in IGNORED
            and name not in unused
            and value not in NOTHING_ASKED.get(name, ())
        }

    @model_validator(mode="before")
    @classmethod
    def _whole_characters_only(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text holds half a character (a lone surrogate, such as \\ud800)") from error
        return data

    @field_validator("stream_options")
    @classmethod
    def _only_for_streams(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only allowed together with stream=true")
        return value

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("only allowed together with logprobs=true")
        return value

    @field_validator("continue_final_message")
    @classmethod
    def _not_both(cls, value: bool, info: Any) -> bool:
        if value and info.data.get("add_generation_prompt"):
            raise ValueError("a message is either continued or answered: set add_generation_prompt to false")
        return value


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool = False
    logprobs: int | None = None

    @field_validator("prompt")
    @classmethod
    def _at_least_one(cls, prompt: Any) -> Any:
        if prompt == []:
            raise ValueError("the list is empty; give a text, token ids, or a list of either")
        return prompt

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one."""
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if one else prompt


class Error(BaseModel):
    """What went wrong: `param` names the field at fault, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every refusal."""

    error: Error


class PromptTokensDetails(BaseModel):
    """Prompt tokens whose KV was found in the prefix cache."""

    cached_tokens: int


class UsageReply(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """One candidate for a place in the text; `token` names it, `bytes` is exact."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """The token taken, and the likeliest candidates for its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[TokenLogprob]


class ChatMessage(BaseModel):
    """An answer, or a chunk's piece of it."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    """One answer of a chat completion."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatReply(BaseModel):
    """The body of a whole chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReply


class ChatChunkChoice(BaseModel):
    """News of one answer."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageReply | None = None


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry a token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(BaseModel):
    """One continuation, or a chunk's piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class CompletionReply(BaseModel):
    """Of a whole completion and of each chunk of a stream alike."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageReply | None = None


class ModelCard(BaseModel):
    """A model name served here."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["kvant"] = "kvant"
    max_model_len: int


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
