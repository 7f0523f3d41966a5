"""Data sets as wholes."""

import pytest
import torch

from imagedata.images import Dataset, Images, hold_out


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
