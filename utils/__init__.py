"""What any program would want. Knows nothing of the project."""
