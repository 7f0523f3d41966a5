"""Batches against naive loops over images."""

import os

import numpy as np
import pytest
import torch

from imagedata.augment import Augmentation, Normalize, cut
from imagedata.images import Images, channel_statistics
from imagedata.loaders import Batch, EvalLoader, TrainLoader, pick_workers
from utils.precision import Execution

CPU = torch.device("cpu")


def images(count: int = 50, size: int = 6, channels: int = 3, seed: int = 0) -> Images:
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, size, size, channels), generator=g, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 5)


def normalize(data: Images) -> Normalize:
    return Normalize(**channel_statistics(data), device=CPU)


def loader(data: Images, **kwargs) -> TrainLoader:
    names = ("batch_size", "seed", "pad", "flip", "mixup", "cutmix", "policy", "erasing")
    augmentation = {"batch_size": 16, "seed": 0} | {name: kwargs.pop(name) for name in names if name in kwargs}
    return TrainLoader(
        data, Augmentation(len(data), **augmentation), 5, normalize(data), CPU, kwargs.pop("workers", 0), Execution()
    )


def normalized(data: Images) -> np.ndarray:
    """[N, C, H, W] in float64 by the definition."""
    x = data.pixels.numpy().astype(np.float64)
    return ((x - x.mean((0, 1, 2))) / x.std((0, 1, 2))).transpose(0, 3, 1, 2)


def assert_same(left: Batch, right: Batch) -> None:
    assert torch.equal(left.inputs, right.inputs)
    assert torch.equal(left.targets, right.targets)
    assert left.size == right.size


def test_an_epoch_is_a_permutation_of_the_normalized_images():
    data = images()
    feed = loader(data)
    assert feed.steps_per_epoch == 4
    for epoch in (0, 1):
        batches = [feed.batch(4 * epoch + position) for position in range(4)]
        assert [len(inputs) for inputs, _, _ in batches] == [16, 16, 16, 2]
        inputs = torch.cat([batch.inputs for batch in batches])
        labels = torch.cat([batch.targets for batch in batches]).argmax(1)
        assert inputs.dtype == torch.float32
        expected = normalized(data)
        found = [int(np.abs(expected - x.numpy()).max((1, 2, 3)).argmin()) for x in inputs]
        assert sorted(found) == list(range(50))
        assert found != list(range(50))
        assert max(np.abs(expected[i] - x.numpy()).max() for i, x in zip(found, inputs, strict=True)) < 1e-5
        assert labels.tolist() == [i % 5 for i in found]


def test_order_and_augmentation_are_functions_of_seed_and_step():
    straight, jumping = (loader(images(), pad=2, flip=True, mixup=0.4) for _ in range(2))
    expected = [straight.batch(step) for step in range(12)]
    for step in (11, 3, 7, 3, 0, 10):
        assert_same(jumping.batch(step), expected[step])
    other = loader(images(), pad=2, flip=True, seed=1).batch(0)[0]
    assert not torch.equal(other, loader(images(), pad=2, flip=True).batch(0)[0])


def test_every_image_is_a_shifted_or_mirrored_original():
    data, pad, size = images(200), 2, 6
    feed = loader(data, pad=pad, flip=True, batch_size=200)
    black = (0 - data.pixels.numpy().astype(np.float64).mean((0, 1, 2))) / data.pixels.numpy().std((0, 1, 2))
    padded = np.broadcast_to(black[None, :, None, None], (200, 3, size + 2 * pad, size + 2 * pad)).copy()
    padded[:, :, pad:-pad, pad:-pad] = normalized(data)
    inputs, targets, _ = feed.batch(0)
    seen, taken = set(), []
    windows = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            window = padded[:, :, top : top + size, left : left + size]
            windows[top, left, False], windows[top, left, True] = window, window[..., ::-1]
    for x, label in zip(inputs.numpy(), targets.argmax(1).tolist(), strict=True):
        matches = [
            (key, index)
            for key, window in windows.items()
            for index in np.flatnonzero(np.abs(window - x).max((1, 2, 3)) < 1e-5)
        ]
        assert len(matches) == 1
        assert matches[0][1] % 5 == label
        seen.add(matches[0][0])
        taken.append(matches[0][1])
    assert sorted(taken) == list(range(200))
    assert len(seen) > 40  # of 25 shifts times 2: all are drawn


def test_workers_cut_the_same_batches_in_any_order():
    resident, streamed = (loader(images(), pad=2, flip=True, mixup=0.4, workers=workers) for workers in (0, 2))
    for step in (0, 1, 2, 3, 4, 9, 10, 2, 3):
        assert_same(streamed.batch(step), resident.batch(step))
    for a, b in zip(streamed.sample(2), resident.sample(2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("memory", "resident"), [(10_800, True), (10_799, False)])
def test_workers_cut_images_that_take_more_than_half_of_memory(monkeypatch, memory, resident):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}.get)
    assert (pick_workers(images(), CPU) == 0) is resident  # 5,400 bytes


def test_mixup_mixes_two_images_and_their_labels_with_one_weight():
    data = images()
    plain, mixed = loader(data), loader(data, mixup=0.5)
    weights = []
    for step in range(8):
        (x, t, _), (mx, mt, _) = plain.batch(step), mixed.batch(step)
        d = (x - x.flip(0)).double()
        weight = float((d * (mx - x.flip(0)).double()).sum() / d.square().sum())  # least squares
        torch.testing.assert_close(mx, weight * x + (1 - weight) * x.flip(0), rtol=0, atol=1e-4)
        torch.testing.assert_close(mt, weight * t + (1 - weight) * t.flip(0), rtol=0, atol=1e-4)
        assert -1e-4 <= weight <= 1 + 1e-4
        weights.append(round(weight, 5))
    assert len(set(weights)) == 8


def test_grey_images_and_constant_channels_stay_finite():
    data = Images(torch.full((4, 2, 2, 1), 7, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    inputs = loader(data).batch(0).inputs
    assert inputs.shape == (4, 1, 2, 2)
    assert inputs.abs().max() < 1e-6


def test_batches_are_channels_last():
    inputs = loader(images(), pad=1).batch(0).inputs
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_test_batches_are_in_order_and_not_augmented():
    data = images()
    feed = EvalLoader(data, 16, normalize(data), CPU)
    inputs = torch.cat([x for x, _ in feed]).numpy()
    assert np.abs(inputs - normalized(data)).max() < 1e-5
    assert torch.cat([y for _, y in feed]).tolist() == data.labels.tolist()
    assert len(feed) == 50


def test_cutting_a_batch_compiles_as_one_graph():
    data = images()
    lines = Augmentation(50, 16, seed=0, pad=2, flip=True).plan(0)[0]
    norm = normalize(data)

    def batch(*lines: torch.Tensor) -> torch.Tensor:
        return norm(cut(data.pixels, *lines, 2))

    first = tuple(line[:16] for line in lines)
    compiled = torch.compile(batch, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*first), batch(*first))


@pytest.mark.parametrize(
    ("policy", "channels"), [("crop-flip", 1), ("randaugment", 3), ("trivialaugment", 1), ("autoaugment", 3)]
)
def test_policies_follow_from_seed_epoch_and_index_alone(policy, channels):
    data = images(size=12, channels=channels)
    options = {"policy": policy, "erasing": 0.5, "pad": 1, "flip": True}
    here, there, plain = loader(data, **options), loader(data, workers=2, **options), loader(data, pad=1, flip=True)
    for step in (5, 0, 1, 4):
        assert_same(here.batch(step), there.batch(step))
        before = torch.get_rng_state()
        assert not torch.equal(here.batch(step).inputs, plain.batch(step).inputs)
        assert torch.equal(here.batch(step).targets, plain.batch(step).targets)
        assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(here.batch(0).inputs, loader(data, seed=1, **options).batch(0).inputs)


def test_random_erasing_paints_a_box_in_the_mean_colour():
    data = images(200, size=12)
    plain, erased = loader(data).batch(0).inputs, loader(data, erasing=1.0).batch(0).inputs
    for before, after in zip(plain, erased, strict=True):
        changed = (before != after).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        box = after[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.abs().max() < 0.02  # the mean, to the nearest level
    share = torch.stack([(a != b).any(0).float().mean() for a, b in zip(plain, erased, strict=True)])
    assert 0.02 <= share.min() < share.max() < 0.5
    half, plain = (loader(data, erasing=share, batch_size=200).batch(0).inputs for share in (0.5, 0.0))
    count = sum(not torch.equal(a, b) for a, b in zip(plain, half, strict=True))
    assert 70 < count < 130


def test_cutmix_puts_a_box_of_the_partner_in_and_weighs_the_labels_by_area():
    data = images(size=12)
    plain, mixed, both = loader(data), loader(data, cutmix=True), loader(data, cutmix=True, mixup=0.5)
    shares, kinds = [], set()
    for step in range(40):
        (x, t, _), (mx, mt, _) = plain.batch(step), mixed.batch(step)
        taken = (mx != x).any(1).any(0)
        rows, columns = taken.any(1).nonzero().flatten(), taken.any(0).nonzero().flatten()
        assert torch.equal(mx[:, :, taken], x.flip(0)[:, :, taken])
        share = len(rows) * len(columns) / 144
        assert taken.sum() == len(rows) * len(columns)  # a box
        torch.testing.assert_close(mt, (1 - share) * t + share * t.flip(0))
        shares.append(share)
        kinds.add(bool(((both.batch(step).inputs - x).abs() < 1e-6).all(1).all(0).any()))
    assert 0.2 < sum(shares) / 40 < 0.5  # half, less what lies outside
    assert min(shares) < 0.05
    assert kinds == {True, False}
