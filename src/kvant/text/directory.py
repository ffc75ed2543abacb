"""The tokenizer in a model's directory, as Hugging Face lays them out. None of the directory's code is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from kvant.errors import CorruptModelError, UnsupportedModelError
from kvant.text.tokenizer import Tokenizer, frame
from kvant.text.vocabulary_files import read_qwen_tiktoken, read_sentencepiece

# Qwen v1 published its format as code, not as a template.
CHATML: Final = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_ROLES = ("bos", "eos", "unk", "pad")
_TOKEN_OPTIONS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read a model's tokenizer: from tokenizer.json, else from qwen.tiktoken, else from tokenizer.model.

    Raises:
        UnsupportedModelError: none of these files is there, or one is of a kind that kvant does not know.
        CorruptModelError: a file cannot be read, or contradicts the others.
        MissingDependencyError: a package that the file needs is not installed.
    """
    try:
        return _load(directory)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptModelError(f"{directory}: the tokenizer's files are malformed: {error!r}") from error


def _load(directory: Path) -> Tokenizer:
    declared = _read_json(directory / "special_tokens_map.json") | _read_json(directory / "tokenizer_config.json")
    backend, config = _backend(directory, {key: value for key, value in declared.items() if value is not None})
    _add_tokens(backend, config, _read_json(directory / "added_tokens.json"))
    ids = {role: _id(backend, config.get(f"{role}_token")) for role in _ROLES}
    if "add_bos_token" in config or "add_eos_token" in config:
        bos, eos = (ids[role] if config.get(f"add_{role}_token") else None for role in ("bos", "eos"))
        frame(backend, bos, eos)
    return Tokenizer(
        backend,
        **{f"{role}_id": ids[role] for role in _ROLES},
        end_ids=[token for name in config.get("end_tokens", ()) if (token := _id(backend, name)) is not None],
        templates=_templates(directory, config),
    )


def _backend(directory: Path, config: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """The encoder, and the config with what goes without saying for this kind of file."""
    if (path := directory / "tokenizer.json").is_file():
        return _from_json(path), config
    if (path := directory / "qwen.tiktoken").is_file():
        usual = {"eos_token": "<|endoftext|>", "end_tokens": ["<|im_end|>"], "chat_template": CHATML}
        return read_qwen_tiktoken(path), {**usual, **config}
    if (path := directory / "tokenizer.model").is_file():
        backend, special = read_sentencepiece(path, "always" if config.get("legacy", True) else "first")
        return backend, {"add_bos_token": True, **special, **config}
    raise UnsupportedModelError(f"{directory} has no tokenizer.json, qwen.tiktoken or tokenizer.model")


def _from_json(path: Path) -> Backend:
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CorruptModelError(f"{path} is not a whole tokenizer: {error}") from error
    # Some were saved with the settings of a training run.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptModelError(f"{path} must hold an object, not {type(content).__name__}")
    return content


def _text(value: Any) -> str:
    """A token as tokenizer_config.json writes it: a string or an object with its content."""
    return str(value["content"] if isinstance(value, Mapping) else value)


def _id(backend: Backend, value: Any) -> int | None:
    return None if value is None else backend.token_to_id(_text(value))


def _add_tokens(backend: Backend, config: Mapping[str, Any], added: Mapping[str, Any]) -> None:
    """Add what the config declares. A token that is new to the vocabulary must get the id that is declared for it."""
    declared = dict(_declared(config, added))
    new = {i: token.content for i, token in declared.items() if backend.token_to_id(token.content) is None}
    backend.add_tokens([token for _, token in sorted(declared.items(), key=lambda entry: entry[0])])
    if wrong := [name for i, name in new.items() if backend.token_to_id(name) != i]:
        raise CorruptModelError(f"the ids declared for the added tokens {wrong} do not follow on the vocabulary")
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    marks = [name for name in _marks(config) if name not in special and backend.token_to_id(name) is not None]
    backend.add_tokens([AddedToken(name, special=True, normalized=False) for name in marks])


def _declared(config: Mapping[str, Any], added: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    if "added_tokens_decoder" not in config:
        yield from ((int(i), AddedToken(name, special=False, normalized=False)) for name, i in added.items())
    for i, token in config.get("added_tokens_decoder", {}).items():
        yield int(i), AddedToken(_text(token), **{name: token[name] for name in _TOKEN_OPTIONS if name in token})


def _marks(config: Mapping[str, Any]) -> list[str]:
    """The tokens that the config calls special, by role or in a list."""
    more = config.get("additional_special_tokens", [])
    return [_text(token) for token in [*(config.get(f"{role}_token") for role in _ROLES), *more] if token is not None]


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; files of their own go before those in the config."""
    files = {path.stem: path for path in directory.glob("additional_chat_templates/*.jinja")}
    if (main := directory / "chat_template.jinja").is_file():
        files["default"] = main
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    source = _read_json(directory / "chat_template.json").get("chat_template", config.get("chat_template", {}))
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}
    return {"default": source} if isinstance(source, str) else dict(source)
