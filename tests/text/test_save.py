"""A tokenizer that was written is read as the same one, whatever it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.text.directory import load_tokenizer
from kvant.text.gguf import tokenizer_from_gguf
from kvant.text.save import save_tokenizer
from kvant.text.tokenizer import Tokenizer
from tests.engine.checkpoint import write_checkpoint

TEXTS = st.one_of(
    st.text(), st.lists(st.sampled_from(("<|im_end|>", "<think>", "<s>", " ", "\n", "hello", "é"))).map("".join)
)
TEMPLATE = "{{ bos_token }}{% for message in messages %}«{{ message.content }}»\n{% endfor %}"


def saved(tokenizer: Tokenizer, directory: Path) -> Tokenizer:
    directory.mkdir()
    save_tokenizer(tokenizer, directory)
    return load_tokenizer(directory)


def facts(tokenizer: Tokenizer) -> tuple[object, ...]:
    templates = {name: (one.source, dict(one.variables)) for name, one in tokenizer.templates.items()}
    roles = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id, tokenizer.end_ids)
    tokens = [(tokenizer.token_bytes(i), tokenizer.is_special(i)) for i in range(tokenizer.vocab_size)]
    return roles, templates, tokenizer.leading_spaces, tokens


@pytest.fixture(scope="module")
def both(request, tmp_path_factory, byte_keys, train_sentencepiece, sentencepiece_keys):
    """A tokenizer, and the same written and read."""
    templates = {"tokenizer.chat_template": TEMPLATE, "tokenizer.chat_template.tool_use": "tools: " + TEMPLATE}
    match request.param:
        case "byte-level":
            keys = byte_keys(add_bos_token=True, add_eos_token=True, pre="qwen2")
        case "byte-level, templates":
            keys = byte_keys(padding_token_id=261) | templates
        case "sentencepiece":
            keys = sentencepiece_keys(train_sentencepiece()) | {"tokenizer.chat_template": TEMPLATE}
        case "phi3":
            keys = sentencepiece_keys(train_sentencepiece(control_symbols=["<|user|>"]))
            keys["general.architecture"] = "phi3"
        case _:
            tokenizer = load_tokenizer(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))
            return tokenizer, saved(tokenizer, tmp_path_factory.mktemp("saved") / "tokenizer")
    tokenizer = tokenizer_from_gguf(keys)
    return tokenizer, saved(tokenizer, tmp_path_factory.mktemp("saved") / "tokenizer")


KINDS = ("byte-level", "byte-level, templates", "sentencepiece", "phi3", "directory")


@pytest.mark.parametrize("both", KINDS, indirect=True)
@settings(max_examples=50)
@given(text=TEXTS)
def test_the_same_ids_for_the_same_text(both, text):
    first, again = both
    ids = first.encode(text)
    assert again.encode(text) == ids
    assert again.encode(text, add_special_tokens=False) == first.encode(text, add_special_tokens=False)
    assert again.decode(ids) == first.decode(ids)


@pytest.mark.parametrize("both", KINDS, indirect=True)
def test_the_same_roles_ends_and_templates(both):
    first, again = both
    assert facts(again) == facts(first)


@settings(max_examples=30)
@given(text=st.text())
def test_a_real_one(smollm2_tokenizer, smollm2_again, text):
    assert smollm2_again.encode(text) == smollm2_tokenizer.encode(text)


@pytest.fixture(scope="module")
def smollm2_again(tmp_path_factory, smollm2_tokenizer):
    return saved(smollm2_tokenizer, tmp_path_factory.mktemp("smollm2") / "tokenizer")


def test_all_of_a_real_one(smollm2_tokenizer, smollm2_again):
    assert facts(smollm2_again) == facts(smollm2_tokenizer)


def test_transformers_reads_it_too(smollm2_tokenizer, smollm2_again, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(smollm2_tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello, it's 2024!\n\n  x<|im_end|>\n"
    assert theirs(text)["input_ids"] == smollm2_tokenizer.encode(text)
    chat = [{"role": "user", "content": "Hi"}]
    shown = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == smollm2_tokenizer.template_for().render(chat, add_generation_prompt=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
