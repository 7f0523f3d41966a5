"""Images from files are measured in turns, each pipeline with its own workers alone."""

import multiprocessing

import numpy as np
import pytest
from PIL import Image

from benchmarks import images
from benchmarks.images import main

SMALL = "--batches 1 --batch-size 2 --image-size 16".split()


@pytest.fixture
def photos(tmp_path):
    chance = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = chance.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.jpg")
    return tmp_path


def test_both_pipelines_take_turns_without_the_workers_of_the_other(photos, monkeypatch, capsys):
    monkeypatch.setattr(images, "share_of_loading", lambda side, turns: 0.5)  # which trains ResNet-20
    begun, others = [], set(multiprocessing.active_children())

    def noting(way, begin):
        def noted(*args):
            begun.append((way, set(multiprocessing.active_children()) - others))
            return begin(*args)

        return noted

    for way in ("pipeline", "usual_script"):
        monkeypatch.setattr(images, way, noting(way, getattr(images, way)))
    assert main(["--data-dir", str(photos), *SMALL, "--turns", "2", "--workers", "1"]) == 0
    assert [way for way, _ in begun] == ["pipeline", "usual_script", "usual_script", "pipeline"]
    assert not any(workers for _, workers in begun)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("decoding alone, one core: ")
    assert printed[1].startswith("1 workers: ")
    assert printed[2] == "32 pixels in memory: making a batch takes 50.0% of a step"


def test_images_that_are_no_jpegs_are_refused(photos, capsys):
    for path in photos.rglob("*.jpg"):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    assert main(["--data-dir", str(photos), *SMALL]) == 2
    assert capsys.readouterr().err.endswith(
        "has images that are not JPEGs, which are what this measures: name others\n"
    )
