"""The whole way: the official client, HTTP, the engine, a small model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import openai
import pytest

from kvant.config import EngineConfig
from kvant.engine.async_engine import AsyncEngine
from kvant.serve.app import create_app
from tests.serve.harness import eventually, serving

ASK = {"model": "tiny", "temperature": 0}
HELLO = [{"role": "user", "content": "What is the capital of France?"}]


class Real:
    """A server with a real engine, and a client of it."""

    def __init__(self, engine: AsyncEngine, base: str) -> None:
        self.engine = engine
        self.url = f"{base}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="unused", max_retries=0)

    def wait_until_freed(self) -> None:
        """Return once no request holds a block, or fail."""
        eventually(lambda: self.engine.stats().kv_blocks_used == self.engine.stats().running == 0)


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Iterator[Real]:
    config = EngineConfig(kv_cache_dtype="int8", max_model_len=512, num_kv_blocks=200, block_size=16)
    with (
        closing(AsyncEngine.from_pretrained(str(smollm2), config)) as engine,
        serving(create_app(engine, ["tiny"])) as base,
    ):
        yield Real(engine, base)


def test_an_answer_that_is_right_whole_and_streamed(real):
    reply = real.client.chat.completions.create(**ASK, messages=HELLO, max_tokens=24)
    assert "Paris" in reply.choices[0].message.content
    assert reply.usage.prompt_tokens == len(real.engine.encode(HELLO))
    options = {"include_usage": True}
    chunks = list(
        real.client.chat.completions.create(**ASK, messages=HELLO, max_tokens=24, stream=True, stream_options=options)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == reply.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == reply.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == reply.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_64_streams_at_once_finish_and_cancelled_ones_free_their_blocks(real):
    async def read(client: openai.AsyncOpenAI, index: int) -> tuple[str, str | None]:
        messages = [{"role": "user", "content": f"Count from {index} upwards."}]
        stream = await client.chat.completions.create(
            **ASK, messages=messages, stream=True, max_tokens=8, extra_body={"ignore_eos": True}
        )
        text, reason = "", None
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason
            if text and index % 4 == 0:
                await stream.close()
                break
        return text, reason

    async def all_of_them() -> list[tuple[str, str | None]]:
        async with openai.AsyncOpenAI(base_url=real.url, api_key="unused", max_retries=0, timeout=300) as client:
            return await asyncio.gather(*(read(client, index) for index in range(64)))

    answers = asyncio.run(all_of_them())
    assert all(text for text, _ in answers)
    assert [reason for _, reason in answers if reason] == ["length"] * 48
    real.wait_until_freed()
    assert real.engine.stats().healthy


def test_cancelled_tasks_free_their_blocks_whether_they_wait_or_run(real):
    async def ask(client: openai.AsyncOpenAI, stream: bool) -> None:
        reply = await client.completions.create(
            **ASK, prompt="Once upon a time", max_tokens=400, stream=stream, extra_body={"ignore_eos": True}
        )
        async for _ in reply:
            pass

    async def cancel_all() -> None:
        async with openai.AsyncOpenAI(base_url=real.url, api_key="unused", max_retries=0) as client:
            tasks = [asyncio.create_task(ask(client, stream)) for stream in (True, False) * 6]
            while real.engine.stats().running == 0:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(cancel_all())
    real.wait_until_freed()


def test_stop_strings_end_an_answer_and_are_no_part_of_it(real):
    ask = {**ASK, "prompt": "1, 2, 3, 4, 5,", "max_tokens": 32, "stop": [" 9"]}
    choice = real.client.completions.create(**ask).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text.startswith(" 6, 7")
    assert " 9" not in choice.text
    streamed = [chunk.choices[0] for chunk in real.client.completions.create(**ask, stream=True)]
    assert "".join(piece.text for piece in streamed) == choice.text
    assert streamed[-1].finish_reason == "stop"


def test_the_same_seed_says_the_same(real):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 1.5, "max_tokens": 12}
    first, again, other = (
        real.client.chat.completions.create(**ask, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_several_choices_and_prompts(real):
    reply = real.client.completions.create(model="tiny", prompt=["The sea", "A tree"], n=2, max_tokens=4, echo=True)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text[:6] for choice in reply.choices] == ["The se", "The se", "A tree", "A tree"]
    assert reply.usage.completion_tokens == 16


def test_logprobs_of_a_greedy_chat_name_the_likeliest_first(real):
    ask = {**ASK, "messages": HELLO, "logprobs": True, "top_logprobs": 3, "max_tokens": 5}
    reply = real.client.chat.completions.create(**ask).choices[0]
    content = reply.logprobs.content
    assert "".join(entry.token for entry in content) == reply.message.content
    for entry in content:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3


def test_scores_of_a_prompt_do_not_depend_on_how_it_is_sent(real):
    text = "The quick brown fox jumps over the lazy dog."
    ids = real.engine.encode(text)
    ask = {**ASK, "echo": True, "logprobs": 1, "max_tokens": 1}
    by_ids, by_text = (real.client.completions.create(**ask, prompt=prompt).choices[0] for prompt in ([ids], text))
    assert by_ids == by_text
    logprobs = by_ids.logprobs
    assert by_ids.text.startswith(text)
    assert "".join(logprobs.tokens) == by_ids.text
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(ids) + 1
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert by_ids.text.startswith(token, offset)
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    assert max(logprobs.top_logprobs[-1].values()) == logprobs.token_logprobs[-1]
    only_scored = real.client.completions.create(**{**ask, "max_tokens": 0}, prompt=text).choices[0]
    assert only_scored.logprobs.token_logprobs == logprobs.token_logprobs[:-1]


def test_what_the_engine_refuses_is_the_clients_fault(real):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="512|511"):
            real.client.completions.create(model="tiny", prompt=[5] * 600, stream=stream)
        with pytest.raises(openai.BadRequestError, match="999999"):
            real.client.completions.create(model="tiny", prompt=[999999], stream=stream)
        with pytest.raises(openai.BadRequestError, match="n=100"):
            real.client.completions.create(model="tiny", prompt="a", n=100, stream=stream)
    with pytest.raises(openai.BadRequestError, match="cannot be called messages"):
        real.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a"}],
            extra_body={"chat_template_kwargs": {"messages": 5}},
        )
    real.wait_until_freed()


def test_health(real):
    assert httpx.get(real.url.removesuffix("/v1") + "/health").json() == {"status": "ok"}
