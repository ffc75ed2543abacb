"""The reader of GGUF files against the gguf package's writer and reader."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize

from kvant.weights.sources.gguf_file import GgufFile, read_gguf

SCALARS = {
    "uint8": 200,
    "int8": -100,
    "uint16": 60_000,
    "int16": -30_000,
    "uint32": 4_000_000_000,
    "int32": -2_000_000_000,
    "float32": 0.5,
    "bool": True,
    "uint64": 2**63,
    "int64": -(2**62),
    "float64": 0.1,
}
ARRAYS = {
    "floats": [0.25, -1.5],
    "integers": [3, -4, 5],
    "flags": [True, False],
    "names": ["", "a b", "Grüße 你好"],
    "nested": [[1, 2], [3]],
}


def write(path: Path, alignment: int | None = None, endian: GGUFEndian = GGUFEndian.LITTLE) -> GGUFWriter:
    """A file with a value of each type, arrays of some, and three tensors."""
    writer = GGUFWriter(path, "llama", endianess=endian)
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, value in SCALARS.items():
        writer.add_key_value(name, value, GGUFValueType[name.upper()])
    for name, values in ARRAYS.items():
        writer.add_array(name, values)
    random = np.random.default_rng(0)
    writer.add_tensor("vector", random.standard_normal(5).astype(np.float32))
    writer.add_tensor("half", random.standard_normal((3, 7)).astype(np.float16))
    blocks = quantize(random.standard_normal((4, 96)).astype(np.float32), GGMLQuantizationType.Q5_1)
    writer.add_tensor("blocks", blocks, raw_dtype=GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return writer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(path)
    return path


def check_tensors(read: GgufFile, path: Path) -> None:
    expected = GGUFReader(path).tensors
    assert list(read.tensors) == [tensor.name for tensor in expected]
    for tensor in expected:
        found = read.tensors[tensor.name]
        assert (found.kind, found.shape) == (tensor.tensor_type, tuple(map(int, reversed(tensor.shape))))
        assert found.data.shape[:-1] == found.shape[:-1]
        assert found.data.tobytes() == tensor.data.tobytes()


def test_values_are_plain_python(path):
    metadata = dict(read_gguf(path).metadata)
    assert metadata.pop("general.architecture") == "llama"
    assert metadata == SCALARS | ARRAYS
    assert [type(value) for value in metadata.values()] == [type(value) for value in (SCALARS | ARRAYS).values()]


def test_tensors_are_where_the_package_finds_them(path, tmp_path):
    check_tensors(read_gguf(path), path)
    wide = tmp_path / "wide.gguf"
    write(wide, alignment=256)
    check_tensors(read_gguf(wide), wide)


def test_a_file_cut_anywhere_is_refused(path, tmp_path):
    whole, cut = path.read_bytes(), tmp_path / "cut.gguf"
    last = GGUFReader(path).tensors[-1]
    for size in range(int(last.data_offset + last.n_bytes)):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"."):
            read_gguf(cut)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"GGUF\x03", b"GGUF\x01", "version is 1"),
        (b"GGUF", b"GGML", "does not begin"),
        (b"uint16\x02", b"uint16\x0d", "no type 13"),
        (b"\x05\0\0\0\0\0\0\0uint8", b"\x04\0\0\0\0\0\0\0int8", "."),
        (b"int16", b"int32", "'uint32' twice"),
        (b"vector", b"blocks", "'blocks' twice"),
        (struct.pack("<Q", 96), struct.pack("<Q", 95), "rows of 95 elements"),
        (struct.pack("<Q", 96), struct.pack("<Q", 1 << 60), "reshape"),
        (struct.pack("<IQ", 8, 3), struct.pack("<IQ", 8, 1 << 63), "beyond its end"),
        (struct.pack("<IQ", 5, 3), struct.pack("<IQ", 5, 1 << 63), "beyond its end"),
        ("ü".encode(), b"\xff\xff", "utf-8"),
    ],
)
def test_a_damaged_file_is_refused(path, tmp_path, old, new, says):
    damaged = tmp_path / "damaged.gguf"
    assert old in path.read_bytes()
    damaged.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(ValueError, match=says):
        read_gguf(damaged)


def test_another_byte_order_is_refused(tmp_path):
    path = tmp_path / "big.gguf"
    write(path, endian=GGUFEndian.BIG)
    with pytest.raises(ValueError, match="big-endian"):
        read_gguf(path)


def test_an_alignment_that_is_none_is_refused(tmp_path):
    path = tmp_path / "odd.gguf"
    write(path, alignment=32)
    key = b"general.alignment" + struct.pack("<I", 4)
    path.write_bytes(path.read_bytes().replace(key + struct.pack("<I", 32), key + struct.pack("<I", 24)))
    with pytest.raises(ValueError, match="24, which is no power of two"):
        read_gguf(path)
