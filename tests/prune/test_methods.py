"""Every method on a network small enough to follow: its sparsity, its rounds, its resuming, its refusals."""

import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_network import build, dead, global_reference, kept, layers, split, train
from torch import nn

from prune import METHODS, Pruner
from prune.methods import SCORE_ROUNDS

SPARSE = [name for name in METHODS if name != "none"]


DISTRIBUTED = [
    (distribution, pattern)
    for distribution in ("erk", "uniform", "global")
    for pattern in ("unstructured", "4x1", "kernel", "channel", "fan-in")
]


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize(("distribution", "pattern"), [*DISTRIBUTED, (None, "2:4")])
def test_every_combination_reaches_its_sparsity_or_says_why_not(method, distribution, pattern):
    fixed = distribution is None  # by the pattern: so are the sparsity and every layer's part
    flags = {"pattern": pattern, "distribution": distribution}
    if SCORE_ROUNDS in METHODS[method].options:
        flags["score_rounds"] = 8
    impossible = not fixed and distribution not in METHODS[method].distributions
    reallocates = METHODS[method].update is not None and METHODS[method].update.reallocates
    impossible |= (fixed and METHODS[method].moves) or (pattern in ("channel", "fan-in") and reallocates)
    impossible |= (pattern, method) == ("channel", "force")
    if impossible:
        words = "choose|take 2:4 with gmp|part of several|keep a constant fan-in|take iter-snip"
        with pytest.raises(ValueError, match=words):
            build(method, None if fixed else 0.5, **flags)
        return
    model, mask, optimizer = build(method, None if fixed else 0.5, **flags)
    step, end = 0, 20 if METHODS[method].update or METHODS[method].tickets else 2
    while step < end:
        train(model, mask, optimizer, end, step)
        step = mask.next_round(end)
    unit = {
        "unstructured": 1,
        "2:4": 1,
        "4x1": 4,
        "kernel": 9,
        "channel": 16 * 9 + 16,  # the most that goes with one
        "fan-in": 16,  # one weight of each output
    }
    total = sum(w.numel() for w in layers(model).values())
    assert abs(mask.masks.sparsity() - 0.5) * total <= len(layers(model)) * unit[pattern]
    for name, w in layers(model).items():
        zero = mask.masks.masks[name] == 0
        assert (w[zero] == 0).all()
        if pattern == "2:4":
            groups = zero.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1)
            assert (groups == 2).all()
        elif pattern == "fan-in":
            assert len(set(zero.flatten(1).sum(1).tolist())) == 1
        elif pattern == "channel":
            pixels = zero.view(*zero.shape[:2], -1)
            assert torch.equal(
                pixels, (pixels.all((1, 2))[:, None] | pixels.all((0, 2)))[..., None].expand(pixels.shape)
            )
        elif pattern == "kernel" and w.ndim == 4:
            assert (zero.all((2, 3)) == zero.any((2, 3))).all()
        elif pattern == "4x1":
            blocks = zero.flatten(1).unflatten(0, (-1, 4))
            assert (blocks.all(1) == blocks.any(1)).all()


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from(["magnitude", "gmp", "lth"]),
    group=st.integers(2, 9).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    sizes=st.tuples(*[st.integers(1, 23)] * 3),
)
@example(method="magnitude", group=(2, 4), sizes=(3, 7, 5))
def test_every_group_of_every_layer_keeps_n_of_m_whatever_the_sizes(method, group, sizes):
    (n, m), (inputs, hidden, outputs) = group, sizes
    model = nn.Sequential(
        nn.Conv2d(inputs, hidden, (1, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, outputs)
    )
    options = {"lth": {"lth_rounds": 2}, "gmp": {"update_interval": 1}}.get(method, {})
    pruner = Pruner(model, method, pattern=f"{n}:{m}", total_steps=4, **options)
    pruner.choose_masks()
    for step in range(4):
        pruner.update_masks(step)
    while pruner.next_round(4) == 0:
        pass
    for mask in pruner.masks.masks.values():
        for part in mask.movedim(1, -1).flatten(0, -2).split(m, dim=1):
            assert (part.sum(1) == min(n, math.ceil(n * part.shape[1] / m))).all()


def test_lottery_tickets_go_back_to_the_weights_of_the_rewind_step():
    model, mask, optimizer = build("lth", 0.8, steps=20, lth_rounds=3, lth_rewind=5)
    rewound = {}

    def look(step):
        if step == 4:
            rewound.update({n: t.clone() for n, t in model.state_dict().items()})

    train(model, mask, optimizer, 20, on_step=look)
    total = sum(w.numel() for w in layers(model).values())
    alive = torch.ones(total, dtype=torch.bool)
    for number in (1, 2, 3):
        trained = [w.detach().abs() for w in layers(model).values()]
        alive = global_reference(trained, round(total * 0.2 ** (number / 3)))
        assert mask.next_round(20) == 5
        assert torch.equal(kept(mask), alive)
        for name, tensor in model.state_dict().items():
            m = mask.masks.masks.get(name.removesuffix(".weight"), torch.ones_like(tensor))
            assert torch.equal(tensor, rewound[name] * m.to(tensor.dtype)), name
        assert all(not t.any() for o in mask.optimizers for s in o.state.values() for t in s.values())
        train(model, mask, optimizer, 20, start=5)
    assert mask.next_round(20) == 20
    assert dead(model) == pytest.approx(0.8, abs=1 / total)


def test_learning_rate_rewinding_prunes_the_trained_weights_and_keeps_them():
    model, mask, optimizer = build("lth", 0.8, steps=10, lth_rounds=2, lth_rewind=5, lth_keep_weights=True)
    train(model, mask, optimizer, 10)
    for number in (1, 2):
        trained = [w.detach().clone() for w in layers(model).values()]
        alive = global_reference([w.abs() for w in trained], round(kept(mask).numel() * 0.2 ** (number / 2)))
        assert mask.next_round(10) == 5
        for w, before, part in zip(layers(model).values(), trained, split(alive, trained), strict=True):
            assert torch.equal(w, before * part)
        assert all(not t.any() for o in mask.optimizers for s in o.state.values() for t in s.values())
        train(model, mask, optimizer, 10, start=5)
    assert mask.next_round(10) == 10
    assert not mask.state_dict()["rewound"]


@pytest.mark.parametrize(
    "method", ["set", "rigl", "mest", "gmp", "lth", "lamp", "dsr", "snfs", "granet", "acdc", "final"]
)
def test_a_method_resumes_bit_for_bit(method):
    options = {"lth": {"lth_rounds": 1, "lth_rewind": 2}, "mest": {"mest_soft": True}}
    options = options.get(method, options["lth"] if METHODS[method].tickets else {})
    runs = []
    for resume in (False, True):
        model, mask, optimizer = build(method, 0.7, interval=4, **options)
        train(model, mask, optimizer, 10)
        if resume:
            saved = copy.deepcopy((model.state_dict(), mask.state_dict(), optimizer.state_dict()))
            model, mask, optimizer = build(method, 0.7, interval=4, seed=0, **options)
            model.load_state_dict(saved[0])
            mask.load_state_dict(saved[1])
            optimizer.load_state_dict(saved[2])
        train(model, mask, optimizer, 20, start=10)
        start = mask.next_round(20)
        train(model, mask, optimizer, 20, start=start)
        runs.append((model, mask))
    for (name, a), b in zip(runs[0][0].state_dict().items(), runs[1][0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert runs[0][1].ever_alive_fraction() == runs[1][1].ever_alive_fraction()


def test_sparsity_by_layer_is_reached_and_unnamed_layers_stay_dense():
    model, mask, _ = build("magnitude", None, layer_sparsity={"conv": 0.75, "classifier": 0.5})
    assert mask.masks.density() == {"conv": 0.25, "linear": 1.0, "classifier": 0.5}
    model, mask, optimizer = build("gmp", None, layer_sparsity={"conv": 0.75, "classifier": 0.5})
    train(model, mask, optimizer, 20)
    assert mask.masks.density() == {"conv": 0.25, "linear": 1.0, "classifier": 0.5}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"layer_sparsity": {"clasifier": 0.5}}, "the nearest name is 'classifier'"),
        ({"layer_sparsity": {"conv": 1.5}}, "sparsity of layer 'conv' has to be"),
        ({"layer_sparsity": {"conv": 0.5}, "sparsity": 0.5}, r"the sparsity by layer fixes the sparsity at 0\.3:"),
        ({"pattern": "2:4", "sparsity": 0.5, "dense_layers": ["conv"]}, r"pattern 2:4 fixes the sparsity at 0\.2:"),
        ({"layer_sparsity": {"conv": 0.5}, "distribution": "erk"}, "leaves nothing to distribute"),
        ({"layer_sparsity": {}}, "every layer is to stay dense"),
        ({"layer_sparsity": {"conv": 0.5}, "dense_layers": ["conv"]}, "has sparsity 0.5 and is among the dense layers"),
        ({"pattern": "2:4", "dense_layers": ["*"]}, "every layer is to stay dense"),
        (
            {"layer_sparsity": {"conv": 0.5, "classifier": 0.999}},
            "0.999 leaves layer 'classifier' without a weight: give",
        ),
        ({"method": "gmp", "layer_sparsity": {"linear": 0.9999}}, "0.9999 leaves layer 'linear' without a weight"),
        ({"method": "gmp", "layer_sparsity": {"conv": 0.95}, "pattern": "1x36"}, "without a unit of 36 weights"),
        ({"layer_sparsity": {"conv": 0.5}, "pattern": "channel"}, "part of several layers, which lose it together"),
        ({"pattern": "channel", "sparsity": 0.5, "dense_layers": ["linear"]}, "no channel can be taken out"),
        ({"pattern": "2:4", "sparsity": 0.9}, "pattern 2:4 fixes the sparsity at 0.5"),
        ({"pattern": "2:4", "distribution": "erk"}, "leaves nothing to distribute"),
        ({"pattern": "2:4", "method": "rigl"}, "take 2:4 with gmp"),
        ({"pattern": "fan-in", "sparsity": 0.5, "method": "dsr"}, "cannot keep a constant fan-in"),
        ({"pattern": "4:2", "sparsity": 0.5}, "unknown pattern '4:2'"),
        ({"pattern": "0x1", "sparsity": 0.5}, "unknown pattern '0x1'"),
        (
            {"pattern": "circle", "sparsity": 0.5},
            "choose unstructured, fan-in, kernel, channel, blocks such as 4x1, or N:M",
        ),
        ({"method": "synflow", "sparsity": 0.5, "distribution": "erk"}, "choose global"),
        ({"method": "lth", "sparsity": 0.5, "lth_rewind": 20}, "cannot rewind to step 20"),
        ({"pattern": "1x36", "sparsity": 0.97}, "take a finer pattern"),
        ({"pattern": "channel", "sparsity": 0.97}, "at most 0.9[0-9]+ is possible, or take another pattern"),
        ({"method": "rigl", "sparsity": 0.5, "interval": "1x"}, "or epochs such as 1e, not '1x'"),
        ({"method": "rigl", "sparsity": 0.5, "interval": "0e"}, "or epochs such as 1e, not '0e'"),
        ({"method": "rigl", "sparsity": 0.5, "interval": "1e"}, "give steps_per_epoch, or update_interval as a number"),
        ({"method": "rigl", "sparsity": 0.5, "steps": 1}, "they stay from step 1 of 1 on; train for longer"),
        ({"method": "rigl", "sparsity": 0.5, "drop_fraction": 2}, "drop_fraction has to be above 0 and below 1, not 2"),
        (
            {"method": "rigl", "sparsity": 0.5, "drop_fractoin": 0.2},
            "it has update_interval, stop_update, drop_fraction",
        ),
        (
            {"method": "iter-snip", "sparsity": 0.5, "score_rounds": 0.5},
            "score_rounds has to be a whole number, not 0.5",
        ),
        ({"method": "lth", "sparsity": 0.5, "lth_rounds": math.inf}, "lth_rounds has to be a finite number, not inf"),
        (
            {"method": "mest", "sparsity": 0.5, "mest_lambda": math.nan},
            "mest_lambda has to be a finite number, not nan",
        ),
        ({"method": "lth", "sparsity": 0.5, "lth_rounds": 0.5}, "lth_rounds has to be a whole number, not 0.5"),
        ({"method": "random", "sparsity": 0.5, "lth_rounds": 2}, "'random' has no option lth_rounds: it has none"),
    ],
)
def test_impossible_combinations_say_what_would_work(kwargs, words):
    with pytest.raises(ValueError, match=words) as error:
        build(**{"method": "magnitude", "sparsity": None} | kwargs)
    assert "\n" not in str(error.value)
