"""The decoder's step in one call against the same step op by op in the reference: families, formats, batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvant.cache.store import KVStore
from kvant.config import SamplingParams
from kvant.engine import runner
from kvant.engine.core import Core
from kvant.engine.sequence import Failure, Request, TokenEvent
from kvant.errors import NotFiniteError
from kvant.formats.kv import KV_FORMATS, KVLayer, KVPlan
from kvant.formats.weight import InputCodes, PackedWeight, pair
from kvant.kernels.cpu.cache import is_native
from kvant.kernels.ops import AttentionBatch, Ops
from kvant.kernels.reference import ReferenceOps
from kvant.models import forcing
from kvant.models.decoder import Decoder
from kvant.models.forcing import force, new_store
from kvant.models.fused import FusedDecoder
from kvant.quantize.rtn import rtn
from kvant.weights.load import LoadedModel, load_model
from kvant.weights.matrices import Rounding
from tests.engine.checkpoint import write_checkpoint
from tests.engine.drive import Ask, core_of, text
from tests.families.configs import TINIES
from tests.families.tiny import build
from tests.formats.stats import plan_of
from tests.kernels.tolerances import rounded_bits, rounded_bits_of_prompts

# Between them: grouped heads, biases, heads of 16 to 32, norms of heads and after the blocks, windows, soft-caps, two
# kinds of RoPE in a model, RoPE that depends on the text's length, RoPE on part of a head, log-n attention.
FAMILIES = (
    "llama-3.1", "llama-dynamic", "llama-bias", "mistral-nemo", "qwen2-windows", "qwen3-bias", "phi-4-mini", "gemma-2",
    "gemma-3-1b", "qwen-v1", "qwen-v1-partial-rotary",
)  # fmt: skip
CHUNKS = (256, 7, 1)
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-3}  # in 16 bit, a last bit that differs counts for more
DIM = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64}  # kernels for few bits want such sizes
SHORT = [token % 128 for token in text(1, 45)]
LONG = text(3, 600)
BAD = 200  # the token whose embedding is damaged
# Where a difference in float32 flips a code, and where rounded queries and softmax weights meet codes of so many bits.
FLIPPED, DECODED = 3e-3, {24: 1e-3, 15: 1.5e-2, 8: 0.3, 7: 0.3}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of the family."""
    return build(TINIES[request.param], tmp_path_factory.mktemp(request.param)).published


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature with the sizes of `DIM`."""
    return write_checkpoint(tmp_path_factory.mktemp("wide"), **DIM)


def load(path: Path, ops: Ops, bits: int | None = None) -> LoadedModel:
    """A checkpoint in float32, or with its matrices in so many bits."""
    rounding = Rounding("rtn", 4.5, partial(rtn, bits=bits or 4, group_size=32))
    return load_model(path, dtype="float32", ops=ops, weights=rounding if bits else "dense")


def states(decoder: Decoder, ids: list[int], plan: KVPlan) -> Tensor:
    return force(decoder, new_store(decoder, plan, len(ids)), ids, len(ids))


def uniform(decoder: Decoder, name: str) -> KVPlan:
    return KVPlan.uniform(KV_FORMATS[name], len(decoder.spec.layers))


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found.shape, found.dtype) == (expected.shape, torch.float32)
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kv", TOLERANCES)
def test_states_and_logits_are_the_references_whatever_the_chunk(native, family, monkeypatch, kv):
    reference, decoder = (load(family, ops).decoder for ops in (ReferenceOps(), native(1)))
    expected = states(reference, SHORT, uniform(reference, kv))
    for chunk in CHUNKS:
        monkeypatch.setattr(forcing, "CHUNK", chunk)
        found = states(decoder, SHORT, uniform(decoder, kv))
        assert_close(found, expected, TOLERANCES[kv])
        assert_close(decoder.logits(found), reference.logits(expected), TOLERANCES[kv])


@pytest.mark.parametrize("budget", [512, 9])
def test_in_a_batch_of_many_texts_each_gets_its_own(native, family, budget):
    """Whole prompts, parts of prompts and single tokens in one step; then choices that part from a prompt in the cache.

    The reference keeps this promise to the bit, see tests/engine/test_equivalence.py.
    """
    wish = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=0, logprobs=0)
    drawn = SamplingParams(temperature=1, seed=1, n=2, max_tokens=5, ignore_eos=True, logprobs=0)
    first = [(prompt, wish) for prompt in (SHORT[:25], SHORT[:1], SHORT[:15] + SHORT[:8], SHORT[4:25])]
    told = []
    for ops in (ReferenceOps(), native(1)):
        core = core_of(load(family, ops), max_model_len=32, max_num_batched_tokens=budget)
        told.append([*answers(core, first), *answers(core, [(SHORT[:20], drawn), (SHORT[:25], drawn)])])
        assert core.stats().kv_blocks_used == 0
    for found, expected in zip(*told, strict=True):
        assert found.tokens == expected.tokens
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-3)


def test_one_call_draws_the_tokens_that_three_draw(native, family, monkeypatch):
    """Who asks for log-probabilities has the steps of three calls: forward, logits, sample."""
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    drawn = SamplingParams(temperature=1.5, top_k=50, top_p=0.9, seed=1, n=2, max_tokens=6, ignore_eos=True)
    asks = [(SHORT[:20], greedy), (SHORT[:7], drawn), (SHORT[5:21], replace(drawn, top_k=0, top_p=1, min_p=0.01))]
    told, draw = [], Mock(wraps=FusedDecoder.draw)
    monkeypatch.setattr(FusedDecoder, "draw", lambda *step: draw(*step))
    monkeypatch.setattr(runner, "_BURST_SECONDS", 60.0)
    model = load(family, native(1))
    for logprobs in (None, 0):
        core = core_of(model, max_model_len=32)
        steps = 5 if core._scheduler._max_steps == 1 else 1
        told.append(answers(core, [(prompt, replace(wish, logprobs=logprobs)) for prompt, wish in asks]))
        assert draw.call_count == (steps if logprobs is None else 0)
        draw.reset_mock()
    assert [answer.tokens for answer in told[0]] == [answer.tokens for answer in told[1]]


@dataclass(frozen=True)
class Answer:
    """One choice: its tokens, and what was told of the prompt's tokens and of its own."""

    tokens: list[int]
    logprobs: list[float]


def answers(core: Core, asks: list[Ask]) -> list[Answer]:
    """Of requests that arrive together."""
    requests = [core.request(prompt, sampling, lambda *_: None) for prompt, sampling in asks]
    for request in requests:
        core.add(request)
    events: list[tuple[Request, TokenEvent | Failure]] = []
    while core.has_work():
        events += core.step()
    return [
        Answer(choice.output, logprobs_of(request, choice.index, events))
        for request in requests
        for choice in request.sequences
    ]


def logprobs_of(request: Request, index: int, events: list[tuple[Request, TokenEvent | Failure]]) -> list[float]:
    """What was told of the prompt's tokens and of one choice's."""
    mine = (event for asking, event in events if asking is request)
    told = [event.logprobs for event in mine if isinstance(event, TokenEvent) and event.index == index]
    return [one.logprob for one in (*request.prompt_logprobs, *told) if one is not None]


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("sizes", [{}, DIM], ids=["16", "64"])
def test_every_cache_format_runs(native, tmp_path, monkeypatch, name, sizes):
    """Most in one call, those without a kernel op by op. Decoding meets the codes, and so do prompts where keys and
    values have 4 bits; others are computed in float32.
    """
    path = write_checkpoint(tmp_path, **sizes)
    reference, decoder = load(path, ReferenceOps()).decoder, load(path, native(1)).decoder
    spec = decoder.spec
    plan = plan_of(KV_FORMATS[name], len(spec.layers), spec.num_kv_heads, spec.head_dim)
    expected = states(reference, LONG[:100], plan)
    fmt = plan.layers[0].format
    at_once = rounded_bits_of_prompts(decoder.ops, fmt, spec.head_dim)
    assert_close(states(decoder, LONG[:100], plan), expected, FLIPPED if at_once == 24 else DECODED[at_once])
    monkeypatch.setattr(forcing, "CHUNK", 1)
    assert_close(states(decoder, LONG[:100], plan), expected, DECODED[rounded_bits(decoder.ops, fmt, spec.head_dim)])


def test_a_layer_without_a_kernel_runs_beside_one_with_sinks(native, tmp_path):
    path = write_checkpoint(tmp_path)
    reference, decoder = (load(path, ops).decoder for ops in (ReferenceOps(), native(1)))
    known, unknown = (plan_of(KV_FORMATS[name], 2, 2, 16).layers[0] for name in ("int4", "fp8_e4m3"))
    for layers in ((known, unknown), (unknown, known)):
        plan = KVPlan("mixed", layers)
        assert_close(states(decoder, SHORT, plan), states(reference, SHORT, plan), FLIPPED)


def test_the_kernels_know_all_formats_but_those_of_float8():
    layer = KVPlan.uniform(KV_FORMATS["fp32"], 1).layers[0]
    layers = {name: KVLayer(replace(layer, format=fmt), 16, 0, {}) for name, fmt in KV_FORMATS.items()}
    assert {name for name, one in layers.items() if not is_native(one, 64)} == {"fp8_e4m3", "fp8_e5m2"}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights(native, wide, monkeypatch, bits):
    """Inputs of matrices are rounded to 8 bit."""
    reference, decoder = (load(wide, ops, bits).decoder for ops in (ReferenceOps(), native(1)))
    expected = states(reference, SHORT, uniform(reference, "fp32"))
    for chunk in CHUNKS:
        monkeypatch.setattr(forcing, "CHUNK", chunk)
        assert_close(states(decoder, SHORT, uniform(decoder, "fp32")), expected, 0.1)


@pytest.mark.parametrize("bits", [4, 8])
def test_gates_that_are_cut_into_units(native, tmp_path, monkeypatch, bits):
    """By tokens and by columns, the last ones smaller; how often depends on the threads, the numbers do not. In 8 bits
    so many inputs are two panels: the second is added to what the unit has.
    """
    monkeypatch.setattr(forcing, "CHUNK", 300)
    path = write_checkpoint(tmp_path, hidden_size=576, intermediate_size=2112)
    reference = load(path, ReferenceOps(), bits).decoder
    expected = states(reference, LONG[:300], uniform(reference, "fp32"))
    decoders = [load(path, native(threads), bits).decoder for threads in (1, 3)]
    found = [states(decoder, LONG[:300], uniform(decoder, "fp32")) for decoder in decoders]
    assert_close(found[0], expected, 0.1)
    assert torch.equal(*found)


def test_no_rows_have_no_products(native):
    ops = native(2)
    found = ops.linear(torch.empty(0, 64), ops.prepare(rtn(torch.ones(32, 64), 4, 32)))
    assert found.shape == (0, 32)


def asymmetric(bits: int, group: int, dtype: torch.dtype, x: Tensor) -> PackedWeight:
    """Codes with zero points, in groups of which the last may be smaller; scales in `dtype`."""
    groups = -(-x.shape[1] // group)
    parts = F.pad(x, (0, groups * group - x.shape[1])).unflatten(1, (groups, group))
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).to(dtype)
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1)
    codes = (parts / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    q = codes.to(torch.uint8).flatten(1)[:, : x.shape[1]]
    return PackedWeight.quantized(bits, pair(q) if bits == 4 else q, scale, zero=zero.to(torch.uint8), group_size=group)


def disordered(x: Tensor) -> PackedWeight:
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    return replace(asymmetric(4, 32, torch.float16, x[:, order]), order=order)


def on_codes(scale: Tensor | None, x: Tensor) -> PackedWeight:
    return replace(rtn(x, 8, x.shape[1]), inputs=InputCodes(scale))


FORMS: dict[str, Callable[[Tensor], PackedWeight]] = {
    "int4-zero": partial(asymmetric, 4, 64, torch.bfloat16),
    "int8-zero": partial(asymmetric, 8, 32, torch.float32),
    "ragged": partial(asymmetric, 4, 80, torch.float16),
    "one-group": lambda x: asymmetric(8, x.shape[1], torch.float32, x),
    "uneven": partial(asymmetric, 4, 24, torch.float16),  # no kernel: float32
    "disordered": disordered,
    "w8a8": partial(on_codes, None),
    "w8a8-static": partial(on_codes, torch.tensor([0.05])),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_quantized_weight(native, wide, monkeypatch, form):
    """In one call, and op by op. The kernels round inputs to 8 bit, 32 together; the reference takes them whole."""
    rounding = Rounding(form, 8, FORMS[form])
    reference, decoder = (
        load_model(wide, dtype="float32", ops=ops, weights=rounding).decoder for ops in (ReferenceOps(), native(1))
    )
    expected = states(reference, SHORT, uniform(reference, "fp32"))
    tolerance = 1e-5 if form == "uneven" else 0.1
    for chunk in CHUNKS:
        monkeypatch.setattr(forcing, "CHUNK", chunk)
        found = states(decoder, SHORT, uniform(decoder, "fp32"))
        assert_close(found, expected, tolerance)
        assert_close(decoder.logits(found), reference.logits(expected), tolerance)
        with monkeypatch.context() as patch:
            patch.setattr(FusedDecoder, "forward", lambda *_: None)
            assert_close(states(decoder, SHORT, uniform(decoder, "fp32")), found, 2e-2)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_number_of_threads_changes_no_bit(native, wide, bits):
    one = load(wide, native(1), bits).decoder
    plan = plan_of(KV_FORMATS["int4"], 2, one.spec.num_kv_heads, one.spec.head_dim)
    found = []
    for decoder in (one, one.with_ops(native(2)), load(wide, native(3), bits).decoder):
        store = new_store(decoder, plan, len(LONG))
        hidden = torch.cat([step(decoder, store, LONG, *span) for span in pairwise((0, 256, 570, 573, 574, 600))])
        planes = [plane.view(torch.uint8).flatten() for layer in store.layers for plane in layer.planes.values()]
        found.append((hidden, decoder.logits(hidden), torch.cat(planes)))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


def test_a_decoder_may_change_between_stores(native, wide):
    """What it keeps of the store that it saw last is no other's."""
    decoder = load(wide, native(1)).decoder
    texts, plan = (LONG[:40], LONG[50:90]), uniform(decoder, "int8_plain")
    expected = [states(decoder, ids, plan) for ids in texts]
    stores = [new_store(decoder, plan, 40) for _ in texts]
    found = [[], []]
    for start in range(0, 40, 8):
        for ids, store, kept in zip(texts, stores, found, strict=True):
            kept.append(step(decoder, store, ids, start, start + 8))
    for kept, whole in zip(found, expected, strict=True):
        assert_close(torch.cat(kept), whole, 0.02)


@pytest.mark.parametrize("kv", TOLERANCES)
def test_wanted_tokens_have_the_states_that_they_have_among_all(native, family, kv):
    """In any order and more than once, of a text's end and of its middle; all keys and values are written."""
    wanted = torch.tensor([44, 3, 44, 0, 20])
    for ops in (ReferenceOps(), native(1)):
        decoder = load(family, ops).decoder
        stores = [new_store(decoder, uniform(decoder, kv), 100) for _ in range(2)]
        of_all, of_some = two_texts(decoder, stores[0], None), two_texts(decoder, stores[1], wanted)
        assert_close(of_some, of_all[wanted], TOLERANCES[kv])
        assert torch.equal(stores[0].blocks, stores[1].blocks)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_wanted_tokens_attend_to_codes_as_decodes_do(native, wide, name):
    decoder, wanted = load(wide, native(1), bits=4).decoder, torch.tensor([15, 44])
    plan = plan_of(KV_FORMATS[name], 2, decoder.spec.num_kv_heads, decoder.spec.head_dim)
    of_all, of_some = (two_texts(decoder, new_store(decoder, plan, 100), rows) for rows in (None, wanted))
    bits = rounded_bits(decoder.ops, KV_FORMATS[name], decoder.spec.head_dim)
    assert_close(of_some, of_all[wanted], DECODED[bits])


def two_texts(decoder: Decoder, store: KVStore, rows: Tensor | None) -> Tensor:
    """The states of a step with two texts, of 16 and 29 tokens, a block each: of all tokens or of `rows`."""
    positions = torch.cat([torch.arange(16), torch.arange(29)])
    slots = positions + store.paging.lead + store.paging.block_size * (torch.arange(45) >= 16)
    batch = AttentionBatch(positions, slots, (0, 16, 45), (16, 29), torch.tensor([[0], [1]]))
    return decoder.forward(torch.tensor(SHORT), batch, positions + 1, store.layers, rows)


def step(decoder: Decoder, store: KVStore, ids: list[int], start: int, stop: int) -> Tensor:
    """The states of tokens [start, stop) of a text whose blocks are the store's in order."""
    positions = torch.arange(start, stop)
    batch = AttentionBatch(
        positions=positions,
        slots=positions + store.paging.lead,
        query_starts=(0, stop - start),
        context_lens=(stop,),
        block_tables=torch.arange(store.num_blocks).unsqueeze(0),
    )
    return decoder.forward(torch.tensor(ids[start:stop]), batch, positions + 1, store.layers)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature, of which one token is infinite."""
    directory = write_checkpoint(tmp_path_factory.mktemp("damaged"))
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD] = torch.inf
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


WHOLE = [token if token != BAD else BAD + 1 for token in LONG]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kv", ["fp32", "int8_plain", "fp8_e4m3"])
def test_tokens_whose_numbers_are_not_finite_are_named(native, damaged, threads, kv):
    decoder = load(damaged, native(threads)).decoder
    plan = plan_of(KV_FORMATS[kv], 2, decoder.spec.num_kv_heads, decoder.spec.head_dim)
    for places in ([0], [3, 4, 60], [90]):
        ids = [BAD if place in places else token for place, token in enumerate(WHOLE[:91])]
        with pytest.raises(NotFiniteError) as caught:
            states(decoder, ids, plan)
        assert caught.value.tokens == tuple(places)


def test_overflowing_weights_are_told(native, tmp_path):
    directory = write_checkpoint(tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"] *= 1e38
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    named = []
    for ops in (ReferenceOps(), native(1)):
        decoder = load(directory, ops).decoder
        with pytest.raises(NotFiniteError, match="overflows in this dtype") as caught:
            states(decoder, WHOLE[:50], uniform(decoder, "fp16"))
        named.append(caught.value.tokens)
    assert named[0] == named[1]
    assert 0 < len(named[0]) < 50


@pytest.mark.parametrize("kv", ["fp32", "int8_plain"])
def test_others_in_the_step_go_on(native, damaged, kv):
    model = load(damaged, native(1))
    wish = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={BAD: -100.0})
    asks = [(WHOLE[:30], wish), ([*WHOLE[:20], BAD, *WHOLE[:9]], wish), (WHOLE[7:40], wish)]
    core = core_of(model, max_num_batched_tokens=48, kv_cache_dtype=kv)
    found = [answer.tokens for answer in answers(core, asks)]
    assert found[1] == []
    alone = [answers(core_of(model, kv_cache_dtype=kv), [ask])[0].tokens for ask in asks[::2]]
    assert found[::2] == alone == [answer.tokens for answer in answers(core, asks[::2])]


def test_others_that_draw_in_the_same_call_go_on(native, damaged):
    wish = SamplingParams(temperature=0, max_tokens=1)
    core = core_of(load(damaged, native(1)))
    assert [len(answer.tokens) for answer in answers(core, [([5], wish), ([BAD], wish), ([6], wish)])] == [1, 0, 1]
