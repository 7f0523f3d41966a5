"""What to look at when a run is over, or before it starts: python -m analysis.NAME."""
