"""GraNet, sparse momentum, DSR, AC/DC and pruning at the end against references written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_network import Tiny, build, global_reference, kept, layers, sample, split, train

from prune import Pruner
from prune.flops import FlopsMeter, count_flops
from prune.schedules import Timing
from prune.updates import share_out


def dense_gradients(model, optimizer):
    inputs, labels = sample(8)
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    return {name: w.grad.clone() for name, w in layers(model).items()}


def step_by_hand(model, pruner, optimizer, step):
    """Take a step and change the masks after it; return its dense gradients, and masks and weights before the change."""
    gradients = dense_gradients(model, optimizer)
    pruner.mask_gradients(step)
    optimizer.step()
    pruner.mask_weights()
    masks = {name: mask.bool() for name, mask in pruner.masks.masks.items()}
    weights = {name: w.detach().clone() for name, w in layers(model).items()}
    pruner.update_masks(step)
    return gradients, masks, weights


def highest(scores, count, among):
    """The `count` highest scores among some, as a boolean in their shape; ties go to the earlier one."""
    order = scores.masked_fill(~among, -math.inf).flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view(scores.shape)


def assert_memory_is_zero(optimizer, model, changed):
    for name, w in layers(model).items():
        assert (optimizer.state[w]["momentum_buffer"][changed[name]] == 0).all()


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_granet_prunes_the_smallest_of_all_then_drops_and_regrows_in_each_layer(start):
    model, mask, optimizer = build("granet", 0.8, steps=40, optimizer="sgd", interval=4, granet_start=start)
    total = sum(w.numel() for w in layers(model).values())
    assert kept(mask).sum() == round((1 - start) * total)
    train(model, mask, optimizer, 3)
    gradients, before, weights = step_by_hand(model, mask, optimizer, 3)
    wanted = start + (0.8 - start) * (1 - (1 - 4 / 20) ** 3)  # half of 40 steps
    flat = global_reference([w.abs() for w in weights.values()], round((1 - wanted) * total))
    changed, came_back = {}, 0
    for (name, w), pruned in zip(weights.items(), split(flat, list(weights.values())), strict=True):
        count = int(pruned.sum())
        drop = math.ceil(0.5 * 0.5 * (1 + math.cos(math.pi * 4 / 30)) * count)  # the last change comes at 30
        survivors = highest(w.abs(), count - drop, pruned)
        expected = survivors | highest(gradients[name].abs(), drop, ~survivors)
        assert torch.equal(mask.masks.masks[name].bool(), expected), name
        # Dropped and regrown: as it was. Pruned, or dead before, and grown: zero.
        assert torch.equal(layers(model)[name], w * (expected & pruned))
        changed[name] = ~(pruned & expected)
        came_back += int((expected & before[name] & ~pruned).sum())
    assert came_back > 0
    assert_memory_is_zero(optimizer, model, changed)


@pytest.mark.parametrize(
    ("how", "count"),
    [({"sparsity": 0.3}, 336), ({"sparsity": None, "layer_sparsity": {"conv": 0.5, "linear": 0.25}}, 144 + 96)],
)
def test_granet_that_begins_at_its_final_sparsity_says_so_and_only_moves(how, count):
    said = []
    model, mask, optimizer = build("granet", steps=40, interval=4, granet_start=0.6, warn=said.append, **how)
    (sentence,) = said
    assert "begin at their final sparsity" in sentence
    assert "granet_start" in sentence
    living = [int(kept(mask).sum())]
    train(model, mask, optimizer, 12, on_step=lambda step: living.append(int(kept(mask).sum())))
    assert set(living) == {count}
    build("granet", steps=40, interval=4, granet_start=0.0, warn=said.append, **how)
    assert said == [sentence]


def test_granet_follows_its_schedule_exactly_and_then_only_moves():
    model, mask, optimizer = build("granet", 0.8, steps=40, interval=4)
    counts, seen = [], []

    def look(step):
        counts.append(int(kept(mask).sum()))
        seen.append(kept(mask))

    train(model, mask, optimizer, 40, on_step=look)
    total = kept(mask).numel()
    for step, count in enumerate(counts):
        last = 30 if step + 1 >= 30 else (step + 1) // 4 * 4
        wanted = 0.5 + 0.3 * (1 - (1 - min(1, last / 20)) ** 3)
        assert count == round((1 - wanted) * total), step
    assert not torch.equal(seen[26], seen[27])  # still moving after step 20
    assert torch.equal(seen[28], seen[39])


def share_by_bisection(total, room, base, slope):
    low, high = -1e9, 1e9
    for _ in range(200):
        c = (low + high) / 2
        if sum(min(r, b + c * k) for r, b, k in zip(room, base, slope, strict=True)) < total:
            low = c
        else:
            high = c
    return [min(r, b + low * k) for r, b, k in zip(room, base, slope, strict=True)]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=8), st.data()
)
def test_shares_sum_to_the_total_and_fill_the_layers(shapes, data):
    room, base, slope = (list(map(float, part)) for part in zip(*shapes, strict=True))
    base = [min(b, r) for b, r in zip(base, room, strict=True)]
    total = data.draw(st.integers(int(sum(base)), int(sum(room))))
    shares = share_out(*(torch.tensor(values, dtype=torch.float64) for values in (total, room, base, slope)))
    assert shares.sum() == total
    reference = share_by_bisection(total, room, base, slope)
    for share, exact, most in zip(shares.tolist(), reference, room, strict=True):
        assert share <= most
        assert abs(share - exact) < 1 + 1e-6
        assert share == int(share)


def test_sparse_momentum_grows_where_the_average_of_dense_gradients_is_large():
    model, mask, optimizer = build("snfs", 0.25, steps=40, optimizer="sgd", interval=4)
    budget, average = int(kept(mask).sum()), {name: torch.zeros_like(w) for name, w in layers(model).items()}
    for step in range(4):
        gradients, before, weights = step_by_hand(model, mask, optimizer, step)
        for name in average:
            average[name] = 0.9 * average[name] + gradients[name]
    rate = 0.5 * 0.5 * (1 + math.cos(math.pi * 4 / 30))
    survivors, mean, room = {}, {}, {}
    for name, w in weights.items():
        count = int(before[name].sum())
        survivors[name] = highest(w.abs(), count - math.ceil(rate * count), before[name])
        mean[name] = (average[name].abs() * before[name]).sum().item() / count
        room[name] = w.numel() - int(survivors[name].sum())
    total = budget - sum(int(part.sum()) for part in survivors.values())
    share = [total * value / sum(mean.values()) for value in mean.values()]
    exact = share_by_bisection(total, list(room.values()), share, [1.0] * len(share))
    assert any(value == most for value, most in zip(exact, room.values(), strict=True))  # one fills up
    counts = [math.floor(value + 1e-9) for value in exact]
    for index in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:
        counts[index] += 1
    for (name, w), count in zip(weights.items(), counts, strict=True):
        expected = survivors[name] | highest(average[name].abs(), count, ~survivors[name])
        assert torch.equal(mask.masks.masks[name].bool(), expected), name
        assert torch.equal(layers(model)[name], w * (expected & before[name]))  # dropped and regrown: as it was
    assert kept(mask).sum() == budget
    assert_memory_is_zero(optimizer, model, {n: before[n] != m.bool() for n, m in mask.masks.masks.items()})


def test_sparse_momentum_reads_every_gradient_up_to_its_last_change_except_skipped_ones():
    model, mask, optimizer = build("snfs", 0.7, steps=40, optimizer="sgd", interval=4)
    assert [mask.grows_by_gradient(step) for step in range(40)] == [True] * 30 + [False] * 10
    dense_gradients(model, optimizer)
    mask.mask_gradients(0)
    mask.update_masks(0)
    before = {name: tensor.clone() for name, tensor in mask.state_dict()["momentum"].items()}
    for w in layers(model).values():
        w.grad.fill_(math.nan)
    mask.mask_gradients(1)
    mask.update_masks(1, skipped=True)
    for name, tensor in mask.state_dict()["momentum"].items():
        assert torch.equal(tensor, before[name])


def test_dsr_drops_below_one_threshold_and_grows_in_proportion_to_what_is_left():
    model, mask, optimizer = build("dsr", 0.7, steps=60, optimizer="sgd", interval=4, drop_fraction=0.05)
    budget, threshold, went_down = int(kept(mask).sum()), 1e-3, False
    for step in range(44):
        _, before, weights = step_by_hand(model, mask, optimizer, step)
        if (step + 1) % 4:
            continue
        survivors = {name: before[name] & (w.abs() >= threshold) for name, w in weights.items()}
        for name, part in survivors.items():
            if not part.any():
                part |= highest(weights[name].abs(), 1, before[name])
        left = [int(part.sum()) for part in survivors.values()]
        dropped = budget - sum(left)
        room = [w.numel() - count for w, count in zip(weights.values(), left, strict=True)]
        exact = share_by_bisection(dropped, room, [0.0] * len(left), left)
        for (name, w), share in zip(weights.items(), exact, strict=True):
            now = mask.masks.masks[name].bool()
            assert (now & survivors[name]).sum() == survivors[name].sum()
            assert abs(int(now.sum()) - int(survivors[name].sum()) - share) < 1 + 1e-6
            again, free = now & before[name] & ~survivors[name], ~now & ~before[name]
            assert not (again.any() and free.any())  # what was dropped comes back only where there is no other place
            assert torch.equal(layers(model)[name], w * survivors[name])
        assert kept(mask).sum() == budget
        factor = 0.5 if dropped > 1.1 * 0.05 * budget else 2.0 if dropped < 0.9 * 0.05 * budget else 1.0
        threshold, went_down = threshold * factor, went_down or factor < 1
        assert mask.state_dict()["memory"]["threshold"].item() == threshold
    assert went_down
    density = mask.masks.density()
    assert max(density.values()) - min(density.values()) > 0.02  # it was the same in every layer
    train(model, mask, optimizer, 60, start=44)
    assert kept(mask).sum() == budget


@pytest.mark.parametrize("method", ["dsr", "snfs"])
def test_moving_between_layers_keeps_the_sum_to_within_half_a_unit_a_layer(method):
    model, mask, optimizer = build(method, 0.5, steps=40, interval=3, pattern="kernel")
    total = kept(mask).numel()
    unit = {name: math.prod(w.shape[2:]) for name, w in layers(model).items()}

    def look(step):
        assert abs(int(kept(mask).sum()) - round(0.5 * total)) <= sum(unit.values()) / 2

    before = mask.masks.alive()
    train(model, mask, optimizer, 40, on_step=look)
    assert mask.masks.alive() != before


@pytest.mark.parametrize("method", ["dsr", "snfs"])
def test_moving_between_layers_contradicts_a_sparsity_of_each(method):
    with pytest.raises(ValueError, match="moves weights from layer to layer: leave layer_sparsity out, or take set or"):
        build(method, None, layer_sparsity={"conv": 0.5})


def test_acdc_alternates_from_dense_ends_sparse_and_its_dense_phases_cost_as_such():
    model, mask, optimizer = build("acdc", 0.8, steps=40, optimizer="sgd", interval=6)
    meter = FlopsMeter(count_flops(model.float(), (4, 5, 5)), mask.masks, passes=1)
    model.double()
    total, counts, operations = kept(mask).numel(), [], []

    def look(step):
        counts.append(int(kept(mask).sum()))
        if (step + 1) % 6 == 0 and counts[-1] == total:  # what came alive is zero, and so is its momentum
            dead = [w == 0 for w in layers(model).values()]
            assert sum(int(part.sum()) for part in dead) >= round(0.8 * total)
            for w, part in zip(layers(model).values(), dead, strict=True):
                assert (optimizer.state[w]["momentum_buffer"][part] == 0).all()
        meter.step(1, mask.grows_by_gradient(step + 1))
        operations.append(meter.read())

    train(model, mask, optimizer, 40, on_step=look)
    sparse = total - round(0.8 * total)
    phases = [total] * 5 + ([sparse] * 6 + [total] * 6) * 2 + [sparse] * 11  # the last change comes at 34
    assert counts == phases
    dense = meter.flops.dense_training
    assert [value == dense for value in operations] == [count == total for count in phases]
    assert mask.ever_alive_fraction() == 1


def test_acdc_keeps_the_largest_weights_of_the_dense_network():
    model, mask, optimizer = build("acdc", 0.8, steps=40, optimizer="sgd", interval=6)
    train(model, mask, optimizer, 17)
    _, before, weights = step_by_hand(model, mask, optimizer, 17)
    assert all(part.all() for part in before.values())
    largest = global_reference([w.abs() for w in weights.values()], round(0.2 * kept(mask).numel()))
    assert torch.equal(kept(mask), largest)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_final_is_dense_up_to_the_last_step_and_then_keeps_the_largest(pattern):
    model, mask, optimizer = build("final", None if pattern == "2:4" else 0.9, steps=10, pattern=pattern)
    train(model, mask, optimizer, 9)
    assert kept(mask).all()
    assert not mask.due(8)
    assert mask.due(9)
    train(model, mask, optimizer, 10, start=9)
    assert mask.masks.sparsity() == pytest.approx(0.5 if pattern == "2:4" else 0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("method", "interval", "stop", "drop"),
    [("dsr", 100, 0.75, 0.14), ("snfs", 30, 0.75, 0.5), ("granet", 1000, 0.75, 0.5), ("acdc", 150, 0.85, None)],
)
def test_a_method_changes_masks_when_and_as_much_as_its_paper_says(method, interval, stop, drop):
    pruner = Pruner(Tiny(), method, 0.5, total_steps=30_000, steps_per_epoch=30)
    assert pruner.timing == Timing(30_000, interval, stop)
    assert pruner.options.get("drop_fraction") == drop
