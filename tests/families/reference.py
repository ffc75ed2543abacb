"""What kvant is held to: transformers' own models, and the oracles of the families it lacks. All float32, eager."""

from __future__ import annotations

import importlib
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.configs.base import Config


class Reference(Protocol):
    """A model with its weights."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every tensor of its checkpoint by name."""
        ...

    def logits(self, ids: list[int]) -> Tensor:
        """[len(ids), vocab] of one text."""
        ...

    def continued(self, prompt: list[int], tokens: list[int]) -> Tensor:
        """[len(tokens), vocab]: what follows the prompt, then each token but the last, as decoded one by one."""
        ...

    def changed(self, **changes: Any) -> Reference:
        """The same weights under another config."""
        ...


class TransformersReference:
    """transformers' implementation of a config's architecture, with random weights unless some are given."""

    def __init__(self, config: Config, weights: dict[str, Tensor] | None = None) -> None:
        self._config = config
        # A copy: what it reads of rotary embeddings is completed in place.
        parsed = CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(config))
        model = AutoModelForCausalLM.from_config(parsed, attn_implementation="eager", dtype=torch.float32)
        self.model: PreTrainedModel = model.eval()
        if weights is not None:
            self.model.load_state_dict(weights)

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        self._forget()
        return self.model(torch.tensor([ids]), use_cache=False).logits[0]

    def _forget(self) -> None:
        """Dynamic NTK keeps the longest text's frequencies until a text within the original context comes."""
        self.model(torch.tensor([[0]]), use_cache=False)

    @torch.inference_mode()
    def continued(self, prompt: list[int], tokens: list[int]) -> Tensor:
        self._forget()
        step = self.model(torch.tensor([prompt]), use_cache=True)
        rows = [step.logits[0, -1]]
        for token in tokens[:-1]:
            step = self.model(torch.tensor([[token]]), past_key_values=step.past_key_values, use_cache=True)
            rows.append(step.logits[0, -1])
        return torch.stack(rows)

    def changed(self, **changes: Any) -> TransformersReference:
        return TransformersReference(self._config | changes, self.weights)


class OracleReference:
    """One of the modules in `oracles`, with random weights unless some are given."""

    def __init__(self, oracle: str, config: Config, weights: dict[str, Tensor] | None = None) -> None:
        self._name, self._config = oracle, config
        self._oracle = importlib.import_module(f"tests.families.oracles.{oracle}")
        self.weights = weights or {name: torch.ones(shape) for name, shape in self._oracle.shapes(config).items()}

    def logits(self, ids: list[int]) -> Tensor:
        return self._oracle.logits(self._config, self.weights, ids, len(ids))

    def continued(self, prompt: list[int], tokens: list[int]) -> Tensor:
        logits = self._oracle.logits(self._config, self.weights, prompt + tokens[:-1], len(prompt))
        return logits[len(prompt) - 1 :]

    def changed(self, **changes: Any) -> OracleReference:
        return OracleReference(self._name, self._config | changes, self.weights)
