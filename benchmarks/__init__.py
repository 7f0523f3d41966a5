"""Measurements of speed and numerical cost: python -m benchmarks.NAME."""
