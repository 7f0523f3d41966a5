"""Images that stay in their files: --dataset imagefolder."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from running import before_step, interrupt, same
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from imagedata.augment import Augmentation, Normalize
from imagedata.files import DEVIATION, MEAN
from imagedata.images import fingerprint, hold_out
from imagedata.loaders import EvalLoader, TrainLoader
from imagedata.sources import load_dataset
from utils.distributed import ProcessGroup
from utils.errors import UsageError
from utils.precision import Execution

CPU = torch.device("cpu")
RUN = "--dataset imagefolder --image-size 16 --depth 8 --width 0.25 --batch-size 5 --epochs 2 --data-dir {}"
RUN += " --optmzr sgd-sam --sam-v2 --prune-method rigl --sparsity 0.8 --precision fp32"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Smooth colour images of several sizes and formats, in two classes."""
    root, chance = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                coarse = Image.fromarray(chance.integers(0, 256, (4, 5, 3), dtype=np.uint8))
                image = coarse.resize((30 + index, 24), Image.Resampling.BICUBIC)
                suffix = ("jpg", "png", "bmp")[index % 3]
                image.convert("L" if index == 4 else "RGB").save(root / split / name / f"{index}.{suffix}")
    return root


def loader(data, workers=0, group=ProcessGroup(), **kwargs):
    augmentation = Augmentation(len(data.train), 5, 0, **kwargs)
    return TrainLoader(data.train, augmentation, 2, Normalize(MEAN, DEVIATION, CPU), CPU, workers, Execution(), group)


def assert_same(left, right):
    assert torch.equal(left.inputs, right.inputs)
    assert torch.equal(left.targets, right.targets)


def test_a_training_image_follows_from_seed_epoch_and_index_alone(photos):
    data = load_dataset("imagefolder", photos, 16)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    feeds = [loader(data, workers) for workers in (0, 1, 2)]
    expected = [feeds[0].batch(step) for step in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    for feed in feeds:
        for step in (5, 0, 1, 2, 4):
            assert_same(feed.batch(step), expected[step])
    assert [batch.size for batch in expected] == [5, 5, 2] * 2
    halves = [loader(data, 0, ProcessGroup(rank, 2)).batch(1).inputs for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), expected[1].inputs)
    order = torch.argsort(torch.cat([batch.targets for batch in expected[:3]]).argmax(1), stable=True)
    assert len(order) == 12
    other = TrainLoader(data.train, Augmentation(12, 5, 1), 2, Normalize(MEAN, DEVIATION, CPU), CPU, 0, Execution())
    assert not torch.equal(other.batch(0).inputs, expected[0].inputs)


def test_images_are_cut_as_the_usual_scripts_cut_them(photos):
    """A crop of random area and shape for training; the centre of a larger image for evaluation."""
    data = load_dataset("imagefolder", photos, 16)
    path = photos / "val" / "dog" / "1.png"
    image = v2.functional.pil_to_tensor(Image.open(path))
    expected = v2.Compose([v2.Resize(18), v2.CenterCrop(16)])(image).permute(1, 2, 0)
    assert torch.equal(data.test.load()[4], expected)
    batches = list(EvalLoader(data.test, 4, Normalize(MEAN, DEVIATION, CPU), CPU, workers=2))
    assert [len(labels) for _, labels in batches] == [4, 2]
    found = batches[1][0][0] * torch.tensor(DEVIATION)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    torch.testing.assert_close(found.permute(1, 2, 0), data.test.load()[4].float(), rtol=0, atol=1e-2)
    grey = data.train.load()[4]
    assert torch.equal(grey, grey[..., :1].expand_as(grey))
    rows = [loader(data).batch(step).inputs for step in range(3)]
    assert torch.cat(rows).shape == (12, 3, 16, 16)


def test_the_list_of_files_is_cached_until_a_directory_changes(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".listed"))
    first = load_dataset("imagefolder", root, 16)
    files = {path: path.stat().st_mtime_ns for path in (root / ".listed").iterdir()}
    assert {path.name for path in files} == {"train.pt", "val.pt"}
    again = load_dataset("imagefolder", root, 16)
    assert {path: path.stat().st_mtime_ns for path in (root / ".listed").iterdir()} == files
    assert fingerprint(first) == fingerprint(again)
    (root / "train" / "cat" / "0.jpg").rename(root / "train" / "cat" / "9.jpg")
    changed = load_dataset("imagefolder", root, 16)
    assert changed.train.name(5) == b"cat/9.jpg"
    assert fingerprint(changed) != fingerprint(first)
    held = hold_out(first, 4, seed=0)
    names = [{part.name(index) for index in range(len(part))} for part in (held.train, held.val, first.train)]
    assert names[0] | names[1] == names[2]
    assert len(names[1]) == 4


def test_any_file_name_is_read_and_what_tools_leave_is_not(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    os.rename(root / "val" / "cat" / "0.jpg", os.fsencode(root / "val" / "cat") + b"/caf\xe9\n.jpg")
    (root / "val" / "cat" / "._1.jpg").write_bytes(b"resource fork")
    (root / "val" / ".cache").mkdir()
    data = load_dataset("imagefolder", root, 16)
    assert {data.test.name(index) for index in range(3)} == {b"cat/1.png", b"cat/2.bmp", b"cat/caf\xe9\n.jpg"}
    assert len(data.test.load()) == 6


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def dangle(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("name", "damage"),
    [("2.bmp", lambda path: path.write_bytes(b"no image")), ("1.png", flip_a_bit), ("0.jpg", dangle)],
    ids=["no image", "damaged PNG", "dangling link"],
)
def test_a_damaged_image_ends_a_run_with_its_name(photos, tmp_path, train, name, damage, workers):
    root = shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".listed"))
    damage(root / "train" / "dog" / name)
    bad = train(f"{RUN.format(root)} --workers {workers}", short=False)
    assert bad.code == 2
    assert f"{name}' is not a readable image" in bad.err.splitlines()[-1]
    assert "Traceback" not in bad.err


def test_the_first_of_several_pictures_in_a_file_is_taken(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        frames[0].save(tmp_path / split / "cat" / "0.jpg", format="GIF", save_all=True, append_images=frames[1:])
    pixels = load_dataset("imagefolder", tmp_path, 16).test.load()
    assert torch.equal(pixels, torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, 16, 16, 3))


def noting_workers(begun, make=DataLoader.__init__):
    """DataLoader.__init__, which also notes its number of workers."""

    def noting(self, *args, num_workers=0, **kwargs):
        begun.append(num_workers)
        make(self, *args, num_workers=num_workers, **kwargs)

    return noting


def test_a_run_on_files_resumes_bit_for_bit_with_any_number_of_workers(photos, train, monkeypatch):
    flags = f"{RUN.format(photos)} --augment randaugment --random-erasing 0.5 --cutmix --mixup --val-split 2"
    whole = train(f"{flags} --workers 0", "whole", short=False)
    assert whole.code == 0, whole.err
    assert "in files that are recognised by their names and sizes" in whole.out
    with before_step(2, interrupt):
        assert train(f"{flags} --workers 2", "cut", short=False).code == 130
    resumed = train(f"{flags} --workers 1 --resume auto", "cut", short=False)
    assert resumed.code == 0, resumed.err
    same(whole.checkpoint()["state"], resumed.checkpoint()["state"])
    assert whole.json("args.json")["args"]["image_size"] == 16
    for flags, workers in (("", None), ("--workers 0", 0), ("--workers 1", 1)):
        begun = []
        monkeypatch.setattr(DataLoader, "__init__", noting_workers(begun))
        again = train(f"--evaluate {whole.directory}/checkpoint.pt {flags}", None, short=False)
        assert f"test top-1 {whole.json('result.json')['test_top1']:.2f}%" in again.out
        assert workers is None or sum(begun) == workers


def test_files_without_a_directory_or_of_other_classes_are_refused(photos, tmp_path):
    with pytest.raises(UsageError, match="imagefolder needs --data-dir"):
        load_dataset("imagefolder")
    with pytest.raises(UsageError, match="train' does not exist"):
        load_dataset("imagefolder", tmp_path)
