"""Data sets from real files."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from imagedata.sources import load_dataset
from utils.errors import UsageError


@pytest.fixture
def tree(tmp_path):
    """Three PNG images a class and split, in two classes; returns the folder and the pixels by path."""
    rng = np.random.default_rng(0)
    pixels = {}
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                path = tmp_path / split / name / f"{index}.png"
                pixels[path] = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels[path]).save(path)
    return tmp_path, pixels


def test_a_folder_gives_its_images_and_classes(tree):
    root, pixels = tree
    dataset = load_dataset("folder", root)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.channels == 3
    for split, images in (("train", dataset.train), ("test", dataset.test)):
        assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
        expected = np.stack([pixels[root / split / name / f"{i}.png"] for name in ("cat", "dog") for i in range(3)])
        assert (images.pixels.numpy() == expected).all()


def test_a_folder_may_call_its_test_images_val(tree):
    root, _ = tree
    expected = load_dataset("folder", root).test.pixels
    (root / "test").rename(root / "val")
    assert torch.equal(load_dataset("folder", root).test.pixels, expected)


def test_the_second_load_decodes_nothing(tree, monkeypatch):
    root, _ = tree
    first = load_dataset("folder", root)

    def fail(*arguments):
        raise AssertionError("decoded again")

    monkeypatch.setattr(Image, "open", fail)
    second = load_dataset("folder", root)
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert torch.equal(first.test.pixels, second.test.pixels)


def test_the_cache_is_found_by_content_and_may_be_damaged(tree):
    root, _ = tree
    first = load_dataset("folder", root)
    path = root / "train" / "cat" / "0.png"
    stat = path.stat()
    other = np.zeros((8, 8, 3), dtype=np.uint8)
    Image.fromarray(other).save(path)
    with open(path, "ab") as file:  # same size and time: only the content tells
        file.write(b"\0" * max(0, stat.st_size - path.stat().st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = load_dataset("folder", root)
    assert second.train.pixels[0].sum() == 0
    for cache in (root / ".decoded").iterdir():
        cache.write_bytes(cache.read_bytes()[:100])
    third = load_dataset("folder", root)
    assert torch.equal(second.train.pixels, third.train.pixels)
    assert not torch.equal(first.train.pixels, third.train.pixels)


def test_a_flipped_bit_in_the_cache_is_found(tree):
    root, _ = tree
    first = load_dataset("folder", root)
    (cache,) = (root / ".decoded").iterdir()
    content = bytearray(cache.read_bytes())
    place = content.index(first.train.pixels.numpy().tobytes())
    content[place] ^= 1
    cache.write_bytes(content)
    assert torch.equal(first.train.pixels, load_dataset("folder", root).train.pixels)
    for other in ({"pixels": 1}, [torch.zeros(2, 3), torch.zeros(1)], [first.train.pixels[:1], first.test.pixels]):
        torch.save(other, cache)
        assert torch.equal(first.train.pixels, load_dataset("folder", root).train.pixels)


def test_a_folder_that_cannot_be_written_to_is_read_without_a_cache(tree, capsys):
    root, _ = tree
    (root / ".decoded").write_text("a file where the cache would be")
    assert len(load_dataset("folder", root).train) == 6
    assert "not cached" in capsys.readouterr().err


def test_image_size_crops_to_a_square_and_resizes(tree):
    root, _ = tree
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = (200, 100, 50)  # the central square
    Image.fromarray(wide).save(root / "train" / "cat" / "0.png")
    with pytest.raises(UsageError, match="differ in size.*--image-size"):
        load_dataset("folder", root)
    dataset = load_dataset("folder", root, 5)
    assert dataset.train.pixels.shape == (6, 5, 5, 3)
    assert (dataset.train.pixels[0, 1:-1, 1:-1] == torch.tensor([200, 100, 50])).all()


def test_grey_images_have_one_channel_and_mixed_ones_three(tree):
    root, pixels = tree
    for path, values in pixels.items():
        Image.fromarray(values[..., 0]).save(path)
    dataset = load_dataset("folder", root)
    assert dataset.channels == 1
    assert (dataset.train.pixels[0, ..., 0].numpy() == pixels[root / "train/cat/0.png"][..., 0]).all()
    Image.fromarray(pixels[root / "test/dog/1.png"]).save(root / "test/dog/1.png")
    dataset = load_dataset("folder", root)
    assert dataset.channels == 3
    grey = dataset.train.pixels[0]
    assert torch.equal(grey, grey[..., :1].expand_as(grey))


def test_digits_are_scikit_learns_in_a_fixed_stratified_split():
    from sklearn.datasets import load_digits

    dataset, again = load_dataset("digits"), load_dataset("digits")
    assert torch.equal(dataset.test.pixels, again.test.pixels)
    assert (len(dataset.train), len(dataset.test), dataset.channels) == (1442, 355, 1)
    assert (dataset.pad, dataset.flip) == (1, False)
    source = load_digits()
    count = lambda array: sorted(map(bytes, np.rint(array * 255 / 16).astype(np.uint8).reshape(-1, 64)))  # noqa: E731
    joined = torch.cat([dataset.train.pixels, dataset.test.pixels]).numpy().reshape(-1, 64)
    assert sorted(map(bytes, joined)) == count(source.images)
    share = dataset.test.labels.bincount() / torch.from_numpy(source.target).bincount()
    assert (share - 0.2).abs().max() < 0.01


def test_processes_that_load_first_at_once_agree(tree):
    root, _ = tree
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                ok = len(load_dataset("folder", root).train) == 6
            except BaseException:
                ok = False
            os._exit(0 if ok else 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert [p.suffix for p in (root / ".decoded").iterdir()] == [".pt"]


def _without_classes(root):
    for split in ("train", "test"):
        for path in (root / split).rglob("*.png"):
            path.unlink()
        for name in ("cat", "dog"):
            (root / split / name).rmdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "train").rename(root / "training"), "train' does not exist"),
        (lambda root: ((root / "train").rename(root / "x"), (root / "train").touch()), "train' is not a directory"),
        (lambda root: (root / "test").rename(root / "testing"), "test' does not exist"),
        (_without_classes, "no folder for each class"),
        (lambda root: [p.unlink() for p in (root / "train/dog").iterdir()], "a class without an image, 'dog'"),
        (lambda root: Image.new("I;16", (8, 8)).save(root / "train/cat/1.png"), "more than 8 bits"),
        (lambda root: (root / "test/dog").rename(root / "test/wolf"), "'dog' is in one only"),
        (lambda root: (root / "train/cat/1.png").write_bytes(b"no image"), "1.png' is not a readable image"),
        (lambda root: (root / "train/cat/1.png").write_bytes((root / "train/cat/1.png").read_bytes()[:60]), "1.png'"),
    ],
)
def test_a_malformed_folder_is_refused_in_one_sentence(tree, damage, words):
    root, _ = tree
    damage(root)
    with pytest.raises(UsageError, match=words) as error:
        load_dataset("folder", root)
    assert "\n" not in str(error.value)
    assert not (root / ".decoded").exists()


def test_images_beyond_half_of_memory_are_mapped_from_a_file(tree, monkeypatch):
    root, _ = tree
    expected = load_dataset("folder", root)
    shutil.rmtree(root / ".decoded")
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 1000}.get)  # bytes; the images take 1,152
    decoded, cached = load_dataset("folder", root), load_dataset("folder", root)
    for found in (decoded, cached):
        assert torch.equal(found.train.pixels, expected.train.pixels)
        assert torch.equal(found.test.pixels, expected.test.pixels)
    assert [path.suffix for path in (root / ".decoded").iterdir()] == [".pt"]
    for path in [*root.glob("t*/*/*.png")]:
        Image.open(path).convert("L").save(path)
    assert load_dataset("folder", root).train.pixels.shape == (6, 8, 8, 1)


def test_an_image_size_beyond_memory_is_refused_before_anything_is_decoded(tree):
    root, _ = tree
    with pytest.raises(UsageError, match="give a smaller --image-size"):
        load_dataset("folder", root, 10**6)


def test_a_file_given_as_the_folder_is_refused(tree):
    root, _ = tree
    with pytest.raises(UsageError, match="--data-dir needs"):
        load_dataset("folder", root / "train" / "cat" / "0.png")


def test_a_folder_without_a_directory_is_refused():
    with pytest.raises(UsageError, match="--data-dir"):
        load_dataset("folder")


def test_cifar_without_a_network_is_refused_with_a_sentence(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(UsageError, match="CIFAR-100 is not in .* could not be downloaded.*--dataset digits") as error:
        load_dataset("cifar100", tmp_path)
    assert "\n" not in str(error.value)
