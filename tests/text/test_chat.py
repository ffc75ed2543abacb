"""Chats through templates: against Hugging Face's own renderer, and against what must not work."""

from __future__ import annotations

import json

import pytest

from kvant.errors import RequestError
from kvant.text.chat import encode_chat, render_chat
from kvant.text.gguf import tokenizer_from_gguf
from kvant.text.template import ChatTemplate

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}"
BLOCKS = """
  {% for m in messages %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% if m.role == 'assistant' %}
      {% generation %}
      {{ m.content }}|{{ loop.length }}|{{ loop.last }}
      {% endgeneration %}
    {% else %}
{{ m.content | upper }}{% if loop.first %}!{% endif %}
    {% endif %}
  {% endfor %}
{% macro show(x) %}[{{ x | tojson(indent=2) }}]{% endmacro %}
{{ show(messages) }}{{ tools | tojson }}{{ nothing }}{{ documents is none }}
{%- set ns = namespace(n=0) -%}
{%- for i in range(5) if i % 2 %}{% set ns.n = ns.n + i %}{% else %}none{% endfor %}{{ ns.n }}
{%- for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}{{ strftime_now("%Y") | length }}
"""
CHATS = (
    [{"role": "user", "content": " hi <b>é& "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b  "},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": " tail "},
    ],
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"é": "<"}}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = CHATS[0]


@pytest.fixture(scope="module")
def hugging_face():
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(source, chat, **options):
        return render_jinja_template([chat], chat_template=source, **TOKENS, **options)[0][0]

    return render


@pytest.mark.parametrize("chat", CHATS, ids=["one", "five"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("source", [CHATML, TRIMMING, BLOCKS], ids=["chatml", "trimming", "blocks"])
def test_templates_render_as_hugging_face_renders_them(hugging_face, source, chat, tools):
    template = ChatTemplate(source, TOKENS)
    for prompt in (True, False):
        theirs = hugging_face(source, chat, tools=tools, add_generation_prompt=prompt)
        assert render_chat(template, chat, tools=tools, add_generation_prompt=prompt) == theirs


@pytest.mark.parametrize("source", [CHATML, TRIMMING], ids=["chatml", "trimming"])
def test_a_final_message_is_left_open(hugging_face, source):
    ours = render_chat(ChatTemplate(source, TOKENS), CHATS[1], continue_final_message=True)
    assert ours == hugging_face(source, CHATS[1], continue_final_message=True)
    assert ours.endswith(" tail " if source == CHATML else "tail")


def test_smollm2_chats(smollm2_tokenizer, metadata, hugging_face):
    text = render_chat(smollm2_tokenizer, USER)
    source = metadata["tokenizer.chat_template"]
    assert text == hugging_face(source, USER, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\n hi <b>é& <|im_end|>\n<|im_start|>assistant\n")
    ids = encode_chat(smollm2_tokenizer, USER)
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids[0] == ids[-4] == smollm2_tokenizer.bos_id


def test_bos_comes_from_the_template_alone(byte_keys):
    keys = byte_keys(add_bos_token=True) | {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    tokenizer = tokenizer_from_gguf(keys)
    assert encode_chat(tokenizer, [{"role": "user", "content": "hello"}]) == tokenizer.encode("hello")
    assert tokenizer.encode("hello")[0] == tokenizer.bos_id


def test_the_template_for_tools_is_used_with_tools(byte_keys):
    named = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "with tools"}
    tokenizer = tokenizer_from_gguf(byte_keys() | named)
    assert render_chat(tokenizer, USER) == "plain"
    assert render_chat(tokenizer, USER, tools=TOOLS) == "with tools"


def test_template_variables_reach_the_template():
    assert render_chat(ChatTemplate("{{ enable_thinking }}"), USER, enable_thinking=False) == "False"


SHOW = ChatTemplate("{{ messages | tojson }}")


def shown(*messages):
    return json.loads(render_chat(SHOW, messages))


def test_text_parts_become_a_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert shown({"role": "user", "content": parts}) == [{"role": "user", "content": "a\nb"}]


def test_an_assistant_may_only_call_tools():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    [result] = shown(message)
    assert result["content"] == ""
    assert result["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": [1]}}
    assert call["function"]["arguments"] == '{"x": [1]}'


def test_a_developer_is_a_system_unless_the_template_knows_him():
    message = {"role": "developer", "content": "x"}
    assert shown(message)[0]["role"] == "system"
    assert render_chat(ChatTemplate("{{ messages[0].role == 'developer' }}"), [message]) == "True"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        (["hi"], "role and content, not 'hi'"),
        ([{"content": "x"}], "role is one of .*not None"),
        ([{"role": "king", "content": "x"}], "not 'king'"),
        ([{"role": ["user"], "content": "x"}], "not \\['user'\\]"),
        ([{"role": "user"}], "'user' is a string or a list of parts, not None"),
        ([{"role": "user", "content": 3}], "not 3"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "user", "content": ["x"]}], "'str'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'text'"),
        ([{"role": "user", "content": object()}], "JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "arguments of a tool call"),
        ([{"role": "assistant", "tool_calls": 5}], "tool_calls is a list, not 5"),
    ],
)
def test_messages_of_another_shape_are_refused(messages, words):
    with pytest.raises(RequestError, match=words):
        render_chat(SHOW, messages)


def test_without_a_template_a_plain_prompt_is_the_way(byte_keys):
    tokenizer = tokenizer_from_gguf(byte_keys())
    assert tokenizer.chat_template is None
    with pytest.raises(RequestError, match="no chat template; send a plain prompt"):
        render_chat(tokenizer, USER)


@pytest.mark.parametrize("name", ["messages", "documents"])
def test_template_variables_cannot_replace_the_chat(name):
    with pytest.raises(RequestError, match=f"cannot be called {name}"):
        render_chat(SHOW, USER, **{name: []})


def test_a_message_the_template_leaves_out_cannot_be_continued():
    with pytest.raises(RequestError, match="leaves out the final message"):
        render_chat(ChatTemplate("{{ messages[0].role }}"), USER, continue_final_message=True)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('No system here!') }}", "refuses this chat: No system here!"),
        ("{{ messages[0].name.first }}", "fails on this chat: .*has no attribute 'name'"),
        ("{% for m in messages %}", "broken \\(line 1: .*send a plain prompt"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ strftime_now.__globals__.os }}", "unsafe"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_a_template_cannot_do_is_the_requests_error(source, words):
    with pytest.raises(RequestError, match=words):
        render_chat(ChatTemplate(source), USER)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set _kvant_steps = [] %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
    ids=["loops", "calls", "forged"],
)
def test_an_endless_template_ends(monkeypatch, source):
    monkeypatch.setattr("kvant.text.template.MAX_STEPS", 10_000)
    with pytest.raises(RequestError, match="more than 10000 steps"):
        render_chat(ChatTemplate(source), USER)


def test_an_objects_methods_do_not_reach_the_template():
    class Leaky(str):
        def secret(self):
            return "told"

    template = ChatTemplate("{{ messages[0].content.secret is defined }}{{ extra.secret is defined }}")
    assert render_chat(template, [{"role": "user", "content": Leaky("x")}], extra=Leaky("y")) == "FalseFalse"
