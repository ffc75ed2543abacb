"""Native kernels for CPUs: C++ in csrc/, called through a plain C interface."""
