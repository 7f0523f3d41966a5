"""What tools and other systems leave in image folders, and names that are not UTF-8."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from imagedata.sources import load_dataset


@pytest.fixture
def folder(tmp_path):
    """Two grey images in each of two classes, for training and for testing."""
    chance = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = chance.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def test_what_tools_leave_in_a_folder_is_skipped(folder):
    expected = load_dataset("folder", folder)
    for place in (folder / "train", folder / "train" / "cat", folder / "test"):
        (place / ".ipynb_checkpoints").mkdir()
        shutil.copy(folder / "train" / "cat" / "0.png", place / ".ipynb_checkpoints" / "0-checkpoint.png")
        (place / ".DS_Store").write_bytes(b"\0")
        (place / "Thumbs.db").write_bytes(b"\0")
    (folder / "train" / "dog" / "._1.png").write_bytes(b"resource fork")
    (folder / "train" / "__MACOSX").mkdir()
    found = load_dataset("folder", folder)
    assert found.classes == ["cat", "dog"]
    assert torch.equal(found.train.pixels, expected.train.pixels)
    assert torch.equal(found.test.labels, expected.test.labels)
    assert len(list((folder / ".decoded").iterdir())) == 1  # the same images: the same cache


def test_images_below_a_class_belong_to_it(folder):
    (folder / "train" / "cat" / "more").mkdir()
    (folder / "train" / "cat" / "1.png").rename(folder / "train" / "cat" / "more" / "1.PNG")
    assert load_dataset("folder", folder).train.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dataset", ["folder", "imagefolder"])
def test_links_below_a_class_are_followed_but_not_in_circles(folder, dataset):
    cat = folder / "train" / "cat"
    (cat / "below").mkdir()
    for link, target in (
        (cat / "loop", cat),
        (cat / "below" / "up", folder / "train"),
        (cat / "more", folder / "test" / "dog"),
    ):
        link.symlink_to(target)
    (folder / "test" / "dog" / "back").symlink_to(cat)  # on the way through more
    assert load_dataset(dataset, folder, 8).train.labels.tolist() == [0, 0, 0, 0, 1, 1]


def test_names_that_are_not_utf_8_are_read_and_trained_on(folder, train):
    odd = os.fsencode(folder / "train" / "cat") + b"/caf\xe9.png"
    os.rename(folder / "train" / "cat" / "1.png", odd)
    for split in (b"train", b"test"):
        os.rename(folder / os.fsdecode(split) / "dog", os.fsencode(folder) + b"/" + split + b"/\xe9t\xe9")
    for _ in range(2):  # decoded, and from the cache
        assert load_dataset("folder", folder).train.labels.tolist() == [0, 0, 1, 1]
    run = train(f"--dataset folder --data-dir {folder} --depth 8 --width 0.25 --epochs 1", short=False)
    assert run.code == 0, run.err
    assert os.fsencode(run.checkpoint()["data"]["classes"][1]) == b"\xe9t\xe9"
