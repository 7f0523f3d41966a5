"""Packages that only some commands need."""

import importlib.util

from utils.errors import UsageError


def require_packages(requirements: str, *names: str) -> None:
    """Check that packages of a requirements file are installed.

    Raises:
        UsageError: one is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} not installed: pip install -r {requirements}")
