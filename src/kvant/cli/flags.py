"""The flags that several verbs share: how they are called, what they say, and what they become.

A verb takes them by decorator: `@engine_flags` gives its parameter `engine` an `EngineConfig`, `@sampling_flags` gives
its parameter `sampling` the `SamplingParams` fields that the user set.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from kvant.config import EngineConfig

Command = Callable[..., None]


def option(flag: str, help_text: str, *more_names: str) -> Any:
    """A Typer option with its twin in the environment: --max-tokens is also KVANT_MAX_TOKENS."""
    variable = "KVANT_" + flag.split("/")[0].removeprefix("--").replace("-", "_").upper()
    return typer.Option(flag, *more_names, envvar=variable, help=help_text)


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        envvar="KVANT_MODEL",
        help="A name from `kvant models`, a .gguf file, a directory with config.json and safetensors, what "
        "`kvant convert` wrote, or a hub id (org/name). Default: smollm2.",
    ),
]


@dataclass(frozen=True)
class Flag:
    """One field of a config on the command line; `default` is the config's, None leaves the field alone."""

    field: str
    type: Any
    help: str
    default: Any = None
    flag: str = ""

    def parameter(self) -> Parameter:
        """As a parameter of a Typer command."""
        flag = self.flag or "--" + self.field.replace("_", "-")
        if self.type is bool:
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        kind: Any = self.type if self.default is not None else self.type | None
        annotation = Annotated[kind, option(flag, self.help)]
        return Parameter(self.field, Parameter.KEYWORD_ONLY, default=self.default, annotation=annotation)


def takes(name: str, flags: Sequence[Flag], build: Callable[[dict[str, Any]], Any]) -> Callable[[Command], Command]:
    """A decorator: the command's parameter `name` becomes these flags, and receives what `build` makes of them."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_flags(**values: Any) -> None:
            taken = {flag.field: values.pop(flag.field) for flag in flags}
            command(**values, **{name: build(taken)})

        signature = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != name]
        parameters = [*own, *(flag.parameter() for flag in flags)]
        with_flags.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_flags

    return decorate


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(EngineConfig)}


def _engine(field: str, kind: Any, help_text: str, flag: str = "") -> Flag:
    return Flag(field, kind, help_text, _DEFAULTS.get(field), flag)


ENGINE_FLAGS = (
    _engine("dtype", str, "Number type to compute in: auto, float32, bfloat16 or float16."),
    _engine(
        "weights",
        str,
        "How weights are kept: auto (as they are stored, 4 and 8 bits of a GGUF file included), dense (expanded to "
        "--dtype), or int4 or int8 (rounded when they are loaded, whatever the checkpoint has). Fewer bits take less "
        "memory and cost some accuracy.",
    ),
    _engine(
        "weights_group_size",
        int,
        "With --weights int4 or int8: how many weights share a scale: 32, 64 or 128. More take less memory.",
    ),
    _engine(
        "kv_cache_dtype",
        str,
        "How the KV cache is stored: auto (16 bit), fp32, bf16, fp16, int8, int4, k8v4, int8_plain, int4_plain, "
        "int8_pertensor, int8_pertensor_perhead, int8_pertoken, fp8_e4m3 (or fp8) or fp8_e5m2. Fewer bits hold more "
        "tokens and cost some accuracy; `kvant models` tells each format's bits, docs/kv-cache.md how to choose.",
    ),
    _engine(
        "kv_cache_dtype_skip_layers",
        list[str],
        "Layers that keep a 16-bit cache whatever --kv-cache-dtype says, separated by commas: 0,1,-1 (-1 is the last), "
        "20-23, or sliding_window for every layer with a window. May be given several times.",
    ),
    _engine(
        "kv_cache_policy",
        Path,
        "A JSON file that gives layers formats of their own: "
        '{"default": "int4", "layers": {"0": "int8", "20-23": "fp16", "sliding_window": "int8"}}.',
    ),
    _engine(
        "quantization_param_path",
        Path,
        "File or directory with the KV cache's measured constants: static scales, or what `kvant calibrate` wrote.",
    ),
    _engine("quant_policy", int, "Another way to say --kv-cache-dtype: 0 is auto, 4 is int4, 8 is int8."),
    _engine(
        "max_model_len",
        int,
        "Longest prompt and answer together, in tokens. Default: the model's own limit, or as much as fits.",
    ),
    _engine(
        "max_num_seqs", int, "How many requests run at the same time; more wait in line. Default: 64, on a GPU 256."
    ),
    _engine(
        "max_num_batched_tokens",
        int,
        "Most tokens computed in one step, --max-num-seqs at least. Longer prompts are read in pieces of this size, "
        "between which others go on. Default: 512, on a GPU 4096.",
    ),
    _engine("block_size", int, "Tokens in one block of the KV cache."),
    _engine(
        "kv_cache_memory",
        str,
        "Memory for the KV cache: '2GiB', '800MB', '50%' of what is free. Default: what the requests can use, up to "
        "half of what is free.",
    ),
    _engine("num_kv_blocks", int, "The same as a number of blocks, instead of --kv-cache-memory."),
    _engine(
        "swap_space",
        str,
        "Memory beside the KV cache that keeps the KV of requests which must make room for others: '2GiB', '800MB', "
        "'10%' of what is free. Default: none; they are computed again.",
    ),
    _engine(
        "enable_prefix_caching",
        bool,
        "Keep the KV of what was read before and use it again when a prompt begins with the same tokens.",
    ),
    _engine("num_threads", int, "CPU threads to compute with. Default: one per core.", "--threads"),
    _engine(
        "device", str, "Where to compute: cpu, cuda, one GPU of several as cuda:1, or auto: a GPU if there is one."
    ),
    _engine(
        "enforce_eager", bool, "On a GPU, launch every kernel by itself instead of recording steps as CUDA graphs."
    ),
    _engine(
        "async_scheduling",
        bool,
        "Launch a step before the last one's tokens are known. Default: on a GPU.",
    ),
    _engine(
        "seed",
        int,
        "Makes answers repeatable: same seed, same answer, but for what the prefix cache changes in rounding. "
        "Default: a new one each time.",
    ),
)

engine_flags = takes("engine", ENGINE_FLAGS, lambda values: EngineConfig(**values))

SAMPLING_FLAGS = (
    Flag("temperature", float, "How freely to choose: 0 always takes the likeliest token."),
    Flag("top_p", float, "Choose among the likeliest tokens that together have this probability."),
    Flag("top_k", int, "Choose among this many of the likeliest tokens; 0 for all."),
    Flag("min_p", float, "Leave out tokens less likely than this share of the likeliest."),
    Flag("max_tokens", int, "Longest answer, in tokens. Default: 512."),
    Flag("repetition_penalty", float, "Above 1: less likely to say what was said or asked before."),
    Flag("presence_penalty", float, "Above 0: less likely to use a token the answer already has."),
    Flag("frequency_penalty", float, "Above 0: less likely the more often the answer has the token."),
    Flag("stop", list[str], "End the answer before this text; may be given several times."),
)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, [])}


sampling_flags = takes("sampling", SAMPLING_FLAGS, _given)
