"""One decoder layer quantized: its linears one after the other, each on the inputs that the ones before leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvant.errors import NotFiniteError, UnsupportedModelError
from kvant.models.layers import LayerWeights, Linear, Products
from kvant.quantize.chunked import ChunkedOps, fast_dtype
from kvant.quantize.folds import Fold
from kvant.quantize.grid import GridSpec
from kvant.quantize.methods import Method, Problem, Solution
from kvant.quantize.moments import Moments
from kvant.quantize.reader import Reader


@dataclass(frozen=True)
class LinearReport:
    """What became of a linear.

    Attributes:
        linear: its name in `LayerWeights.linears`.
        error: what share of its outputs' energy on the calibration text the weight's errors are.
        method: that was chosen for it; "none" where it stayed as it was.
        divided: what its inputs were divided in, a norm or a linear; None where they were not.
        refused: whether nothing was found in which they can be divided.
    """

    linear: str
    layer: int
    error: float
    method: str
    bits: int
    group_size: int
    divided: str | None
    refused: bool


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer as it will be stored: its linears' weights are `PackedWeight`s, its norms divided where that was done."""

    weights: LayerWeights
    linears: tuple[LinearReport, ...]


@dataclass(frozen=True)
class LayerQuantizer:
    """Quantizes layers.

    Attributes:
        reader: runs a layer over some texts at once.
        method: for each linear.
        specs: what each linear's codes are like, by its name in `LayerWeights.linears`; one that is not there stays as
            it is.
        compares: whether the last eighth of the texts is kept apart first, for methods that compare others.
    """

    reader: Reader
    method: Method
    specs: Mapping[str, GridSpec]
    compares: bool

    def __call__(
        self, index: int, layer: LayerWeights, folds: Mapping[str, Fold], texts: list[Tensor]
    ) -> tuple[QuantizedLayer, list[Tensor]]:
        """The layer quantized, and what it makes of the texts then.

        Args:
            index: of the layer.
            layer: its weights, dense and not prepared.
            folds: see `find_folds`.
            texts: hidden states [tokens, hidden] of some texts each; they are taken from the list, to save memory.

        Raises:
            NotFiniteError: a linear's inputs are not finite.
        """
        stored, reports = layer, []
        running = [self.reader.products(index, layer, texts.pop(0)) for _ in range(len(texts))]
        inputs = [_proceed(products, None) for products in running]
        for kind, linear in layer.linears.items():
            solution = Solution("none", linear.weight)
            if kind in self.specs:
                with _named(kind):
                    solution, error = self._solve(self.specs[kind], linear, stored, folds.get(kind), inputs)
                reports.append(self._report(index, kind, solution, error, folds.get(kind)))
            if solution.scale is not None:
                stored = folds[kind].applied(stored, solution.scale)
            stored = stored.with_linears(**{kind: Linear(solution.weight, stored.linears[kind].bias)})
            product = _product(solution, linear.bias)
            inputs = [_proceed(products, product(inputs.pop(0))) for products in running]
        return QuantizedLayer(stored, tuple(reports)), inputs

    def _solve(
        self, spec: GridSpec, linear: Linear, stored: LayerWeights, fold: Fold | None, inputs: Sequence[Tensor]
    ) -> tuple[Solution, float]:
        """The linear in few bits, and its error on the text."""
        problem = self._problem(spec, linear, stored, fold, inputs)
        solution = self.method(problem)
        return solution, solution.error(problem, problem.inputs)

    def _problem(
        self, spec: GridSpec, linear: Linear, stored: LayerWeights, fold: Fold | None, inputs: Sequence[Tensor]
    ) -> Problem:
        seen = len(inputs) - max(1, len(inputs) // 8) if self.compares and len(inputs) > 1 else len(inputs)
        return Problem(
            weight=linear.weight.dequantize(torch.float32),
            inputs=Moments.of(inputs[:seen]),
            unseen=Moments.of(inputs[seen:]) if seen < len(inputs) else None,
            spec=spec,
            settled=None if fold is None else partial(fold.settled, stored),
            ties=None if fold is None else fold.ties,
        )

    def _report(self, index: int, kind: str, solution: Solution, error: float, fold: Fold | None) -> LinearReport:
        spec = self.specs[kind]
        return LinearReport(
            linear=kind,
            layer=index,
            error=error,
            method=solution.method,
            bits=spec.bits,
            group_size=spec.group_size,
            divided=None if fold is None or solution.scale is None else fold.producer,
            refused=fold is None,
        )


@contextmanager
def _named(kind: str) -> Iterator[None]:
    """Errors with the name of the linear that they came from."""
    try:
        yield
    except (NotFiniteError, UnsupportedModelError) as error:
        raise type(error)(f"{kind}: {error}") from error


def _proceed(products: Products[tuple[Tensor, Tensor]], product: Tensor | None) -> Tensor:
    """Run a layer on with what it asked for: to the inputs of the next product, or to the hidden states at its end."""
    try:
        # Many wait here at once, in 16 bit.
        return (next(products) if product is None else products.send(product))[1].bfloat16()
    except StopIteration as end:
        x, residual = end.value
        hidden: Tensor = x + residual
        return hidden


def _product(solution: Solution, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    ops = ChunkedOps(fast_dtype())
    weight = ops.prepare(solution.weight)
    return lambda x: ops.linear(x if solution.scale is None else x / solution.scale, weight, bias)
