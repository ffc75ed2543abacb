"""How stored tensors become values."""
