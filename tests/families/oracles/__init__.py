"""Families that transformers lacks, each as its published code defines it, in plain PyTorch."""
