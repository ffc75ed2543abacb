"""The front door in Python: `pipeline`, and the sessions it opens.

The module is not called `pipeline`: importing a submodule of that name would replace the function `kvant.pipeline`.
"""

from __future__ import annotations

import queue
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from tqdm.auto import tqdm

from kvant.config import EngineConfig, SamplingParams
from kvant.engine.build import Front, serve_model
from kvant.engine.deltas import DeltaBuilder
from kvant.engine.inputs import Prompt, is_single_prompt
from kvant.engine.outputs import Delta, Response
from kvant.engine.sequence import Failure, Request, TokenEvent
from kvant.errors import ConfigError, RequestError
from kvant.text.chat import render_chat

DEFAULT_MAX_TOKENS = 512

_Sampling = SamplingParams | Sequence[SamplingParams] | None
_Mailbox = queue.SimpleQueue[tuple[Request, TokenEvent | Failure]]


def pipeline(
    model: str | Path | None = None, *, engine: EngineConfig | None = None, quant_policy: int | None = None
) -> Pipeline:
    """Load a model and answer prompts with it.

    Args:
        model: a directory, a .gguf file, a hub id, or "smollm2" (also the default; see `kvant models pull`).
        engine: how to run it.
        quant_policy: LMDeploy's name for the KV cache's bits: 0, 4 or 8.

    Raises:
        KvantError: of the kind that names the cause.
    """
    config = engine or EngineConfig()
    if quant_policy is not None:
        config = replace(config, quant_policy=quant_policy)
    return Pipeline(serve_model(model, config))


class Pipeline(Front):
    """A loaded model. Use it in a `with` statement, or `close()` it.

    A prompt is a text (continued as it stands), a list of chat messages (through the model's chat template) or a list
    of token ids. Without `sampling`, the model's recommended settings apply, with at most 512 output tokens; where you
    give your own, `max_tokens=None` goes on to the context's limit.
    """

    @property
    def default_sampling(self) -> SamplingParams:
        """What is used where a call brings no sampling."""
        return replace(self._served.default_sampling, max_tokens=DEFAULT_MAX_TOKENS)

    @overload
    def __call__(self, prompts: Prompt, sampling: _Sampling = None) -> Response: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, prompts: Sequence[Prompt], sampling: _Sampling = None) -> list[Response]: ...

    def __call__(self, prompts: Prompt | Sequence[Prompt], sampling: _Sampling = None) -> Response | list[Response]:
        """Answer one prompt with one response, or a list of prompts, batched, with a list in the same order.

        Args:
            prompts: a prompt or a list of them.
            sampling: one for all, or one for each prompt.

        Raises:
            RequestError: a prompt cannot be served; the others are abandoned.
        """
        if prompts is None or isinstance(prompts, Mapping):
            raise RequestError("a prompt is a text, a list of chat messages or a list of token ids")
        if is_single_prompt(prompts):
            return self._answer([prompts], self._wishes(sampling, 1))[0]  # type: ignore[list-item]
        batch: list[Prompt] = list(prompts)  # type: ignore[arg-type]
        return self._answer(batch, self._wishes(sampling, len(batch)))

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Generator[Delta, None, None]:
        """Answer one prompt piece by piece. Closing the iterator aborts the request."""
        request, mailbox = self._submit(self._served.encode(prompt), sampling or self.default_sampling)
        builder = DeltaBuilder(request, self.tokenizer, continues=isinstance(prompt, str))
        try:
            while not builder.finished:
                delta = self._receive(mailbox, {request: builder})
                if delta is not None:
                    yield delta
        finally:
            self._served.engine.abort(request)

    def session(self, system: str | None = None, sampling: SamplingParams | None = None) -> Session:
        """A conversation that remembers its turns, and does not compute them again.

        Raises:
            ConfigError: prefix caching, which holds the history's KV, is switched off.
        """
        if not self._served.engine.core.prefix_caching:
            raise ConfigError("sessions keep their history in the prefix cache; set enable_prefix_caching=True")
        return Session(self, system, sampling or self.default_sampling)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _wishes(self, sampling: _Sampling, count: int) -> list[SamplingParams]:
        if sampling is None or isinstance(sampling, SamplingParams):
            return [sampling or self.default_sampling] * count
        if len(sampling) != count:
            raise RequestError(
                f"{count} prompts, but {len(sampling)} sampling params; give one, or one for each prompt"
            )
        return list(sampling)

    def _answer(self, prompts: Sequence[Prompt], wishes: Sequence[SamplingParams]) -> list[Response]:
        encoded = [self._served.encode(prompt) for prompt in prompts]
        mailbox: _Mailbox = queue.SimpleQueue()
        builders: dict[Request, DeltaBuilder] = {}
        try:
            for prompt, ids, wish in zip(prompts, encoded, wishes, strict=True):
                request = self._served.engine.submit(ids, wish, lambda *event: mailbox.put(event))
                builders[request] = DeltaBuilder(request, self.tokenizer, continues=isinstance(prompt, str))
            self._drain(mailbox, builders)
        finally:
            for request, builder in builders.items():
                if not builder.finished:
                    self._served.engine.abort(request)
        return [builder.response() for builder in builders.values()]

    def _drain(self, mailbox: _Mailbox, builders: Mapping[Request, DeltaBuilder]) -> None:
        """Receive until all are finished, with a progress bar for a batch on a terminal (disable=None asks for one)."""
        disable = None if len(builders) > 1 else True
        with tqdm(total=len(builders), unit="prompt", disable=disable) as bar:
            left = len(builders)
            while left:
                delta = self._receive(mailbox, builders)
                if delta is not None and delta.usage is not None:  # the request's last
                    left -= 1
                    bar.update()

    def _submit(self, ids: list[int], sampling: SamplingParams) -> tuple[Request, _Mailbox]:
        mailbox: _Mailbox = queue.SimpleQueue()
        return self._served.engine.submit(ids, sampling, lambda *event: mailbox.put(event)), mailbox

    def _receive(self, mailbox: _Mailbox, builders: Mapping[Request, DeltaBuilder]) -> Delta | None:
        request, event = mailbox.get()
        if isinstance(event, Failure):
            raise event.error
        delta = builders[request].push(event)
        if builders[request].stopped_early(event):
            self._served.engine.abort(request, event.index)
        return delta


class Session:
    """A conversation. Each turn sends the very tokens of the turns before, so that their KV is found in the cache.

    Attributes:
        messages: what was said, as chat messages.
    """

    def __init__(self, pipe: Pipeline, system: str | None, sampling: SamplingParams) -> None:
        self._pipe = pipe
        self._system = system
        self._sampling = sampling
        self.messages: list[dict[str, Any]] = []
        self._ids: list[int] = []
        self._text = ""
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._ids, self._text = [], ""

    def chat(self, text: str, sampling: SamplingParams | None = None) -> Response:
        """Say something and wait for the answer."""
        ids, rendered, messages = self._turn(text)
        response = self._pipe(ids, sampling or self._sampling)
        self._remember(messages, rendered, ids, response.text, response.token_ids)
        return response

    def stream(self, text: str, sampling: SamplingParams | None = None) -> Generator[Delta, None, None]:
        """Say something and read the answer as it comes; an answer cut short is remembered as far as it was read."""
        ids, rendered, messages = self._turn(text)
        answer: list[Delta] = []
        try:
            for delta in self._pipe.stream(ids, sampling or self._sampling):
                answer += [delta] if delta.index == 0 else []
                yield delta
        finally:
            if answer:
                tokens = tuple(token for delta in answer for token in delta.token_ids)
                self._remember(messages, rendered, ids, "".join(delta.text for delta in answer), tokens)

    def _turn(self, text: str) -> tuple[list[int], str, list[dict[str, Any]]]:
        """The next prompt's ids and text, and the messages with the new one.

        Where the template only appends to what stood before, only what is new is tokenized. Where it rewrites the
        history (some drop reasoning, some trim), everything is, and the cache serves what is still equal.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        tokenizer = self._pipe.tokenizer
        rendered = render_chat(tokenizer, messages)
        # (A tokenizer that begins every text with a space of its own cannot encode the middle of one.)
        if self._ids and rendered.startswith(self._text) and not tokenizer.leading_spaces:
            fresh = tokenizer.encode(rendered[len(self._text) :], add_special_tokens=False)
            return self._ids + fresh, rendered, messages
        return tokenizer.encode(rendered, add_special_tokens=False), rendered, messages

    def _remember(
        self, messages: list[dict[str, Any]], rendered: str, ids: list[int], answer: str, tokens: tuple[int, ...]
    ) -> None:
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self._ids = [*ids, *tokens]
        self._text = rendered + self._pipe.tokenizer.decode(tokens, skip_special_tokens=False)
