"""One decoder layer quantized: its linears one after the other, each on the inputs that the ones before leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvant.errors import NotFiniteError, UnsupportedModelError
from kvant.models.layers import LayerWeights, Linear
from kvant.quantize.chunked import ChunkedOps, fast_dtype
from kvant.quantize.folds import Fold
from kvant.quantize.grid import GridSpec
from kvant.quantize.methods import Method, Problem, Solution
from kvant.quantize.moments import Moments
from kvant.quantize.reader import Reader, proceed
from kvant.quantize.trial import Product, Trial


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
        compares: whether the method also asks for a problem without the text that solutions are compared on, the last:
            some fit what they see.
    """

    reader: Reader
    method: Method
    specs: Mapping[str, GridSpec]
    compares: bool

    def __call__(
        self,
        index: int,
        layer: LayerWeights,
        following: LayerWeights | None,
        folds: Mapping[str, Fold],
        texts: list[Tensor],
    ) -> tuple[QuantizedLayer, list[Tensor]]:
        """The layer quantized, and what it makes of the texts then.

        Args:
            index: of the layer.
            layer: its weights, dense and not prepared.
            following: the next one's, the same; None for the last.
            folds: see `find_folds`.
            texts: hidden states [tokens, hidden] of some texts each; they are taken from the list, to save memory.

        Raises:
            NotFiniteError: a linear's inputs are not finite.
        """
        stored, reports, settled = layer, [], dict[str, Product]()
        trial = Trial(self.reader, index, layer, following, texts[-1][-self.reader.length :].clone())
        running = [self.reader.products(index, layer, texts.pop(0)) for _ in range(len(texts))]
        inputs = [proceed(products, None) for products in running]
        for kind, linear in layer.linears.items():
            solution = Solution("none", linear.weight)
            if kind in self.specs:
                with _named(kind):
                    harm = _harm(trial, settled, kind, linear.bias)
                    problem = self._problem(self.specs[kind], linear, stored, folds.get(kind), inputs, harm)
                    solution = self.method(problem)
                    error = solution.error(problem, problem.inputs)
                reports.append(self._report(index, kind, solution, error, folds.get(kind)))
            if solution.scale is not None:
                stored = folds[kind].applied(stored, solution.scale)
            stored = stored.with_linears(**{kind: Linear(solution.weight, stored.linears[kind].bias)})
            product = settled[kind] = _product(solution, linear.bias)
            inputs = [proceed(products, product(inputs.pop(0))) for products in running]
        return QuantizedLayer(stored, tuple(reports)), inputs

    def _problem(
        self,
        spec: GridSpec,
        linear: Linear,
        stored: LayerWeights,
        fold: Fold | None,
        inputs: Sequence[Tensor],
        harm: Callable[[Solution], float],
    ) -> Problem:
        moments, trial = Moments.of(inputs), inputs[-1][-self.reader.length :]
        apart = self.compares and len(trial) < moments.count
        return Problem(
            weight=linear.weight.dequantize(torch.float32),
            inputs=moments,
            spec=spec,
            harm=harm,
            settled=None if fold is None else partial(fold.settled, stored),
            ties=None if fold is None else fold.ties,
            others=(lambda: moments.without(Moments.of([trial]))) if apart else None,
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


def _harm(trial: Trial, settled: Mapping[str, Product], kind: str, bias: Tensor | None) -> Callable[[Solution], float]:
    """What a solution for a linear does, beside those that the ones before it have."""
    return lambda solution: trial.harm({**settled, kind: _product(solution, bias)})


def _product(solution: Solution, bias: Tensor | None) -> Product:
    ops = ChunkedOps(fast_dtype())
    weight = ops.prepare(solution.weight)
    return lambda x: ops.linear(x if solution.scale is None else x / solution.scale, weight, bias)
