"""The two frozen configs a user writes: `EngineConfig` and `SamplingParams`. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvant.errors import ConfigError

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
}
QUANT_POLICIES = {0: "auto", 4: "int4", 8: "int8"}
WEIGHT_BITS = MappingProxyType({"int4": 4, "int8": 8})
WEIGHT_GROUP_SIZES = (32, 64, 128)
SLIDING_WINDOW = "sliding_window"
MAX_LOGPROBS = 32
_INT = 2**31 - 1
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def parse_memory(value: int | float | str, name: str = "memory") -> int | float:
    """Bytes (int) or a fraction of free memory (float), from either or from text: "2GiB", "50%", "0.5", "1000000".

    Raises:
        ConfigError: it is neither; the error calls it `name`.
    """
    if isinstance(value, str):
        return _parse_memory_text(value, name)
    if isinstance(value, float):
        _require(0 < value <= 1, f"{name}={value}: a float is a fraction of free memory, 0 < fraction <= 1")
        return value
    _require(value > 0, f"{name}={value}: bytes must be positive")
    return value


def _parse_memory_text(text: str, name: str) -> int | float:
    match = re.fullmatch(r"\s*([0-9.]+)\s*(%|(?:[kmg]i?)?b?)\s*", text.lower())
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or math.isnan(number):
        raise ConfigError(f"{name}={text!r} is not a size: write bytes, '2GiB', '800MB', '50%' or 0.5")
    if match[2] == "%":
        return parse_memory(number / 100, name)
    unit = match[2].removesuffix("b")
    if not match[2] and "." in match[1]:
        return parse_memory(number, name)
    return parse_memory(int(number * _UNITS[unit]), name)


def parse_layers(entry: object, where: str) -> tuple[int, int] | None:
    """The first and the last layer that an entry of a layer list names, or None for the word "sliding_window".

    Args:
        entry: an index (3 or "3"), negative ones counted from the last layer, or a range of them, both ends included
            ("0-3", "-4--1").
        where: what the error says of the entry's place.

    Raises:
        ConfigError: it is none of these.
    """
    if entry == SLIDING_WINDOW:
        return None
    text = str(entry) if _is_integer(entry) or isinstance(entry, str) else ""
    match = re.fullmatch(r"(-?[0-9]{1,9})(?:-(-?[0-9]{1,9}))?", text)
    if match is None:
        raise ConfigError(
            f"{where} names no layers; write an index (3, or -1 for the last layer), a range (0-3) or {SLIDING_WINDOW}"
        )
    return int(match[1]), int(match[2] or match[1])


def _layer_list(name: str, given: Any) -> tuple[int | str, ...]:
    """The entries of a layer list, each in its one spelling: 3, "0-3", "sliding_window"."""
    items = (given,) if isinstance(given, str | int) else given
    _require(isinstance(items, Iterable), f"{name}={given!r} must be a list of layers")
    # Split at spaces too, as the environment's lists are: "0, 1" arrives as "0," and "1".
    pieces = (item.replace(",", " ").split() if isinstance(item, str) else [item] for item in items)
    return tuple(_spelled(entry, f"{name}: {entry!r}") for piece in pieces for entry in piece)


def _spelled(entry: object, where: str) -> int | str:
    ends = parse_layers(entry, where)
    if ends is None:
        return SLIDING_WINDOW
    first, last = ends
    return first if first == last else f"{first}-{last}"


def _path(name: str, given: Any) -> Path | None:
    _require(given is None or (isinstance(given, str | Path) and given != ""), f"{name}={given!r} must be a path")
    return None if given is None else Path(given)


@dataclass(frozen=True)
class StepLimits:
    """How large a step may be, and whether the next one is launched before its tokens are known; see `EngineConfig`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    overlapping: bool


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs a model. Field names follow vLLM's where it has them.

    Attributes:
        dtype: compute type: "auto", "float32", "bfloat16" or "float16". "auto" is float32 on a CPU where the
            weights then fit in half of the free memory, else the checkpoint's own 16-bit type.
        weights: how matrices are kept: "auto" as they are stored (a GGUF's blocks in 4 and 8 bits where the backend
            computes on such, else expanded), "dense" in the compute type, "int4" or "int8" rounded to nearest when
            they are loaded, whatever the checkpoint has.
        weights_group_size: for "int4" and "int8": so many inputs share a scale: 32, 64 or 128.
        kv_cache_dtype: the KV-cache format by name (`kvant models` lists them); "auto" is 16 bit.
        kv_cache_dtype_skip_layers: layers that keep a 16-bit cache whatever kv_cache_dtype says: indices (0, "3", -1
            for the last layer), ranges ("0-3", both ends included) or "sliding_window", every layer whose attention
            has a window. A list, or one text with commas, is taken too.
        kv_cache_policy: a JSON file that gives layers formats of their own: {"default": "int4", "layers": {"0": "int8",
            "20-23": "fp16", "sliding_window": "int8"}}. Where it has a default, kv_cache_dtype must be "auto" or the
            same. Indices and ranges come before "sliding_window", here and in kv_cache_dtype_skip_layers.
        quantization_param_path: a file or directory with the cache's measured constants: static scales, or what
            `kvant calibrate` wrote.
        max_model_len: longest prompt + output in tokens; None takes the model's own limit, or what fits.
        max_num_seqs: sequences that may run at the same time; None takes 64, on a GPU 256, and no more than
            max_num_batched_tokens.
        max_num_batched_tokens: token budget of one step, at least one for each of max_num_seqs; longer prompts are
            prefilled in chunks. None takes 512, on a GPU 4096, and no less than max_num_seqs.
        block_size: tokens in one KV block.
        enable_prefix_caching: share the KV of equal prefixes between requests and turns.
        kv_cache_memory: bytes, "2GiB", "50%" or a float fraction of free memory; None fits automatically.
        num_kv_blocks: the pool's size in blocks, instead of `kv_cache_memory`.
        swap_space: host memory that keeps the KV of requests which must make room for others: bytes, "2GiB", "10%" or
            a float fraction of free memory. Where it is full, or None, they are computed again.
        num_threads: CPU threads; None leaves the choice to the backend (all cores).
        device: "cpu", "cuda", one GPU of several as "cuda:1", or "auto": a GPU where there is one.
        enforce_eager: on a GPU, launch every kernel of every step instead of recording steps as CUDA graphs.
        async_scheduling: launch a step before the last one's tokens are known; None does so on a GPU.
        seed: for requests that bring no seed of their own; None draws a fresh one for each.
        quant_policy: LMDeploy's alias of kv_cache_dtype: 0 (auto), 4 (int4), 8 (int8).
    """

    dtype: str = "auto"
    weights: str = "auto"
    weights_group_size: int = WEIGHT_GROUP_SIZES[0]
    kv_cache_dtype: str = "auto"
    kv_cache_dtype_skip_layers: tuple[int | str, ...] = ()
    kv_cache_policy: str | Path | None = None
    quantization_param_path: str | Path | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 64
    enable_prefix_caching: bool = True
    kv_cache_memory: int | float | str | None = None
    num_kv_blocks: int | None = None
    swap_space: int | float | str | None = None
    num_threads: int | None = None
    device: str = "auto"
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    seed: int | None = None
    quant_policy: InitVar[int | None] = None

    def __post_init__(self, quant_policy: int | None) -> None:
        if quant_policy is not None:
            object.__setattr__(self, "kv_cache_dtype", self._from_quant_policy(quant_policy))
        _require(self.dtype in DTYPES, f"dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        object.__setattr__(self, "dtype", DTYPES[self.dtype])
        self._check_weights()
        known_device = isinstance(self.device, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)
        _require(bool(known_device), f"device={self.device!r} is unknown; use 'cpu', 'cuda', 'cuda:1' or 'auto'")
        skipped = _layer_list("kv_cache_dtype_skip_layers", self.kv_cache_dtype_skip_layers)
        object.__setattr__(self, "kv_cache_dtype_skip_layers", skipped)
        for name in ("kv_cache_policy", "quantization_param_path"):
            object.__setattr__(self, name, _path(name, getattr(self, name)))
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_kv_blocks", "num_threads"):
            value = getattr(self, name)
            _require(value is None or (_is_integer(value) and value >= 1), f"{name}={value!r} must be at least 1")
        self._check_budget()
        _require(
            8 <= self.block_size <= 1024 and self.block_size & (self.block_size - 1) == 0,
            f"block_size={self.block_size} must be a power of two from 8 to 1024",
        )
        given_twice = self.kv_cache_memory is not None and self.num_kv_blocks is not None
        _require(not given_twice, "give kv_cache_memory or num_kv_blocks, not both")
        for name in ("kv_cache_memory", "swap_space"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, parse_memory(getattr(self, name), name))

    def limits(self, device: str) -> StepLimits:
        """What a step may be on a kind of device ("cpu", "cuda")."""
        gpu = device == "cuda"
        usual_seqs, usual_tokens = (256, 4096) if gpu else (64, 512)
        seqs = self.max_num_seqs or min(usual_seqs, self.max_num_batched_tokens or usual_tokens)
        return StepLimits(
            max_num_seqs=seqs,
            max_num_batched_tokens=self.max_num_batched_tokens or max(usual_tokens, seqs),
            overlapping=gpu if self.async_scheduling is None else self.async_scheduling,
        )

    def _check_budget(self) -> None:
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        _require(
            seqs is None or tokens is None or tokens >= seqs,
            f"max_num_batched_tokens={tokens} is less than max_num_seqs={seqs}: a step has a token for every sequence "
            "that runs; raise the one, lower the other, or leave one of them out",
        )

    def _check_weights(self) -> None:
        known = ("auto", "dense", *WEIGHT_BITS)
        _require(self.weights in known, f"weights={self.weights!r} is unknown; choose one of {', '.join(known)}")
        size, sizes = self.weights_group_size, WEIGHT_GROUP_SIZES
        known_size = _is_integer(size) and size in sizes
        _require(known_size, f"weights_group_size={size!r} must be one of {', '.join(map(str, sizes))}")
        _require(
            self.weights in WEIGHT_BITS or size == sizes[0],
            f"weights_group_size={size} is of no use to weights={self.weights!r}; choose int4 or int8, or leave it out",
        )

    def _from_quant_policy(self, policy: int) -> str:
        _require(policy in QUANT_POLICIES, f"quant_policy={policy} is unknown; 0 is auto, 4 is int4, 8 is int8")
        name = QUANT_POLICIES[policy]
        _require(
            self.kv_cache_dtype in ("auto", name),
            f"quant_policy={policy} means kv_cache_dtype={name!r}, but {self.kv_cache_dtype!r} was given too",
        )
        return name


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Field names are vLLM's.

    Applied in this order: penalties and bias, temperature, top_k, top_p, min_p.

    Attributes:
        n: completions per prompt; they share the prompt's KV blocks.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        top_p: keep the smallest set with at least this probability.
        min_p: keep tokens at least this likely relative to the likeliest.
        repetition_penalty: > 1 discourages tokens of prompt and output (divides positive logits).
        presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens of the output.
        logit_bias: token id -> added to its logit, from -100 to 100.
        seed: same seed, same output, whatever else is in the batch; but native kernels compute a prompt that the prefix
            cache knows a little differently, which may turn an output.
        stop: strings that end the output (they are not part of it).
        stop_token_ids: ids that end the output.
        ignore_eos: go on past the model's end-of-sequence tokens.
        max_tokens: output limit; None means up to the context limit.
        min_tokens: no end-of-sequence or stop id before this many tokens.
        logprobs: None, or how many likeliest tokens to report beside the chosen one (0 to 32).
        prompt_logprobs: the same for each prompt token.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] | None = ()
    stop_token_ids: tuple[int, ...] | list[int] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        self._check_ranges()
        _require(all(isinstance(text, str) and text for text in self.stop_strings), "stop takes texts, none empty")
        _require(all(map(_is_integer, self.stop_token_ids or ())), "stop_token_ids takes token ids")
        for token, bias in (self.logit_bias or {}).items():
            _require(_is_integer(token), f"logit_bias: {token!r} is no token id")
            _require(_is_number(bias) and abs(bias) <= 100, f"logit_bias[{token}]={bias!r} must be from -100 to 100")

    def _check_ranges(self) -> None:
        for name, (kind, low, high) in _SAMPLING_LIMITS.items():
            value: Any = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            fits = (_is_integer if kind == "an integer" else _is_number)(value) and low <= value <= high
            _require(fits, f"{name}={value!r} must be {kind} from {low} to {high}")
        _require(self.top_p > 0, "top_p must be greater than 0; use temperature=0 for greedy decoding")
        limit = self.max_tokens
        _require(limit is None or self.min_tokens <= limit, f"min_tokens={self.min_tokens} exceeds max_tokens={limit}")

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one."""
        return self.temperature == 0

    @cached_property
    def penalizes(self) -> bool:
        """Whether a token's probability depends on what was said before, beyond the model's own view of it."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @cached_property
    def filters(self) -> tuple[float, ...]:
        """What shapes a row of logits once penalties and bias are in it: temperature, top_k, top_p, min_p."""
        return (self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as it is kept."""
        return tuple(self.stop or ())


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


_MAY_BE_NONE = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
_SAMPLING_LIMITS: Mapping[str, tuple[str, float, float]] = MappingProxyType(
    {
        "n": ("an integer", 1, 1024),
        "temperature": ("a number", 0, 1e6),
        "top_k": ("an integer", 0, _INT),
        "top_p": ("a number", 0, 1),
        "min_p": ("a number", 0, 1),
        "repetition_penalty": ("a number", 1e-3, 1e3),
        "presence_penalty": ("a number", -100, 100),
        "frequency_penalty": ("a number", -100, 100),
        "seed": ("an integer", -math.inf, math.inf),
        "max_tokens": ("an integer", 1, _INT),
        "min_tokens": ("an integer", 0, _INT),
        "logprobs": ("an integer", 0, MAX_LOGPROBS),
        "prompt_logprobs": ("an integer", 0, MAX_LOGPROBS),
    }
)
