"""Whole runs in several processes: they train the network that one process trains, and end together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import FORKS, launch, wait_for
from running import ROOT, before_step, scalars

pytestmark = FORKS

# No batch norm, whose statistics are of a share. In batches of 131 the last of 656 images is alone, and the second process
# has none of it; 618 images make batches of 103, which is odd.
VIT = "--arch vit --depth 1 --width 0.34 --dataset digits --epochs 1 --lr 0.05 --log-interval 5 --precision fp32 --compile off"
CONV = "--dataset digits --depth 8 --width 0.25 --batch-size 128 --log-interval 4 --precision fp32 --compile off"
STATIC, RIGL = "--prune-method random --sparsity 0.5", "--prune-method rigl --sparsity 0.5 --update-interval 3"


def state_of(directory: Path) -> dict:
    return torch.load(directory / "checkpoint.pt", weights_only=True)["state"]


def codes(outcome: list[tuple[int, str]]) -> list[int]:
    return [code for code, _ in outcome]


def terminate(state: object) -> None:
    signal.raise_signal(signal.SIGTERM)


def assert_close(left: dict, right: dict) -> None:
    """Compare weights, and masks to the last bit."""
    for name, tensor in left["model"].items():
        torch.testing.assert_close(tensor, right["model"][name], rtol=2e-4, atol=2e-6, msg=name)
    masks = (left["pruner"]["masks"], right["pruner"]["masks"])
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    assert left["rows"][-1]["train_loss"] == pytest.approx(right["rows"][-1]["train_loss"], rel=1e-5)
    assert left["rows"][-1]["test_loss"] == pytest.approx(right["rows"][-1]["test_loss"], rel=1e-4)
    assert left["rows"][-1]["test_top1"] == pytest.approx(right["rows"][-1]["test_top1"], abs=0.6)  # two images
    assert left["training_flops"] == right["training_flops"]


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, f"--optmzr sgd {RIGL} --batch-size 103"),
        (2, f"--optmzr sgd-sam {RIGL} --batch-size 131"),
        (2, f"--optmzr sgd-sam --sam-v2 {RIGL} --batch-size 103"),
        (2, "--optmzr sgd-sam --sam-v2 --prune-method snfs --sparsity 0.5 --update-interval 3 --batch-size 131"),
        (2, "--optmzr sgd-cram --batch-size 131"),
        (2, f"--optmzr sgd-sam --sam-v2 --sam-direction random --sam-unmasked {STATIC} --batch-size 131"),
        (3, "--optmzr sgd-sam --sam-v2 --batch-size 131 --mixup --nonfinite skip"),
        (3, "--optmzr sgd-sam --sam-v2 --batch-size 131 --mixup --workers 1"),
        (3, "--optmzr sgd-sam --sam-v2 --batch-size 131 --accumulate 3 --clip-grad 0.5 --smooth-eps 0.1"),
    ],
)
def test_several_processes_train_the_network_that_one_trains(tmp_path, world, flags):
    images = 656 if flags.split("--batch-size ")[1].startswith("131") else 618
    for number in (1, world):
        outcome = launch(f"{VIT} --train-images {images} {flags}", number, tmp_path / str(number))
        assert codes(outcome) == [0] * number, outcome
    assert {text for _, text in outcome[1:]} == {""}  # only the first process says anything
    assert_close(state_of(tmp_path / "1"), state_of(tmp_path / str(world)))
    one, several = (scalars(tmp_path / str(number)) for number in (1, world))
    for tag in filter(lambda tag: tag.startswith("optimizer/"), one):
        assert [value for _, value in several[tag]] == pytest.approx(
            [value for _, value in one[tag]], rel=2e-3, abs=2e-4
        )


def test_weights_without_a_gradient_stay_where_they_are_in_several_processes_too(tmp_path):
    """Frozen ones and ones that the loss does not use: weight decay moves what has a gradient."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n\n"
        "class Network(nn.Module):\n"
        "    def __init__(self, num_classes, channels, size):\n"
        "        super().__init__()\n"
        "        self.frozen, self.unused, self.last = nn.Linear(64, 16), nn.Linear(64, 2), nn.Linear(16, num_classes)\n"
        "        self.frozen.requires_grad_(False)\n\n"
        "    def forward(self, x):\n"
        "        return self.last(self.frozen(x.flatten(1)).relu())\n"
    )
    flags = f"--arch {file}:Network --dataset digits --epochs 1 --train-images 656 --batch-size 131 --weight-decay 0.1 --precision fp32"
    for number in (1, 2):
        outcome = launch(f"{flags} --compile off", number, tmp_path / str(number))
        assert codes(outcome) == [0] * number, outcome
    one, two = (state_of(tmp_path / str(number))["model"] for number in (1, 2))
    torch.manual_seed(0)
    for name, layer in (("frozen", torch.nn.Linear(64, 16)), ("unused", torch.nn.Linear(64, 2))):
        assert torch.equal(one[f"{name}.weight"], layer.weight)
        assert torch.equal(two[f"{name}.weight"], layer.weight)
    torch.testing.assert_close(one["last.weight"], two["last.weight"], rtol=2e-4, atol=2e-6)


def test_synchronised_batch_norm_keeps_all_processes_the_same(tmp_path):
    """As the run compares itself after every epoch; with empty shares and parts, and statistics estimated anew."""
    flags = f"{CONV} --optmzr sgd-sam {STATIC} --epochs 1 --lr 0.02 --batch-size 131 --accumulate 2"
    outcome = launch(f"{flags} --sync-bn --recalibrate-bn", 2, tmp_path / "run")
    assert codes(outcome) == [0, 0], outcome
    assert 0 <= json.loads((tmp_path / "run" / "result.json").read_text())["test_top1_recalibrated_bn"] <= 100


def test_synchronised_batch_norm_needs_one_image_per_process(tmp_path):
    """42 images in batches of 20: of the last two each process has one, of one pixel in the end."""
    flags = "--dataset digits --arch vgg --depth 16 --width 0.05 --train-images 42 --batch-size 20 --epochs 1 --precision fp32"
    alone, synchronised = (launch(f"{flags} {more}", 2, tmp_path / f"run{more}") for more in ("", "--sync-bn"))
    assert alone[0][0] == 2
    assert "1 image" in alone[0][1]
    assert synchronised == [(0, ""), (0, "")]


def test_batch_norm_that_each_process_estimates_anew_needs_images_of_its_own_for_it(tmp_path):
    flags = "--dataset digits --arch vgg --depth 16 --width 0.05 --train-images 42 --batch-size 20 --epochs 1 --precision fp32"
    outcome = launch(f"{flags} --sync-bn --recalibrate-bn", 2, tmp_path / "run")
    assert outcome[0][0] == 2
    assert "1 image of this size cannot be batch-normalised" in outcome[0][1]
    assert not (tmp_path / "run").exists()


def test_local_perturbations_change_the_weights_in_all_processes_alike(tmp_path):
    """The run itself compares the weights of its processes after every epoch."""
    flags = f"{CONV} --epochs 1 --optmzr sgd-sam --sam-rho 0.5 {STATIC}"
    for name in ("", "--sam-local"):
        outcome = launch(f"{flags} {name}", 2, tmp_path / f"run{name}")
        assert codes(outcome) == [0, 0], outcome
    one, other = state_of(tmp_path / "run"), state_of(tmp_path / "run--sam-local")
    assert not torch.equal(one["model"]["classifier.weight"], other["model"]["classifier.weight"])


def test_a_difference_between_processes_is_found_and_named(tmp_path):
    @torch.no_grad()
    def move(state):
        state.model.stage2[0].conv1.weight[0, 0, 0, 0] += 1e-7

    spoil = lambda rank: before_step(7, move) if rank else nullcontext()  # noqa: E731
    outcome = launch(f"{CONV} --epochs 1", 2, tmp_path / "run", around=spoil)
    assert codes(outcome) == [1, 1], outcome
    for _, text in outcome:
        assert "process 1 has another 'model." in text
        assert "Traceback" not in text
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("further", "name"),
    [
        ("--log-interval 5", "flags.log_interval"),
        ("--recalibrate-bn", "flags.recalibrate_bn"),
        ("--data-dir {other}", "data.fingerprint"),
    ],
)
def test_processes_that_were_launched_differently_are_refused(tmp_path, further, name):
    for place, shade in (("data", 1), ("other", 2)):
        for folder in ("train/x", "train/y", "test/x", "test/y"):
            (tmp_path / place / folder).mkdir(parents=True)
            Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / place / folder / "0.png")
    further = further.format(other=tmp_path / "other")
    flags = f"{CONV} --epochs 1 --dataset folder --data-dir {tmp_path / 'data'}"
    outcome = launch(flags, 2, tmp_path / "run", further=lambda rank: further if rank else "")
    assert codes(outcome) == [1, 1], outcome
    for _, text in outcome:
        assert f"process 1 has another '{name}' than process 0" in text
        assert sum(not line.startswith("warning:") for line in text.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_gone_ends_the_others_with_a_sentence(tmp_path):
    vanish = lambda rank: before_step(7, lambda state: os._exit(9)) if rank else nullcontext()  # noqa: E731
    outcome = launch(f"{CONV} --epochs 1", 2, tmp_path / "run", around=vanish)
    assert codes(outcome) == [1, 9], outcome
    assert outcome[0][1].startswith("error: another process of this training is gone")
    assert outcome[0][1].count("\n") == 1


def test_bad_flags_are_reported_once(tmp_path):
    outcome = launch(f"{CONV} --epochs 0", 2, tmp_path / "run")
    assert codes(outcome) == [2, 2]
    assert "argument --epochs" in outcome[0][1]
    assert outcome[1][1] == ""


def test_the_first_process_reports_what_only_it_finds_wrong(tmp_path):
    (tmp_path / "file").touch()
    flags = f"{CONV} --epochs 1 --output-dir {tmp_path}/file/run"
    first, second = launch(flags, 2, tmp_path / "run")
    assert first[0] == 2
    assert "file/run" in first[1]
    assert second == (-signal.SIGKILL, "")  # by the launcher, while it waits for the first
    assert "Traceback" not in first[1]


def test_another_process_reports_what_only_it_finds_wrong(tmp_path):
    further = f"--dataset folder --data-dir {tmp_path}/nowhere"
    _, second = launch(f"{CONV} --epochs 1", 2, tmp_path / "run", further=lambda rank: further if rank else "")
    assert second[0] == 2
    assert second[1].startswith("process 1: error: ")
    assert second[1].count("\n") == 1
    assert "nowhere" in second[1]


def test_a_signal_to_one_process_ends_all_and_another_number_can_go_on(tmp_path):
    flags = f"{CONV} --epochs 2 --optmzr sgd-sam --sam-v2 {RIGL}"
    interrupt = lambda rank: before_step(13, terminate) if rank else nullcontext()  # noqa: E731
    outcome = launch(flags, 2, tmp_path / "run", around=interrupt)
    assert codes(outcome) == [75, 75], outcome
    assert state_of(tmp_path / "run")["global_step"] == 16  # the next logged step
    shutil.copytree(tmp_path / "run", tmp_path / "three")
    for name, world in (("run", 2), ("three", 3), ("whole", 2)):
        outcome = launch(f"{flags} --resume auto", world, tmp_path / name)
        assert codes(outcome) == [0] * world, outcome
    one, other, three = (state_of(tmp_path / name) for name in ("run", "whole", "three"))
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in one["model"].items())
    assert three["rows"][0] == one["rows"][0]
    assert three["global_step"] == one["global_step"]


def test_a_signal_to_a_process_that_saves_waits_for_the_next_logged_step(tmp_path):
    @contextmanager
    def signal_in_save():
        save = torch.save

        def interrupted(value, file):
            save(value, file)
            if value["state"]["global_step"] == 12:
                terminate(value)

        torch.save = interrupted
        yield

    outcome = launch(
        f"{CONV} --epochs 2", 2, tmp_path / "run", around=lambda rank: nullcontext() if rank else signal_in_save()
    )
    assert codes(outcome) == [75, 75], outcome
    assert state_of(tmp_path / "run")["global_step"] == 16


def test_a_run_with_synchronised_batch_norm_goes_on_in_one_process(tmp_path):
    flags = f"{CONV} --optmzr sgd-sam --epochs 1 --sync-bn"
    both = launch(f"{flags} --log-interval 1", 2, tmp_path / "run", around=lambda rank: before_step(5, terminate))
    assert codes(both) == [75, 75], both
    assert codes(launch(f"{flags} --resume auto", 1, tmp_path / "run")) == [0]
    assert len(state_of(tmp_path / "run")["rows"]) == 1


def test_a_run_with_local_perturbations_goes_on_only_in_as_many_processes(tmp_path):
    flags = f"{CONV} --optmzr sgd-sam --epochs 1 --sam-local"
    both = launch(f"{flags} --log-interval 1", 2, tmp_path / "run", around=lambda rank: before_step(5, terminate))
    assert codes(both) == [75, 75], both
    (alone,) = launch(f"{flags} --resume auto", 1, tmp_path / "run")
    assert alone[0] == 2
    assert "go on in 2 processes as before" in alone[1]
    assert codes(launch(f"{flags} --resume auto", 2, tmp_path / "run")) == [0, 0]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["processes"] == 2


def test_processes_do_not_outlive_the_torchrun_that_launched_them(tmp_path):
    """The one test with the real torchrun."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "main_prune_train.py",
    ]
    command += [*f"{CONV} --epochs 500".split(), "--output-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "checkpoint.pt", lambda: process.poll() is None)
    process.kill()
    out, err = process.communicate(timeout=60)  # until the last one that holds these pipes is gone
    assert "2 processes" in out.splitlines()[0]
    assert "ended by SIGTERM" in err
    steps = int(re.search(r"after step ([\d,]+) with a checkpoint", err)[1].replace(",", ""))
    assert state_of(tmp_path / "run")["global_step"] == steps > 12


def test_evaluation_in_several_processes_is_refused(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    bad = train("--evaluate missing.pt", None, short=False)
    assert (bad.code, bad.err) == (2, "error: --evaluate takes one process: leave torchrun out\n")


def test_a_number_of_processes_that_is_no_number_is_refused(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "x")
    bad = train("--epochs 1")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "WORLD_SIZE in the environment has to be a number" in bad.err


def test_more_processes_than_gpus_are_refused_unless_no_cuda_is_given(train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    bad = train("--epochs 1")
    sentence = "error: there are 2 GPUs for 3 processes: launch fewer, or give --device cpu\n"
    assert (bad.code, bad.err) == (2, sentence)
    assert train("--epochs 1 --no-cuda --compile off").code == 0


def test_one_gpu_for_all_processes_is_refused(train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    bad = train("--epochs 1 --device cuda:1")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "--device cuda:1 names one GPU for 2 processes" in bad.err
