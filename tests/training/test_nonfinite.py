"""Steps whose loss or gradient is not finite, and fp16 with its scaled loss."""

import math

import pytest
import torch
from running import before_step, rows
from torch import nn

from imagedata.loaders import Batch
from prune import METHODS, Pruner
from training import loop
from training.nonfinite import NonFiniteGuard
from training.optim import build_optimizer
from training.state import TrainState
from training.step import TrainingStep, build_objective
from utils.precision import Execution

ARMS = [("sgd", False), ("sgd-sam", False), ("sgd-sam", True), ("adam-sam", True)]


class Training:
    """A small convolutional network with batch norm, and batches by seed."""

    def __init__(self, name, v2, guard, accumulate=1, method="none", **sparse):
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)]
        self.model = nn.Sequential(*layers)
        self.model[1].num_batches_tracked = None
        nn.init.constant_(self.model[1].weight, 16.0)  # gradients above 2, so that 2**127 is too large a scale
        momentum = 0.9 if name.startswith("sgd") else None
        optimizer = build_optimizer(name, self.model, lr=0.05, weight_decay=0.01, momentum=momentum, rho=0.3, v2=v2)
        if METHODS[method].has_interval:
            sparse.setdefault("update_interval", 2)
        pruner = Pruner(self.model, method, **sparse, total_steps=100, optimizers=[optimizer])
        pruner.choose_masks()
        self.state = TrainState(self.model, optimizer, pruner, guard(self.model))
        objective = build_objective(self.model, Execution(), 8 // accumulate)
        self.take = TrainingStep(self.state, objective, lambda step: 0.05, accumulate, clip_grad=1.0)

    def step(self, seed, spoilt=False, log=False):
        g = torch.Generator().manual_seed(seed)
        inputs = torch.randn(8, 2, 5, 5, generator=g)
        targets = torch.rand(8, 5, generator=g)
        if spoilt:
            inputs[3, 1, 2, 2] = float("nan")
        return self.take(Batch(inputs, targets / targets.sum(1, keepdim=True), 8), log)

    def everything(self):
        """All that a step may change, the SAM memory of one-step SAM apart."""
        state = self.state.state_dict()
        tensors = [*state["model"].values(), *state["pruner"]["masks"].values()]
        tensors += [
            t
            for p in state["optimizer"]["state"].values()
            for key, t in p.items()
            if key[:4] != "sam_" and isinstance(t, torch.Tensor)
        ]
        return [t.clone() for t in tensors]


def skipping(model):
    return NonFiniteGuard(model, skip=True)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("name", "v2"), ARMS)
def test_a_skipped_step_leaves_no_trace(name, v2, accumulate):
    training, reference = (Training(name, v2, skipping, accumulate) for _ in range(2))
    for seed in range(3):
        training.step(seed)
        reference.step(seed)
    before = training.everything()
    sums, _ = training.step(3, spoilt=True)
    assert sums.tolist() == [0.0, 0.0]
    assert training.state.guard.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, training.everything(), strict=True))
    if v2:
        reference.state.optimizer.first_step()
        reference.state.optimizer.restore()  # the gradient that it perturbed along is forgotten
    for seed in (4, 5, 6):
        _, logged = training.step(seed, log=True)
        reference.step(seed)
        if v2:
            assert (logged["perturbation_norm"].item() == 0) == (seed == 4)
    assert all(torch.equal(a, b) for a, b in zip(reference.everything(), training.everything(), strict=True))


@pytest.mark.parametrize("method", ["rigl", "gmp", "set"])
def test_a_mask_update_waits_for_a_step_that_is_not_skipped(method):
    training = Training("sgd-sam", True, skipping, method=method, sparsity=0.5)
    masks = training.state.pruner.masks
    changed = []
    for seed in range(1, 8):
        version = masks.version
        training.step(seed, spoilt=seed in (3, 4))
        changed.append(masks.version > version)
    # Due after steps 2, 4 and 6, counted from 0: the second of them is spoilt, and the one before it, which is not due, too.
    due = [training.state.pruner.due(step) for step in range(7)]
    expected, waiting = [], False
    for step, is_due in enumerate(due):
        waiting |= is_due
        expected.append(waiting and step + 1 not in (3, 4))
        waiting &= not expected[-1]
    assert changed == expected
    assert changed != due


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("name", "v2"), ARMS)
def test_a_scaled_loss_changes_nothing_and_overflows_are_skipped(name, v2, accumulate):
    """In float32, where a power of two as the scale is exact: from the first step that does not overflow on, bit for bit."""

    def scaled(model):
        guard = NonFiniteGuard(model, fp16=True)
        guard.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-70)
        return guard

    training, reference = Training(name, v2, scaled, accumulate), Training(name, v2, NonFiniteGuard, accumulate)
    skipped = 0
    before = training.everything()
    while skipped < 20:
        training.step(skipped)
        if not training.state.guard.skipped:
            break
        skipped += 1
        assert all(torch.equal(a, b) for a, b in zip(before, training.everything(), strict=True))
    assert 0 < skipped < 20
    assert training.state.guard.skipped_steps == skipped
    assert training.state.guard.scaler.get_scale() == 2.0 ** (127 - 70 * skipped)
    for seed in range(skipped, skipped + 4):
        if seed > skipped:
            training.step(seed)
        reference.step(seed)
    for a, b in zip(reference.everything(), training.everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arm", ["--optmzr sgd", "--optmzr sgd-sam", "--optmzr sgd-sam --sam-v2"])
def test_fp16_trains_like_fp32_and_resumes_with_its_scale(train, arm):
    flags = f"{arm} --epochs 2 --clip-grad 1 --accumulate 2 --prune-method random --sparsity 0.5"
    half, full = train(f"{flags} --precision fp16", "half"), train(f"{flags} --precision fp32", "full")
    assert (half.code, half.err) == (0, "")
    assert "fp16" in half.out.splitlines()[0]
    results = [run.json("result.json") for run in (half, full)]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], rel=0.1)
    assert results[0]["skipped_steps"] == 0
    scaler = half.checkpoint()["state"]["guard"]["scaler"]
    assert scaler["scale"] == 65536
    assert scaler["_growth_tracker"] == 2 * 6  # steps without an overflow
    again = train(f"{flags} --precision fp16 --resume auto", "half")
    assert "finished already" in again.out


@pytest.mark.parametrize(("flags", "advised"), [("", True), ("--nonfinite skip", False)])
def test_a_flag_that_is_given_is_not_advised(train, monkeypatch, flags, advised):
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: (float("nan"), 0.0))
    ended = train(f"--epochs 1 {flags}")
    assert ended.code == 1
    assert ended.err.startswith("error: the test loss is nan at step 6")
    assert ("--nonfinite skip" in ended.err) == advised


def spoil(state):
    """Make the next forward pass see NaN: that of the step, unless it is logged and looks at w first."""

    def once(model, inputs):
        handle.remove()
        return (inputs[0] * float("nan"),)

    handle = state.model.register_forward_pre_hook(once)


def test_skipped_steps_are_counted_and_in_no_mean(train):
    flags = "--optmzr sgd-sam --sam-v2 --prune-method rigl --sparsity 0.5 --update-interval 3"
    with before_step({2, 6}, spoil):
        run = train(f"--epochs 2 --nonfinite skip {flags}")
    assert (run.code, run.err) == (0, "")
    assert run.json("result.json")["skipped_steps"] == 2
    assert all(0 < row["train_loss"] < 10 for row in run.checkpoint()["state"]["rows"])


@pytest.mark.parametrize(
    ("arm", "lower"), [("--optmzr sgd", "--lr,"), ("--optmzr sgd-sam --sam-v2", "--lr or --sam-rho,")]
)
def test_fp16_does_not_hide_a_loss_that_is_not_finite(train, arm, lower):
    with before_step(2, spoil):  # a step that is not logged: there the pass at w would be the spoilt one
        stopped = train(f"--epochs 1 --precision fp16 {arm}")
    assert (stopped.code, stopped.err.count("\n")) == (1, 1)
    assert "the loss is nan at step 3" in stopped.err
    assert f": lower {lower}" in stopped.err


def test_fp16_may_look_for_its_scale_for_longer_than_an_epoch(train, monkeypatch):
    """Epochs of one step: the first ones overflow, are recorded as such, and training goes on."""
    original = torch.amp.GradScaler

    def large(device, enabled):
        return original(device, init_scale=2.0**40, backoff_factor=2.0**-12, enabled=enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", large)
    run = train(
        "--arch vit --depth 1 --width 0.34 --epochs 4 --batch-size 1442 --precision fp16 --optmzr sgd --lr 0.05"
    )
    assert (run.code, run.err) == (0, "")
    losses = [float(row["train_loss"]) for row in rows(run.directory)]
    skipped = run.json("result.json")["skipped_steps"]
    assert 1 <= skipped < 4
    assert [math.isnan(loss) for loss in losses] == [True] * skipped + [False] * (4 - skipped)
    resumed = train("--resume " + str(run.directory / "checkpoint.pt"), None, short=False)
    assert resumed.code == 0
    assert "finished already" in resumed.out


def test_a_run_stops_at_a_step_that_is_not_finite_and_names_the_way_out(train):
    with before_step(range(6, 12), spoil):
        stopped = train("--epochs 3")
        assert (stopped.code, stopped.err.count("\n")) == (1, 1)
        assert "--nonfinite skip" in stopped.err
        assert stopped.checkpoint()["state"]["global_step"] == 6
        hopeless = train("--epochs 3 --nonfinite skip --resume auto")  # may change: it is a rule for what went wrong
    assert (hopeless.code, hopeless.err.count("\n")) == (1, 1)
    assert "all were skipped" in hopeless.err


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("final", {}), ("gmp", {"stop_update": 1.0, "update_interval": 70}),
        ("mest", {"stop_update": 1.0, "mest_soft": True}),
    ],
)  # fmt: skip
def test_a_last_step_that_is_skipped_does_not_lose_the_sparsity(method, options):
    training = Training("sgd-sam", True, skipping, method=method, sparsity=0.5, **options)
    for seed in range(100):
        training.step(seed, spoilt=seed == 99)
    assert training.state.guard.skipped_steps == 1
    assert training.state.pruner.masks.sparsity() == pytest.approx(0.5, abs=0.5 / 252)  # weights
