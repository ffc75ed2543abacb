"""A model's chat template: untrusted Jinja from its files, run in a sandbox on plain data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import repeat
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvant.errors import RequestError

MAX_STEPS = 1_000_000
"""Loop turns and calls that one rendering may take: thousands of messages fit, an endless loop does not."""

_STEPS = "_kvant_steps"


@dataclass(frozen=True)
class ChatTemplate:
    """A template's source, compiled when it is first used, and the variables it may use besides the messages."""

    source: str
    variables: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _compiled(self) -> Template:
        try:
            return _Sandbox().from_string(self.source)
        except TemplateSyntaxError as error:
            fault = f"line {error.lineno}: {error.message}"
            raise RequestError(f"the model's chat template is broken ({fault}); send a plain prompt instead") from error

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The text of a chat.

        Raises:
            RequestError: the template is broken or refuses the messages; with its own words.
        """
        data = {**self.variables, **variables, "messages": messages, _STEPS: repeat(None, MAX_STEPS)}
        template = self._compiled
        try:
            return template.render(data)
        except _RefusedError as error:
            raise RequestError(f"the model's chat template refuses this chat: {error.message}") from error
        except Exception as error:  # a template can raise anything that Python can
            reason = str(error) or type(error).__name__
            raise RequestError(f"the model's chat template fails on this chat: {reason}") from error


class _RefusedError(TemplateError):
    """Raised by the template itself."""


class _GenerationTag(Extension):
    """`{% generation %}` marks what a training run learns from; here it is as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """What templates are written for: Hugging Face's settings, filters and functions; and an end to every loop."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationTag])
        self.filters |= {"tojson": _to_json, "_counted": _counted}
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in source.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno, environment=self)
        return super()._generate(source, *args, **kwargs)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _count(context)
        return super().call(context, obj, *args, **kwargs)


def _count(context: Context) -> None:
    # `parent` holds what `render` was given; templates cannot assign to it.
    if next(context.parent[_STEPS], True):
        raise _RefusedError(f"it takes more than {MAX_STEPS} steps")


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _count(context)
        yield item


def _refuse(message: str) -> None:
    raise _RefusedError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, this one leaves the characters of HTML as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
