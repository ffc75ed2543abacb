"""What a quantized model or KV cache costs, measured."""
