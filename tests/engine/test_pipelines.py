"""The front door in Python, on a miniature model with a tokenizer of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest

import kvant
from kvant.config import EngineConfig, SamplingParams
from kvant.errors import ConfigError, EngineDeadError, RequestError
from kvant.pipelines import DEFAULT_MAX_TOKENS, Pipeline, pipeline
from kvant.text.chat import render_chat
from tests.engine.checkpoint import END, write_checkpoint
from tests.engine.drive import eventually, reasons, spy_on_requests

pytestmark = pytest.mark.usefixtures("single_thread")

CONFIG = EngineConfig(dtype="float32", kv_cache_dtype="int4", max_model_len=400, num_kv_blocks=100, block_size=16)
# The marks are no part of a text: a model that says them inside its answer leaves the template's text.
NO_MARKS = dict.fromkeys(range(256, END + 1), -100.0)
GREEDY = SamplingParams(temperature=0, max_tokens=8, logit_bias=NO_MARKS)


@pytest.fixture(scope="module")
def pipe(tiny_path) -> Iterator[Pipeline]:
    with pipeline(tiny_path, engine=CONFIG) as pipe:
        yield pipe


def freed(pipe: Pipeline) -> bool:
    stats = pipe.stats()
    return stats.running == stats.waiting == stats.kv_blocks_used == 0


def test_one_prompt_gives_one_response_and_a_list_gives_a_list_in_order(pipe):
    prompts = ["one", "another one", [7, 8, 9], [{"role": "user", "content": "hello"}], "one"]
    responses = pipe(prompts, GREEDY)
    assert [response.text for response in responses] == [pipe(prompt, GREEDY).text for prompt in prompts]
    assert [response.prompt_token_ids for response in responses[:3]] == [
        tuple(pipe.tokenizer.encode("one")), tuple(pipe.tokenizer.encode("another one")), (7, 8, 9),
    ]  # fmt: skip
    assert len({response.token_ids for response in responses}) == 4
    assert pipe([], GREEDY) == []


def test_a_list_of_prompts_takes_one_sampling_or_one_for_each(pipe):
    wishes = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in (3, 1, 5)]
    responses = pipe(["a", "b", "c"], wishes)
    assert [response.usage.completion_tokens for response in responses] == [3, 1, 5]
    assert [response.usage.completion_tokens for response in pipe(["a", "b"], wishes[0])] == [3, 3]
    with pytest.raises(RequestError, match="3 prompts, but 2 sampling params"):
        pipe(["a", "b", "c"], wishes[:2])
    assert pipe("a", [wishes[1]]).usage.completion_tokens == 1


def test_a_response_tells_what_was_asked_for(pipe):
    wish = SamplingParams(seed=3, n=2, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    response = pipe([5, 6, 7, 8], wish)
    assert [choice.index for choice in response.choices] == [0, 1]
    assert response.choices[0].token_ids == response.token_ids != response.choices[1].token_ids
    for choice in response.choices:
        assert [one.token_id for one in choice.logprobs] == list(choice.token_ids)
        assert all(len(one.top) == 2 for one in choice.logprobs)
    assert response.prompt_logprobs[0] is None
    assert [one.token_id for one in response.prompt_logprobs[1:]] == [6, 7, 8]
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (4, 12)
    assert response.finish_reason == "length"
    assert 0 <= response.timings.queue <= response.timings.time_to_first_token <= response.timings.total


def test_a_stream_is_the_response_in_pieces(pipe):
    whole = pipe("tell me", GREEDY)
    deltas = list(pipe.stream("tell me", GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert tuple(token for delta in deltas for token in delta.token_ids) == whole.token_ids
    assert [delta.finish_reason for delta in deltas[-2:]] == [None, "length"]
    assert deltas[-1].usage.completion_tokens == 8


def test_a_stream_that_is_closed_frees_what_it_held(pipe, monkeypatch):
    taken = spy_on_requests(pipe._served.engine, monkeypatch)
    stream = pipe.stream("on and on", SamplingParams(temperature=0, ignore_eos=True))
    assert len(list(islice(stream, 3))) == 3
    stream.close()
    eventually(lambda: freed(pipe))
    assert reasons(taken) == ["abort"]


def test_stop_strings_end_the_engines_work_too(pipe, monkeypatch):
    whole = pipe("tell me", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    stop = whole.text[5:7]
    taken = spy_on_requests(pipe._served.engine, monkeypatch)
    cut = pipe("tell me", SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, stop=stop))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    eventually(lambda: freed(pipe))
    assert reasons(taken) == ["abort"]


def test_one_bad_prompt_refuses_the_batch_and_leaves_nothing_running(pipe, monkeypatch):
    taken = spy_on_requests(pipe._served.engine, monkeypatch)
    for bad, match in (([1] * 400, "400 tokens"), (5, "a prompt is a text"), ([{"role": "clown"}], "clown")):
        with pytest.raises(RequestError, match=match):
            pipe(["fine", bad], SamplingParams(ignore_eos=True))
    eventually(lambda: freed(pipe) and None not in reasons(taken))
    assert set(reasons(taken)) <= {"abort"}


def test_what_it_shows_of_the_model(pipe, tiny_path):
    assert pipe.model_name == str(tiny_path)
    assert (pipe.max_model_len, pipe.memory.num_blocks, pipe.memory.plan.name) == (400, 100, "int4")
    assert pipe.default_sampling == SamplingParams(max_tokens=DEFAULT_MAX_TOKENS)


def test_the_checkpoints_recommendation_is_the_default(tmp_path):
    write_checkpoint(tmp_path)
    recommended = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [3, END], "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    with kvant.pipeline(tmp_path, engine=CONFIG, quant_policy=4) as pipe:
        assert pipe.default_sampling == SamplingParams(
            temperature=0.6, top_p=0.9, top_k=20, max_tokens=DEFAULT_MAX_TOKENS
        )
        ends = pipe("x", SamplingParams(logit_bias={3: 100.0}))
        assert (ends.token_ids, ends.finish_reason) == ((3,), "stop")


def test_quant_policy_is_heard_and_must_not_contradict(tiny_path):
    with pipeline(tiny_path, engine=EngineConfig(num_kv_blocks=8), quant_policy=8) as pipe:
        assert pipe.memory.plan.name == "int8"
    with pytest.raises(ConfigError, match="quant_policy=8"):
        pipeline(tiny_path, engine=CONFIG, quant_policy=8)


def test_a_closed_pipeline_says_so(tiny_path):
    with pipeline(tiny_path, engine=CONFIG) as pipe:
        pass
    with pytest.raises(EngineDeadError, match="closed"):
        pipe("hello", GREEDY)
    with pytest.raises(EngineDeadError, match="closed"):
        next(pipe.stream("hello", GREEDY))
    assert not pipe.stats().healthy


def test_a_batch_learns_that_the_engine_died(tiny_path, monkeypatch):
    with pipeline(tiny_path, engine=CONFIG) as pipe:
        monkeypatch.setattr(pipe._served.engine.core._runner, "launch", lambda plan: 1 / 0)
        with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
            pipe(["a", "b"], GREEDY)


def test_a_turn_is_computed_once(pipe):
    session = pipe.session("Be brief.", GREEDY)
    first = session.chat("What is the sea?")
    assert session.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the sea?"},
        {"role": "assistant", "content": first.text},
    ]
    second = session.chat("And a lake?")
    known = len(first.prompt_token_ids) + len(first.token_ids)
    assert second.prompt_token_ids[:known] == (*first.prompt_token_ids, *first.token_ids)
    assert second.usage.cached_tokens == known - 1, "all but the last token, which was sampled but not computed"
    third = session.chat("Thanks.")
    assert third.usage.cached_tokens == len(second.prompt_token_ids) + len(second.token_ids) - 1


def test_a_turns_prompt_is_the_templates(pipe):
    session = pipe.session(sampling=SamplingParams(temperature=0, logit_bias={END: 100.0}))
    session.chat("one")
    prompt = session.chat("two").prompt_token_ids
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "two"},
    ]
    assert pipe.tokenizer.decode(prompt, skip_special_tokens=False) == render_chat(pipe.tokenizer, chat)
    assert list(prompt) == pipe.tokenizer.encode(render_chat(pipe.tokenizer, chat), add_special_tokens=False)


def test_a_streamed_turn_is_the_same_turn(pipe):
    spoken, streamed = pipe.session(sampling=GREEDY), pipe.session(sampling=GREEDY)
    for text_ in ("one", "two"):
        answer = spoken.chat(text_)
        assert "".join(delta.text for delta in streamed.stream(text_)) == answer.text
    assert spoken.messages == streamed.messages


def test_an_answer_cut_short_is_remembered_as_far_as_it_was_read(pipe):
    session = pipe.session(sampling=replace(GREEDY, max_tokens=None))
    stream = session.stream("one")
    read = "".join(delta.text for delta in islice(stream, 4))
    stream.close()
    assert session.messages[-1] == {"role": "assistant", "content": read}
    assert session.chat("two", GREEDY).usage.cached_tokens > 0


def test_a_turn_that_is_refused_is_not_remembered(pipe):
    session = pipe.session(sampling=GREEDY)
    session.chat("one")
    before = list(session.messages)
    with pytest.raises(RequestError, match="limit is 399"):
        session.chat("x" * 500)
    assert session.messages == before
    session.chat("two")


def test_a_streamed_turn_that_is_refused_is_not_remembered_either(pipe):
    session = pipe.session(sampling=GREEDY)
    session.chat("one")
    before = list(session.messages)
    with pytest.raises(RequestError, match="limit is 399"):
        list(session.stream("x" * 500))
    assert session.messages == before


def test_a_session_starts_over(pipe):
    session = pipe.session("Be brief.", GREEDY)
    first = session.chat("one")
    session.reset()
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    assert session.chat("one").token_ids == first.token_ids


def test_sessions_need_the_prefix_cache(tiny_path):
    config = EngineConfig(num_kv_blocks=8, enable_prefix_caching=False)
    with pipeline(tiny_path, engine=config) as pipe, pytest.raises(ConfigError, match="enable_prefix_caching=True"):
        pipe.session()


def test_two_sessions_do_not_mix(pipe):
    alone = [pipe.session(sampling=GREEDY).chat(said).text for said in ("one", "two")]
    first, second = pipe.session(sampling=GREEDY), pipe.session(sampling=GREEDY)
    assert [first.chat("one").text, second.chat("two").text] == alone


def test_a_turn_that_ended_at_a_stop_string_is_not_computed_again(pipe):
    session = pipe.session("Answer.", GREEDY)
    words = session.chat("one two").text
    session.reset()
    stopped = session.chat("one two", replace(GREEDY, stop=(words[3],)))
    assert stopped.finish_reason == "stop"
    assert session.chat("three").usage.cached_tokens >= stopped.usage.prompt_tokens


@pytest.mark.parametrize("prompt", [None, {"role": "user", "content": "hi"}])
def test_what_is_neither_a_prompt_nor_a_list_of_them_is_refused(pipe, prompt):
    with pytest.raises(RequestError, match="a prompt is a text"):
        pipe(prompt)
