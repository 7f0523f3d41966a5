"""Data sets as wholes."""

import pytest
import torch

from imagedata.images import Dataset, Images, balanced_part, hold_out, with_label_noise


def images(count: int = 50, seed: int = 0) -> Images:
    g = torch.Generator().manual_seed(seed)
    return Images(torch.randint(256, (count, 6, 6, 3), generator=g, dtype=torch.uint8), torch.arange(count) % 5)


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_images_are_the_same_for_every_run_of_a_seed(seed):
    dataset = Dataset(images(), images(10, seed=5), classes=list("abcde"), pad=0, flip=False)
    split, again = hold_out(dataset, 20, seed), hold_out(dataset, 20, seed)
    assert torch.equal(split.val.pixels, again.val.pixels)
    assert (len(split.train), len(split.val), len(split.test)) == (30, 20, 10)
    flat = [set(map(bytes, part.pixels.flatten(1).numpy())) for part in (split.train, split.val, dataset.train)]
    assert flat[0] | flat[1] == flat[2]
    assert not flat[0] & flat[1]
    assert not torch.equal(split.val.pixels, hold_out(dataset, 20, seed + 2).val.pixels)


def labelled(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Images(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1), labels)


def test_a_part_has_as_many_images_of_each_class_and_follows_the_seed():
    images = labelled([20, 30, 25])
    for count in (3, 10, 60):
        part = balanced_part(images, count, 3, seed=1)
        assert sorted(part.labels.bincount(minlength=3).tolist()) == sorted(
            [count // 3 + (i < count % 3) for i in range(3)]
        )
        assert len(set(part.pixels.flatten().tolist())) == count
        assert torch.equal(part.labels, images.labels[part.pixels.flatten().long()])
    same, other = balanced_part(images, 30, 3, seed=1), balanced_part(images, 30, 3, seed=2)
    assert torch.equal(same.pixels, balanced_part(images, 30, 3, seed=1).pixels)
    assert not torch.equal(same.pixels, other.pixels)
    with pytest.raises(ValueError, match="at most 60"):
        balanced_part(images, 64, 3, seed=0)
    with pytest.raises(ValueError, match="--train-images 2 leaves some of 3 classes without an image"):
        balanced_part(images, 2, 3, seed=0)


def test_label_noise_gives_exactly_the_fraction_another_label_uniformly():
    images = labelled([1000] * 4)
    noisy = with_label_noise(images, 0.4, 4, seed=3)
    wrong = noisy.labels != images.labels
    assert int(wrong.sum()) == 1600
    assert torch.equal(noisy.pixels, images.pixels)
    shifts = ((noisy.labels - images.labels) % 4)[wrong].bincount(minlength=4).tolist()
    assert shifts[0] == 0
    assert max(abs(count - 1600 / 3) for count in shifts[1:]) < 4 * (1600 * 2 / 9) ** 0.5  # four standard deviations
    assert torch.equal(noisy.labels, with_label_noise(images, 0.4, 4, seed=3).labels)
    assert not torch.equal(noisy.labels, with_label_noise(images, 0.4, 4, seed=4).labels)
    assert torch.equal(with_label_noise(images, 0.0, 4, seed=3).labels, images.labels)
