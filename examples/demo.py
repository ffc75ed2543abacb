"""A small model with a 4-bit KV cache: what the same memory holds in each format, and an answer while it is written."""

from __future__ import annotations

import argparse
import resource
import sys

from rich.console import Console
from rich.table import Table

from kvant import EngineConfig, SamplingParams, pipeline
from kvant.cache.store import MemoryReport
from kvant.pipelines import Pipeline

KV_MEMORY = "64MiB"
PROMPT = "Explain in three sentences why the sky is blue."


def capacity(memory: MemoryReport) -> Table:
    """How many tokens the KV cache's memory holds in 16 bit, int8 and int4."""
    table = Table(title=f"What {memory.pool_bytes / 1e6:.0f} MB of KV cache hold", title_justify="left")
    for heading in ("format", "tokens", "against 16 bit"):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    baseline = memory.tokens_in("fp16")
    for name in ("fp16", "int8", "int4"):
        tokens = memory.tokens_in(name)
        table.add_row(
            name, f"{tokens:,}", f"{tokens / baseline:.2f}x", style="bold" if name == memory.plan.name else None
        )
    return table


def answer(pipe: Pipeline, console: Console, prompt: str, max_tokens: int) -> None:
    """Stream the model's answer, then say how fast it came."""
    console.print(f"[bold]{prompt}")
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    usage = timings = None
    for delta in pipe.stream([{"role": "user", "content": prompt}], params):
        console.out(delta.text, end="", highlight=False)
        usage, timings = delta.usage, delta.timings
    console.print("\n")
    if usage and timings:
        console.print(f"{usage.completion_tokens} tokens at {timings.tokens_per_second:.1f} tokens/s", style="dim")
        console.print(f"first token after {timings.time_to_first_token:.2f} s", style="dim")
    console.print(f"peak memory {peak_bytes() / 1e6:.0f} MB", style="dim")


def peak_bytes() -> int:
    """The most memory this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="anything kvant opens; default: the pulled demo model")
    parser.add_argument("--kv-cache-dtype", default="int4")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    console = Console()
    config = EngineConfig(kv_cache_dtype=args.kv_cache_dtype, kv_cache_memory=KV_MEMORY)
    with pipeline(args.model, engine=config) as pipe:
        console.print(capacity(pipe.memory), "")
        answer(pipe, console, args.prompt, args.max_tokens)


if __name__ == "__main__":
    main()
