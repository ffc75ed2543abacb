"""/v1/chat/completions over HTTP, against the official client."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

HELLO = [{"role": "user", "content": "hi"}]


def test_a_whole_answer_with_its_usage(serve):
    here = serve()
    reply = here.client.chat.completions.create(model="fake", messages=HELLO)
    assert reply.object == "chat.completion"
    assert reply.model == "fake"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == "héllo wörld"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == len("user:hi;")
    assert reply.usage.completion_tokens == 13
    assert reply.usage.total_tokens == 21
    assert reply.usage.prompt_tokens_details.cached_tokens == 4


def test_a_stream_says_the_same_in_pieces(serve):
    here = serve()
    chunks = list(here.client.chat.completions.create(model="fake", messages=HELLO, stream=True, max_tokens=5))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "héll"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_the_last_chunk_counts_when_asked_to(serve):
    here = serve()
    options = {"include_usage": True}
    *chunks, last = here.client.chat.completions.create(
        model="fake", messages=HELLO, stream=True, stream_options=options
    )
    assert last.choices == []
    assert last.usage.completion_tokens == 13
    assert all(chunk.usage is None for chunk in chunks)


def test_the_wire_format_of_a_stream(serve):
    here = serve()
    body = {"messages": HELLO, "stream": True, "max_tokens": 1}
    response = httpx.post(f"{here.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    opening, last = (json.loads(event.removeprefix("data: ")) for event in events)
    assert opening["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert last["choices"] == [{"index": 0, "delta": {"content": "h"}, "logprobs": None, "finish_reason": "length"}]
    assert set(last) == {"id", "object", "created", "model", "choices"}


def test_n_choices_whole_and_streamed(serve):
    here = serve()
    reply = here.client.chat.completions.create(model="fake", messages=HELLO, n=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.message.content for choice in reply.choices} == {"héllo wörld"}
    texts = ["", "", ""]
    for chunk in here.client.chat.completions.create(model="fake", messages=HELLO, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["héllo wörld"] * 3


def test_logprobs_name_tokens_and_bytes(serve):
    here = serve()
    ask = {"model": "fake", "messages": HELLO, "logprobs": True, "top_logprobs": 3, "max_tokens": 2}
    content = here.client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [entry.token for entry in content] == ["h", "bytes:\\xc3"]
    assert content[1].bytes == [0xC3]
    assert content[0].logprob == -0.5
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("x", -0.25), ("h", -0.5), ("y", -9999.0)]
    chunks = list(here.client.chat.completions.create(**ask, stream=True))
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == content


def test_logprobs_without_alternatives(serve):
    here = serve()
    reply = here.client.chat.completions.create(model="fake", messages=HELLO, logprobs=True, max_tokens=1)
    assert reply.choices[0].logprobs.content[0].top_logprobs == []
    plain = here.client.chat.completions.create(model="fake", messages=HELLO, max_tokens=1)
    assert plain.choices[0].logprobs is None


def test_the_template_gets_its_options(serve):
    here = serve()
    here.client.chat.completions.create(model="fake", messages=HELLO)
    assert here.engine.template_options[0] == {"add_generation_prompt": True, "continue_final_message": False}
    extra = {"continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False}}
    here.engine.template_options.clear()
    here.client.chat.completions.create(model="fake", messages=HELLO, extra_body=extra, reasoning_effort="low")
    assert here.engine.template_options[0] == {
        "add_generation_prompt": False,
        "continue_final_message": True,
        "reasoning_effort": "low",
        "enable_thinking": False,
    }


def test_text_parts_and_developer_messages(serve):
    here = serve()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    here.client.chat.completions.create(model="fake", messages=messages)
    assert bytes(here.engine.seen[0][0]).decode() == "system:be kind;user:a\nb;"


def test_a_bad_prompt_is_refused_before_the_stream_begins(serve):
    here = serve()
    long = [{"role": "user", "content": "x" * 2000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="2006 tokens"):
            here.client.chat.completions.create(model="fake", messages=long, stream=stream)
        with pytest.raises(openai.BadRequestError, match="unknown token"):
            here.client.chat.completions.create(
                model="fake", messages=HELLO, stream=stream, extra_body={"stop_token_ids": [999]}
            )


def test_a_death_in_the_middle_of_a_stream_reaches_the_client(serve):
    here = serve()
    here.engine.dies_after = 3
    stream = here.client.chat.completions.create(model="fake", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="the engine died"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match="the engine died") as caught:
        here.client.chat.completions.create(model="fake", messages=HELLO)
    assert caught.value.status_code == 503
    assert here.engine.running == 0


def test_64_streams_at_once_and_those_left_are_freed(serve):
    here = serve()
    here.engine.pace = 0.005

    async def read(client: openai.AsyncOpenAI, leaves: bool) -> str:
        stream = await client.chat.completions.create(model="fake", messages=HELLO, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if leaves and text:
                await stream.close()
                return text
        return text

    async def all_of_them() -> list[str]:
        async with here.async_client() as client:
            return await asyncio.gather(*(read(client, leaves=index % 4 == 0) for index in range(64)))

    texts = asyncio.run(all_of_them())
    assert [text for index, text in enumerate(texts) if index % 4] == ["héllo wörld"] * 48
    assert len(here.engine.seen) == 64
    here.wait_until_freed()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_request(serve, stream):
    here = serve()
    here.engine.pace = 100
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{here.url}/v1/chat/completions", json={"messages": HELLO, "stream": stream}, timeout=0.3)
    assert len(here.engine.seen) == 1
    here.wait_until_freed()
