"""A miniature Llama with a byte-level tokenizer, written to disk without any other library's model code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 256 + len(MARKS)
END = VOCAB - 1
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": END,
    "torch_dtype": "float32",
}


def write_checkpoint(directory: Path, **changes: Any) -> Path:
    """The checkpoint with these changes of its config; the weights depend on nothing but its sizes."""
    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes
    (directory / "config.json").write_text(json.dumps(config))
    save_file(_weights(config), directory / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"eos_token": MARKS[2], "pad_token": MARKS[0], "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def overflowing(directory: Path) -> Path:
    """The checkpoint there, its second layer's keys turned into numbers that are beyond float16, and within float32."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.self_attn.k_proj.weight"] *= 1e6
    save_file(weights, file, metadata={"format": "pt"})
    return directory


def _weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Large enough that attention is far from uniform and every token of the context shows in the logits."""
    generator = torch.Generator().manual_seed(7)
    hidden, width, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (VOCAB, hidden), "lm_head": (VOCAB, hidden)}
    norms = ["model.norm"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norms += [f"{prefix}input_layernorm", f"{prefix}post_attention_layernorm"]
        shapes |= {
            f"{prefix}self_attn.q_proj": (heads * dim, hidden),
            f"{prefix}self_attn.k_proj": (groups * dim, hidden),
            f"{prefix}self_attn.v_proj": (groups * dim, hidden),
            f"{prefix}self_attn.o_proj": (hidden, heads * dim),
            f"{prefix}mlp.gate_proj": (width, hidden),
            f"{prefix}mlp.up_proj": (width, hidden),
            f"{prefix}mlp.down_proj": (hidden, width),
        }
    weights = {name: torch.randn(*s, generator=generator) * 1.5 / s[1] ** 0.5 for name, s in shapes.items()}
    weights |= {name: 1 + 0.3 * torch.randn(hidden, generator=generator) for name in norms}
    return {f"{name}.weight": weight for name, weight in weights.items()}


def _tokenizer() -> Tokenizer:
    """One token a byte, and ChatML's marks."""
    tokenizer = Tokenizer(BPE({char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return tokenizer
