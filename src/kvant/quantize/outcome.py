"""What a quantization cost and brought: measured, as JSON for programs and as a model card for people."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvant.quantize.chunked import ChunkedOps
from kvant.quantize.layer import LinearReport
from kvant.quantize.recipe import WHOLE_ROW, Recipe
from kvant.quantize.scores import Scores, score_all, standard_error
from kvant.quantize.texts import Window
from kvant.version import __version__
from kvant.weights.load import WeightLoader
from kvant.weights.source import TensorSource

REPORT_FILE = "quantization_report.json"
_ROWS = 32  # predictions compared at once: bounds the logits
# A linear is named as bad when so much of its outputs' energy is error, and it is so many times the median.
_BAD_ERROR, _BAD_RATIO = 0.02, 5


@dataclass(frozen=True)
class Outcome:
    """A finished quantization.

    Attributes:
        was_quantized: whether the original's weights were in few bits before; it is the original all the same.
        calibration: the text that layers were quantized on.
        ppl_original, ppl: perplexity on unseen text, before and after.
        ppl_change: relative, with its standard error: 0.01 is 1 % worse.
        kl: mean KL(original || quantized) of the next-token distributions, in nats.
        top1: share of predictions whose likeliest token stayed the same.
        size_original: bytes of the model in 16 bit.
        size: bytes of the checkpoint.
        seconds: of the whole run, before interruptions too.
        peak_memory: largest resident set of the process, in bytes; pages of mapped files count.
        linears: what became of each linear of each layer.
    """

    model: str
    was_quantized: bool
    recipe: Recipe
    calibration: str
    ppl_original: float
    ppl: float
    ppl_change: float
    ppl_change_stderr: float
    kl: float
    kl_stderr: float
    top1: float
    unseen_tokens: int
    size_original: int
    size: int
    seconds: float
    peak_memory: int
    linears: tuple[LinearReport, ...]

    @classmethod
    def of(
        cls,
        source: TensorSource,
        recipe: Recipe,
        calibration: str,
        size: int,
        linears: Sequence[LinearReport],
        scores: tuple[Scores, Scores],
        seconds: float,
    ) -> Outcome:
        """From the scores of the original model and of the quantized one on the same text."""
        original, quantized = scores
        difference = quantized.nll - original.nll
        ratio = float(difference.mean().exp())
        return cls(
            model=source.path.name,
            was_quantized=any(source.packed_bits(name) is not None for name in source.shapes()),
            recipe=recipe,
            calibration=calibration,
            ppl_original=float(original.nll.mean().exp()),
            ppl=float(quantized.nll.mean().exp()),
            ppl_change=ratio - 1,
            ppl_change_stderr=ratio * standard_error(difference),
            kl=float(quantized.kl.mean()),
            kl_stderr=standard_error(quantized.kl),
            top1=float(quantized.agrees.mean()),
            unseen_tokens=quantized.nll.numel(),
            size_original=2 * source.num_parameters(),
            size=size,
            seconds=seconds,
            peak_memory=peak_memory(),
            linears=tuple(linears),
        )

    @property
    def bad(self) -> list[LinearReport]:
        """The linears that lose much more than most, worst first."""
        usual = median(report.error for report in self.linears)
        found = [it for it in self.linears if not it.error <= max(_BAD_ERROR, _BAD_RATIO * usual)]
        return sorted(found, key=lambda report: -report.error)

    def as_json(self) -> dict[str, Any]:
        """In JSON's types; a number that is not finite becomes null."""
        values = _plain(dataclasses.asdict(self))
        assert isinstance(values, dict)
        return {"kvant": __version__, "torch": torch.__version__, **values, "bad": [_named(it) for it in self.bad]}

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, before, after), as a table has it."""
        saved = self.size_original / self.size
        return [
            ("size", _mib(self.size_original), f"{_mib(self.size)} ({saved:.2f}x smaller)"),
            (
                "perplexity",
                f"{self.ppl_original:.3f}",
                f"{self.ppl:.3f} ({self.ppl_change:+.2%} ± {self.ppl_change_stderr:.2%})",
            ),
            ("KL (nats)", "0", f"{self.kl:.4f} ± {self.kl_stderr:.4f}"),
            ("top-1 agreement", "100%", f"{self.top1:.1%}"),
        ]

    def notes(self) -> list[str]:
        """What its reader should know beside the table."""
        kinds = {report.linear: report for report in self.linears}
        sizes = {f"{report.group_size} ({kind})": report.group_size for kind, report in kinds.items()}
        groups = ", ".join(sizes) if len(set(sizes.values())) > 1 else str(next(iter(sizes.values())))
        recipe = self.recipe
        scales = "one scale a row" if recipe.group_size == WHOLE_ROW else f"a scale for each {groups} inputs"
        found = [
            f"{recipe.method}, {recipe.bits} bits, {'no' if recipe.symmetric else 'with'} zero points, {scales}",
            f"calibrated on {recipe.samples} x {recipe.seqlen} tokens of {self.calibration}; measured on "
            f"{self.unseen_tokens:,} of a text that nothing was calibrated on",
            f"{self.seconds:.0f} s, {_mib(self.peak_memory)} of memory at most",
        ]
        if self.was_quantized:
            found.append("the original's weights were in few bits already; sizes are compared with 16 bit")
        refused = sorted({report.linear for report in self.linears if report.refused})
        if refused and self.recipe.method in ("awq", "smoothquant", "auto"):
            found.append(
                f"inputs that nothing could be divided for, so that they were not scaled: {', '.join(refused)}"
            )
        return found + [_advice(report) for report in self.bad[:5]]


def unseen_scores(
    loader: WeightLoader, original: Sequence[Tensor], quantized: Sequence[Tensor], windows: Sequence[Window]
) -> tuple[Scores, Scores]:
    """The predictions of windows after the last layer, [windows, predictions] each.

    Args:
        loader: has the last norm and the output head, which are the same for both.
        original: hidden states [tokens, hidden] float32 of some windows each.
        quantized: the same of the quantized model.
        windows: token ids.
    """
    head, bias = (linear := loader.head()).weight.planes["weight"].data, linear.bias
    norm, spec, ops = loader.norm(), loader.spec, ChunkedOps()
    count, length = len(windows), len(windows[0])

    def logits(hidden: Tensor) -> Tensor:
        values = F.linear(ops.rms_norm(hidden, norm, spec.rms_eps), head, bias)
        return values if spec.final_softcap is None else torch.tanh(values / spec.final_softcap) * spec.final_softcap

    plain, rounded = (torch.cat(list(it)).view(count, length, -1)[:, :-1].flatten(0, 1) for it in (original, quantized))
    targets = torch.tensor(windows)[:, 1:].flatten()
    baseline, found = score_all(lambda rows: (logits(plain[rows]), logits(rounded[rows])), targets, _ROWS)
    return baseline.by_window(count), found.by_window(count)


def model_card(outcome: Outcome, name: str) -> str:
    """README.md for the checkpoint."""
    lines = [
        f"# {name}",
        "",
        f"{outcome.model}, its linear layers quantized by kvant {__version__}.",
        "",
        "| | original | quantized |",
        "| --- | ---: | ---: |",
        *(f"| {what} | {before} | {after} |" for what, before, after in outcome.rows()),
        "",
        *(f"- {note}" for note in outcome.notes()),
        f"- every linear's error is in {REPORT_FILE}",
        "",
        f"Run it with `kvant chat ./{name}`, or with any program that reads {outcome.recipe.format} checkpoints"
        f"{'' if outcome.recipe.symmetric else ' with zero points'}.",
    ]
    return "\n".join(lines) + "\n"


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _named(report: LinearReport) -> str:
    return f"layer {report.layer}, {report.linear}"


def _advice(report: LinearReport) -> str:
    return (
        f"{_named(report)}: {report.error:.1%} of its outputs' energy is error; smaller groups, 8 bits or "
        f"--ignore '*.{report.layer}.*' help"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
