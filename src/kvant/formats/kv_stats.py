"""The constants that KV codecs work with: measured once for a model, they let its cache be stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache, reduce

import torch
from torch import Tensor

CENTRE_TILE = 64  # positions that share one expansion of the centre


@dataclass(frozen=True, eq=False)
class Centre:
    """Where a layer's keys lie on average: c(m) = R_m mu, the mean key before RoPE turned to position m.

    Storing k - c(m) removes what all keys have in common, which in many models is most of a key. c(m) depends on the
    position alone, so it is never stored, and a cached prefix stays valid.

    Attention needs q^T c(m) for every token m again. Turning mu for each token would cost as much as q^T k itself, so
    c(m) is a polynomial in m within each tile of `CENTRE_TILE` positions: R_(tile's middle) sum_j phi_j(m) C_j, where
    C_j is the least-squares projection of the turning mu on the orthonormal polynomial phi_j. A kernel takes `order`
    dot products a tile and `order` multiply-adds a token. Slow pairs are followed closely; of a pair that turns often
    within a tile nothing is subtracted.

    Attributes:
        coefficients: C, [kv_heads, order, head_dim] float32.
        frequencies: [R / 2] float32, radians per position of the pairs (i, i + R / 2); elements from R on do not turn.
    """

    coefficients: Tensor
    frequencies: Tensor

    @classmethod
    def of_mean(cls, mean: Tensor, frequencies: Tensor, order: int) -> Centre:
        """The centre of keys with this mean before RoPE, [kv_heads, head_dim]."""
        offsets = torch.arange(CENTRE_TILE, device=mean.device) - (CENTRE_TILE - 1) / 2
        turning = turn(mean.unsqueeze(1), offsets, frequencies)
        return cls(polynomials(order).to(mean.device).T @ turning, frequencies)

    def to(self, device: torch.device) -> Centre:
        """The same on another device."""
        return Centre(self.coefficients.to(device), self.frequencies.to(device))

    def at(self, positions: Tensor) -> Tensor:
        """c(m) of positions [tokens] int64: float32 [kv_heads, tokens, head_dim]."""
        tiles, tile = (positions // CENTRE_TILE).unique(return_inverse=True)
        middles = tiles * CENTRE_TILE + (CENTRE_TILE - 1) / 2
        turned = turn(self.coefficients.unsqueeze(2), middles, self.frequencies)
        basis = polynomials(turned.shape[1]).to(positions.device)[positions % CENTRE_TILE]
        # Term by term, not as a matrix product: a token's sum must not depend on how many tokens there are.
        return reduce(torch.add, (basis[:, j, None] * turned[:, j, tile] for j in range(basis.shape[1])))


@cache
def polynomials(order: int) -> Tensor:
    """Orthonormal polynomials of degree 0 to order - 1 over a tile's positions: [CENTRE_TILE, order] float32."""
    offsets = torch.arange(CENTRE_TILE, dtype=torch.float64, device="cpu") * 2 / (CENTRE_TILE - 1) - 1
    powers = torch.stack([offsets**degree for degree in range(order)], dim=1)
    basis, signs = torch.linalg.qr(powers)
    rising: Tensor = basis * signs.diagonal().sign()
    return rising.float()


def turn(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """RoPE's rotation R_m of x [..., tokens, head_dim] (or one for all tokens) to positions [tokens], in float32."""
    angles = positions.double().unsqueeze(1) * frequencies.double()
    cos, sin = angles.cos().float(), angles.sin().float()
    half = frequencies.shape[0]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rest = rest.expand(*torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1]), rest.shape[-1])
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Constants of one layer's keys, or of its values, that its codec works with. Each may be absent.

    Attributes:
        centre: what is subtracted, by position.
        balance: [kv_heads, head_dim] float32, what elements are multiplied by.
        feedback: [kv_heads, head_dim, head_dim] float32, strictly upper triangular: rounding element i off by e lets
            every later element j aim lower by e * feedback[i, j].
        scale: [kv_heads] float32, the step of a static format.
    """

    centre: Centre | None = None
    balance: Tensor | None = None
    feedback: Tensor | None = None
    scale: Tensor | None = None

    def to(self, device: torch.device) -> LayerStats:
        """The same on another device."""
        found = (getattr(self, field.name) for field in fields(self))
        return LayerStats(*(None if constant is None else constant.to(device) for constant in found))


NO_STATS = LayerStats()
