"""The arithmetic of predictions, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvant.evaluate.rows import summarize
from kvant.quantize.scores import PIECES, Scores, score, score_all, standard_error

SEEDS = st.integers(0, 2**32)


def random_logits(seed: int, rows: int = 5, vocab: int = 11, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def log_softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.numpy().astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@given(SEEDS, st.floats(0.0, 8.0))
def test_scores_are_those_of_the_definition(seed, distance):
    baseline = random_logits(seed)
    logits = baseline + distance * random_logits(seed + 1, scale=1.0)
    targets = torch.arange(5)
    found = score(baseline, logits, targets)
    p, q = log_softmax(baseline), log_softmax(logits)
    np.testing.assert_allclose(found.nll, -q[np.arange(5), np.arange(5)], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-8, atol=1e-13)
    np.testing.assert_array_equal(found.agrees, p.argmax(axis=1) == q.argmax(axis=1))
    assert found.nll.dtype == found.kl.dtype == found.agrees.dtype == torch.float64


@given(SEEDS, st.sampled_from([1e-3, 1.0, 1e3, 1e30]))
def test_equal_logits_have_no_divergence_at_all(seed, scale):
    logits = random_logits(seed, scale=scale)
    found = score(logits, logits.clone(), torch.zeros(5, dtype=torch.int64))
    assert (found.kl == 0).all()
    assert (found.agrees == 1).all()


@given(SEEDS, st.floats(1e-9, 1e-3))
def test_divergence_is_never_negative(seed, distance):
    baseline = random_logits(seed, rows=64)
    found = score(baseline, baseline + distance * random_logits(seed + 1, rows=64), torch.zeros(64, dtype=torch.int64))
    assert (found.kl >= 0).all()


def test_tokens_that_neither_allows_add_nothing():
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    assert score(logits, logits + torch.tensor([0.5, 0.0, 0.0]), torch.tensor([0])).kl.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_show(bad):
    logits = torch.tensor([[0.0, bad, 2.0]])
    found = score(torch.tensor([[0.0, 1.0, 2.0]]), logits, torch.tensor([0]))
    assert not found.nll.isfinite().any()
    assert not found.kl.isfinite().any()


def test_a_token_held_impossible_costs_infinitely_much():
    found = score(torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))
    assert float(found.nll) == float(found.kl) == math.inf


@given(SEEDS, st.integers(2, 9), st.integers(1, 40))
def test_the_error_of_several_windows_is_that_of_their_means(seed, windows, predictions):
    values = random_logits(seed, windows, predictions).double()
    expected = values.numpy().mean(axis=1).std(ddof=1) / np.sqrt(windows)
    assert standard_error(values) == pytest.approx(expected)


@given(SEEDS, st.integers(2, 100))
def test_the_error_of_one_window_is_that_of_its_pieces(seed, predictions):
    values = random_logits(seed, 1, predictions).double()
    means = [piece.mean() for piece in np.array_split(values[0].numpy(), min(PIECES, predictions))]
    assert standard_error(values) == pytest.approx(np.std(means, ddof=1) / np.sqrt(len(means)))


def test_the_error_of_dependent_predictions_is_not_that_of_independent_ones():
    """Every value 64 times over: the error must be that of the 16 different ones."""
    different = torch.randn(PIECES, generator=torch.Generator().manual_seed(3)).double()
    expected = float(different.std()) / PIECES**0.5
    assert standard_error(different.repeat_interleave(64).unsqueeze(0)) == pytest.approx(expected)


def test_one_observation_has_no_error():
    assert math.isnan(standard_error(torch.ones(1, 1)))


def test_a_summary_against_numpy():
    generator = torch.Generator().manual_seed(1)
    shape = (4, 30)
    nll, kl = (torch.rand(shape, generator=generator).double() for _ in range(2))
    agrees = (torch.rand(shape, generator=generator) > 0.3).double()
    baseline = Scores(nll - 0.1 * torch.rand(shape, generator=generator), torch.zeros(shape), torch.ones(shape))
    row = summarize("int4", "int4 (layer 0: fp16)", 4.5, Scores(nll, kl, agrees), baseline)

    def error(values: torch.Tensor) -> float:
        return values.numpy().mean(axis=1).std(ddof=1) / 2

    assert (row.kv_cache_dtype, row.plan, row.bits_per_element) == ("int4", "int4 (layer 0: fp16)", 4.5)
    assert (row.tokens, row.windows, row.window_size) == (120, 4, 31)
    assert row.ppl == pytest.approx(np.exp(nll.numpy().mean()))
    assert row.ppl_stderr == pytest.approx(row.ppl * error(nll))
    ratio = row.ppl / np.exp(baseline.nll.numpy().mean())
    assert row.ppl_change == pytest.approx(ratio - 1)
    assert row.ppl_change_stderr == pytest.approx(ratio * error(nll - baseline.nll))
    assert (row.kl, row.kl_stderr) == (pytest.approx(kl.numpy().mean()), pytest.approx(error(kl)))
    assert (row.top1, row.top1_stderr) == (pytest.approx(agrees.numpy().mean()), pytest.approx(error(agrees)))


def test_pairing_makes_the_change_surer_than_either_perplexity():
    nll = torch.rand(4, 30, generator=torch.Generator().manual_seed(1)).double()
    baseline = Scores(nll - 0.25, torch.zeros_like(nll), torch.ones_like(nll))
    row = summarize("x", "x", 4.0, Scores(nll, nll, nll), baseline)
    assert row.ppl_change == pytest.approx(math.exp(0.25) - 1)
    assert row.ppl_change_stderr < 1e-12 < row.ppl_stderr


def test_an_enormous_perplexity_is_infinite_and_no_error():
    scores = Scores(torch.full((2, 3), 1e4, dtype=torch.float64), torch.zeros(2, 3), torch.ones(2, 3))
    assert summarize("x", "x", 4.0, scores, scores).ppl == math.inf


def test_all_rows_are_scored_some_at_a_time() -> None:
    logits, baseline = torch.randn(11, 20), torch.randn(11, 20)
    targets = torch.randint(0, 20, (11,))
    found = score_all(lambda rows: (baseline[rows], logits[rows]), targets, 4)
    expected = score(baseline, baseline, targets), score(baseline, logits, targets)
    for some, wanted in zip(found, expected, strict=True):
        for name in ("nll", "kl", "agrees"):
            torch.testing.assert_close(getattr(some, name), getattr(wanted, name))
