"""From names to files: every kind of name, and a clear error for each way in which a name can lead nowhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from kvant.errors import ModelNotFoundError, UnsupportedModelError
from kvant.weights.locate import LocalModel, local_models, locate
from kvant.weights.pull import PULLABLE

COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees or changes the models on this machine, and none leaves it."""
    monkeypatch.setenv("KVANT_HOME", str(tmp_path / "kvant-home"))
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def checkpoint(folder: Path, shards: tuple[str, ...] = ("model.safetensors",)) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for name in shards:
        (folder / name).write_bytes(b"12345")
    if len(shards) > 1:
        index = {"weight_map": {f"w{i}": name for i, name in enumerate(shards)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def cached_repo(repo: str, shards: tuple[str, ...] = ("model.safetensors",)) -> Path:
    """A model in the hub's local cache, laid out as the hub's client lays it out."""
    base = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(COMMIT)
    return checkpoint(base / "snapshots" / COMMIT, shards)


def pulled_smollm2() -> Path:
    path = Path(os.environ["KVANT_HOME"]) / "models" / "smollm2.gguf"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(PULLABLE["smollm2"].size)  # a sparse file: the right size, no bytes
    return path


def test_none_and_the_name_are_the_pulled_file():
    path = pulled_smollm2()
    assert locate(None) == locate("smollm2") == locate() == path


def test_a_model_not_pulled_yet_says_how_to():
    with pytest.raises(ModelNotFoundError, match="kvant models pull smollm2"):
        locate(None)


def test_a_directory_with_config_is_itself(tmp_path):
    folder = checkpoint(tmp_path / "model")
    (folder / "extra.gguf").write_bytes(b"")
    assert locate(folder) == locate(str(folder)) == folder


def test_a_gguf_file_is_itself_and_so_is_the_only_one_of_a_directory(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    assert locate(file) == file
    assert locate(tmp_path) == file


def test_several_gguf_files_have_to_be_told_apart(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"2 \.gguf files \(a\.gguf, b\.gguf\)"):
        locate(tmp_path)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = checkpoint(tmp_path / "models" / "mine")
    assert locate("~/models/mine") == folder


def test_a_directory_named_like_a_hub_id_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "org" / "name")
    assert locate("org/name") == Path("org/name")


def test_an_empty_directory_has_no_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor a \.gguf"):
        locate(tmp_path)


def test_one_file_of_a_checkpoint_names_its_directory(tmp_path):
    folder = checkpoint(tmp_path / "model")
    with pytest.raises(ModelNotFoundError, match=f"Give its directory: {folder}"):
        locate(folder / "model.safetensors")


def test_pickled_weights_are_not_supported(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin"):
        locate(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["smolm2", "./missing", "~/missing", "/no/such/dir", "org/file.gguf", "a/b/c", ""])
def test_a_name_that_is_nothing_never_reaches_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFoundError, match="no model|holds no model"):
        locate(name)


def test_a_missing_path_object_never_reaches_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFoundError, match="no model"):
        locate(Path("org/name"))


@pytest.mark.parametrize("shards", [("model.safetensors",), ("a.safetensors", "b.safetensors")])
def test_a_cached_hub_model_needs_no_network(shards):
    folder = cached_repo("org/name", shards)
    assert locate("org/name") == folder


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 1}'])
def test_a_cached_model_with_a_broken_index_is_not_whole(index):
    folder = cached_repo("org/name")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UnsupportedModelError, match="org/name"):
        locate("org/name")
    assert local_models() == []


def test_offline_says_which_variable_to_unset():
    with pytest.raises(ModelNotFoundError, match=r"org/name.*HF_HUB_OFFLINE is set\. Unset it.*kvant models pull"):
        locate("org/name")


class Hub(BaseHTTPRequestHandler):
    """A hub on this machine: org/name with the files of `files`, a gated repository, and no other."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = self.path.split("?")[0].split("/")
        if "gated" in parts:
            self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        elif "name" not in parts:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "revision" in parts:
            self.reply(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
        elif "tree" in parts:
            tree = [{"type": "file", "path": f, "size": len(c), "oid": f} for f, c in self.files.items()]
            self.reply(200, json.dumps(tree).encode())
        else:
            self.reply(200, self.files[parts[-1]], {"ETag": f'"{parts[-1]}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "asked", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield Hub
        server.shutdown()


def test_a_hub_model_is_downloaded_without_pickles(hub):
    wanted = {"config.json": b"{}", "model.safetensors": b"123", "tokenizer.json": b"{}", "chat_template.jinja": b"x"}
    hub.files |= wanted | {
        "pytorch_model.bin": b"!",
        "model.pt": b"!",
        "README.md": b"!",
        "consolidated.safetensors": b"!",
    }

    folder = locate("org/name")

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    asked = len(hub.asked)
    assert locate("org/name") == folder
    assert len(hub.asked) == asked


def test_a_half_cached_hub_model_is_completed(hub):
    folder = cached_repo("org/name", ("a.safetensors", "b.safetensors"))
    hub.files |= {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "b.safetensors").unlink()
    assert locate("org/name") == folder
    assert (folder / "b.safetensors").is_file()


def test_a_repository_without_safetensors_is_not_supported(hub):
    hub.files |= {"config.json": b"{}", "pytorch_model.bin": b"!"}
    with pytest.raises(UnsupportedModelError, match=r"org/name.*safetensors.*\.gguf"):
        locate("org/name")


def test_an_unknown_repository_says_so(hub):
    with pytest.raises(ModelNotFoundError, match="org/nothing: the hub has no such repository"):
        locate("org/nothing")


def test_a_gated_repository_says_how_to_get_in(hub):
    with pytest.raises(ModelNotFoundError, match="org/gated: its owner has to grant you access.*hf auth login"):
        locate("org/gated")


@pytest.mark.parametrize("name", ["org/na--me", "org/name-", "a/b..c"])
def test_what_cannot_be_a_hub_id_is_said_to_be_none(name):
    with pytest.raises(ModelNotFoundError, match="is no hub id"):
        locate(name)


def test_other_failures_are_named_too(monkeypatch):
    def snapshot_download(repo: str, *, local_files_only: bool = False, **patterns: list[str]) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFoundError, match="org/name: OSError.*No space left on device"):
        locate("org/name")


def test_an_unreachable_hub_fails_in_seconds(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match=r"http://127\.0\.0\.1:9\) cannot be reached: .*Connection refused"):
        locate("org/name")
    assert time.monotonic() - start < 10


def test_local_models_are_those_that_locate_finds():
    assert local_models() == []
    file, folder = pulled_smollm2(), cached_repo("org/name")
    incomplete = cached_repo("org/half", ("a.safetensors", "b.safetensors"))
    (incomplete / "a.safetensors").unlink()

    models = local_models()

    assert models == [
        LocalModel("smollm2", file, PULLABLE["smollm2"].size, "gguf"),
        LocalModel("org/name", folder, len("{}") + len("12345"), "safetensors"),
    ]
    assert [locate(model.name) for model in models] == [model.path for model in models]
