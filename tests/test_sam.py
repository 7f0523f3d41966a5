"""SAM computes the formulas of its docstring, and weights come back from every perturbation."""

import pytest
import torch
from formulas import BASES, Reference, assert_same, batches, documented_step, loss_of, network, weights
from torch import nn

from sam import SAM


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("base", BASES)
def test_the_documented_loop_follows_the_formulas(base, adaptive, v2):
    cls, options = BASES[base]
    model, reference_model = network(), network()
    optimizer = SAM(model.parameters(), cls, rho=0.3, adaptive=adaptive, v2=v2, **options)
    reference = Reference(reference_model, cls, options, [0.3] * 4, [adaptive] * 4, v2)
    for batch in batches(6):
        documented_step(model, optimizer, batch)
        reference.step(batch)
        for p, q in zip(model.parameters(), reference_model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_one_step_sam_differs_from_its_base_although_zero_grad_sets_gradients_to_none():
    model, plain_model = network(), network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3)
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1)
    for number, batch in enumerate(batches(3)):
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        before = weights(model)
        optimizer.first_step(zero_grad=True)
        moved = sum(((p - w) ** 2).sum() for p, w in zip(model.parameters(), before, strict=True)).sqrt()
        assert moved.item() == (pytest.approx(0.3) if number else 0)
        loss_of(model, batch).backward()
        optimizer.second_step(zero_grad=True)
        plain.zero_grad()
        loss_of(plain_model, batch).backward()
        plain.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), plain_model.parameters(), strict=True))


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
def test_groups_have_their_own_rho_and_adaptive_and_share_the_norm(v2):
    model, reference_model = network(), network()
    groups = [
        {"params": list(model[0].parameters()), "rho": 0.5},
        {"params": list(model[3].parameters()), "adaptive": True},
    ]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.2, v2=v2, lr=0.1, momentum=0.9)
    options = {"lr": 0.1, "momentum": 0.9}
    rhos, adaptive = [0.5, 0.5, 0.2, 0.2], [False, False, True, True]
    reference = Reference(reference_model, torch.optim.SGD, options, rhos, adaptive, v2)
    for batch in batches(5):
        documented_step(model, optimizer, batch)
        reference.step(batch)
    for p, q in zip(model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_parameters_of_several_dtypes_share_the_norm():
    a = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    b = nn.Parameter(torch.tensor([4.0], dtype=torch.bfloat16))
    optimizer = SAM([a, b], torch.optim.SGD, lr=0.0, rho=1.0)
    for _ in range(2):
        optimizer.first_step(zero_grad=True)
        (a**2 / 2).sum().backward()
        (b**2 / 2).sum().backward()
        optimizer.second_step()
    optimizer.first_step()
    # The gradient was taken at (3 + 0.6, 4 + 0.8) and so points along (3, 4) again.
    assert a.item() == pytest.approx(3.6, rel=1e-2)
    assert b.item() == pytest.approx(4.8, rel=1e-2)


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(base, v2):
    cls, options = BASES[base]
    model, plain_model = network(dtype=torch.float32), network(dtype=torch.float32)
    optimizer = SAM(model.parameters(), cls, rho=0, v2=v2, **options)
    plain = cls(plain_model.parameters(), **options)
    for batch in batches(5, dtype=torch.float32):
        documented_step(model, optimizer, batch)
        plain.zero_grad()
        loss_of(plain_model, batch).backward()
        plain.step()
    assert_same(weights(model), weights(plain_model))


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
def test_weights_come_back_bit_for_bit(v2, adaptive):
    model = network(dtype=torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=7.3, adaptive=adaptive, v2=v2)
    start = weights(model)
    for batch in batches(20, dtype=torch.float32):
        documented_step(model, optimizer, batch)
    assert_same(weights(model), start)


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
def test_weights_that_were_converted_during_training_come_back_bit_for_bit(v2):
    model = network(dtype=torch.bfloat16)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, v2=v2)
    for batch in batches(2, dtype=torch.bfloat16):
        documented_step(model, optimizer, batch)
    model.float()
    optimizer.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-5)  # what bf16 has no room for
    start = weights(model)
    for batch in batches(2, dtype=torch.float32):
        documented_step(model, optimizer, batch)
    assert_same(weights(model), start)


def test_restore_is_idempotent_and_leaves_the_next_step_unperturbed():
    model = network(dtype=torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3)
    first, second, third = batches(3, dtype=torch.float32)
    documented_step(model, optimizer, first)
    start = weights(model)
    optimizer.restore()  # nothing to restore, nothing forgotten
    optimizer.first_step(zero_grad=True)
    assert not torch.equal(model[0].weight, start[0])
    loss_of(model, second).backward()
    optimizer.restore()  # a step that a GradScaler skipped
    optimizer.restore()
    assert_same(weights(model), start)
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.second_step()
    optimizer.first_step(zero_grad=True)
    assert_same(weights(model), start)
    loss_of(model, third).backward()
    optimizer.second_step()
    start = weights(model)
    optimizer.first_step()
    assert not torch.equal(model[0].weight, start[0])
    optimizer.first_step()  # begins with restore: never a perturbation upon a perturbation
    assert_same(weights(model), start)


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_perturbs_nothing(bad, adaptive, v2):
    model = network(dtype=torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.3, adaptive=adaptive, v2=v2)
    first, second, third = batches(3, dtype=torch.float32)
    documented_step(model, optimizer, first)
    start = weights(model)

    def spoil():
        loss_of(model, second).backward()
        model[0].weight.grad[0, 0, 0, 0] = bad

    if v2:
        optimizer.first_step(zero_grad=True)
        spoil()
        # With lr 0 a non-finite gradient would still spoil the weight: 0 * inf. A user skips such a step by hand.
        optimizer.base_optimizer.step = lambda: None
        optimizer.second_step(zero_grad=True)
        del optimizer.base_optimizer.step
    else:
        spoil()
    optimizer.first_step(zero_grad=True)
    assert_same(weights(model), start)
    loss_of(model, third).backward()
    optimizer.second_step(zero_grad=True)
    assert_same(weights(model), start)
    if not v2:
        loss_of(model, first).backward()
    optimizer.first_step()
    assert not torch.equal(model[0].weight, start[0])
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_vanishing_gradient_perturbs_nothing_and_stays_finite():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM([p], torch.optim.SGD, lr=0.1)
    for _ in range(3):
        optimizer.first_step()
        assert p.tolist() == [1.0, 2.0]
        p.grad = torch.zeros(2)
        optimizer.second_step()


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
def test_masked_gradients_give_a_masked_perturbation(v2):
    model = network(dtype=torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, v2=v2, weight_decay=0.1)
    masks = [torch.rand_like(p) < 0.3 for p in model.parameters()]
    with torch.no_grad():
        for p, m in zip(model.parameters(), masks, strict=True):
            p.mul_(m)

    def backward(batch):
        loss_of(model, batch).backward()
        for p, m in zip(model.parameters(), masks, strict=True):
            p.grad.mul_(m)

    for batch in batches(4, dtype=torch.float32):
        optimizer.zero_grad()
        if not v2:
            backward(batch)
        optimizer.first_step(zero_grad=True)
        assert all((p[~m] == 0).all() for p, m in zip(model.parameters(), masks, strict=True))
        backward(batch)
        optimizer.second_step()
        assert all((p[~m] == 0).all() for p, m in zip(model.parameters(), masks, strict=True))


def test_parameters_without_a_gradient_are_left_alone():
    used, unused, frozen = (nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0, 3.0))
    frozen.requires_grad_(False)
    optimizer = SAM([used, unused, frozen], torch.optim.SGD, lr=0.1, weight_decay=0.1, rho=0.5)
    for _ in range(3):
        optimizer.first_step(zero_grad=True)
        assert unused.tolist() == [2.0] * 3
        (used**2).sum().backward()
        optimizer.second_step(zero_grad=True)
    assert unused.tolist() == [2.0] * 3
    assert frozen.tolist() == [3.0] * 3
    assert used.tolist() != [1.0] * 3


def test_a_branch_used_in_one_step_only_is_perturbed_in_the_next_only():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = SAM([a, b], torch.optim.SGD, lr=0.0, rho=0.5)
    perturbed = []
    for use_b in (True, False, True, False):
        optimizer.first_step(zero_grad=True)
        perturbed.append(b.item() != 1)
        (a + b if use_b else a).sum().backward()
        optimizer.second_step()
        assert (a.item(), b.item()) == (1, 1)
    assert perturbed == [False, True, False, True]


def test_a_gradient_in_the_first_pass_and_none_in_the_second_comes_back():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = SAM([a, b], torch.optim.SGD, lr=0.0, rho=0.5, v2=False)
    (a + b).sum().backward()
    optimizer.first_step(zero_grad=True)
    assert b.item() != 1
    a.sum().backward()
    assert b.grad is None
    optimizer.second_step()
    assert (a.item(), b.item()) == (1, 1)


def test_perturbation_stats():
    p = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = SAM([p], torch.optim.SGD, lr=0.0, rho=0.5)
    optimizer.first_step()
    p.grad = torch.tensor([3.0, 4.0])
    assert [s.item() for s in optimizer.perturbation_stats()] == [0.0, 0.0]
    optimizer.second_step()
    optimizer.first_step()
    p.grad = torch.tensor([4.0, 3.0])
    norm, cosine = optimizer.perturbation_stats()
    assert norm.item() == pytest.approx(0.5)
    assert cosine.item() == pytest.approx(24 / 25)


def test_stats_count_what_is_perturbed_and_has_no_gradient_now():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = SAM([a, b], torch.optim.SGD, lr=0.0, rho=1.0)
    optimizer.first_step(zero_grad=True)
    (3 * a + 4 * b).sum().backward()
    optimizer.second_step(zero_grad=True)
    optimizer.first_step()
    a.sum().backward()
    norm, cosine = optimizer.perturbation_stats()
    assert norm.item() == pytest.approx(1.0)
    assert cosine.item() == pytest.approx(0.6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stats_of_small_gradients_in_half_precision_do_not_underflow(dtype):
    p = nn.Parameter(torch.zeros(2, dtype=dtype))
    optimizer = SAM([p], torch.optim.SGD, lr=0.0, rho=2**-10)
    optimizer.first_step()
    p.grad = torch.tensor([3.0, 4.0], dtype=dtype) * 2**-14
    optimizer.second_step()
    optimizer.first_step()
    p.grad = torch.tensor([4.0, 3.0], dtype=dtype) * 2**-14
    assert optimizer.perturbation_stats()[1].item() == pytest.approx(24 / 25, abs=0.01)


def test_a_tiny_gradient_is_divided_by_its_norm_plus_1e_12():
    p = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    optimizer = SAM([p], torch.optim.SGD, lr=0.0, rho=1.0)
    optimizer.first_step()
    p.grad = torch.tensor([3e-12], dtype=torch.float64)
    optimizer.second_step()
    optimizer.first_step()
    assert p.item() == pytest.approx(0.75)
