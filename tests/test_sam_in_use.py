"""SAM as torch's users meet it: schedulers, groups, closures, accumulation, GradScaler, and what it refuses."""

import warnings

import pytest
import torch
from formulas import assert_same, batches, documented_step, loss_of, network, weights
from torch import nn

from sam import SAM


def test_schedulers_see_one_list_of_groups_and_do_not_warn():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(3):
            documented_step(model, optimizer, batch)
            scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)


def test_add_param_group_joins_the_norm_from_its_second_step_on():
    a, b = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))
    optimizer = SAM([a], torch.optim.SGD, lr=0.0, rho=1.0)

    def step():
        optimizer.first_step(zero_grad=True)
        seen = (a.item(), b.item())
        (a * 3 + b * 4).sum().backward()
        optimizer.second_step()
        return seen

    step()
    optimizer.add_param_group({"params": [b], "rho": 2.0, "lr": 0.5})
    assert step() == (4.0, 4.0)  # a alone was remembered
    assert b.item() == 2.0  # moved by its own learning rate
    assert step() == (pytest.approx(3.6), pytest.approx(2.0 + 2.0 * 0.8))
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": float("nan")})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(("v2", "evaluations"), [(True, 1), (False, 2)])
def test_step_with_a_closure(v2, evaluations):
    model, other = network(), network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, v2=v2)
    by_hand = SAM(other.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, v2=v2)
    for batch in batches(3):
        losses = []

        def closure(batch=batch, losses=losses):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            losses.append(loss)
            return loss

        with torch.no_grad():  # the closure has gradients all the same, as with torch's own optimizers
            returned = optimizer.step(closure)
        documented_step(other, by_hand, batch)
        assert len(losses) == evaluations
        assert returned is losses[0]
    assert_same(weights(model), weights(other))


def test_a_closure_that_raises_leaves_the_weights_unperturbed():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    documented_step(model, optimizer, batches(1)[0])
    start = weights(model)

    def closure():
        assert not torch.equal(model[0].weight, start[0])
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    assert_same(weights(model), start)


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
def test_accumulated_micro_batches_are_one_step(v2):
    model, other = network(), network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, v2=v2)
    whole = SAM(other.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, v2=v2)

    def accumulate(batch):
        for part in (slice(0, 3), slice(3, 6)):
            (loss_of(model, (batch[0][part], batch[1][part])) / 2).backward()

    for batch in batches(4):
        optimizer.zero_grad()
        if not v2:
            accumulate(batch)
        optimizer.first_step(zero_grad=True)
        accumulate(batch)
        optimizer.second_step()
        documented_step(other, whole, batch)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
def test_the_grad_scaler_recipe_follows_the_formulas_and_survives_a_skipped_step(v2):
    model, other = network(dtype=torch.float32), network(dtype=torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, v2=v2)
    unscaled = SAM(other.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, v2=v2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two: scaling is exact

    def step(batch, overflow=False):
        optimizer.zero_grad()
        if not v2:
            scaler.scale(loss_of(model, batch)).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale(loss_of(model, batch)).backward()
        if overflow:
            model[0].weight.grad[0, 0, 0, 0] = float("inf")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.restore()

    def plain(batch):
        unscaled.zero_grad()
        if not v2:
            loss_of(other, batch).backward()
        unscaled.first_step(zero_grad=True)
        loss_of(other, batch).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        unscaled.second_step()

    data = batches(5, dtype=torch.float32)
    for batch in data[:2]:
        step(batch)
        plain(batch)
    before = weights(model)
    step(data[2], overflow=True)
    assert_same(weights(model), before)
    assert scaler.get_scale() == 512.0
    unscaled.first_step()
    unscaled.restore()  # what a skipped step amounts to
    for batch in data[3:]:
        step(batch)
        plain(batch)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_closure_through_a_grad_scaler_is_refused():
    model = network(dtype=torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it wraps step()
    batch = batches(1, dtype=torch.float32)[0]

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer, closure)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batch)).backward()
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(optimizer, closure)
    with pytest.raises(RuntimeError, match="Closure"):
        scaler.step(optimizer, closure=closure)
    optimizer.zero_grad()
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer, closure)  # nothing is scaled there


@pytest.mark.parametrize("rho", [float("nan"), float("inf"), "0.05", None, torch.ones(2), torch.tensor(1)])
def test_a_rho_that_is_no_finite_scalar_is_refused(rho):
    with pytest.raises(ValueError, match="rho"):
        SAM([nn.Parameter(torch.ones(1))], torch.optim.SGD, rho=rho, lr=0.1)


@pytest.mark.parametrize(
    "base", ["SGD", torch.nn.Linear, torch.optim.Optimizer, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)]
)
def test_a_base_that_is_no_optimizer_class_is_refused(base):
    with pytest.raises(ValueError, match="Optimizer class"):
        SAM([nn.Parameter(torch.ones(1))], base, lr=0.1)


@pytest.mark.parametrize(("base", "words"), [(torch.optim.LBFGS, "closure"), (torch.optim.Adadelta, "rho")])
def test_optimizers_that_cannot_go_in_are_refused(base, words):
    with pytest.raises(ValueError, match=words):
        SAM([nn.Parameter(torch.ones(1))], base)


def test_steps_out_of_order_are_refused():
    p = nn.Parameter(torch.ones(1))
    for call in ("second_step", "step"):
        with pytest.raises(RuntimeError, match="first_step"):
            getattr(SAM([p], torch.optim.SGD, lr=0.1), call)()
    with pytest.raises(RuntimeError, match="no gradient"):
        SAM([p], torch.optim.SGD, lr=0.1, v2=False).first_step()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = SAM(embedding.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.first_step()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.second_step()
