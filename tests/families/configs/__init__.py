"""Real configs in miniature: `config.json` with the keys and the style its publishers use, only the sizes shrunk."""

from __future__ import annotations

from tests.families.configs.gemma import GEMMA
from tests.families.configs.internlm import INTERNLM, INTERNLM2
from tests.families.configs.llama import LLAMA, MISTRAL
from tests.families.configs.phi import PHI3
from tests.families.configs.qwen import QWEN2, QWEN3, QWEN_V1

# Families that transformers lacks: model_type -> the module in `oracles` that holds their reference.
ORACLES = {"qwen": "qwen_v1", "internlm": "internlm", "internlm2": "internlm2"}

TINIES = {
    tiny.name: tiny
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA, QWEN_V1, INTERNLM, INTERNLM2)
    for tiny in family
}
