"""What is kept of a measurement for other tools."""

from __future__ import annotations

import pytest
import torch

from kvant.errors import ConfigError
from kvant.quantize.kv_calibrate import ScaleFiles, calibrate_kv, common_key_share, static_scales
from kvant.quantize.kv_statistics import KVStatistics, LayerStatistics
from tests.families.configs import TINIES
from tests.families.tiny import build


def layer(mean: float, variance: float, keys: list[float], values: list[float]) -> LayerStatistics:
    shape = (len(keys), 4)
    moments = torch.full(shape, mean), torch.full(shape, variance), torch.zeros(*shape, 4)
    return LayerStatistics(*moments, torch.tensor(keys), torch.tensor(values), torch.full((len(keys),), 99.0))


def test_the_share_of_the_mean():
    assert common_key_share(layer(0.0, 2.0, [1.0], [1.0])) == 0
    assert common_key_share(layer(3.0, 1.0, [1.0, 1.0], [1.0, 1.0])) == pytest.approx(0.9)
    assert common_key_share(layer(-3.0, 0.0, [1.0], [1.0])) == 1
    assert common_key_share(layer(0.0, 0.0, [1.0], [1.0])) == 0


@pytest.mark.parametrize(("codes", "largest"), [("int8", 127), ("fp8", 448)])
def test_codes_reach_the_largest_keys_and_values(codes, largest):
    statistics = KVStatistics((layer(1, 1, [4.0, 8.0], [0.5, 0.25]), layer(1, 1, [1.0, 2.0], [0.0, 3.0])), 1)
    scales = static_scales(statistics, codes)
    assert scales.codes == codes
    for steps, expected in ((scales.keys, [[4, 8], [1, 2]]), (scales.values, [[0.5, 0.25], [0, 3]])):
        for step, ranges in zip(steps, expected, strict=True):
            torch.testing.assert_close(step, torch.tensor(ranges) / largest)
            assert (step > 0).all(), "a head of zeros has a scale too"


def test_scales_that_have_a_place_pass():
    ScaleFiles().check(3)
    ScaleFiles(layouts=("vllm", "compressed-tensors"), per_head=True, tp_size=8).check(4)
    ScaleFiles(layouts=("vllm", "modelopt"), tp_size=3).check(4)
    ScaleFiles(layouts=()).check(4)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (ScaleFiles(layouts=("compressed-tensors", "vllm", "fused")), "compressed-tensors and fused would both be"),
        (ScaleFiles(layouts=("fused",), per_head=True), "'fused' holds one scale a layer"),
        (ScaleFiles(per_head=True, tp_size=3), "4 KV heads cannot be split"),
        (ScaleFiles(layouts=("output-scale",), tp_size=2), "only the layout 'vllm'"),
        (ScaleFiles(layouts=(), tp_size=2), "only the layout 'vllm'"),
    ],
    ids=str,
)
def test_scales_without_a_place_are_refused(files, says):
    with pytest.raises(ConfigError, match=says):
        files.check(4)


def test_a_model_type_within_a_larger_config(tmp_path, tiny_path):
    """vLLM compares the text model's."""
    path = build(TINIES["gemma-3-4b"], tmp_path / "model").published
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tiny_path / name).read_bytes())
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(33, 90)))  # the bytes that this model has tokens for
    calibrate_kv(path, tmp_path / "out", text=text, samples=2, seqlen=20)
    assert '"model_type": "gemma3_text"' in (tmp_path / "out" / "kv_cache_scales.json").read_text()
