"""From what a user calls a model to the file or directory that holds it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvant.errors import ModelNotFoundError, UnsupportedModelError
from kvant.weights.pull import PULLABLE, find_pulled

DEFAULT_MODEL = "smollm2"
WORKSPACE_HEADER = "workspace.json"  # the file by which a converted model's directory is known

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights come as safetensors only: .bin and .pt files are pickles, which can run code when they are opened.
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "*.tiktoken",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "quantize_config.json",
)
# The same weights once more, in their makers' own layout.
_HUB_DUPLICATES = ("consolidated*", "original/*")
_ELSE = f"Give a local directory or .gguf file instead, or try the small model: `kvant models pull {DEFAULT_MODEL}`."


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine, ready to be loaded: `size` is in bytes, `locate(name)` gives `path`."""

    name: str
    path: Path
    size: int
    kind: Literal["gguf", "safetensors"]


def locate(model: str | Path | None = None) -> Path:
    """The .gguf file, or the directory with config.json and safetensors or a converted model, that `model` stands for.

    Args:
        model: None (the default model), the name of a pulled model, a .gguf file, a directory, or a hub id
            "org/name", which is downloaded unless the hub's local cache has it. In this order: a directory that is
            called like a pulled model is "./smollm2", and a local path comes before a hub id.

    Raises:
        ModelNotFoundError: it leads to nothing, or to several models.
        UnsupportedModelError: there are weights, but not in a format that kvant opens.
    """
    name = DEFAULT_MODEL if model is None else str(model)
    if name in PULLABLE:
        return _pulled(name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _in_directory(path)
    if path.is_file():
        return _as_file(path)
    if isinstance(model, str) and _HUB_ID.fullmatch(name) and path.suffix != ".gguf" and name[0] not in ".~":
        return _from_hub(name)
    raise ModelNotFoundError(
        f"no model {name!r}: it is no existing file or directory, no hub id (org/name) and no model that can be pulled "
        f"({', '.join(PULLABLE)}). Check the spelling; `kvant models` lists what is here."
    )


def local_models() -> list[LocalModel]:
    """The models on this machine that `locate` finds by name: pulled ones, then those in the hub's cache."""
    found = ((name, find_pulled(name)) for name in PULLABLE)
    return [LocalModel(name, path, path.stat().st_size, "gguf") for name, path in found if path] + _hub_models()


def _pulled(name: str) -> Path:
    path = find_pulled(name)
    if path is None:
        raise ModelNotFoundError(f"{name} is not on this machine yet. Fetch it with `kvant models pull {name}`.")
    return path


def _in_directory(path: Path) -> Path:
    if any((path / name).is_file() for name in ("config.json", WORKSPACE_HEADER)):
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise ModelNotFoundError(f"{path} holds {len(files)} .gguf files ({names}). Give the path of one of them.")
    wanted = f"neither config.json nor a .gguf file, nor {WORKSPACE_HEADER} of a converted model"
    raise ModelNotFoundError(f"{path} holds no model: {wanted}. {_ELSE}")


def _as_file(path: Path) -> Path:
    if path.suffix == ".gguf":
        return path
    if path.suffix in (".safetensors", ".json"):
        raise ModelNotFoundError(f"{path} is one file of a model. Give its directory: {path.parent}.")
    raise UnsupportedModelError(f"{path} is no .gguf file, nor a directory with config.json and safetensors. {_ELSE}")


def _from_hub(repo: str) -> Path:
    # Imported here: it takes longer to import than all else that a local GGUF file needs to be found.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted, unwanted = list(_HUB_FILES), list(_HUB_DUPLICATES)
    try:
        folder = Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=True))
        if _is_complete(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise ModelNotFoundError(f"{repo!r} is no hub id: {error} {_ELSE}") from error
    try:
        folder = Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # whatever the hub's client, its HTTP library or the disk may raise
        raise ModelNotFoundError(f"cannot download {repo}: {_cause(repo, error)} {_ELSE}") from error
    if not _is_complete(folder):
        raise UnsupportedModelError(
            f"{repo} has no config.json with complete safetensors weights, and kvant opens no pickled weights (.bin, "
            f".pt). Where the repository offers .gguf files, download one and give its path. {_ELSE}"
        )
    return folder


def _cause(repo: str, error: Exception) -> str:
    """Why the hub's client gave up on `repo`, and what to do about just that."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner has to grant you access. Ask for it on the model's page, then `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private (`hf auth login`). Check the spelling."
    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return "it is not in the local cache, and HF_HUB_OFFLINE is set. Unset it to download."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"the hub ({constants.ENDPOINT}) cannot be reached: {error.__cause__ or error}."
    return f"{type(error).__name__}: {error}."


def _is_complete(folder: Path) -> bool:
    """Whether config.json and every safetensors file that the index names are there."""
    try:
        names = {name for index in folder.glob("*.safetensors.index.json") for name in _shards(index)}
    except (OSError, ValueError):
        return False
    weights = [folder / name for name in names] or list(folder.glob("*.safetensors"))
    return (folder / "config.json").is_file() and bool(weights) and all(path.is_file() for path in weights)


def _shards(index: Path) -> set[str]:
    content = json.loads(index.read_text(encoding="utf-8"))
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        raise ValueError(f"{index} has no weight_map")
    return {str(name) for name in shards.values()}


def _hub_models() -> list[LocalModel]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return sorted(
        (
            LocalModel(repo.repo_id, revision.snapshot_path, revision.size_on_disk, "safetensors")
            for repo in repos
            if repo.repo_type == "model"
            for revision in repo.revisions
            if "main" in revision.refs and _is_complete(revision.snapshot_path)
        ),
        key=lambda model: model.name,
    )
