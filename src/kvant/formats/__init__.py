"""What the bytes mean: weight planes and KV-cache codes. A leaf: no engine, no kernels."""
