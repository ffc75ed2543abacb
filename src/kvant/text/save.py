"""Writing a tokenizer as the files of an HF directory, whatever it was read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvant.text.tokenizer import Tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into a directory that is there.

    `load_tokenizer` gives the same tokenizer again: ids, roles, ends, templates. One thing it makes stricter, as HF
    does: a token with a role (BOS, EOS, unknown, padding) is special, even where the file it came from did not say so.

    Raises:
        OSError: a file cannot be written.
    """
    # Not `backend.save`, whose errors tell nothing but their text.
    (directory / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
    config = json.dumps(_config(tokenizer), ensure_ascii=False, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(config, encoding="utf-8")


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.pad_id}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": name for role, i in ids.items() if (name := tokenizer.token_name(i)) is not None}
    config["end_tokens"] = [name for i in tokenizer.end_ids if (name := tokenizer.token_name(i)) is not None]
    sources = {kind: template.source for kind, template in tokenizer.templates.items()}
    if set(sources) == {"default"}:
        config["chat_template"] = sources["default"]
    elif sources:
        config["chat_template"] = [{"name": kind, "template": source} for kind, source in sources.items()]
    return config
