"""The blocked KV cache: block ids and counts, the prefix tree, the memory."""
