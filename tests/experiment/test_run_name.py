"""Names of runs, which are names of directories."""

import pytest

from experiment.flags import parse, resolve
from experiment.run_name import run_name


def name_of(*argv):
    return run_name(resolve(parse(list(argv))[0]))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (
            "--optmzr sgd-sam --sam-v2 --prune-method random --sparsity 0.9 --remark first/try",
            "resnet8_digits_sgd-sam-v2-rho0.05_random-erk-0.9_lr0.1_epochs1_batch-size256_width0.5_seed0_first-try",
        ),
        (
            "--optmzr adamw-sam --adaptive --weight-decay 0.1",
            "resnet8_digits_adamw-sam-adaptive-rho0.5_dense_lr0.001_epochs1_batch-size256_weight-decay0.1_width0.5_seed0",
        ),
        (
            "--optmzr sgd-sam --sam-v2 --sam-direction momentum --sam-rho -3 --rho-schedule sqrt --eval-every 5",
            "resnet8_digits_sgd-sam-v2-momentum-rho-3-sqrt_dense_lr0.1_epochs1_batch-size256_width0.5_seed0",
        ),
        (
            "--optmzr sgd-sam --sam-from 0.9 --sam-every 5",
            "resnet8_digits_sgd-sam-rho0.05_dense_lr0.1_epochs1_batch-size256_sam-every5_sam-from0.9_width0.5_seed0",
        ),
    ],
)
def test_a_run_is_named_by_its_hyper_parameters(flags, name):
    common = "--dataset digits --depth 8 --width 0.5 --batch-size 256 --epochs 1"
    assert name_of(*common.split(), *flags.split()) == name


@pytest.mark.parametrize(
    "remark", ["../../../outside", "/absolute", "$(touch it-ran)", "a;touch it-ran", "é\u202e/..", "x" * 500]
)
def test_a_remark_names_one_plain_directory(remark):
    name = name_of("--remark", remark)
    assert name.isascii()
    assert len(name) <= 255
    assert not set(name) & set("/;$() ")
    assert name.startswith("resnet")


def test_a_run_without_a_directory_is_written_below_runs(train, tmp_path):
    assert train("--epochs 1 --remark ../../outside", None).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (run,) = (tmp_path / "runs").iterdir()
    assert run.resolve().parent == tmp_path / "runs"
    assert (run / "result.json").exists()
