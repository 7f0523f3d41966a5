"""Sparsities by layer from a YAML file."""

from pathlib import Path

from utils.errors import UsageError


def load_layer_sparsity(path: Path) -> dict[str, float]:
    """Read `prune_ratios: {layer: sparsity}`; a layer is named by its module or, with `.weight`, by its parameter.

    Raises:
        UsageError: no such file, or another content.
    """
    import yaml  # here: whoever gives no such file needs no YAML

    try:
        content = yaml.safe_load(path.read_text())
        ratios = content["prune_ratios"]
        return {str(name).removesuffix(".weight"): float(value) for name, value in ratios.items()}
    except OSError as error:
        raise UsageError(f"cannot read '{path}' ({error.strerror})") from error
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"'{path}' is not a file of 'prune_ratios: {{layer: sparsity}}' in YAML") from error
