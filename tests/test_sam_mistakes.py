"""Uses that went wrong without a word in SAM implementations: each is right here, or refused by a sentence."""

import io
import warnings
from contextlib import nullcontext

import pytest
import torch
from formulas import assert_same, batches, documented_step, loss_of, network, weights
from torch import nn

from sam import SAM

OPTIONS = {"lr": 0.1, "momentum": 0.9, "rho": 0.3}
BOTH = pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])


class Wrapper:
    """A wrapper in the manner of training frameworks: the optimizer's attributes are copied when it is wrapped."""

    def __init__(self, optimizer):
        self.__dict__ = dict(optimizer.__dict__)
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})


@BOTH
def test_a_wrapper_that_copies_attributes_and_the_optimizer_in_it_are_one(v2):
    model, other = network(), network()
    inner = SAM(model.parameters(), torch.optim.SGD, v2=v2, **OPTIONS)
    wrapper = Wrapper(inner)
    by_hand = SAM(other.parameters(), torch.optim.SGD, v2=v2, **OPTIONS)
    for number, batch in enumerate(batches(6)):
        first, second = (wrapper, inner) if number % 2 else (inner, wrapper)
        first.zero_grad()
        if not v2:
            loss_of(model, batch).backward()
        first.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        second.second_step()
        documented_step(other, by_hand, batch)
        assert_same(weights(model), weights(other))
        saved = [o.state_dict()["state"] for o in (inner, wrapper)]
        assert all(("sam_buffer" in values) == v2 for state in saved for values in state.values())
    wrapper.load_state_dict(by_hand.state_dict())
    assert inner.param_groups is wrapper.param_groups is inner.base_optimizer.param_groups
    assert inner.state is inner.base_optimizer.state


def test_weights_that_are_loaded_between_train_and_eval_are_not_replaced_by_those_before():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    first, second = batches(2)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.train()
    for batch in (first, second):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    model.load_state_dict(best)
    loss_of(model, first).backward()
    with pytest.raises(RuntimeError, match=r"eval\(\) or restore\(\) before they are loaded"):
        optimizer.step()
    assert_same(weights(model), list(best.values()))
    optimizer.eval()
    assert_same(weights(model), list(best.values()))


def test_an_error_of_a_closure_that_changes_weights_is_the_one_that_is_seen():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    documented_step(model, optimizer, batches(1)[0])

    def closure():
        with torch.no_grad():
            next(model.parameters()).zero_()
        raise KeyError("of the closure")

    with pytest.raises(KeyError, match="of the closure"):
        optimizer.step(closure)


def test_a_network_that_changes_its_weights_as_it_runs_is_refused_with_the_reason():
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.1), nn.Linear(4, 2))
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS).attach(model)

    def step():
        optimizer.zero_grad()
        model(torch.arange(8)).sum().backward()
        optimizer.step()

    step()
    with pytest.raises(RuntimeError, match="a network that changes them in its forward pass, as by max_norm"):
        step()


def test_hooks_of_other_programs_are_no_sam():
    class _Hook:
        function = staticmethod(lambda *_: None)

        def __call__(self, *_):
            return None

    model = network()
    model.register_state_dict_pre_hook(_Hook())
    model.register_state_dict_pre_hook(lambda *_: None)
    SAM(model.parameters(), torch.optim.SGD, **OPTIONS).attach(model)
    model.state_dict()


def test_a_closure_adds_to_the_gradients_of_a_step_that_the_model_zeroed():
    model, other = network(), network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    by_hand = SAM(other.parameters(), torch.optim.SGD, **OPTIONS)
    halves = batches(6)
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        model.zero_grad()
        optimizer.first_step()
        loss_of(model, first).backward()
        optimizer.step(lambda batch=second: loss_of(model, batch).backward())
        by_hand.zero_grad()
        by_hand.first_step()
        for half in (first, second):
            loss_of(other, half).backward()
        by_hand.second_step()
        assert_same(weights(model), weights(other))


def test_a_state_of_random_directions_from_another_kind_of_device_is_drawn_anew_and_says_so():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, direction="random", **OPTIONS)
    documented_step(model, optimizer, batches(1)[0])
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["sam_generator"] = torch.zeros(16, dtype=torch.uint8)  # as CUDA has it
    ends = []
    for drawn_before in (False, True):  # also where the object has drawn already
        again = SAM(model.parameters(), torch.optim.SGD, direction="random", **OPTIONS)
        for _ in range(drawn_before):
            documented_step(model, again, batches(1)[0])
        with pytest.warns(UserWarning, match="drawn on another kind of device") as warned:
            again.load_state_dict(saved)
        assert warned[0].filename == __file__
        documented_step(model, again, batches(1)[0])  # draws
        ends.append([again.state[p]["sam_buffer"].clone() for p in model.parameters()])
    assert_same(*ends)


@BOTH
def test_a_closure_that_computes_nothing_is_refused(v2):
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, v2=v2, **OPTIONS)
    with pytest.raises(RuntimeError, match="no gradient"):
        optimizer.step(lambda: None)
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="before step"):
        optimizer.step(lambda: None)


@BOTH
def test_a_closure_that_does_not_zero_gradients_computes_those_of_its_batch(v2):
    model, other = network(), network()
    optimizer, by_hand = (SAM(m.parameters(), torch.optim.SGD, v2=v2, **OPTIONS) for m in (model, other))
    for batch in batches(4):

        def closure(batch=batch):
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        documented_step(other, by_hand, batch)
        assert_same(weights(model), weights(other))


@pytest.mark.parametrize("mode", ["train", "perturbed", "zeros"])
def test_a_closure_sees_no_gradient_of_the_step_before(mode):
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1, rho=0.5)
    if mode == "train":
        optimizer.train()
    for _ in range(3):  # the gradient of a linear loss is the same everywhere
        if mode == "zeros":
            optimizer.zero_grad(set_to_none=False)
        with optimizer.perturbed() if mode == "perturbed" else nullcontext():
            optimizer.step(lambda: weight.sum().backward())
    optimizer.eval()
    assert weight.tolist() == pytest.approx([-0.3, -0.3], rel=1e-12)


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "two-step"])
def test_a_closure_after_first_step_is_the_rest_of_the_step(v2):
    model, other = network(), network()
    optimizer, by_hand = (SAM(m.parameters(), torch.optim.SGD, v2=v2, **OPTIONS) for m in (model, other))
    for batch in batches(4):
        optimizer.zero_grad()
        if not v2:
            loss_of(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        optimizer.step(lambda batch=batch: loss_of(model, batch).backward())
        documented_step(other, by_hand, batch)
        assert_same(weights(model), weights(other))


def test_the_loop_of_two_steps_around_one_step_sam_warns_once():
    model, other = network(), network()
    optimizer, by_hand = (SAM(m.parameters(), torch.optim.SGD, **OPTIONS) for m in (model, other))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches(3):
            loss_of(model, batch).backward()
            optimizer.first_step(zero_grad=True)
            loss_of(model, batch).backward()
            optimizer.second_step(zero_grad=True)
    assert ["v2=False" in str(w.message) and w.filename == __file__ for w in caught] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(3):
            by_hand.first_step(zero_grad=True)  # gradients of the last step may be there
            loss_of(other, batch).backward()
            by_hand.second_step()
        assert_same(weights(model), weights(other))
        by_hand.zero_grad()
        by_hand.first_step()
        loss_of(other, batch).backward()
        by_hand.restore()  # nor is the gradient of a step that was left out one of a pass too many
        by_hand.first_step()


@BOTH
def test_steps_inside_a_compiled_function_are_those_outside(v2):
    model, other = network(), network()
    optimizer, by_hand = (SAM(m.parameters(), torch.optim.SGD, v2=v2, **OPTIONS) for m in (model, other))
    first_step, second_step = (torch.compile(f) for f in (optimizer.first_step, optimizer.second_step))
    for batch in batches(4):
        optimizer.zero_grad()
        if not v2:
            loss_of(model, batch).backward()
        first_step(zero_grad=True)
        loss_of(model, batch).backward()
        second_step()
        documented_step(other, by_hand, batch)
    assert_same(weights(model), weights(other))


def test_one_autocast_region_around_both_passes_reads_the_perturbed_weights():
    models = [network(dtype=torch.float32) for _ in range(2)]
    for model, one_region in zip(models, (True, False), strict=True):
        optimizer = SAM(model.parameters(), torch.optim.SGD, v2=False, lr=0.1, rho=3.0)
        for batch in batches(3, dtype=torch.float32):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16) if one_region else nullcontext():
                for half in (lambda o=optimizer: o.first_step(zero_grad=True), optimizer.second_step):
                    with torch.autocast("cpu", torch.bfloat16):
                        loss_of(model, batch).backward()
                    half()
    assert_same(*map(weights, models))


def test_a_loss_reused_after_first_step_is_refused_by_torch():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = SAM(model.parameters(), torch.optim.SGD, v2=False, **OPTIONS)
    loss = model(torch.ones(2, 3)).sum()
    loss.backward(retain_graph=True)
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_groups_that_change_are_followed():
    a, b, c = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3))
    optimizer = SAM([{"params": [a]}, {"params": [b]}], torch.optim.SGD, lr=0.0, rho=1.0)

    def step(*params):
        optimizer.first_step(zero_grad=True)
        seen = [round(p.item(), 6) for p in (a, b, c)]
        sum(p.sum() * k for p, k in zip(params, (3, 4), strict=False)).backward()
        optimizer.second_step()
        return seen

    step(a, b)
    assert step(a, b) == [0.6, 0.8, 0]
    optimizer.param_groups[1]["params"][0] = c  # replaced, as by a wrapper that shards
    assert step(a, c) == [1, 0, 0]
    assert step(a, c) == [0.6, 0, 0.8]
    del optimizer.param_groups[0]
    assert step(c) == [0, 0, 1]
    assert step(c) == [0, 0, 1]
    optimizer.param_groups.insert(0, {**optimizer.param_groups[0], "params": []})
    assert step(c) == [0, 0, 1]
    assert [s.item() for s in optimizer.perturbation_stats()] == [0, 0]


def test_frozen_parameters_have_no_buffer_and_are_not_moved():
    for direction in ("previous", "momentum", "ema", "random"):
        model = network()
        optimizer = SAM(model.parameters(), torch.optim.SGD, direction=direction, **OPTIONS).attach(model)
        model[0].requires_grad_(False)
        start = weights(model)
        for batch in batches(3):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            assert torch.equal(model[0].weight, start[0])
            optimizer.step()
        assert not optimizer.state.get(model[0].weight)
        model[0].requires_grad_(True)
        for batch in batches(2):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        model.requires_grad_(False)
        model[3].requires_grad_(True)  # frozen in the middle of training: neither moved nor kept
        start = weights(model)
        optimizer.zero_grad()
        loss_of(model, batches(1)[0]).backward()
        assert torch.equal(model[0].weight, start[0])
        optimizer.step()
        assert "sam_buffer" not in optimizer.state[model[0].weight]
        assert "sam_buffer" in optimizer.state[model[3].weight]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_checkpoint_without_the_base_optimizers_state_is_refused(base):
    p = nn.Parameter(torch.ones(2))
    optimizer = SAM([p], base, lr=0.1)
    group = {k: v for k, v in optimizer.state_dict()["param_groups"][0].items() if not k.startswith("sam_")}
    with pytest.raises(ValueError, match="does not save its base optimizer"):
        optimizer.load_state_dict({"state": {0: {"old_p": torch.ones(2)}}, "param_groups": [group]})


def test_accumulating_for_a_closure_without_attach_is_refused():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    first, second, third = batches(3)
    documented_step(model, optimizer, first)
    optimizer.zero_grad()
    loss_of(model, second).backward()
    with pytest.raises(RuntimeError, match="attach"):
        optimizer.step(lambda: loss_of(model, third).backward())


def test_what_state_dict_returns_does_not_change_with_the_next_step():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3)
    first, second = batches(2)
    documented_step(model, optimizer, first)
    saved = optimizer.state_dict()["state"][0]["sam_buffer"]
    before = saved.clone()
    documented_step(model, optimizer, second)
    assert torch.equal(saved, before)


def test_what_is_saved_is_no_larger_than_what_it_holds():
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 1))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1).attach(model)
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    for what in (model[1].state_dict(), optimizer.state_dict()["state"][3]):
        file = io.BytesIO()
        torch.save(what, file)
        assert file.tell() < 8192


def test_hooks_on_state_dicts_and_steps_are_called():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    called = []
    optimizer.register_state_dict_pre_hook(lambda o: called.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: called.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: called.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda o: called.append("loaded"))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: called.append("stepping"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: called.append("stepped"))
    documented_step(model, optimizer, batches(1)[0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["stepping", "stepped", "saving", "saved", "loading", "loaded"]


def test_a_state_loaded_under_inference_mode_can_be_trained_on():
    model, other = network(), network()
    optimizer, resumed = (SAM(m.parameters(), torch.optim.SGD, **OPTIONS) for m in (model, other))
    first, second = batches(2)
    documented_step(model, optimizer, first)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    with torch.inference_mode():
        saved = torch.load(file, weights_only=True)
        resumed.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    for m, o in ((model, optimizer), (other, resumed)):
        documented_step(m, o, second)
    assert_same(weights(model), weights(other))
