"""The two configs: what they take, what they make of it, and what they refuse with a reason."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvant.config import DTYPES, MAX_LOGPROBS, EngineConfig, SamplingParams, parse_layers, parse_memory
from kvant.errors import ConfigError, KvantError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (1, 1),
        (2 * 10**9, 2 * 10**9),
        (0.5, 0.5),
        (1.0, 1.0),
        ("50%", 0.5),
        ("12.5 %", 0.125),
        ("0.25", 0.25),
        ("1.0", 1.0),
        ("1", 1),
        ("123456", 123456),
        ("2GiB", 2 * 2**30),
        ("1.5gib", 3 * 2**29),
        (" 800 MB ", 800 * 10**6),
        ("64MiB", 64 * 2**20),
        ("3k", 3000),
        ("3Ki", 3 * 1024),
        ("7B", 7),
        ("0.5G", 5 * 10**8),
    ],
)
def test_memory_is_bytes_or_a_fraction(written, meant):
    parsed = parse_memory(written)
    assert parsed == meant
    assert type(parsed) is type(meant)
    config = EngineConfig(kv_cache_memory=written, swap_space=written)
    assert config.kv_cache_memory == config.swap_space == meant


@pytest.mark.parametrize(
    "written",
    [
        *(0, -5, 0.0, -0.1, 1.1, math.nan, math.inf),
        *("", "GiB", "2 apples", "1.2.3GB", ".", "-2GB", "150%", "0%", "0", "2TB", "2i", "2iB", "ib", "1.5", "0.1B"),
    ],
)
def test_what_is_no_amount_of_memory_is_refused(written):
    for name in ("kv_cache_memory", "swap_space"):
        with pytest.raises(ConfigError, match=f"^{name}="):
            EngineConfig(**{name: written})


@given(amount=st.integers(1, 10**6), unit=st.sampled_from(("", "K", "M", "G")), binary=st.booleans())
def test_units_are_powers_of_1000_or_1024(amount, unit, binary):
    factor = (1024 if binary else 1000) ** ("", "K", "M", "G").index(unit)
    text = f"{amount}{unit}{'i' if binary and unit else ''}B"
    assert parse_memory(text) == amount * factor


def test_an_engine_is_configured_by_nothing():
    config = EngineConfig()
    assert (config.dtype, config.kv_cache_dtype, config.device) == ("auto", "auto", "auto")
    assert (config.weights, config.weights_group_size) == ("auto", 32)
    assert config.enable_prefix_caching
    assert config.kv_cache_memory is config.num_kv_blocks is config.swap_space is config.max_model_len is None
    assert config.kv_cache_policy is config.quantization_param_path is None
    assert config.kv_cache_dtype_skip_layers == ()


def test_configs_are_frozen_and_derived_from_each_other():
    config = EngineConfig(quant_policy=8, dtype="bf16", kv_cache_memory="1GiB")
    with pytest.raises(FrozenInstanceError):
        config.block_size = 32  # type: ignore[misc]
    derived = replace(config, block_size=32)
    assert derived == EngineConfig(kv_cache_dtype="int8", dtype="bfloat16", kv_cache_memory=2**30, block_size=32)
    assert config.block_size == 64
    with pytest.raises(ConfigError, match="block_size=9"):
        replace(config, block_size=9)
    with pytest.raises(FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]


@pytest.mark.parametrize(("given", "known"), DTYPES.items())
def test_dtypes_have_several_names(given, known):
    assert EngineConfig(dtype=given).dtype == known


@pytest.mark.parametrize(("policy", "name"), [(0, "auto"), (4, "int4"), (8, "int8")])
def test_quant_policy_is_another_name_for_the_kv_format(policy, name):
    assert EngineConfig(quant_policy=policy).kv_cache_dtype == name
    assert EngineConfig(quant_policy=policy, kv_cache_dtype=name).kv_cache_dtype == name


def test_quant_policy_and_the_kv_format_must_agree():
    with pytest.raises(ConfigError, match="quant_policy=4 means kv_cache_dtype='int4', but 'int8' was given too"):
        EngineConfig(quant_policy=4, kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match="quant_policy=0 means kv_cache_dtype='auto', but 'int4' was given too"):
        EngineConfig(quant_policy=0, kv_cache_dtype="int4")
    with pytest.raises(ConfigError, match="quant_policy=3 is unknown; 0 is auto, 4 is int4, 8 is int8"):
        EngineConfig(quant_policy=3)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ((), ()),
        (3, (3,)),
        ("", ()),
        ("0,1,sliding_window", (0, 1, "sliding_window")),
        (["0", 3, "-1", "0-3", "-4--1", "5-5", "-0"], (0, 3, -1, "0-3", "-4--1", 5, 0)),
        (["0,1", " 007 , sliding_window,"], (0, 1, 7, "sliding_window")),
        (["0,", "1"], (0, 1)),  # "0, 1" as the environment's lists arrive
        (range(2), (0, 1)),
    ],
    ids=str,
)
def test_lists_of_layers_are_kept_in_one_spelling(written, meant):
    config = EngineConfig(kv_cache_dtype_skip_layers=written)
    assert config.kv_cache_dtype_skip_layers == meant
    assert list(map(type, config.kv_cache_dtype_skip_layers)) == list(map(type, meant))
    assert replace(config, seed=1).kv_cache_dtype_skip_layers == meant


@pytest.mark.parametrize(
    "entry", ["x", "0-", "0-1-2", "1.5", "--1", "1..3", "full_attention", 1.5, True, None, "1" * 10]
)
def test_what_names_no_layers_is_refused(entry):
    with pytest.raises(ConfigError, match=r"kv_cache_dtype_skip_layers: .* names no layers; write an index \(3, or -1"):
        EngineConfig(kv_cache_dtype_skip_layers=(0, entry))


def test_layers_are_a_list():
    for wrong in (None, 1.5):
        with pytest.raises(ConfigError, match=f"kv_cache_dtype_skip_layers={wrong} must be a list of layers"):
            EngineConfig(kv_cache_dtype_skip_layers=wrong)


@given(first=st.integers(-(10**9) + 1, 10**9 - 1), last=st.integers(-(10**9) + 1, 10**9 - 1))
def test_layers_mean_what_they_say(first, last):
    assert parse_layers(first, "here") == parse_layers(str(first), "here") == (first, first)
    assert parse_layers(f"{first}-{last}", "here") == (first, last)
    assert parse_layers("sliding_window", "here") is None


@pytest.mark.parametrize("name", ["kv_cache_policy", "quantization_param_path"])
def test_files_are_given_as_text_or_path(name):
    assert EngineConfig(**{name: "a/b.json"}) == EngineConfig(**{name: Path("a/b.json")})
    assert getattr(EngineConfig(**{name: "a/b.json"}), name) == Path("a/b.json")
    for wrong in ("", 3, {"default": "int4"}):
        with pytest.raises(ConfigError, match=f"{name}=.* must be a path"):
            EngineConfig(**{name: wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' is unknown; choose one of auto, .*bfloat16"),
        ({"weights": "int3"}, "weights='int3' is unknown; choose one of auto, dense, int4, int8"),
        ({"weights": "int4", "weights_group_size": 16}, "weights_group_size=16 must be one of 32, 64, 128"),
        ({"weights": "int8", "weights_group_size": 64.0}, "weights_group_size=64.0 must be one of"),
        ({"weights_group_size": 64}, "weights_group_size=64 is of no use to weights='auto'; choose int4 or int8"),
        ({"device": "tpu"}, "device='tpu' is unknown; use 'cpu', 'cuda'"),
        ({"device": "cuda:"}, "device='cuda:' is unknown"),
        ({"max_model_len": 0}, "max_model_len=0 must be at least 1"),
        ({"max_model_len": 10.5}, "max_model_len=10.5 must be"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens=-1 must be at least 1"),
        ({"max_num_batched_tokens": 7, "max_num_seqs": 8}, "max_num_batched_tokens=7 is less than max_num_seqs=8: .*"),
        ({"num_kv_blocks": 0}, "num_kv_blocks=0 must be at least 1"),
        ({"num_threads": 0}, "num_threads=0 must be at least 1"),
        ({"block_size": 4}, "block_size=4 must be a power of two from 8 to 1024"),
        ({"block_size": 24}, "block_size=24 must be a power of two"),
        ({"block_size": 2048}, "block_size=2048 must be a power of two"),
        ({"kv_cache_memory": "1GiB", "num_kv_blocks": 5}, "give kv_cache_memory or num_kv_blocks, not both"),
    ],
    ids=str,
)
def test_an_engine_that_cannot_be_says_which_setting_is_wrong(wrong, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**wrong)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_num_seqs": 5000}, (5000, 5000)),
        ({"max_num_batched_tokens": 3}, (3, 3)),
        ({"max_num_seqs": 3, "max_num_batched_tokens": 3}, (3, 3)),
    ],
    ids=str,
)
def test_a_step_has_a_token_for_every_sequence_that_may_run(device, given, expected):
    limits = EngineConfig(**given).limits(device)
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == expected


@pytest.mark.parametrize("size", [8, 16, 64, 1024])
def test_block_sizes(size):
    assert EngineConfig(block_size=size).block_size == size


def test_sampling_without_wishes_is_the_models_own_distribution():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_k, params.top_p, params.min_p) == (1, 1.0, 0, 1.0, 0.0)
    assert not params.greedy
    assert SamplingParams(temperature=0).greedy


def test_lists_and_single_strings_are_taken_too():
    params = SamplingParams(stop="END", stop_token_ids=[1, 2], top_k=-1)
    assert (params.stop, params.stop_token_ids, params.top_k) == (("END",), (1, 2), 0)
    assert params.stop_strings == ("END",)
    assert (SamplingParams(stop=None, stop_token_ids=None).stop_strings, SamplingParams().stop_token_ids) == ((), ())
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert replace(params, n=2).stop == ("END",)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("n", (1, 1024), (0, 1025, 1.5, True, "2", None)),
        ("temperature", (0, 1, 1e6), (-0.1, math.nan, math.inf, "1", None)),
        ("top_k", (-1, 0, 1, 10**9), (-2, 1.5, 2**31, None)),
        ("top_p", (1e-9, 1), (0, -0.1, 1.1, math.nan)),
        ("min_p", (0, 1), (-0.1, 1.1, math.nan)),
        ("repetition_penalty", (0.01, 2, 1000.0), (0, -1, math.inf, math.nan)),
        ("presence_penalty", (-100, 100), (-101, 101, math.nan)),
        ("frequency_penalty", (-100, 100), (-101, 101, math.nan)),
        ("max_tokens", (None, 1), (0, 2.0)),
        ("min_tokens", (0, 7), (-1,)),
        ("logprobs", (None, 0, MAX_LOGPROBS), (-1, MAX_LOGPROBS + 1)),
        ("prompt_logprobs", (None, 0, MAX_LOGPROBS), (-1, MAX_LOGPROBS + 1)),
        ("seed", (None, 0, -3, 2**70), (1.5, "7", False)),
        ("stop", (None, (), "x", ("a", "b")), (("a", ""), [""], "", [3])),
        ("stop_token_ids", (None, (), [1]), (["a"], [1.5])),
        ("logit_bias", (None, {}, {3: -100.0}), ({3: math.inf}, {3: math.nan}, {3: 100.5}, {"3": 1.0}, {3: "1"})),
    ],
)
def test_sampling_has_limits(name, inside, outside):
    for value in inside:
        SamplingParams(**{name: value})
    for value in outside:
        with pytest.raises(ConfigError, match=name):
            SamplingParams(**{name: value})


def test_wishes_must_not_contradict_each_other():
    assert SamplingParams(min_tokens=3, max_tokens=3).min_tokens == 3
    with pytest.raises(ConfigError, match="min_tokens=4 exceeds max_tokens=3"):
        SamplingParams(min_tokens=4, max_tokens=3)


def test_top_p_of_0_points_to_greedy():
    with pytest.raises(ConfigError, match="use temperature=0 for greedy"):
        SamplingParams(top_p=0)


def test_a_wrong_setting_is_a_value_error_and_one_of_kvants():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, KvantError)
