"""From a conversation to the prompt that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvant.errors import RequestError
from kvant.text.template import ChatTemplate
from kvant.text.tokenizer import Tokenizer

ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

# Stands for the point where a continued message ends. The space shows whether the template trims contents.
_CURSOR = "\ue000continue\ue001"
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "documents"})

Messages = Sequence[Mapping[str, Any]]


def render_chat(
    source: Tokenizer | ChatTemplate,
    messages: Messages,
    /,
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool = False,
    **template_kwargs: Any,
) -> str:
    """The text of a chat, as the model's template writes it.

    Args:
        source: the tokenizer of the model, or a template.
        messages: {"role", "content"} and whatever else the template reads; a content is a string or a list of
            OpenAI's {"type": "text", "text"} parts, which are joined by newlines.
        add_generation_prompt: end with the beginning of an answer.
        tools: JSON schemas of functions the model may call.
        continue_final_message: end inside the last message, for the model to go on with it, instead of a new answer.
        template_kwargs: variables that the template knows (such as enable_thinking).

    Raises:
        RequestError: no template, messages of a wrong shape, or ones that the template refuses.
    """
    template = source if isinstance(source, ChatTemplate) else source.template_for(tools)
    if template is None:
        raise RequestError(
            "the model has no chat template; send a plain prompt (text or token ids) instead of messages"
        )
    if taken := _RESERVED & template_kwargs.keys():
        raise RequestError(f"a template variable cannot be called {', '.join(sorted(taken))}")
    chat = [_message(message, template) for message in _plain(messages, "messages")]
    if not chat:
        raise RequestError("a chat needs at least one message")
    variables = {"documents": None, "tools": _plain(tools, "tools") if tools else None}
    variables |= _plain(template_kwargs, "template variables")
    if continue_final_message:
        return _render_open(template, chat, {**variables, "add_generation_prompt": False})
    return template.render(chat, **variables, add_generation_prompt=add_generation_prompt)


def encode_chat(tokenizer: Tokenizer, messages: Messages, /, **kwargs: Any) -> list[int]:
    """The token ids of a chat: `render_chat` with the same arguments, encoded as it stands."""
    return tokenizer.encode(render_chat(tokenizer, messages, **kwargs), add_special_tokens=False)


def _render_open(template: ChatTemplate, chat: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    final = {**chat[-1], "content": chat[-1]["content"] + _CURSOR + " "}
    text, cursor, rest = template.render([*chat[:-1], final], **variables).rpartition(_CURSOR)
    if not cursor:
        raise RequestError(
            "the model's chat template leaves out the final message, which therefore cannot be continued"
        )
    return text if rest.startswith(" ") else text.rstrip()


def _plain(value: Any, what: str) -> Any:
    """A copy made of JSON's types only: a template must not get at the methods of anything else."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{what} must consist of what JSON has (objects, lists, strings, numbers): {error}"
        ) from error


def _message(message: Any, template: ChatTemplate) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"a message is an object with role and content, not {message!r}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"a message's role is one of {', '.join(sorted(ROLES))}, not {role!r}")
    if role == "developer" and "developer" not in template.source:
        role = "system"
    plain = {**message, "role": role, "content": _content(message.get("content"), role)}
    if calls := plain.get("tool_calls"):
        if not isinstance(calls, list):
            raise RequestError(f"a message's tool_calls is a list, not {calls!r}")
        plain["tool_calls"] = [_tool_call(call) for call in calls]
    return plain


def _content(content: Any, role: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise RequestError(f"the content of a message of role {role!r} is a string or a list of parts, not {content!r}")
    return "\n".join(_part(part) for part in content)


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RequestError(f"content part of type {kind!r}: the model reads text parts only")


def _tool_call(call: Any) -> Any:
    """OpenAI's clients send arguments as JSON text; templates expect the object."""
    match call:
        case {"function": {"arguments": str(text)}}:
            try:
                return {**call, "function": {**call["function"], "arguments": json.loads(text)}}
            except ValueError as error:
                raise RequestError(f"the arguments of a tool call are not JSON: {error}") from error
    return call
