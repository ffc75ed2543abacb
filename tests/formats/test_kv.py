"""The formats by name: what they take, what follows from it, and how they are found."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvant.errors import ConfigError
from kvant.formats.kv import KV_FORMATS, SINK_SPAN, KVLayer, KVPlan, KVShape, LayerPlan, resolve_kv_format
from kvant.formats.kv_stats import NO_STATS
from tests.formats.stats import layer_plan_of
from tests.formats.vectors import HEAD_DIMS

# Bytes of a key and of a value of 64 elements: codes, and what is kept beside them.
VECTORS = {
    "fp32": (256, 256), "fp16": (128, 128), "bf16": (128, 128),
    "int8": (64 + 4, 64 + 4), "int4": (32 + 4, 32 + 4), "k8v4": (64 + 4, 32 + 8),
    "int8_plain": (64 + 4, 64 + 4), "int4_plain": (32 + 4, 32 + 4), "int8_pertoken": (64 + 2, 64 + 2),
    "int8_pertensor": (64, 64), "int8_pertensor_perhead": (64, 64), "fp8_e4m3": (64, 64), "fp8_e5m2": (64, 64),
}  # fmt: skip
MEASURED = {"int8", "int4", "k8v4", "int8_pertensor", "int8_pertensor_perhead", "fp8_e4m3", "fp8_e5m2"}
WITH_SINKS = {"int4", "k8v4"}


@pytest.mark.parametrize("name", KV_FORMATS)
def test_bytes_by_hand(name):
    fmt, vectors = KV_FORMATS[name], sum(VECTORS[name])
    assert fmt.bytes_per_token(KVShape(num_layers=30, num_kv_heads=3, head_dim=64)) == 30 * 3 * vectors
    lead = 4 * 3 if name in WITH_SINKS else 0  # each of 4 sinks takes 3 slots more
    assert fmt.lead == lead
    assert fmt.bits_per_element(64, context=1000) == pytest.approx(vectors * 8 / 128 * (1000 + lead) / 1000)


@pytest.mark.parametrize(
    ("name", "head_dim", "least", "most"),
    [
        ("int8", 64, 8, 8.6), ("int4", 64, 4, 4.6), ("k8v4", 64, 6, 6.8),
        ("int8", 128, 8, 8.3), ("int4", 128, 4, 4.35), ("k8v4", 128, 6, 6.7),
    ],
)  # fmt: skip
def test_few_bits_are_few_with_all_that_belongs_to_them(name, head_dim, least, most):
    """At 4096 tokens, scales, zeros and sinks counted; of a format and of a model's plan."""
    fmt = KV_FORMATS[name]
    assert least < fmt.bits_per_element(head_dim) <= most
    for shape in (KVShape(28, 2, head_dim), KVShape(1, 1, head_dim)):
        plan = KVPlan.uniform(fmt, shape.num_layers)
        assert plan.bits_per_element(shape) == pytest.approx(fmt.bits_per_element(head_dim))


@given(
    names=st.lists(st.sampled_from(sorted(KV_FORMATS)), min_size=1, max_size=5),
    heads=st.integers(1, 8), head_dim=st.sampled_from(HEAD_DIMS), context=st.integers(1, 100_000),
)  # fmt: skip
def test_a_plans_size_is_that_of_its_layers_under_one_lead(names, heads, head_dim, context):
    formats = [KV_FORMATS[name] for name in names]
    plan, shape = KVPlan("mixed", tuple(LayerPlan(fmt) for fmt in formats)), KVShape(len(names), heads, head_dim)
    one = KVShape(1, heads, head_dim)
    assert plan.lead == max(fmt.lead for fmt in formats)
    assert plan.bytes_per_token(shape) == sum(fmt.bytes_per_token(one) for fmt in formats)
    stored, elements = plan.bytes_per_token(shape) * 8 * (context + plan.lead), 2 * len(names) * heads * head_dim
    assert plan.bits_per_element(shape, context) == pytest.approx(stored / (context * elements))


def test_int4_holds_3_5_times_as_many_tokens_as_16_bit_and_int8_1_9_times():
    shape = KVShape(30, 3, 64)
    wide = KV_FORMATS["fp16"].bytes_per_token(shape)
    assert wide / KV_FORMATS["int4"].bytes_per_token(shape) > 3.5
    assert wide / KV_FORMATS["int8"].bytes_per_token(shape) > 1.85


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_code_bytes_of_a_sinks_slots_hold_it_in_16_bit(name, head_dim):
    fmt = KV_FORMATS[name]
    assert fmt.sinks == (4 if name in WITH_SINKS else 0)
    for codec in (fmt.key, fmt.value):
        assert codec.planes(head_dim)[0].bytes * SINK_SPAN >= 2 * head_dim


@pytest.mark.parametrize("name", KV_FORMATS)
def test_a_format_says_whether_it_works_with_statistics(name):
    fmt = KV_FORMATS[name]
    assert fmt.measured == (name in MEASURED)
    plan = layer_plan_of(fmt, kv_heads=1, head_dim=16)
    assert fmt.measured == any(stats is not NO_STATS for stats in (plan.key_stats, plan.value_stats))


def test_auto_is_16_bit_in_the_models_own_kind():
    assert resolve_kv_format("auto", torch.bfloat16).name == "bf16"
    assert resolve_kv_format("auto", torch.float16).name == "fp16"
    assert resolve_kv_format("auto", torch.float32).name == "fp16"
    for name in KV_FORMATS:
        assert resolve_kv_format(name, torch.bfloat16).name == name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16"), ("fp8", "fp8_e4m3"),
        ("int8_per_token_head", "int8_pertoken"), ("int4_per_token_head", "int4"),
    ],
)  # fmt: skip
def test_other_engines_names_are_understood(alias, name):
    assert resolve_kv_format(alias, torch.float32) is KV_FORMATS[name]


def test_an_unknown_format_names_those_there_are():
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int3' is unknown; choose one of auto, .*int8, int4"):
        resolve_kv_format("int3", torch.float32)


def test_a_layer_shows_each_codec_its_own_planes():
    planes = {plane.name: torch.zeros(1, 1, 8, *plane.shape) for plane in KV_FORMATS["int4"].planes(16)}
    layer = KVLayer(LayerPlan(KV_FORMATS["int4"]), 8, 0, planes)
    assert layer.side("key").keys() == layer.side("value").keys() == {"codes", "words"}
    assert layer.side("key")["codes"] is planes["key.codes"]
    assert layer.side("value")["words"] is planes["value.words"]
