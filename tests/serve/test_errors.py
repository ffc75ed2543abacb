"""What is refused, and that every refusal has the same shape."""

from __future__ import annotations

import json
import re

import httpx
import pytest

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


def refused(response: httpx.Response, status: int) -> dict[str, str | None]:
    """The envelope of a refusal."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("fields", "param", "complaint"),
    [
        ({"messages": None}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": ["hi"]}, "messages", "valid dictionary"),
        ({"messages": [{"role": "user"}]}, None, "content of a message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "text parts only"),
        ({"chat_template_kwargs": {"messages": 1}}, None, "cannot be called messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate"),
        ({"temperature": "warm"}, "temperature", "valid number"),
        ({"temperature": -1}, None, "temperature=-1"),
        ({"top_p": 0}, None, "top_p must be greater than 0"),
        ({"max_tokens": 0}, None, "max_tokens=0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "less than or equal to 128"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "valid integer"),
        ({"stop": 5}, "stop", "string.*list"),
        ({"temprature": 1}, "temprature", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tools", "not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 99}, None, "logprobs=99"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "either"),
    ],
)
def test_bad_chat_fields(here, fields, param, complaint):
    body = json.dumps({"messages": HELLO, **fields}).encode()  # httpx itself refuses a lone surrogate
    response = httpx.post(here.url + CHAT, content=body, headers={"Content-Type": "application/json"})
    error = refused(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert re.search(complaint, error["message"])
    assert here.engine.seen == []


@pytest.mark.parametrize(
    ("field", "value"), [("suffix", "end"), ("best_of", 4), ("prompt", {"a": 1}), ("prompt", [1, "a"])]
)
def test_bad_completion_fields(here, field, value):
    error = refused(httpx.post(f"{here.url}/v1/completions", json={"prompt": "a", field: value}), 400)
    assert error["param"] == field


def test_fields_that_ask_for_nothing_are_fine(serve):
    here = serve()
    nothing = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "tools": [{"type": "function"}],
        "tool_choice": "none",
        "logprobs": None,
        "stop": None,
        "audio": None,
    }
    assert httpx.post(here.url + CHAT, json={"messages": HELLO, **nothing}).status_code == 200


@pytest.mark.parametrize("body", [b"{", b"[]", b'"text"', b"", b"\xff"])
def test_bodies_that_are_no_json_objects(here, body):
    response = httpx.post(here.url + CHAT, content=body, headers={"Content-Type": "application/json"})
    assert refused(response, 400)["type"] == "invalid_request_error"


def test_a_form_or_plain_text_is_not_read_as_json(serve):
    """A web page of another site could send those without asking."""
    here = serve()
    response = httpx.post(here.url + CHAT, content=b'{"messages": []}', headers={"Content-Type": "text/plain"})
    assert "application/json" in refused(response, 400)["message"]


def test_unknown_routes_methods_and_models(serve):
    here = serve(names=("a", "org/b"))
    assert "POST /v1/embeddings" in refused(httpx.post(f"{here.url}/v1/embeddings", json={}), 404)["message"]
    assert "GET" in refused(httpx.get(here.url + CHAT), 405)["message"]
    error = refused(httpx.post(here.url + CHAT, json={"model": "c", "messages": HELLO}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "a, org/b" in error["message"]
    refused(httpx.get(f"{here.url}/v1/models/c"), 404)


def test_models_are_listed_and_replies_carry_the_name_asked_for(serve):
    here = serve(names=("a", "org/b"))
    assert [model.id for model in here.client.models.list()] == ["a", "org/b"]
    assert here.client.models.retrieve("org/b").id == "org/b"
    assert here.client.chat.completions.create(model="org/b", messages=HELLO).model == "org/b"
    assert httpx.post(here.url + CHAT, json={"messages": HELLO}).json()["model"] == "a"


def test_without_the_key_only_health_answers(serve):
    here = serve(key="secret")
    assert httpx.get(f"{here.url}/health").status_code == 200
    for path in ("/v1/models", "/version", "/openapi.json", "/nowhere"):
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer é"},
        ):
            raw = {name: value.encode() for name, value in header.items()}
            error = refused(httpx.get(here.url + path, headers=raw), 401)
            assert error["code"] == "invalid_api_key"
            assert "secret" not in error["message"]
    assert [model.id for model in here.client.models.list()] == ["fake"]


def test_large_bodies_are_refused_whether_they_state_their_length_or_not(serve):
    here = serve(max_body_bytes=1000)
    body = b'{"messages": [{"role": "user", "content": "' + b"x" * 2000 + b'"}]}'
    headers = {"Content-Type": "application/json"}
    for content in (body, (part for part in (body[:500], body[500:]))):
        error = refused(httpx.post(here.url + CHAT, content=content, headers=headers), 413)
        assert "1000 bytes" in error["message"]
    assert here.engine.seen == []
    assert httpx.post(here.url + CHAT, json={"messages": HELLO}).status_code == 200


def test_health_follows_the_engine(serve):
    here = serve()
    assert httpx.get(f"{here.url}/health").json() == {"status": "ok"}
    here.engine.healthy = False
    assert httpx.get(f"{here.url}/health").status_code == 503


def test_no_other_site_may_read_answers(serve):
    here = serve()
    response = httpx.get(f"{here.url}/v1/models", headers={"Origin": "https://elsewhere.example"})
    assert "access-control-allow-origin" not in response.headers


def test_an_unforeseen_failure_tells_no_internals(serve, monkeypatch):
    here = serve()
    monkeypatch.setattr(here.engine, "encode", lambda *_, **__: 1 / 0)
    error = refused(httpx.post(here.url + CHAT, json={"messages": HELLO}), 500)
    assert error["type"] == "server_error"
    assert "division" not in error["message"]


def test_the_version(serve):
    from kvant import __version__

    assert httpx.get(f"{serve().url}/version").json() == {"version": __version__}
