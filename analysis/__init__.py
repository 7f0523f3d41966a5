"""Commands that look at finished runs: python -m analysis.NAME."""
