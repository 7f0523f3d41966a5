"""`load` gives a trained network out of a file alone: the one that was trained, and what it needs to be used."""

import pytest
import torch
from running import FINISHED, same

from experiment.load import load
from imagedata.augment import Normalize, NormalizeImages
from imagedata.sources import load_dataset
from training.checkpoint import load_checkpoint
from utils.errors import UsageError


@pytest.fixture(scope="module")
def run(run_once):
    """A finished run in float32, as a loaded network computes."""
    return run_once(f"{FINISHED} --precision fp32 --val-split 200")


@pytest.fixture
def damage(run, tmp_path):
    """damage(function) writes run's checkpoint, changed by a function, and returns its path."""

    def write(change):
        checkpoint = run.checkpoint()
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        return tmp_path / "checkpoint.pt"

    return write


def test_a_loaded_network_has_the_test_accuracy_of_its_run(run):
    trained = load(run.directory)
    test = load_dataset("digits").test
    assert not trained.model.training
    with torch.inference_mode():
        logits = trained.model(trained.normalize(test.pixels.permute(0, 3, 1, 2)))
    top1 = 100 * (logits.argmax(1) == test.labels).double().mean().item()
    assert top1 == pytest.approx(run.json("result.json")["test_top1"])
    assert trained.metrics["test_top1"] == run.json("result.json")["test_top1"]


def test_a_loaded_network_has_weights_masks_classes_and_flags_of_its_checkpoint(run):
    trained, state = load(str(run.directory / "checkpoint.pt")), run.checkpoint()["state"]
    same(dict(trained.model.state_dict()), dict(state["model"]))
    same(trained.masks.state_dict(), state["pruner"]["masks"])
    assert trained.masks.sparsity() == pytest.approx(0.9, abs=1e-3)
    assert trained.classes == list("0123456789")
    assert trained.args == run.json("args.json")["args"]
    assert trained.metrics == state["rows"][-1]
    assert trained.data["image_shape"] == [1, 8, 8]


def test_a_directory_stands_for_its_last_epoch_and_not_for_its_best(run):
    best = load_checkpoint(run.directory / "best.pt")["state"]["rows"]
    assert load(run.directory / "best.pt").metrics == best[-1]
    assert load(run.directory).metrics["epoch"] == 3


def test_load_needs_no_data_set_and_leaves_random_numbers_alone(run, damage, tmp_path):
    def forget_the_data(checkpoint):
        checkpoint["args"] |= {"dataset": "folder", "data_dir": str(tmp_path / "gone")}
        del checkpoint["data"]["image_shape"]  # as in older ones

    path = damage(forget_the_data)
    before = torch.get_rng_state()
    same(dict(load(path).model.state_dict()), dict(load(run.directory).model.state_dict()))
    assert torch.equal(torch.get_rng_state(), before)


def test_in_the_middle_of_an_epoch_nothing_is_known_of_the_accuracy(damage):
    path = damage(lambda checkpoint: checkpoint["state"].update(partial={"images": 256}))
    assert load(path).metrics == {"epoch": 3}


@pytest.mark.parametrize(
    "change",
    [
        lambda checkpoint: checkpoint["args"].pop("arch"),
        lambda checkpoint: checkpoint["args"].update(depth=9),
        lambda checkpoint: checkpoint["args"].update(width=0.5),
        lambda checkpoint: checkpoint["data"].pop("mean"),
        lambda checkpoint: checkpoint["data"].update(classes=3),
        lambda checkpoint: checkpoint["state"].pop("rows"),
        lambda checkpoint: checkpoint["state"]["model"].popitem(),
        lambda checkpoint: checkpoint["state"]["pruner"]["masks"].update(none=torch.ones(1)),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused_with_a_sentence(damage, change):
    with pytest.raises(UsageError, match="damaged or of another version of this program") as error:
        load(damage(change))
    assert "\n" not in str(error.value)


def test_what_is_no_network_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    for path, words in {
        tmp_path / "absent.pt": "there is no checkpoint",
        tmp_path: "there is no checkpoint '.*checkpoint.pt'",
        tmp_path / "args.json": "is not a whole checkpoint of this program",
    }.items():
        with pytest.raises(UsageError, match=words):
            load(path)
    with pytest.raises(UsageError, match="--device has to be"):
        load(tmp_path, device="tpu")


@pytest.mark.parametrize("channels", [1, 3])
def test_uint8_images_are_normalised_as_in_training_and_floats_close_to_that(channels):
    pixels = torch.randint(0, 256, (5, 8, 6, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    figures = [113.9, 123.0, 125.3][:channels], [66.7, 62.1, 0.3][:channels]
    expected, normalize = Normalize(*figures, torch.device("cpu"))(pixels), NormalizeImages(*figures)
    images = pixels.permute(0, 3, 1, 2)
    assert torch.equal(normalize(images), expected)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(normalize(images.to(dtype) / 255), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.full((2, 3, 8, 8), 255.0), "go from 0 to 1, and these from 255 to 255"),
        (torch.full((2, 3, 8, 8), -2.0), "divide levels by 255 or give them as uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "uint8 or floating point, not torch.int64"),
        (torch.zeros(2, 1, 8, 8), r"\[B, 3, H, W\], not \[2, 1, 8, 8\]"),
        (torch.zeros(2, 8, 8, 3), r"\[B, 3, H, W\], not \[2, 8, 8, 3\]"),
        (torch.zeros(3, 8, 8), r"\[B, 3, H, W\], not \[3, 8, 8\]"),
    ],
)
def test_images_that_would_be_misread_are_refused(images, words):
    with pytest.raises(ValueError, match=words):
        NormalizeImages([120.0] * 3, [60.0] * 3)(images)
