"""SAM against the formulas of its docstring, written out here in float64."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sam import SAM, flatten_parameters

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "fused": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
}


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4))
    return model.to(dtype, memory_format=torch.channels_last)


def batches(count: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 2, 5, 5, generator=g, dtype=dtype), torch.randint(4, (6,), generator=g)) for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def documented_step(model: nn.Module, optimizer: SAM, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The loop of the docstring, and the one of two-step SAM."""
    optimizer.zero_grad()
    if not optimizer.v2:
        loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    optimizer.second_step(zero_grad=True)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


class Reference:
    """The update rule, one parameter at a time, around a base optimizer of its own.

    `rho`, `adaptive`: one value a parameter. `keep`: which parameters get a gradient at a step.
    """

    def __init__(self, model, base, options, rho, adaptive, v2):
        self.model, self.params = model, list(model.parameters())
        self.base = base(self.params, **options)
        self.rho, self.adaptive, self.v2 = rho, adaptive, v2
        self.previous = None

    def gradient(self, batch):
        return torch.autograd.grad(loss_of(self.model, batch), self.params)

    def step(self, batch):
        along = self.previous if self.v2 else self.gradient(batch)
        start = weights(self.model)
        if along is not None:
            t = [p.abs() if a else torch.ones_like(p) for p, a in zip(start, self.adaptive, strict=True)]
            norm = sum(((tp * g) ** 2).sum() for tp, g in zip(t, along, strict=True)) ** 0.5
            with torch.no_grad():
                for p, tp, g, rho in zip(self.params, t, along, self.rho, strict=True):
                    p += rho * tp**2 * g / (norm + 1e-12)
        gradient = self.gradient(batch)
        with torch.no_grad():
            for p, w, g in zip(self.params, start, gradient, strict=True):
                p.copy_(w)
                p.grad = g.clone()
        self.previous = gradient
        self.base.step()


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


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_flattened_parameters_train_bit_for_bit_alike(adaptive, v2):
    model, flat_model = network(), network()
    before = weights(flat_model)
    flatten_parameters(flat_model.parameters())
    assert_same(weights(flat_model), before)
    assert len({p.untyped_storage().data_ptr() for p in flat_model.parameters()}) == 1
    strides = [p.stride() for p in model.parameters()]
    assert [p.stride() for p in flat_model.parameters()] == strides
    optimizers = [
        SAM(m.parameters(), torch.optim.SGD, rho=0.3, adaptive=adaptive, v2=v2, lr=0.1, momentum=0.9)
        for m in (model, flat_model)
    ]
    for batch in batches(6):
        documented_step(model, optimizers[0], batch)
        documented_step(flat_model, optimizers[1], batch)
        assert_same(weights(model), weights(flat_model))


def test_flattened_parameters_are_perturbed_and_restored_as_one():
    def calls(optimizer):
        with Count() as count:
            optimizer.first_step()
            optimizer.restore()
        return count.calls

    model = network()
    flatten_parameters(model.parameters())
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for batch in batches(2):
        documented_step(model, optimizer, batch)
    assert not any("foreach" in call for call in calls(optimizer))


@pytest.mark.parametrize(
    "undo",
    [
        lambda params: [setattr(p, "data", p.data.clone()) for p in params],
        lambda params: setattr(params[1], "data", params[1].data.clone()),
        lambda params: setattr(params[0], "data", params[0].data.clone()),
    ],
    ids=["all", "one", "first"],
)
@pytest.mark.parametrize("when", ["before the first step", "later"])
def test_parameters_that_leave_their_common_memory_are_still_perturbed(undo, when):
    model, reference = network(), network()
    flatten_parameters(model.parameters())
    optimizers = [SAM(m.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9) for m in (model, reference)]
    for number, batch in enumerate(batches(6)):
        if number == (3 if when == "later" else 0):
            undo(list(model.parameters()))
        documented_step(model, optimizers[0], batch)
        documented_step(reference, optimizers[1], batch)
        assert_same(weights(model), weights(reference))


def test_parameters_of_other_groups_or_orders_than_they_were_flattened_in_are_still_perturbed():
    model, reference = network(), network()
    flatten_parameters(model.parameters())
    optimizers = []
    for m in (model, reference):
        a, b, c, d = m.parameters()
        groups = [{"params": [b, a]}, {"params": [c, d], "rho": 0.7}]
        optimizers.append(SAM(groups, torch.optim.SGD, rho=0.3, lr=0.1))
    for batch in batches(4):
        documented_step(model, optimizers[0], batch)
        documented_step(reference, optimizers[1], batch)
        assert_same(weights(model), weights(reference))


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


def test_the_remembered_gradient_is_a_copy():
    model, other = network(), network()
    optimizers = [SAM(m.parameters(), torch.optim.SGD, lr=0.1, rho=0.3) for m in (model, other)]
    first = batches(1)[0]
    for m, o in zip((model, other), optimizers, strict=True):
        documented = loss_of(m, first)
        o.first_step()
        documented.backward()
        o.second_step()
    for p in model.parameters():
        p.grad.fill_(99)  # what the next backward does to DDP's buckets
    optimizers[0].first_step(zero_grad=True)
    optimizers[1].first_step(zero_grad=True)
    assert_same(weights(model), weights(other))


def test_sam_keeps_one_buffer_a_parameter_at_one_address_and_leaves_the_base_optimizer_its_state():
    model = network(dtype=torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.Adam, lr=0.01)
    addresses = set()
    for batch in batches(3, dtype=torch.float32):
        documented_step(model, optimizer, batch)
        addresses.add(tuple(t.data_ptr() for p in model.parameters() for t in optimizer.state[p].values()))
    assert len(addresses) == 1
    for p in model.parameters():
        assert [t.shape for t in optimizer.state[p].values()] == [p.shape]
        assert set(optimizer.base_optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_number_of_computing_calls_does_not_depend_on_the_number_of_parameters_and_nothing_waits():
    counts = []
    for layers in (2, 20):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5)) for _ in range(layers)]
        optimizer = SAM(params, torch.optim.SGD, lr=0.1, fused=True)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(5)
            with Count() as count:
                optimizer.first_step()
                optimizer.second_step()
        assert "_local_scalar_dense" not in count.calls
        counts.append(sum(name != "as_strided" for name in count.calls))  # views compute nothing
    assert counts[0] == counts[1] <= 14


def test_a_saved_and_loaded_run_goes_on_bit_for_bit():
    for v2 in (True, False):
        model = network(dtype=torch.float32)
        options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.3, v2=v2, **options)
        data = batches(8, dtype=torch.float32)
        for batch in data[:4]:
            documented_step(model, optimizer, batch)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed_model = network(seed=9, dtype=torch.float32)
        resumed = SAM(resumed_model.parameters(), torch.optim.SGD, rho=0.1, v2=v2, **options)
        resumed_model.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        assert resumed.param_groups[0]["rho"] == 0.3
        for batch in data[4:]:
            documented_step(model, optimizer, batch)
            documented_step(resumed_model, resumed, batch)
        assert_same(weights(model), weights(resumed_model))
        for p, q in zip(model.parameters(), resumed_model.parameters(), strict=True):
            momenta = [o.base_optimizer.state[x]["momentum_buffer"] for o, x in ((optimizer, p), (resumed, q))]
            assert_same(momenta[:1], momenta[1:])


def test_a_learning_rate_set_after_loading_reaches_the_base_optimizer():
    p = nn.Parameter(torch.ones(1))
    optimizer = SAM([p], torch.optim.SGD, lr=0.1)
    optimizer.load_state_dict(SAM([nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1).state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 10.0
    optimizer.first_step()
    p.grad = torch.ones(1)
    optimizer.second_step()
    assert p.item() == -9.0


def test_a_plain_optimizers_state_loads_with_nothing_remembered():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    plain = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    q.grad = torch.tensor([1.0, 2.0])
    plain.step()
    optimizer = SAM([p], torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.7, adaptive=True)
    optimizer.load_state_dict(plain.state_dict())
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["adaptive"]) == (0.7, True)
    assert optimizer.base_optimizer.state[p]["momentum_buffer"].tolist() == [1.0, 2.0]
    optimizer.first_step()
    assert p.tolist() == [1.0, 1.0]


def test_state_dict_of_perturbed_weights_is_refused():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    documented_step(model, optimizer, batches(1)[0])
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="restore"):
        optimizer.state_dict()
    optimizer.restore()
    assert optimizer.state_dict()["sam_memory"] is None


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
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -1.0})
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
    scaler.scale(loss_of(model, batch)).backward()
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(optimizer, closure)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer, closure)  # nothing is scaled there


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


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), "0.05", None])
def test_a_rho_that_is_no_radius_is_refused(rho):
    with pytest.raises(ValueError, match="rho"):
        SAM([nn.Parameter(torch.ones(1))], torch.optim.SGD, rho=rho, lr=0.1)


@pytest.mark.parametrize(
    "base", ["SGD", torch.nn.Linear, torch.optim.Optimizer, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)]
)
def test_a_base_that_is_no_optimizer_class_is_refused(base):
    with pytest.raises(ValueError, match="Optimizer class"):
        SAM([nn.Parameter(torch.ones(1))], base, lr=0.1)


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


@pytest.mark.parametrize(("base", "words"), [(torch.optim.LBFGS, "closure"), (torch.optim.Adadelta, "rho")])
def test_optimizers_that_cannot_go_in_are_refused(base, words):
    with pytest.raises(ValueError, match=words):
        SAM([nn.Parameter(torch.ones(1))], base)


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


def test_memory_of_other_parameters_is_refused_and_nothing_changes():
    small, large = nn.Linear(1, 2), nn.Linear(5, 2)
    optimizers = [SAM(m.parameters(), torch.optim.SGD, lr=0.1 * (i + 1)) for i, m in enumerate((small, large))]
    optimizers[0].first_step()
    small(torch.ones(1)).sum().backward()
    optimizers[0].second_step()
    with pytest.raises(ValueError, match="other parameters"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].param_groups[0]["lr"] == 0.2


def test_copies_are_refused_in_one_sentence():
    optimizer = SAM([nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="load_state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(optimizer)


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


def test_a_tiny_gradient_is_divided_by_its_norm_plus_1e_12():
    p = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    optimizer = SAM([p], torch.optim.SGD, lr=0.0, rho=1.0)
    optimizer.first_step()
    p.grad = torch.tensor([3e-12], dtype=torch.float64)
    optimizer.second_step()
    optimizer.first_step()
    assert p.item() == pytest.approx(0.75)
