"""Data sets from real files."""

import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from imagedata.sources import DATASETS, load_dataset
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


@pytest.mark.parametrize("dataset", ["folder", "imagefolder"])
def test_a_directory_that_cannot_be_listed_is_refused_and_not_left_out(tree, monkeypatch, dataset):
    root, _ = tree
    shutil.copytree(root / "train" / "cat", root / "train" / "cat" / "more")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        with pytest.raises(UsageError, match=r"more' cannot be read \(Permission denied\)"):
            load_dataset(dataset, root, 8)
    assert len(load_dataset(dataset, root, 8).train) == 9


def test_images_that_cannot_be_cached_are_trained_on_even_so(tree, capsys, monkeypatch):
    """Of a full disk torch's writer tells by a RuntimeError; and what is cached has no second copy in memory."""
    root, _ = tree

    def full(value, file):
        assert not hasattr(file, "getbuffer")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    assert len(load_dataset("folder", root).train) == 6
    assert "not cached" in capsys.readouterr().err


def test_one_process_at_a_time_downloads_a_data_set(tmp_path, monkeypatch):
    """Threads stand for processes: each opens the lock by itself."""
    inside, most = [], []

    def cifar(root, train, download):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", cifar)

    def load():
        with pytest.raises(UsageError, match="could not be downloaded"):
            load_dataset("cifar10", tmp_path / "data")

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
    assert not list(tmp_path.iterdir())


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


def facts(name):
    """Return classes, channels and side of a data set, as they are known without it."""
    return DATASETS[name].classes, DATASETS[name].channels, DATASETS[name].side


def test_what_is_known_of_data_sets_is_kept():
    digits = load_dataset("digits")
    assert (*facts("digits"), facts("digits")[-1]) == (len(digits.classes), *digits.image_shape)
    assert [facts(name) for name in ("cifar10", "cifar100", "tinyimagenet")] == [
        (10, 3, 32),
        (100, 3, 32),
        (200, 3, 64),
    ]
    from torchvision.transforms import AutoAugmentPolicy

    policies = {name: source.policies for name, source in DATASETS.items() if source.policies != "IMAGENET"}
    assert policies == {"cifar10": "CIFAR10", "cifar100": "CIFAR10", "svhn": "SVHN"}  # where each was learnt
    assert all(hasattr(AutoAugmentPolicy, source.policies) for source in DATASETS.values())


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


@pytest.mark.parametrize("name", ["mnist", "fashionmnist", "svhn"])
def test_data_sets_without_a_network_are_refused_with_what_to_put_where(tmp_path, monkeypatch, name):
    def no_network(*args, **kwargs):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UsageError, match="could not be downloaded.*put .* there.*--dataset digits") as error:
        load_dataset(name, tmp_path)
    assert "\n" not in str(error.value)


def test_cifar_without_a_network_is_refused_with_a_sentence(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(UsageError, match="CIFAR-100 is not in .* could not be downloaded.*--dataset digits") as error:
        load_dataset("cifar100", tmp_path)
    assert "\n" not in str(error.value)


def idx(path, array):
    """Write an array as MNIST has it: type, dimensions, sizes, bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


@pytest.mark.parametrize(("name", "place", "flip"), [("mnist", "MNIST", False), ("fashionmnist", "FashionMNIST", True)])
def test_mnist_and_fashionmnist_are_read_from_the_files_of_torchvision(tmp_path, name, place, flip):
    chance = np.random.default_rng(0)
    raw, written = tmp_path / place / "raw", {}
    raw.mkdir(parents=True)
    for split, count in (("train", 20), ("t10k", 10)):
        written[split] = chance.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        idx(raw / f"{split}-images-idx3-ubyte", written[split])
        idx(raw / f"{split}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    data = load_dataset(name, tmp_path)
    assert np.array_equal(data.train.pixels[..., 0].numpy(), written["train"])
    assert np.array_equal(data.test.pixels[..., 0].numpy(), written["t10k"])
    assert data.test.labels.tolist() == list(range(10))
    assert (data.channels, data.pad, data.flip, len(data.classes)) == (1, 2, flip, 10)
    assert (*facts(name), facts(name)[-1]) == (10, *data.image_shape)
    assert data.test.labels.dtype == torch.int64


def test_svhn_is_read_from_the_files_of_torchvision_and_verified(tmp_path, monkeypatch):
    import hashlib

    from scipy.io import savemat
    from torchvision.datasets import SVHN

    chance, written, known = np.random.default_rng(0), {}, {}
    for split, count in (("train", 20), ("test", 10)):
        written[split] = chance.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        path = tmp_path / f"{split}_32x32.mat"
        savemat(path, {"X": written[split], "y": np.arange(1, count + 1)[:, None] % 10 + 1})
        known[split] = ["https://nowhere.invalid/", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", known)
    data = load_dataset("svhn", tmp_path)
    assert np.array_equal(data.train.pixels.permute(1, 2, 3, 0).numpy(), written["train"])
    assert data.test.labels.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert (data.channels, data.flip, data.classes) == (3, False, [str(digit) for digit in range(10)])
    assert (*facts("svhn"), facts("svhn")[-1]) == (10, *data.image_shape)
    path.write_bytes(b"damaged")
    with pytest.raises(UsageError, match="SVHN is not in .* put 'train_32x32.mat' and 'test_32x32.mat' there"):
        load_dataset("svhn", tmp_path)


@pytest.fixture
def tiny(tmp_path):
    """TinyImageNet as it is unpacked, of two classes and few images."""
    chance = np.random.default_rng(0)
    for name in ("n01", "n02"):
        (tmp_path / "train" / name / "images").mkdir(parents=True)
        (tmp_path / "train" / name / f"{name}_boxes.txt").touch()
        for index in range(3):
            pixels = chance.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / "images" / f"{name}_{index}.JPEG", "JPEG")
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "test" / "images").mkdir(parents=True)
    lines = []
    for index, name in enumerate(("n02", "n01", "n02")):
        pixels = np.full((64, 64, 3), 10 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "val" / "images" / f"val_{index}.JPEG", "JPEG")
        lines.append(f"val_{index}.JPEG\t{name}\t0\t0\t62\t62\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


def test_tiny_imagenet_is_read_as_it_is_unpacked(tiny):
    data = load_dataset("tinyimagenet", tiny)
    assert data.classes == ["n01", "n02"]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [1, 0, 1]
    assert data.test.pixels[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert data.image_shape == (3, 64, 64)


@pytest.mark.parametrize("content", ["val_0.JPEG\tn03\n", "val_0.JPEG\n", "", None])
def test_tiny_imagenet_without_its_annotations_is_refused(tiny, content):
    path = tiny / "val" / "val_annotations.txt"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UsageError, match="does not say the class of each image"):
        load_dataset("tinyimagenet", tiny)
    with pytest.raises(UsageError, match="tinyimagenet needs --data-dir"):
        load_dataset("tinyimagenet")


@pytest.mark.parametrize("name", ["folder", "imagefolder"])
def test_one_class_and_classes_of_one_image_are_told(tree, capsys, name):
    root, _ = tree
    load_dataset(name, root, 8)
    assert "warning" not in capsys.readouterr().err
    for index in (1, 2):
        (root / "train" / "dog" / f"{index}.png").unlink()
    load_dataset(name, root, 8)
    assert f"warning: 'dog' in '{root}/train' has one image" in capsys.readouterr().err
    for split in ("train", "test"):
        shutil.rmtree(root / split / "dog")
    load_dataset(name, root, 8)
    assert "has one class, 'cat': there is nothing to tell apart" in capsys.readouterr().err
