"""What a change of a layer does, one layer later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvant.kernels.reference import ReferenceOps
from kvant.models.families import model_spec
from kvant.models.layers import Linear
from kvant.quantize.chunked import ChunkedOps, UnpreparedOps
from kvant.quantize.reader import Reader
from kvant.quantize.trial import Trial
from kvant.weights.load import WeightLoader, open_source
from kvant.weights.matrices import MatrixReader

LENGTH = 12


class Scene:
    """The miniature's layers and two texts before the first of them."""

    def __init__(self, path: Path) -> None:
        source = open_source(path)
        spec = model_spec(source.config)
        matrices = MatrixReader(source, torch.float32, "dense", False)
        loader = WeightLoader(source, spec, matrices, UnpreparedOps())
        self.layers = [loader.layer(index) for index in range(2)]
        self.hidden = torch.randn(2 * LENGTH, spec.hidden_size, generator=torch.Generator().manual_seed(0))
        self.reader = Reader.of(spec, ChunkedOps(), 2, LENGTH)

    def after(self, layer, following):
        """The inputs of the next layer's MLP, or the hidden states after the last, in float32."""
        ops = UnpreparedOps()
        reader = Reader.of(self.reader.spec, ops, 2, LENGTH)
        hidden = reader.layer(0, layer, self.hidden)
        if following is None:
            return hidden
        products = reader.products(1, following, hidden)
        linear, x = next(products)
        while linear is not following.mlp.gate_up:
            linear, x = products.send(linear(ops, x))
        return x


@pytest.fixture(scope="module")
def scene(tiny_path: Path) -> Scene:
    return Scene(tiny_path)


@pytest.mark.parametrize("kind", ["qkv", "out", "gate_up", "down"])
@pytest.mark.parametrize("last", [False, True])
def test_harm_is_the_share_that_changes_one_layer_later(scene, kind, last):
    layer, following = scene.layers[0], None if last else scene.layers[1]
    linear, ops = layer.linears[kind], ReferenceOps()
    weight = linear.weight.dequantize(torch.float32)
    changed = type(linear.weight).dense(weight + 0.3 * weight.roll(1, 0))
    trial = Trial(scene.reader, 0, layer, following, scene.hidden)
    found = trial.harm({kind: lambda x: ops.linear(x.float(), ops.prepare(changed), linear.bias)})
    wanted = scene.after(layer, following)
    there = scene.after(layer.with_linears(**{kind: Linear(changed, linear.bias)}), following)
    shares = (there - wanted).square().sum(1) / wanted.square().sum(1)
    assert found == pytest.approx(float(shares.mean()), rel=0.05)  # some products are computed in bfloat16
    assert found > 1e-4


def test_what_stays_as_it_was_does_no_harm(scene):
    layer, following = scene.layers
    trial = Trial(scene.reader, 0, layer, following, scene.hidden)
    assert trial.harm({}) == 0.0


@pytest.mark.parametrize("last", [False, True])
def test_a_result_that_is_no_number_is_the_worst(scene, last):
    layer, following = scene.layers
    trial = Trial(scene.reader, 0, layer, None if last else following, scene.hidden)
    assert trial.harm({"down": lambda x: torch.full_like(scene.hidden, torch.nan)}) == torch.inf


def test_a_huge_token_counts_as_much_as_any_other(scene):
    """First tokens are often thousands of times as large as the others: their errors must not be all that counts."""
    layer, linear = scene.layers[1], scene.layers[1].linears["down"]
    hidden = scene.hidden.clone()
    hidden[0] *= 1e4
    ops = ReferenceOps()
    prepared = ops.prepare(linear.weight)

    def worse(x):
        return 1.2 * ops.linear(x.float(), prepared, linear.bias)

    plain, huge = (Trial(scene.reader, 1, layer, None, it).harm({"down": worse}) for it in (scene.hidden, hidden))
    assert huge > 0.5 * plain
