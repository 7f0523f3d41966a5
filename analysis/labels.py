"""Short names of runs, optimizers and settings, as tables and pictures show them."""

import math


def optimizer_name(args: dict) -> str:
    """Name the optimizer of a run's flags as papers do: sgd, sgd SAM, sgd SAM.v2, sgd ASAM, sgd MSAM, sgd SAM late 0.9 ...

    Args:
        args: the flags; those that came after the run may be missing.
    """
    base = args["optmzr"].removesuffix("-sam")
    if base == args["optmzr"]:
        return base
    direction, schedule = args.get("sam_direction", "previous"), args.get("rho_schedule", "constant")
    since, until, every = args.get("sam_from", 0), args.get("sam_until", 1), args.get("sam_every", 1)
    name = f"{'A' if args['adaptive'] else ''}SAM{'.v2' if args['sam_v2'] else ''}"
    if direction == "momentum" and (args["sam_rho"] or 0) < 0:
        name, direction = "adaptive MSAM" if args["adaptive"] else "MSAM", "previous"
    parts = [
        base, name, direction != "previous" and direction, args.get("sam_local") and "local",
        args.get("sam_unmasked") and "unmasked", schedule != "constant" and f"{schedule}-rho", _window(since, until),
        every > 1 and f"every {every}",
    ]  # fmt: skip
    return " ".join(filter(None, parts))


def _window(since: float, until: float) -> str:
    """Name the part of training in which SAM perturbs: nothing for all of it."""
    if until == 1:
        return f"late {since:g}" if since else ""
    return f"from {since:g} to {until:g}" if since else f"early {until:g}"


def run_label(args: dict) -> str:
    """Describe a run in a few words, for example `sgd SAM.v2, rho 0.05, random 0.9`."""
    parts = [optimizer_name(args)]
    if args["sam_rho"] is not None:
        parts.append(f"rho {args['sam_rho']:g}")
    sparse = f"{args['prune_method']} {args['sparsity'] or ''}".strip()
    parts.append("dense" if args["prune_method"] == "none" else sparse)
    return ", ".join(parts)


def setting_name(column: str) -> str:
    """Return the name of a table's column in words, for example `update interval` for `--update_interval`."""
    return column.removeprefix("--").replace("_", " ")


def value_text(value: object) -> str:
    """Return a setting's value as text: 10 for 10.0, and nothing for a missing value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def accuracy_text(mean: float, std: float) -> str:
    """Return `mean ± std` with two decimals; only the mean without a std, and nothing without a mean."""
    if math.isnan(mean):
        return ""
    return f"{mean:.2f}" if math.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def count_text(count: float, noun: str) -> str:
    """Return a count with its noun: 1 run, 2 runs."""
    return f"{count:.0f} {noun}" if count == 1 else f"{count:.0f} {noun}s"
