"""attach(): one line in any loop, and the modes and the context that do without a module."""

import copy
import io
import pickle

import pytest
import torch
from formulas import assert_same, batches, documented_step, loss_of, network, weights
from torch import nn

from sam import SAM

OPTIONS = {"lr": 0.1, "momentum": 0.9, "rho": 0.3}


def pair(**options):
    """A model with an attached optimizer, and one for the documented loop."""
    model, other = network(), network()
    attached = SAM(model.parameters(), torch.optim.SGD, **OPTIONS, **options).attach(model)
    return model, attached, other, SAM(other.parameters(), torch.optim.SGD, **OPTIONS, **options)


def usual_step(model, optimizer, batch):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def moved(model, start):
    return not torch.equal(model[0].weight, start[0])


@pytest.mark.parametrize("direction", ["previous", "momentum", "ema", "random"])
def test_the_usual_loop_with_attach_is_the_documented_loop(direction):
    model, attached, other, by_hand = pair(direction=direction)
    for batch in batches(5):
        usual_step(model, attached, batch)
        documented_step(other, by_hand, batch)
        assert_same(weights(model), weights(other))


def test_a_closure_with_attach_is_the_documented_loop():
    model, attached, other, by_hand = pair()
    for batch in batches(4):

        def closure(batch=batch):
            attached.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        attached.step(closure)
        documented_step(other, by_hand, batch)
        assert_same(weights(model), weights(other))


def test_accumulation_with_evaluation_and_saving_between_micro_batches_keeps_the_same_e():
    model, attached, other, by_hand = pair()
    for batch in batches(4):
        start = weights(model)
        attached.zero_grad()
        by_hand.first_step(zero_grad=True)
        for part in (slice(0, 3), slice(3, 6)):
            micro = (batch[0][part], batch[1][part])
            (loss_of(model, micro) / 2).backward()
            (loss_of(other, micro) / 2).backward()
            torch.testing.assert_close(weights(model), weights(other), rtol=1e-14, atol=1e-14)
            model.eval()
            loss_of(model, batch)
            assert_same(weights(model), start)
            model.train()
            with torch.no_grad():
                loss_of(model, batch)
            assert_same(weights(model), start)
            assert torch.equal(model.state_dict()["0.weight"], start[0])
            attached.state_dict()
        attached.step()
        by_hand.second_step()
        torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("look", ["state_dict", "part", "optimizer", "eval", "no_grad", "inference"])
def test_whoever_looks_at_the_weights_in_a_step_sees_w(look):
    model, attached, *_ = pair()
    first, second = batches(2)
    usual_step(model, attached, first)
    start = weights(model)
    loss_of(model, second).backward()
    assert moved(model, start)
    if look == "state_dict":
        model.state_dict()
    elif look == "part":
        model[0].state_dict()
    elif look == "optimizer":
        attached.state_dict()
    elif look == "eval":
        model.eval()(second[0])
    else:
        with torch.no_grad() if look == "no_grad" else torch.inference_mode():
            model(second[0])
    assert_same(weights(model), start)
    attached.step()


def test_a_run_saved_in_the_middle_of_an_accumulation_goes_on_bit_for_bit():
    model, attached, other, _ = pair()
    first, second, third = batches(3)
    usual_step(model, attached, first)
    attached.zero_grad()
    loss_of(model, second).backward()
    file = io.BytesIO()
    torch.save([model.state_dict(), attached.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = SAM(other.parameters(), torch.optim.SGD, **OPTIONS).attach(other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for m, o in ((model, attached), (other, resumed)):
        o.zero_grad()
        loss_of(m, third).backward()
        o.step()
    assert_same(weights(model), weights(other))


@pytest.mark.parametrize("direction", ["previous", "momentum", "ema", "random"])
@pytest.mark.parametrize("how", ["attach", "train"])
def test_a_run_saved_in_the_middle_of_a_step_goes_on_bit_for_bit_beside_weights_that_are_not_perturbed(how, direction):
    """Those of a group with rho 0, and one that is frozen before that step."""

    def build():
        model = network()
        groups = [{"params": model[0].parameters(), "rho": 0.0}, {"params": model[3].parameters()}]
        optimizer = SAM(groups, torch.optim.SGD, direction=direction, **OPTIONS)
        return model, optimizer.attach(model) if how == "attach" else optimizer

    def train(model, optimizer, batch):
        if how == "train":
            optimizer.train()
        usual_step(model, optimizer, batch)

    model, optimizer = build()
    first, second, third = batches(3)
    train(model, optimizer, first)
    train(model, optimizer, second)
    model[3].bias.requires_grad_(False)
    if how == "attach":
        optimizer.zero_grad()
        loss_of(model, third).backward()
    start = weights(model)
    optimizer.eval()
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    if how == "train":
        optimizer.train()
    assert_same([weights(model)[0]], [start[0]])
    resumed_model, resumed = build()
    resumed_model[3].bias.requires_grad_(False)
    resumed_model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for batch in batches(3):
        for m, o in ((model, optimizer), (resumed_model, resumed)):
            train(m, o, batch)
    optimizer.eval()
    resumed.eval()
    assert_same(weights(model), weights(resumed_model))


def test_weights_loaded_in_the_middle_of_a_step_stay():
    model, attached, other, _ = pair()
    first, second = batches(2)
    usual_step(model, attached, first)
    loss_of(model, second).backward()
    model.load_state_dict(other.state_dict())
    assert_same(weights(model), weights(other))
    with pytest.raises(RuntimeError, match="first half"):
        attached.step()
    usual_step(model, attached, first)


def test_detach_undoes_attach():
    model, attached, *_ = pair()
    first, second = batches(2)
    usual_step(model, attached, first)
    start = weights(model)
    loss_of(model, second)
    assert moved(model, start)
    attached.detach()
    assert_same(weights(model), start)
    loss_of(model, second)
    assert_same(weights(model), start)
    with pytest.raises(RuntimeError, match="first half"):
        attached.step()


@pytest.mark.parametrize("part", ["whole", "part"])
def test_a_sam_that_is_attached_again_takes_the_place_of_the_first(part):
    """As where a notebook's cell is run twice."""
    model, attached, other, by_hand = pair()
    first, *rest = batches(4)
    usual_step(model, attached, first)
    documented_step(other, by_hand, first)
    loss_of(model, rest[0])  # which perturbs, and no step follows
    again = SAM(model.parameters(), torch.optim.SGD, **OPTIONS).attach(model if part == "whole" else model[0])
    fresh = SAM(other.parameters(), torch.optim.SGD, **OPTIONS)
    if part == "part":
        again.attach(model)
    for batch in rest:
        usual_step(model, again, batch)
        documented_step(other, fresh, batch)
    assert_same(list(model.state_dict().values()), weights(other))
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, first), loss_of(other, first), rtol=0, atol=0)


def test_two_optimizers_of_different_parameters_may_be_attached_to_one_model():
    model, other = network(), network()
    parts = [list(module.parameters()) for module in (model[0], model[-1])]
    both = [SAM(params, torch.optim.SGD, **OPTIONS).attach(model) for params in parts]
    others = [SAM(module.parameters(), torch.optim.SGD, **OPTIONS) for module in (other[0], other[-1])]
    for batch in batches(3):
        for optimizer in both:
            optimizer.zero_grad()
        loss_of(model, batch).backward()
        for optimizer in others:
            optimizer.first_step(zero_grad=True)
        loss_of(other, batch).backward()
        for optimizer in (*both, *others):
            optimizer.step()
    assert_same(weights(model), weights(other))


@pytest.mark.parametrize("look", ["evaluation", "state_dict", "detach"])
def test_weights_that_another_optimizer_changed_are_kept_and_the_user_is_told(look):
    model, attached, *_ = pair()
    first, second = batches(2)
    usual_step(model, attached, first)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, second).backward()
    plain.step()
    trained = weights(model)
    looks = {"evaluation": lambda: model.eval()(second[0]), "state_dict": model.state_dict, "detach": attached.detach}
    with pytest.raises(RuntimeError, match=r"weights were changed while SAM had them perturbed.*detach\(\)"):
        looks[look]()
    assert_same(weights(model), trained)
    looks[look]()
    assert_same(weights(model), trained)


def test_a_copy_of_an_attached_model_is_a_model_of_its_own():
    model, attached, *_ = pair()
    usual_step(model, attached, batches(1)[0])
    start = weights(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(other, batches(1)[0])
        assert_same(weights(model), start)
        assert_same(weights(other), start)


def test_a_step_without_a_training_forward_pass_is_refused():
    model, attached, *_ = pair()
    model.eval()
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="training forward pass"):
        attached.step()


def test_a_step_that_a_scaler_skips_leaves_the_perturbation_to_the_next_batch():
    model, attached, other, by_hand = pair()
    first, second, third = batches(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in (first, second, third):
        attached.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        if batch is second:
            model[0].weight.grad[0, 0, 0, 0] = float("inf")
        scaler.step(attached)
        scaler.update()
    for batch in (first, third):
        documented_step(other, by_hand, batch)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=1e-12)


def test_train_and_eval_serve_a_loop_without_a_module():
    model, other = network(), network()
    optimizer, by_hand = (SAM(m.parameters(), torch.optim.SGD, **OPTIONS) for m in (model, other))
    data = batches(6)
    for epoch in (data[:3], data[3:]):
        optimizer.train()
        for batch in epoch:
            usual_step(model, optimizer, batch)
            documented_step(other, by_hand, batch)
        with pytest.raises(RuntimeError, match=r"eval\(\)"):
            optimizer.state_dict()
        optimizer.eval()
        torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=1e-12)
    resumed_model = network()
    resumed = SAM(resumed_model.parameters(), torch.optim.SGD, **OPTIONS)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (resumed_model, resumed)):
        o.train()
        usual_step(m, o, data[0])
        o.eval()
    assert_same(weights(model), weights(resumed_model))


def test_the_context_perturbs_each_micro_batch_by_the_same_e():
    model, other = network(), network()
    optimizer, by_hand = (SAM(m.parameters(), torch.optim.SGD, **OPTIONS) for m in (model, other))
    for batch in batches(4):
        start = weights(model)
        optimizer.zero_grad()
        by_hand.first_step(zero_grad=True)
        for part in (slice(0, 3), slice(3, 6)):
            micro = (batch[0][part], batch[1][part])
            with optimizer.perturbed():
                loss_of(model, micro).backward()
            assert_same(weights(model), start)
            loss_of(other, micro).backward()
        optimizer.step()
        by_hand.second_step()
        torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=1e-12)


def test_two_step_sam_refuses_what_needs_one_pass():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, v2=False)
    for call in (lambda: optimizer.attach(model), optimizer.train, lambda: optimizer.perturbed().__enter__()):
        with pytest.raises(ValueError, match="two passes"):
            call()


def test_lazy_layers_are_attached_before_they_know_their_shape():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS).attach(model)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        seen.append(optimizer.perturbation_stats()[0].item())
        optimizer.step()
    assert seen == [0.0, pytest.approx(0.3), pytest.approx(0.3)]
    assert optimizer.state[model[0].weight]["sam_buffer"].shape == (3, 4)


@pytest.mark.parametrize("compile_first", [True, False])
def test_a_compiled_model_trains_like_an_eager_one(compile_first):
    torch.compiler.reset()  # it takes a like network without hooks for this one
    model, _, other, by_hand = pair()
    optimizer = SAM(model.parameters(), torch.optim.SGD, **OPTIONS)
    compiled = torch.compile(model, backend="eager") if compile_first else None
    optimizer.attach(compiled if compile_first else model)
    compiled = compiled or torch.compile(model, backend="eager")
    for batch in batches(4):
        optimizer.zero_grad()
        loss_of(compiled, batch).backward()
        optimizer.step()
        documented_step(other, by_hand, batch)
        torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=1e-12)


def test_what_looks_at_weights_between_micro_batches_sees_w_and_the_step_goes_on():
    model, attached, other, by_hand = pair()
    halves = batches(6)
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        start = weights(model)
        attached.zero_grad()
        loss_of(model, first).backward()
        with attached.unperturbed():
            loss_of(model, second)  # in training mode
            assert_same(weights(model), start)
        loss_of(model, second).backward()
        attached.step()
        by_hand.zero_grad()
        by_hand.first_step()
        for half in (first, second):
            loss_of(other, half).backward()
        by_hand.second_step()
        torch.testing.assert_close(weights(model), weights(other))
