"""Where tensors come from: lazy name -> tensor over memory-mapped files."""
