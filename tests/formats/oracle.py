"""What the planes of a codec may hold for given vectors, said a second time, in float64: the result, not the way to it.

What is checked allows for the rounding of the stored numbers and for a few roundings of float32 on the way, and for
vectors that are known only up to a slack, as those that a kernel computes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kvant.formats.kv_codecs import (
    AffineCodec,
    FloatCodec,
    GroupedCodec,
    Planes,
    ShapedCodec,
    StaticCodec,
    SymmetricCodec,
    VectorCodec,
)
from kvant.formats.kv_stats import LayerStats

HALF_LIMIT = 65504.0
FLOAT32 = 2.0**-20  # of a few sums and products
STEPS = 2e-5  # float32's error of a quotient, relative to all levels


def assert_encodes(
    codec: VectorCodec, planes: Planes, x: Tensor, positions: Tensor, stats: LayerStats, slack: Tensor | float = 0.0
) -> None:
    """The planes hold what the codec makes of x [kv_heads, tokens, head_dim], whose elements are off by `slack`."""
    x = x.double()
    slack = torch.as_tensor(slack, dtype=torch.float64).expand_as(x)
    match codec:
        case ShapedCodec():
            x, slack = shaped(x, positions, stats, slack)
            assert_encodes(codec.inner, planes, x, positions, stats, slack)
        case FloatCodec():
            _assert_rounded(planes["data"], x, slack)
        case AffineCodec():
            _check_affine(codec, planes, x, slack)
        case GroupedCodec():
            _check_grouped(planes, x, stats.feedback, slack)
        case SymmetricCodec():
            _check_symmetric(planes, x, slack)
        case StaticCodec():
            assert stats.scale is not None
            scale = stats.scale.double().view(-1, 1, 1)
            _check_static(codec, planes["codes"], x / scale, slack / scale)
        case _:
            raise AssertionError(f"nothing is said about {codec}")


def shaped(x: Tensor, positions: Tensor, stats: LayerStats, slack: Tensor) -> tuple[Tensor, Tensor]:
    """What a `ShapedCodec` hands to the codec within, and how far it may be off."""
    if stats.centre is not None:
        centre = stats.centre.at(positions).double()
        x, slack = x - centre, slack + FLOAT32 * (x.abs() + centre.abs())
    balance = 1.0 if stats.balance is None else stats.balance.double().unsqueeze(1)
    x, slack, matrix = x * balance, slack * balance, sylvester(x.shape[-1])
    return x @ matrix, (slack + x.shape[-1] * 2.0**-24 * x.abs()) @ matrix.abs()


@cache
def sylvester(size: int) -> Tensor:
    """The matrix of `hadamard` by its definition: (-1)^(ones that i and j share), in blocks along the diagonal."""
    block = size & -size
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    one = torch.tensor(rows, dtype=torch.float64) / block**0.5
    return torch.block_diag(*[one] * (size // block))


def _assert_rounded(found: Tensor, exact: Tensor, slack: Tensor) -> None:
    """Numbers as a float type holds them: to the nearest, or its largest."""
    info = torch.finfo(found.dtype)
    exact = exact.clamp(-info.max, info.max)
    assert found.float().isfinite().all()
    bound = exact.abs() * info.eps / 2 * 1.0001 + info.tiny * info.eps / 2 + slack * 1.0001
    assert ((found.double() - exact).abs() <= bound).all()


def _unpaired(codes: Tensor) -> Tensor:
    """4-bit codes, of which each byte has two, the even element below."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)


def _check_affine(codec: AffineCodec, planes: Planes, x: Tensor, slack: Tensor) -> None:
    levels, codes = 2**codec.bits - 1, planes["codes"]
    codes = _unpaired(codes) if codec.bits == 4 else codes
    affine, most = planes["affine"], slack.amax(-1, keepdim=True)
    scale, zero = affine.double().split(1, dim=-1)
    _assert_rounded(affine[..., 1:], x.amin(-1, keepdim=True), most)
    span = (x.amax(-1, keepdim=True) - zero).clamp(min=0)
    _assert_rounded(affine[..., :1], span / levels, (most + FLOAT32 * span) / levels)
    assert not codes[(scale == 0).expand_as(codes)].any()
    step = torch.where(scale > 0, scale, 1.0)
    off = torch.where(scale > 0, (x - zero) / step - codes, 0.0)
    _assert_half_steps(off, codes, 0, levels, slack / step + STEPS * levels)


def _check_grouped(planes: Planes, x: Tensor, feedback: Tensor | None, slack: Tensor) -> None:
    """Steps as the words tell them: wide enough, hardly wider than needed, and the codes' middle where it can be."""
    words, codes = planes["words"].to(torch.int32) & 0xFFFF, _unpaired(planes["codes"])
    scale = ((words >> 6) * 32).to(torch.int16).view(torch.float16).double().unsqueeze(-1)
    eighths = ((words & 63) - 32).unsqueeze(-1)
    x, slack = (t.unflatten(-1, (words.shape[-1], -1)) for t in (x, slack))
    low, high, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), slack.amax(-1, keepdim=True)
    needed = torch.maximum((high - low) / 15, (high + low).abs() / 2 / 3.875).clamp(max=63488.0)
    off = 2.0**-11 * needed + 2.0**-25 + most  # a float16's rounding, before the last bits are dropped upwards
    assert (scale >= needed - off).all()
    assert (scale <= (needed + off) * (1 + 2.0**-5) + 2.0**-19).all()
    step = torch.where(scale > 0, scale, 1.0)
    wanted = ((-low / step - 7.5) * 8).clamp(-32, 31)
    assert ((eighths - wanted).abs() <= 0.5 + 8 * most / step + STEPS * 8)[scale > 0].all()
    aims, allowed = (x / step + 7.5 + eighths / 8).flatten(-2), (slack / step).flatten(-2) + STEPS * 15
    rounding = aims - codes
    if feedback is not None:
        # What an element passes on is its error, not its error in steps of its own group.
        size = x.shape[-1]
        width, step = (t.squeeze(-1).repeat_interleave(size, dim=-1) for t in (scale, step))
        rounding, allowed = _rounding(rounding * width, feedback) / step, _spread(allowed * width, feedback) / step
        live = width > 0
        rounding, allowed, codes = rounding[live], allowed[live], codes[live]
    _assert_half_steps(rounding, codes, 0, 15, allowed)


def _rounding(off: Tensor, feedback: Tensor) -> Tensor:
    """Each element's own rounding error, where `off` [kv_heads, tokens, head_dim] is what all of them left."""
    return torch.linalg.solve_triangular(_lower(feedback), off.mT, upper=False, unitriangular=True).mT


def _spread(slack: Tensor, feedback: Tensor) -> Tensor:
    lower = _lower(feedback)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(lower.shape[-1]).double(), upper=False)
    return slack @ inverse.abs().mT


def _lower(feedback: Tensor) -> Tensor:
    """(1 + F)^T: what is left of the rounding errors e is (1 + F)^T e."""
    assert torch.equal(feedback, feedback.triu(1))
    return (feedback.double() + torch.eye(feedback.shape[-1])).mT


def _check_symmetric(planes: Planes, x: Tensor, slack: Tensor) -> None:
    codes, scale = planes["codes"].double(), planes["scale"].double()
    largest = x.abs().amax(-1, keepdim=True)
    _assert_rounded(planes["scale"], largest / 127, (slack.amax(-1, keepdim=True) + FLOAT32 * largest) / 127)
    assert not codes[(scale == 0).expand_as(codes)].any()
    step = torch.where(scale > 0, scale, 1.0)
    off = torch.where(scale > 0, x / step - codes, 0.0)
    _assert_half_steps(off, codes, -127, 127, slack / step + STEPS * 127)


def _check_static(codec: StaticCodec, codes: Tensor, steps: Tensor, slack: Tensor) -> None:
    if codec.dtype == torch.int8:
        _assert_half_steps(steps - codes, codes, -127, 127, slack + STEPS * 127)
    else:
        _assert_rounded(codes, steps, slack + FLOAT32 * steps.abs())


def _assert_half_steps(off: Tensor, codes: Tensor, lowest: int, highest: int, allowed: Tensor) -> None:
    """No code is more than half a step off, but for the outermost, which stand for all that lies beyond."""
    assert ((codes >= lowest) & (codes <= highest)).all()
    assert ((off <= 0.5 + allowed) | (codes == highest)).all()
    assert ((off >= -0.5 - allowed) | (codes == lowest)).all()
