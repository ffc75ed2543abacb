"""Tokenizers from the directories that models are published in."""

from __future__ import annotations

import base64
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.errors import CorruptModelError, MissingDependencyError, RequestError, UnsupportedModelError
from kvant.text.chat import encode_chat, render_chat
from kvant.text.directory import load_tokenizer
from kvant.text.gguf import tokenizer_from_gguf
from kvant.text.spelling import BYTE_TO_CHAR

BOS, EOS, THINK = 261, 262, 263
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture
def directory(tmp_path, byte_keys):
    """A function that writes a directory with a tokenizer.json and these other files."""
    tokenizer_from_gguf(byte_keys()).backend.save(str(tmp_path / "tokenizer.json"))

    def write(config=None, **files):
        for name, content in {"tokenizer_config.json": config or {}, **files}.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path

    return write


def test_a_tokenizer_json_alone_is_enough(directory):
    tokenizer = load_tokenizer(directory())
    assert tokenizer.decode(tokenizer.encode("hello wörld")) == "hello wörld"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids, tokenizer.chat_template) == (None, None, (), None)
    assert tokenizer.vocab_size == 264


def test_special_tokens_are_strings_or_objects(directory):
    config = {
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        "unk_token": None,
    }
    tokenizer = load_tokenizer(directory(config))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (BOS, EOS, None)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.end_ids) == ("<|begin|>", "<|im_end|>", (EOS,))


def test_the_special_tokens_map_fills_what_the_config_lacks(directory):
    mapped = {"bos_token": "<think>", "eos_token": {"content": "<|im_end|>"}}
    tokenizer = load_tokenizer(directory({"bos_token": "<|begin|>"}, **{"special_tokens_map.json": mapped}))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (BOS, EOS)


def test_bos_and_eos_are_added_as_the_config_says(directory):
    tokens = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    plain = load_tokenizer(directory(tokens)).encode("hello")
    both = load_tokenizer(directory({**tokens, "add_bos_token": True, "add_eos_token": True}))
    assert both.encode("hello") == [BOS, *plain, EOS]
    assert both.encode("hello", add_special_tokens=False) == plain
    assert load_tokenizer(directory({**tokens, "add_bos_token": None})).encode("hello") == plain
    assert load_tokenizer(directory({"bos_token": None, "add_bos_token": True})).encode("hello") == plain


def test_without_a_word_in_the_config_the_tokenizer_json_decides(directory, tmp_path, byte_keys):
    path = directory()
    tokenizer_from_gguf(byte_keys(add_bos_token=True)).backend.save(str(tmp_path / "tokenizer.json"))
    hello = load_tokenizer(path).encode("hello")
    assert hello[0] == BOS
    silent = load_tokenizer(directory({"bos_token": "<|begin|>", "add_bos_token": False}))
    assert silent.encode("hello") == hello[1:]


def test_settings_of_a_training_run_are_dropped(directory, tmp_path, byte_keys):
    backend = tokenizer_from_gguf(byte_keys()).backend
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    path = directory()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(path).encode("abcdef")) == 6


def test_added_tokens_are_added(directory):
    options = {"lstrip": False, "normalized": False, "single_word": False}
    added = {
        "265": {"content": "<plain>", "rstrip": False, "special": False, **options},
        "264": {"content": "<mark>", "rstrip": True, "special": True, **options},
    }
    tokenizer = load_tokenizer(directory({"added_tokens_decoder": added}))
    assert tokenizer.encode("<mark> <plain>") == [264, 265]
    assert tokenizer.decode([264, 265]) == "<plain>"
    assert tokenizer.vocab_size == 266


def test_tokens_the_config_calls_special_are_special(directory):
    tokenizer = load_tokenizer(directory({"additional_special_tokens": ["<think>", "<not there>"]}))
    assert tokenizer.is_special(THINK)
    assert tokenizer.vocab_size == 264


def test_an_added_token_that_does_not_follow_on_is_refused(directory):
    with pytest.raises(CorruptModelError, match=r"\['<mark>'\]"):
        load_tokenizer(directory({"added_tokens_decoder": {"999": {"content": "<mark>", "special": True}}}))


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"chat_template": "a"}, {}, "a"),
        ({"chat_template": [{"name": "default", "template": "b"}, {"name": "tool_use", "template": "t"}]}, {}, "b"),
        ({"chat_template": "a"}, {"chat_template.json": {"chat_template": "c"}}, "c"),
        ({"chat_template": "a"}, {"chat_template.jinja": "d", "chat_template.json": {"chat_template": "c"}}, "d"),
        ({}, {}, None),
    ],
)
def test_chat_templates_by_rank(directory, config, files, expected):
    assert load_tokenizer(directory(config, **files)).chat_template == expected


def test_chat_templates_by_name(directory):
    path = directory(
        None, **{"chat_template.jinja": "{{ eos_token }}", "additional_chat_templates__tool_use.jinja": "t"}
    )
    tokenizer = load_tokenizer(path)
    assert render_chat(tokenizer, USER) == ""
    assert render_chat(tokenizer, USER, tools=[{}]) == "t"
    directory({"eos_token": "<|im_end|>"})
    assert render_chat(load_tokenizer(path), USER) == "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is not a whole tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", '{"chat_template": 5}', "malformed"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "malformed"),
        ("tokenizer_config.json", '{"eos_token": {}}', "malformed"),
        ("special_tokens_map.json", "[1]", "special_tokens_map.json must hold an object, not list"),
    ],
)
def test_broken_files_are_named(directory, tmp_path, name, content, words):
    directory()
    (tmp_path / name).write_text(content)
    with pytest.raises(CorruptModelError, match=words):
        load_tokenizer(tmp_path)


def test_a_decoder_of_another_kind_is_refused(directory, tmp_path):
    path = directory() / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}))
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps(content | {"decoder": None}))
    with pytest.raises(UnsupportedModelError, match="no decoder"):
        load_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer.json, qwen.tiktoken or tokenizer.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["a\ud800", 3, None])
def test_what_is_no_text_is_refused(directory, text):
    with pytest.raises(RequestError, match="whole Unicode characters"):
        load_tokenizer(directory()).encode(text)


def test_ids_that_are_not_used_stand_for_nothing(directory):
    tokenizer = load_tokenizer(directory())
    assert tokenizer.decode([-1, 10**6, 2**40, 72, 10**12]) == tokenizer.token_text(72)


# tokenizer.model


@pytest.fixture
def sentencepiece_directory(tmp_path, train_sentencepiece):
    def write(config=None, **options):
        model = train_sentencepiece(**options)
        (tmp_path / "tokenizer.model").write_bytes(model)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config or {}))
        return tmp_path, pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)

    return write


TEXTS = ("the dog", " the  dog ", "123 ==== \n\t!", "naïve 你好 😀 x", "", "  ", "a\n b", "</s", "<0x41>")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<eoh>", "▁▁"]},
    ],
    ids=["llama", "no prefix", "whitespace", "nfkc", "user defined"],
)
def test_a_tokenizer_model_encodes_as_its_own_library_does(sentencepiece_directory, options):
    path, theirs = sentencepiece_directory(**options)
    ours = load_tokenizer(path)
    for text in (*TEXTS, "the<eoh>dog  the"):
        ids = theirs.encode(text)
        assert ours.encode(text) == [1, *ids]
        assert ours.decode(ids) == theirs.decode(ids)
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.end_ids) == (1, 2, 0, (2,))


def test_no_space_goes_after_a_user_defined_piece(sentencepiece_directory):
    """InternLM's prompts depend on it."""
    path, theirs = sentencepiece_directory(user_defined_symbols=["<eoh>"])
    ours = load_tokenizer(path)
    for text in ("the<eoh>dog", "the<eoh>\nthe dog<eoh> the"):
        assert ours.encode(text) == [1, *theirs.encode(text)]


def test_the_config_of_a_tokenizer_model_is_honoured(sentencepiece_directory):
    path, theirs = sentencepiece_directory({"add_bos_token": False, "add_eos_token": True, "bos_token": "</s>"})
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("the") == [*theirs.encode("the"), 2]
    assert tokenizer.bos_id == 2


@pytest.mark.parametrize(("legacy", "text"), [(False, "<s> the</s>dog"), (True, "<s> the</s> dog")])
def test_newer_llama_tokenizers_put_a_space_before_the_text_only(sentencepiece_directory, legacy, text):
    tokenizer = load_tokenizer(sentencepiece_directory({"legacy": legacy})[0])
    assert "".join(map(tokenizer.token_text, tokenizer.encode("the</s>dog"))) == text


def test_added_tokens_json_of_older_directories(sentencepiece_directory):
    path, theirs = sentencepiece_directory()
    (path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": theirs.vocab_size()}))
    assert load_tokenizer(path).encode("<|im_start|>")[-1] == theirs.vocab_size()


def test_unigram_models_are_refused(sentencepiece_directory):
    path, _ = sentencepiece_directory(model_type="unigram", vocab_size=340)
    with pytest.raises(UnsupportedModelError, match="BPE"):
        load_tokenizer(path)


def test_a_file_that_is_no_sentencepiece_model(sentencepiece_directory):
    path, _ = sentencepiece_directory()
    (path / "tokenizer.model").write_bytes(b"\xff\xff no protocol buffer")
    with pytest.raises(CorruptModelError, match="not a SentencePiece model"):
        load_tokenizer(path)


def test_a_missing_package_is_named(sentencepiece_directory, monkeypatch):
    path, _ = sentencepiece_directory()

    def no_sentencepiece(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("kvant.text.vocabulary_files.import_module", no_sentencepiece)
    with pytest.raises(MissingDependencyError, match="pip install sentencepiece protobuf"):
        load_tokenizer(path)


def test_no_code_of_the_directory_is_run(sentencepiece_directory):
    path, _ = sentencepiece_directory({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    (path / "evil.py").write_text("raise SystemExit('ran')")
    assert load_tokenizer(path).encode("the")
    assert "evil" not in sys.modules


# qwen.tiktoken


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, metadata):
    """A small qwen.tiktoken (the first ranks of SmolLM2's vocabulary over all bytes), by tiktoken and by us."""
    tiktoken = pytest.importorskip("tiktoken")
    bytes_of = {char: byte for byte, char in BYTE_TO_CHAR.items()}
    merged = [merge.replace(" ", "") for merge in metadata["tokenizer.ggml.merges"][:3000]]
    names = dict.fromkeys([*BYTE_TO_CHAR.values(), *merged])
    ranks = {bytes(bytes_of[char] for char in name): rank for rank, name in enumerate(names)}
    path = tmp_path_factory.mktemp("qwen")
    lines = (base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items())
    (path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    theirs = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return theirs, load_tokenizer(path)


@settings(deadline=None)
@given(text=st.text(" \n'sabeihtnor019.é你=-", max_size=60))
def test_qwen_encodes_as_tiktoken_does(qwen, text):
    theirs, ours = qwen
    ids = ours.encode(text)
    assert ids == theirs.encode_ordinary(text)
    assert ours.decode(ids) == text


def test_qwen_has_its_special_tokens_and_its_chats(qwen):
    theirs, ours = qwen
    end, start, turn = (theirs.n_vocab + i for i in range(3))
    assert ours.vocab_size == theirs.n_vocab + 3 + 205
    assert ours.encode("<|endoftext|><|im_start|><|im_end|>") == [end, start, turn]
    assert ours.encode("<|extra_0|><|extra_204|>") == [theirs.n_vocab + 3, theirs.n_vocab + 207]
    assert (ours.eos_id, ours.end_ids) == (end, (end, turn))
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    chat = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(ours, USER) == system + chat
    assert render_chat(ours, [{"role": "system", "content": "S"}]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encode_chat(ours, USER)[0] == start


@pytest.mark.parametrize("content", [b"YQ== 0\nYg== x", b"YQ==", b"!!! 0", b"YQ== 1"])
def test_a_broken_tiktoken_file(tmp_path, content):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(CorruptModelError, match=r"qwen.tiktoken"):
        load_tokenizer(tmp_path)
