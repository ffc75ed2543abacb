"""Continuous batching: plan, run, commit."""
