"""What SAM keeps between calls, where it lies, and how it is saved."""

import copy
import io
import pickle

import pytest
import torch
from formulas import assert_same, batches, documented_step, loss_of, network, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sam import SAM


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


def test_sam_keeps_one_buffer_per_parameter_at_one_address_and_shows_it_in_state():
    model = network(dtype=torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.Adam, lr=0.01)
    addresses = set()
    for batch in batches(3, dtype=torch.float32):
        documented_step(model, optimizer, batch)
        addresses.add(tuple(t.data_ptr() for p in model.parameters() for t in optimizer.state[p].values()))
    assert len(addresses) == 1
    for p in model.parameters():
        assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq", "sam_buffer"}
        assert optimizer.state[p]["sam_buffer"].shape == p.shape


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_calls_do_not_grow_with_the_number_of_parameters_and_nothing_waits():
    counts = []
    for layers in (2, 20):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5)) for _ in range(layers)]
        optimizer = SAM(params, torch.optim.SGD, lr=0.1, fused=True)
        optimizer.first_step()
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(5)
            with Count() as count:
                optimizer.restore()
                optimizer.first_step()
                optimizer.second_step()
        assert "_local_scalar_dense" not in count.calls
        counts.append(sum(not name.startswith(("as_strided", "promote_types", "_record")) for name in count.calls))
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


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.SGD])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_saving_before_the_base_optimizer_took_a_step_changes_nothing(base, rho):
    """Many begin where they find a state empty: in a step that is skipped, and for a layer that is unfrozen in one."""
    first, second = batches(2)
    ends = []
    for saves in (False, True):
        model = network()
        optimizer = SAM(model.parameters(), base, rho=rho, v2=False, lr=0.1)
        loss_of(model, first).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, first).backward()
        optimizer.restore()
        if saves:
            optimizer.state_dict()
        documented_step(model, optimizer, second)

        optimizer = SAM(model.parameters(), base, rho=rho, lr=0.1).attach(model)
        model[0].requires_grad_(False)
        for batch in (first, second):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        model[0].requires_grad_(True)
        loss_of(model, first).backward()
        optimizer.eval()
        loss_of(model, second).backward()
        if saves:
            optimizer.state_dict()
        optimizer.step()
        ends.append(weights(model))
    assert_same(*ends)


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
    assert not any("sam_buffer" in values for values in optimizer.state_dict()["state"].values())


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


def test_a_state_of_an_earlier_version_goes_on_bit_for_bit():
    model, other = network(), network()
    optimizer, resumed = (SAM(m.parameters(), torch.optim.SGD, lr=0.1, rho=0.3) for m in (model, other))
    first, second = batches(2)
    documented_step(model, optimizer, first)
    state = optimizer.state_dict()
    memory = {index: values["sam_buffer"] for index, values in state["state"].items()}
    groups = [{k: v for k, v in group.items() if k != "sam_holds"} for group in state["param_groups"]]
    resumed.load_state_dict({"state": {}, "param_groups": groups, "sam_memory": memory})
    other.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (other, resumed)):
        documented_step(m, o, second)
    assert_same(weights(model), weights(other))
