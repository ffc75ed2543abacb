"""Counts the instructions of decode attention's loop in machine code, for a GPU that is not here.

    python -m tests.kernels.triton.count CAPABILITY [FORMAT/MODEL/HEAD_DIM ...]

For each a line: instructions of a thread in the loop over a part of a context and outside of it, and how many of all
threads the loop's are for each byte of the cache that a tile reads. Those called slow have half the multiprocessor's
lanes. As with `compile`, TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from kvant.formats.kv import KV_FORMATS
from kvant.kernels.ops import AttentionShape
from kvant.kernels.triton.launch import Config
from tests.formats.stats import layer_plan_of
from tests.kernels.scenes import scene
from tests.kernels.triton.compile import Case, cubin_reader, resources

HEADS = {"llama-2": 1, "llama-3": 4}  # query heads of a KV head
SHAPES = [f"{name}/{model}/{dim}" for dim in (128, 64) for model in HEADS for name in ("int4", "int8", "bf16")]
# What half as many lanes compute in a clock as others do.
SLOW = re.compile(r"LOP3|SHF|PRMT|IADD|ISETP|IMNMX|LEA|SEL|VIADD|IABS|I2F|F2F|MUFU|SHFL")


def loops(assembly: str) -> tuple[list[list[str]], int]:
    """The instructions of each loop, the longest loop first, and how many there are in all."""
    found, code, labels = [], [], {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    for at, instruction in enumerate(code):
        to = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        if to and labels.get(to[1], at + 1) <= at:
            found.append(code[labels[to[1]] : at + 1])
    return sorted(found, key=len, reverse=True), len(code)


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(str(cubin_reader())).with_name("nvdisasm")
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def operation(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def decode_case(
    name: str, model: str, dim: str, sizes: dict[str, int], warps: int | None, stages: int | None
) -> tuple[Case, int, Config]:
    """A decode step of a KV head, the bytes that a token has there, and how it is launched."""
    from kvant.kernels.triton import attention_decode

    heads, size = HEADS[model], int(dim)
    it = scene(layer_plan_of(KV_FORMATS[name], 1, size), 1, size, 64, [(200, 1)], seed=0)
    q = torch.zeros(1, heads, size, dtype=torch.bfloat16 if name == "bf16" else torch.float16)
    shape = AttentionShape(heads, 1, size, 0.1)
    config = attention_decode.default(q, it.cache, it.batch, shape)
    blocks = {**config.blocks, **sizes}
    config = Config(blocks, warps or config.num_warps, stages or config.num_stages)

    def run(ops: Any) -> None:
        attention_decode.attention_decode(q, it.cache, it.batch, shape, torch.empty_like(q), config)

    return Case(f"{name}/{model}/{dim}", run), sum(plane.bytes for plane in KV_FORMATS[name].planes(size)), config


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the instructions of decode attention without a GPU.")
    parser.add_argument("capability", type=int)
    parser.add_argument("shapes", nargs="*", default=SHAPES)
    parser.add_argument("--blocks", default="", help='other sizes than the default ones, such as "REGISTERS=255"')
    parser.add_argument("--warps", type=int)
    parser.add_argument("--stages", type=int)
    asked = parser.parse_args()
    sizes = {name: int(size) for name, _, size in (one.partition("=") for one in asked.blocks.split(",") if one)}
    from tests.kernels.triton.compile import launches

    for name in asked.shapes:
        case, size, config = decode_case(*name.split("/"), sizes, asked.warps, asked.stages)
        for _, kernel in launches(asked.capability, iter([case])):
            if kernel.name != "merge":
                print(name, counted(kernel, size * config.blocks["TILE"]), flush=True)


def counted(kernel: Any, read: int) -> str:
    """What there is to say of a kernel whose longest loop reads so many bytes."""
    (body, *_), everything = loops(disassembled(kernel.asm["cubin"]))
    count = Counter(operation(one) for one in body)
    slow = sum(number for it, number in count.items() if SLOW.match(it))
    registers, stack = resources(kernel.asm["cubin"])
    lanes = kernel.metadata.num_warps * 32 / read
    return (
        f"{len(body)} instructions and {everything - len(body)} outside, {len(body) * lanes:.2f} a byte, "
        f"{slow * lanes:.2f} of them slow; {registers} registers, {stack} stack, "
        f"{kernel.metadata.shared} shared, {kernel.metadata.num_warps} warps; "
        + " ".join(f"{it} {number}" for it, number in count.most_common(20))
    )


if __name__ == "__main__":
    sys.exit(main())
