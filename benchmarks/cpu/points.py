"""What is measured: points (decoding at a depth, prefilling a length), and the peers that measure them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from protocol import Job

from kvant.errors import ConfigError

ROUNDED = 256


@dataclass(frozen=True)
class Point:
    """Decoding after `length` tokens, for so many sequences at once, or prefilling `length` tokens.

    Written as `decode@2048`, `decode@0x8` (8 sequences) or `prefill@256`.
    """

    kind: str
    length: int
    sequences: int = 1

    @classmethod
    def parse(cls, text: str) -> Point:
        """The point that a name means.

        Raises:
            ConfigError: it is no name.
        """
        match = re.fullmatch(r"(decode)@(\d+)(?:x([1-9]\d*))?|(prefill)@([1-9]\d*)", text)
        if match is None:
            raise ConfigError(f"{text!r} is no point; write decode@DEPTH, decode@DEPTHxSEQUENCES or prefill@TOKENS")
        return cls("prefill", int(match[5])) if match[4] else cls("decode", int(match[2]), int(match[3] or 1))

    @property
    def name(self) -> str:
        """As `parse` takes it."""
        return f"{self.kind}@{self.length}" + (f"x{self.sequences}" if self.sequences > 1 else "")

    @property
    def label(self) -> str:
        """For people."""
        if self.kind == "prefill":
            return f"prefill of {self.length}"
        return f"decode at {self.length}" + (f", {self.sequences} sequences" if self.sequences > 1 else "")

    def prompt_tokens(self, tokens: int, context: int) -> int:
        """Length of each prompt: at least one token, and so many that the output still fits the model's context.

        Raises:
            ConfigError: the model's context is shorter than the point.
        """
        if self.length > context:
            raise ConfigError(f"{self.name}: the model's context has {context} tokens; leave this point out")
        return max(min(self.length, context - tokens - 1), 1)

    def prompts(self, prompt_tokens: int, vocab_size: int, repeat: int, seed: int) -> list[list[int]]:
        """Random ids, the same for every peer. A prefill's differ in each repeat, so that no cache knows them."""
        turn = repeat if self.kind == "prefill" else 0
        source = random.Random(f"{seed} {self.name} {turn}")
        return [[source.randrange(vocab_size) for _ in range(prompt_tokens)] for _ in range(self.sequences)]


@dataclass(frozen=True)
class PeerKind:
    """A program to compare.

    Attributes:
        module: its file in peers/.
        kv_caches: types of its KV cache; each is measured.
        max_tokens: decoded at most, where it is too slow for more.
        max_length: of the points that it takes part in, likewise.
    """

    module: str
    kv_caches: tuple[str, ...]
    max_tokens: int | None = None
    max_length: int | None = None


OURS, REFERENCE = "kvant", "llama.cpp"
PEERS: Mapping[str, PeerKind] = MappingProxyType(
    {
        OURS: PeerKind("kvant_peer", ("fp16", "int8", "int4")),
        REFERENCE: PeerKind("llama_cpp_peer", ("f16", "q8_0", "q4_0")),
        "transformers": PeerKind("transformers_peer", ("fp32",), max_tokens=8, max_length=2048),
        "openvino": PeerKind("openvino_peer", ("u8",)),
    }
)


@dataclass(frozen=True)
class Variant:
    """A peer with one type of KV cache."""

    peer: str
    kv_cache: str

    @property
    def name(self) -> str:
        """As the command line and the results name it."""
        return f"{self.peer}:{self.kv_cache}"

    @property
    def kind(self) -> PeerKind:
        """What all variants of the peer have in common."""
        return PEERS[self.peer]

    def takes(self, point: Point) -> bool:
        """Whether it takes part in a point."""
        return self.kind.max_length is None or point.length <= self.kind.max_length

    def tokens(self, wanted: int) -> int:
        """How many tokens it decodes where so many are wanted."""
        return min(wanted, self.kind.max_tokens or wanted)


def parse_variants(names: Sequence[str]) -> list[Variant]:
    """Variants from `kvant:int4`, or all of a peer's from `kvant`.

    Raises:
        ConfigError: an unknown name, or none.
    """
    found: dict[Variant, None] = {}
    for name in names:
        peer, _, kv_cache = name.partition(":")
        kinds = PEERS[peer].kv_caches if peer in PEERS else ()
        if not kinds or (kv_cache and kv_cache not in kinds):
            known = "; ".join(f"{peer}: {', '.join(kind.kv_caches)}" for peer, kind in PEERS.items())
            raise ConfigError(f"{name!r} is no peer; write PEER or PEER:KV_CACHE, of these: {known}")
        found |= dict.fromkeys(Variant(peer, kind) for kind in kinds if kv_cache in ("", kind))
    if not found:
        raise ConfigError("no peer is named")
    return list(found)


@dataclass(frozen=True)
class Scale:
    """How much of a model is measured.

    Attributes:
        vocab_size, context: the model's, in tokens.
        tokens: decoded after each prompt's first output token.
    """

    points: tuple[Point, ...]
    tokens: int
    vocab_size: int
    context: int

    def prompt_tokens(self, point: Point) -> int:
        """Length of the point's prompts."""
        return point.prompt_tokens(self.tokens if point.kind == "decode" else 0, self.context)

    def job(self, model: str, variant: Variant, threads: int, work_dir: str) -> Job:
        """What a variant's process needs room for: all points, and once more their prompts' later editions."""
        points = [point for point in self.points if variant.takes(point)]
        lengths = [self.prompt_tokens(point) + self.tokens + 1 for point in points]
        rounded = (-(-length // ROUNDED) * ROUNDED for length in lengths)
        return Job(
            model=model,
            kv_cache=variant.kv_cache,
            threads=threads,
            work_dir=work_dir,
            max_length=min(max(lengths, default=1), self.context),
            max_sequences=max((point.sequences for point in points), default=1),
            cache_tokens=2 * sum(p.sequences * length for p, length in zip(points, rounded, strict=True)),
        )
