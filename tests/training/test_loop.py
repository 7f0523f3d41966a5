"""What happens around the training steps: evaluation, and trainings that cannot go on."""

import re
import signal
from types import SimpleNamespace

import pytest
import torch
from running import before_step, rows, same
from torch import nn

from imagedata.augment import Normalize
from imagedata.images import Images, channel_statistics
from imagedata.loaders import EvalLoader
from training.loop import evaluate
from utils.precision import Execution


def test_speed_leaves_out_what_is_compiled_and_seconds_count_every_launch(train, monkeypatch):
    """By a clock of the test: a process's first step takes 100 seconds, another 2, and all else no time."""
    now, begun = [0.0], []
    monkeypatch.setattr("training.loop.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def pass_time(state):
        now[0] += 2 if begun else 100
        begun.append(state.global_step)
        if begun[0] == 0 and state.global_step == 8:  # of six steps an epoch
            signal.raise_signal(signal.SIGTERM)

    for code in (75, 0):
        begun.clear()
        with before_step(range(12), pass_time):
            run = train("--epochs 2 --resume auto")
        assert run.code == code, run.err
    first, second = rows(run.directory)
    assert float(first["images_per_second"]) == pytest.approx((570 - 96) / (5 * 2), rel=1e-3)
    assert float(first["seconds"]) == pytest.approx(100 + 5 * 2, rel=1e-3)
    assert begun == [9, 10, 11]
    assert float(second["images_per_second"]) == pytest.approx((570 - 4 * 96) / (2 * 2), rel=1e-3)
    assert float(second["seconds"]) == pytest.approx(3 * 2 + 100 + 2 * 2, rel=1e-3)


def test_evaluate_counts_every_image_once_in_eval_mode():
    torch.manual_seed(0)
    pixels = torch.randint(256, (23, 4, 4, 1), dtype=torch.uint8)
    images = Images(pixels, torch.arange(23) % 3)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
    statistics = model[1].running_mean.clone()
    normalize = Normalize(**channel_statistics(images), device=torch.device("cpu"))
    loss, top1 = evaluate(model, EvalLoader(images, 5, normalize, torch.device("cpu")), Execution())
    assert model.training
    assert torch.equal(model[1].running_mean, statistics)
    model.eval()
    logits = model(normalize(pixels)).double()
    expected = -logits.log_softmax(1)[torch.arange(23), images.labels].mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert top1 == pytest.approx(100 * (logits.argmax(1) == images.labels).double().mean().item())


def test_a_loss_that_is_not_finite_ends_a_run_with_a_sentence(train):
    failed = train("--lr 1e12 --epochs 2 --optmzr sgd")
    assert failed.code == 1
    assert re.fullmatch(r"error: .* step \d+ with learning rate [\d.e+]+: .*\n", failed.err)
    assert not (failed.directory / "result.json").exists()


def test_a_good_checkpoint_stays_when_a_later_epoch_goes_wrong(train):
    run = train("--lr 0.05 --epochs 1 --lr-scheduler constant")
    (run.directory / "result.json").unlink()
    saved = run.checkpoint()
    saved["args"]["lr"] = 1e12
    torch.save(saved, run.directory / "checkpoint.pt")
    failed = train(f"--resume {run.directory}/checkpoint.pt --epochs 3", None, short=False)
    assert failed.code == 1
    same(run.checkpoint()["state"], saved["state"])


def test_a_layer_that_empties_during_training_ends_it_with_a_sentence(train):
    flags = "--epochs 1 --prune-method gmp --sparsity 0.999 --sparsity-distribution global --sparsity-pattern 1x9999"
    failed = train(f"{flags} --width 0.5 --update-interval 2")
    assert failed.code == 1
    assert re.fullmatch(r"error: this sparsity leaves layer '.*' without a weight: .*\n", failed.err)
    assert not (failed.directory / "result.json").exists()
