"""Names of optimizers in tables and pictures."""

import pytest

from analysis.labels import optimizer_name
from analysis.run_table import OPTIMIZER_FLAGS
from experiment.flags import parse, plain, resolve


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("", "sgd SAM"),
        ("--adaptive", "sgd ASAM"),
        ("--sam-v2", "sgd SAM.v2"),
        ("--sam-v2 --sam-rho -0.3", "sgd SAM.v2"),  # the column of rho has the sign
        ("--sam-v2 --sam-unmasked", "sgd SAM.v2 unmasked"),
        ("--sam-v2 --sam-direction momentum --sam-rho -3", "sgd MSAM"),
        ("--sam-v2 --sam-direction momentum --sam-rho -3 --adaptive", "sgd adaptive MSAM"),
        ("--sam-v2 --sam-direction momentum", "sgd SAM.v2 momentum"),
        ("--sam-v2 --sam-direction ema", "sgd SAM.v2 ema"),
        ("--sam-v2 --sam-direction random --rho-schedule lr", "sgd SAM.v2 random lr-rho"),
        ("--sam-from 0.9", "sgd SAM late 0.9"),
        ("--sam-until 0.5", "sgd SAM early 0.5"),
        ("--sam-from 0.25 --sam-until 0.5 --rho-schedule sqrt", "sgd SAM sqrt-rho from 0.25 to 0.5"),
        ("--sam-every 5 --sam-local", "sgd SAM local every 5"),
    ],
)
def test_arms_are_told_apart_by_name(flags, name):
    args = plain(resolve(parse(f"--optmzr sgd-sam {flags}".split())[0]))
    assert optimizer_name(args) == name
    assert {f"--{flag}" for flag in args if flag.startswith("sam_")} - {"--sam_rho"} <= set(OPTIMIZER_FLAGS)
