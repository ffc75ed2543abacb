"""/v1/completions over HTTP: prompts in all their forms, echo and scores."""

from __future__ import annotations

import asyncio

import openai
import pytest


@pytest.mark.parametrize("prompt", ["hé", ["hé"], [104, 195, 169], [[104, 195, 169]]])
def test_a_prompt_in_each_form(here, prompt):
    reply = here.client.completions.create(model="fake", prompt=prompt, max_tokens=3)
    assert reply.object == "text_completion"
    assert [choice.text for choice in reply.choices] == ["hé"]
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].logprobs is None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 3)
    echoed = here.client.completions.create(model="fake", prompt=prompt, max_tokens=3, echo=True)
    assert echoed.choices[0].text == "héhé"


def test_several_prompts_with_several_choices_each(serve):
    here = serve()
    reply = here.client.completions.create(model="fake", prompt=["a", "bc"], n=2, echo=True, max_tokens=1)
    assert [(choice.index, choice.text) for choice in reply.choices] == [(0, "ah"), (1, "ah"), (2, "bch"), (3, "bch")]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 4)


def test_several_prompts_streamed(serve):
    here = serve()
    ask = {"model": "fake", "prompt": ["a", "bc"], "echo": True, "stream": True, "max_tokens": 4}
    *chunks, last = here.client.completions.create(**ask, stream_options={"include_usage": True})
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["ahél", "bchél"]
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 8)


def test_a_completion_has_16_tokens_unless_told(serve):
    here = serve()
    assert here.client.completions.create(model="fake", prompt="a").usage.completion_tokens == 13
    assert here.engine.seen[0][1].max_tokens == 16


def test_scores_of_a_prompt_as_evaluation_harnesses_ask_for_them(serve):
    here = serve()
    ask = {"model": "fake", "prompt": [[97, 195, 169, 98]], "echo": True, "logprobs": 1, "temperature": 0}
    for max_tokens, generated in ((1, ["h"]), (0, [])):
        reply = here.client.completions.create(**ask, max_tokens=max_tokens)
        choice = reply.choices[0]
        assert choice.text == "aéb" + "".join(generated)
        assert choice.finish_reason == "length"
        assert choice.logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "b", *generated]
        assert choice.logprobs.token_logprobs == [None, -1.0, -1.0, -1.0, *[-0.5] * len(generated)]
        assert choice.logprobs.top_logprobs[:2] == [None, {"bytes:\\xc3": -1.0}]
        # The character that two tokens share begins where the first of them is complete: offsets never go back.
        assert choice.logprobs.text_offset == [0, 1, 1, 2, 3][: 4 + len(generated)]
        assert reply.usage.completion_tokens == max_tokens


def test_a_token_that_is_no_part_of_the_text_takes_no_room_in_it(serve):
    here = serve()
    ask = {"model": "fake", "prompt": [1, 97, 98], "echo": True, "logprobs": 0, "max_tokens": 1}
    choice = here.client.completions.create(**ask).choices[0]
    assert choice.text == "abh"
    assert choice.logprobs.text_offset == [0, 0, 1, 2]


def test_logprobs_of_the_output_alone(serve):
    here = serve()
    ask = {"model": "fake", "prompt": "a", "logprobs": 2, "max_tokens": 3}
    logprobs = here.client.completions.create(**ask).choices[0].logprobs
    assert logprobs.tokens == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs.text_offset == [0, 1, 1]
    assert logprobs.top_logprobs[0] == {"x": -0.25, "h": -0.5}
    chunks = [chunk.choices[0].logprobs for chunk in here.client.completions.create(**ask, stream=True)]
    assert [token for chunk in chunks for token in chunk.tokens] == logprobs.tokens
    assert [offset for chunk in chunks for offset in chunk.text_offset] == logprobs.text_offset


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [([], "list is empty"), ("", "0 tokens"), (["a", ""], "0 tokens"), ([[]], "0 tokens"), (["a"] * 3000, "2048")],
)
def test_prompts_that_are_refused(here, prompt, complaint):
    with pytest.raises(openai.BadRequestError, match=complaint):
        here.client.completions.create(model="fake", prompt=prompt)
    assert here.engine.seen == []


def test_all_prompts_of_a_request_end_when_one_fails(serve):
    here = serve()
    here.engine.dies_after = 2
    with pytest.raises(openai.InternalServerError, match="the engine died"):
        here.client.completions.create(model="fake", prompt=["a"] * 5)
    assert here.engine.running == 0


def test_a_stream_that_is_left_frees_all_its_prompts(serve):
    here = serve()
    here.engine.pace = 0.05

    async def leave() -> None:
        async with here.async_client() as client:
            stream = await client.completions.create(model="fake", prompt=["a"] * 8, stream=True)
            await anext(aiter(stream))
            assert here.engine.running == 8
            await stream.close()

    asyncio.run(leave())
    here.wait_until_freed()
