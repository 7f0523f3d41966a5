"""The directions of one-step SAM against formulas in float64, and what rho, norm_over and maximize change."""

import copy

import pytest
import torch
from formulas import Reference, assert_same, batches, documented_step, loss_of, network, weights
from torch import nn

from sam import SAM

SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01})
CASES = [
    ("previous", *SGD),
    ("momentum", *SGD),
    ("momentum", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("momentum", torch.optim.AdamW, {"lr": 0.01}),
    ("ema", *SGD),
    ("ema", torch.optim.Adam, {"lr": 0.01}),
    ("random", *SGD),
]


def drawn(model, dtype=torch.float64):
    """The noise that `random` draws: one call for all parameters, each in its own memory layout at a multiple of 16."""
    generator = torch.Generator().manual_seed(7)

    def noise():
        sizes = [-(-p.numel() // 16) * 16 for p in model.parameters()]
        parts = torch.randn(sum(sizes), generator=generator, dtype=dtype).split(sizes)
        return [z[: p.numel()].as_strided(p.shape, p.stride()) for z, p in zip(parts, model.parameters(), strict=True)]

    return noise


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("rho", [0.3, -0.3])
@pytest.mark.parametrize(("direction", "base", "options"), CASES)
def test_each_direction_follows_its_formula(direction, base, options, rho, adaptive):
    model, other = network(), network()
    sam = {"direction": direction, "beta": 0.8, "seed": 7}
    optimizer = SAM(model.parameters(), base, rho=rho, adaptive=adaptive, **sam, **options)
    reference = Reference(other, base, options, [rho] * 4, [adaptive] * 4, True, direction, 0.8, drawn(other))
    for batch in batches(6):
        documented_step(model, optimizer, batch)
        reference.step(batch)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["previous", "momentum", "ema", "random"])
def test_each_direction_resumes_bit_for_bit(direction):
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "rho": 0.3, "direction": direction}
    model, resumed_model = network(), network(seed=9)
    optimizer = SAM(model.parameters(), torch.optim.SGD, **options)
    data = batches(6)
    for batch in data[:3]:
        documented_step(model, optimizer, batch)
    resumed = SAM(resumed_model.parameters(), torch.optim.SGD, seed=5, **options)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's own tensors are live
    for batch in data[3:]:
        documented_step(model, optimizer, batch)
        documented_step(resumed_model, resumed, batch)
        assert_same(weights(model), weights(resumed_model))


@pytest.mark.parametrize("direction", ["previous", "momentum", "ema", "random"])
def test_masked_gradients_give_a_masked_perturbation_in_each_direction(direction):
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, direction=direction)
    masks = [torch.rand_like(p) < 0.3 for p in model.parameters()]
    with torch.no_grad():
        for p, m in zip(model.parameters(), masks, strict=True):
            p.mul_(m)
    moved = []
    for batch in batches(3):
        start = weights(model)
        optimizer.first_step(zero_grad=True)
        assert all((p[~m] == 0).all() for p, m in zip(model.parameters(), masks, strict=True))
        moved.append(not torch.equal(model[0].weight, start[0]))
        loss_of(model, batch).backward()
        for p, m in zip(model.parameters(), masks, strict=True):
            p.grad.mul_(m)
        optimizer.second_step()
    assert moved == [False, True, True]


@pytest.mark.parametrize(("direction", "buffers"), [("previous", 1), ("momentum", 1), ("random", 1), ("ema", 2)])
def test_each_direction_keeps_the_buffers_that_it_says(direction, buffers):
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, direction=direction)
    for batch in batches(3):
        documented_step(model, optimizer, batch)
    for p in model.parameters():
        assert len(optimizer.state[p]) == 1 + buffers


def test_a_momentum_that_is_not_there_is_refused():
    for base, options in ((torch.optim.SGD, {}), (torch.optim.Adagrad, {}), (torch.optim.Adam, {"betas": (0.0, 0.9)})):
        with pytest.raises(ValueError, match="has none"):
            SAM([nn.Parameter(torch.ones(1))], base, lr=0.1, direction="momentum", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "sideways"},
        {"norm_over": "some"},
        {"direction": "ema", "beta": 1.0},
        {"direction": "ema", "v2": False},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="direction|norm_over|beta"):
        SAM([nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1, **options)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_rho_may_change_from_step_to_step(as_tensor):
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = SAM([p], torch.optim.SGD, lr=0.0, rho=torch.tensor(0.1) if as_tensor else 0.1)
    seen = []
    for rho in (0.1, 0.2, -0.5, 0.0):
        group = optimizer.param_groups[0]
        group["rho"].fill_(rho) if as_tensor else group.update(rho=rho)
        optimizer.first_step(zero_grad=True)
        seen.append(p.item())
        p.sum().backward()
        optimizer.second_step()
    assert seen == pytest.approx([1.0, 1.2, 0.5, 1.0])


def test_a_rho_in_a_tensor_gives_the_bits_of_a_number():
    results = []
    for rho in (0.3, torch.tensor(0.3)):
        model = network().float()
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=rho)
        for batch in batches(10, dtype=torch.float32):
            documented_step(model, optimizer, batch)
        results.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture(params=["number", "tensor", "tensor on a device"])
def zero(request, monkeypatch):
    """A rho of 0; the last one as on a device, whose value is not looked at."""
    if "device" in request.param:
        monkeypatch.setattr("sam._on_device", lambda rho: isinstance(rho, torch.Tensor))
    return 0.0 if request.param == "number" else torch.tensor(0.0)


def test_a_group_with_rho_zero_spoils_no_norm_over_the_others(zero):
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [a], "rho": zero}, {"params": [b]}]
    optimizer = SAM(groups, torch.optim.SGD, lr=0.0, rho=1.0, norm_over="perturbed")
    for _ in range(2):
        optimizer.first_step()
        moved = b.detach() - 1
        a.grad, b.grad = torch.full((2,), torch.nan), torch.tensor([3.0, 4.0])
        optimizer.second_step()
    assert torch.allclose(moved, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize(("norm_over", "length"), [("all", 0.6), ("perturbed", 1.0), ("none", 3.0)])
def test_groups_with_rho_zero_are_not_perturbed_and_count_if_asked(norm_over, length, zero):
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [{"params": [b], "rho": zero}, {"params": [a]}]
    optimizer = SAM(groups, torch.optim.SGD, lr=0.0, rho=1.0, norm_over=norm_over)
    optimizer.first_step(zero_grad=True)
    (3 * a + 4 * b).sum().backward()
    optimizer.second_step()
    optimizer.first_step()
    assert (a.item(), b.item()) == (pytest.approx(length), 0.0)


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
def test_maximizing_is_minimizing_the_negative(v2):
    model, other = network(), network()
    options = {"lr": 0.1, "momentum": 0.9, "rho": 0.3, "v2": v2}
    optimizer = SAM(model.parameters(), torch.optim.SGD, maximize=True, **options)
    plain = SAM(other.parameters(), torch.optim.SGD, **options)
    for batch in batches(4):
        for m, o, sign in ((model, optimizer, -1), (other, plain, 1)):
            o.zero_grad()
            if not v2:
                (sign * loss_of(m, batch)).backward()
            o.first_step(zero_grad=True)
            (sign * loss_of(m, batch)).backward()
            o.second_step()
    assert_same(weights(model), weights(other))


def test_maximizing_along_the_momentum_is_minimizing_the_negative():
    model, other = network(), network()
    options = {"lr": 0.1, "momentum": 0.9, "rho": -0.3, "direction": "momentum"}
    optimizer = SAM(model.parameters(), torch.optim.SGD, maximize=True, **options)
    plain = SAM(other.parameters(), torch.optim.SGD, **options)
    for batch in batches(4):
        for m, o, sign in ((model, optimizer, -1), (other, plain, 1)):
            o.first_step(zero_grad=True)
            (sign * loss_of(m, batch)).backward()
            o.second_step()
    assert_same(weights(model), weights(other))


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
def test_complex_weights_are_scaled_by_their_modulus(v2):
    w, g = torch.tensor([3 + 4j, 1 - 1j, 0.5j]), torch.tensor([1 - 2j, 0.5 + 1j, 2 + 0j])
    p = nn.Parameter(w.clone().to(torch.complex128))
    optimizer = SAM([p], torch.optim.SGD, lr=0.0, rho=0.5, adaptive=True, v2=v2)
    if v2:
        optimizer.first_step()
        p.grad = g.to(torch.complex128)
        optimizer.second_step()
    p.grad = g.to(torch.complex128)
    optimizer.first_step(zero_grad=True)
    expected = w + 0.5 * w.abs() ** 2 * g / (w.abs() * g).abs().square().sum().sqrt()
    torch.testing.assert_close(p.detach(), expected.to(torch.complex128), rtol=1e-6, atol=1e-6)


BASES = ["Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@pytest.mark.parametrize("launch", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("name", BASES)
def test_rho_zero_is_each_optimizer_of_torch_bit_for_bit(name, launch):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    models = []
    for sam in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(6, 5, bias=False)
        try:
            base = getattr(torch.optim, name)
            optimizer = (SAM if sam else lambda params, base, **k: base(params, **k))(
                model.parameters(), base, **launch, **({"rho": 0.0} if sam else {})
            )
        except (TypeError, RuntimeError) as error:
            pytest.skip(f"{name} is not made so: {error}")
        if sam:
            optimizer.attach(model)
        for _ in range(4):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
        models.append(model)
    assert_same(*map(weights, models))
