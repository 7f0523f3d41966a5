"""Two processes train what one trains."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from running import before_step, wait_for
from torch import nn

import main_prune_train
from training.batch_norm import synchronise
from training.checkpoint import CheckpointWriter
from training.step import TrainingStep
from utils.distributed import ProcessGroup

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")

# No batch norm, whose statistics are of a share. 1,442 images: in batches of 131 the last one is a single image, of which
# the second process has none; in batches of 103 all are even but for the parity.
VIT = "--arch vit --depth 1 --width 0.34 --dataset digits --epochs 1 --lr 0.05 --log-interval 5 --precision fp32 --compile off"
CONV = "--dataset digits --depth 8 --width 0.25 --batch-size 128 --log-interval 4 --precision fp32 --compile off"


def launch(flags: str, world: int, directory: Path, before=lambda rank: "") -> list[tuple[int, str]]:
    """main_prune_train.py in so many forked processes, as torchrun would. Returns their exit codes and stderr.

    Args:
        before: what happens in a process, by rank, before it trains; it may return further flags.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        process = os.fork()
        if process:
            children.append(process)
            continue
        code = 99
        try:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.stderr = open(f"{directory}.{rank}.log", "w", buffering=1)  # noqa: SIM115
            further = before(rank) or ""
            code = main_prune_train.main([*flags.split(), "--output-dir", str(directory), *further.split()])
        finally:
            os._exit(code)
    codes, deadline = dict.fromkeys(children), time.monotonic() + 120
    while None in codes.values():
        for process in [p for p, code in codes.items() if code is None]:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > deadline:  # torchrun ends the others where one fails
            time.sleep(1.5)
            for process in [p for p, code in codes.items() if code is None]:
                done, status = os.waitpid(process, os.WNOHANG)
                if not done:
                    os.kill(process, signal.SIGKILL)
                    _, status = os.waitpid(process, 0)
                codes[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [(codes[p], Path(f"{directory}.{rank}.log").read_text()) for rank, p in enumerate(children)]


def torchrun(flags: str, directory: Path) -> subprocess.Popen:
    """main_prune_train.py in two processes that torchrun launches."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "main_prune_train.py",
    ]
    command += [*flags.split(), "--output-dir", str(directory)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def state_of(directory: Path) -> dict:
    return torch.load(directory / "checkpoint.pt", weights_only=True)["state"]


def close(left: dict, right: dict) -> None:
    """Weights, and masks to the last bit."""
    for name, tensor in left["model"].items():
        torch.testing.assert_close(tensor, right["model"][name], rtol=2e-4, atol=2e-6, msg=name)
    masks = (left["pruner"]["masks"], right["pruner"]["masks"])
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    assert left["rows"][-1]["train_loss"] == pytest.approx(right["rows"][-1]["train_loss"], rel=1e-5)
    assert left["rows"][-1]["test_loss"] == pytest.approx(right["rows"][-1]["test_loss"], rel=1e-4)
    assert left["rows"][-1]["test_top1"] == pytest.approx(right["rows"][-1]["test_top1"], abs=0.6)  # two images
    assert left["training_flops"] == right["training_flops"]


STATIC, RIGL = "--prune-method random --sparsity 0.5", "--prune-method rigl --sparsity 0.5 --update-interval 3"


@pytest.mark.parametrize("batch", [103, 131])
@pytest.mark.parametrize("sparse", [STATIC, RIGL], ids=["static", "rigl"])
@pytest.mark.parametrize("arm", ["--optmzr sgd", "--optmzr sgd-sam", "--optmzr sgd-sam --sam-v2"])
def test_two_processes_agree_with_one(tmp_path, arm, sparse, batch):
    flags = f"{VIT} {arm} {sparse} --batch-size {batch}"
    for world in (1, 2):
        outcome = launch(flags, world, tmp_path / str(world))
        assert [code for code, _ in outcome] == [0] * world, outcome
    assert outcome[1][1] == ""  # only the first process says anything
    close(state_of(tmp_path / "1"), state_of(tmp_path / "2"))


@pytest.mark.parametrize(
    "flags", ["--mixup", "--accumulate 3 --clip-grad 0.5 --smooth-eps 0.1", "--workers 1 --mixup", "--nonfinite skip"]
)
def test_so_they_do_with_other_flags(tmp_path, flags):
    flags = f"{VIT} --optmzr sgd-sam --sam-v2 --batch-size 131 {flags}"
    for world in (1, 3):
        outcome = launch(flags, world, tmp_path / str(world))
        assert [code for code, _ in outcome] == [0] * world, outcome
    close(state_of(tmp_path / "1"), state_of(tmp_path / "3"))


@pytest.mark.parametrize("size", [7, 1, 0])
def test_synchronised_batch_norm_is_that_of_the_whole_batch(tmp_path, size):
    """Output, gradients and statistics in float64, against torch's own layer on all images."""

    def build():
        torch.manual_seed(0)
        layer = nn.BatchNorm2d(3).double()
        layer.num_batches_tracked = None
        nn.init.normal_(layer.weight)
        return (
            layer,
            torch.randn(size, 3, 2, 2, dtype=torch.float64, requires_grad=True),
            torch.randn(size, 3, 2, 2).double(),
        )

    def inside(rank):
        torch.distributed.init_process_group("gloo")
        layer, inputs, slope = build()
        synchronise(layer)
        group = ProcessGroup(rank, 2)
        share = group.share(inputs.detach()).requires_grad_()
        out = layer(share)
        (out * group.share(slope)).sum().backward()
        sums = [layer.weight.grad, layer.bias.grad]
        for grad in sums:
            group.add(grad)
        torch.save([out.detach(), share.grad, *sums, layer.running_mean, layer.running_var], tmp_path / f"{rank}.pt")
        os._exit(0)

    assert [code for code, _ in launch("", 2, tmp_path / "run", inside)] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    layer, inputs, slope = build()
    if size:
        out = layer(inputs)
        (out * slope).sum().backward()
        expected = [
            out.detach(),
            inputs.grad,
            layer.weight.grad,
            layer.bias.grad,
            layer.running_mean,
            layer.running_var,
        ]
    else:
        none = torch.zeros(0, 3, 2, 2)
        expected = [none, none, torch.zeros(3), torch.zeros(3), layer.running_mean, layer.running_var]
    for number, tensor in enumerate(expected):
        found = torch.cat([part[number] for part in parts]) if number < 2 else parts[0][number]
        torch.testing.assert_close(found, tensor.double(), rtol=1e-9, atol=1e-12)
        assert number < 2 or torch.equal(parts[0][number], parts[1][number])


def test_a_run_with_synchronised_batch_norm_keeps_all_processes_the_same(tmp_path):
    """As it compares itself after every epoch; with empty shares and parts, and statistics estimated anew."""
    flags = f"{CONV} --optmzr sgd-sam {STATIC} --epochs 2 --lr 0.02 --batch-size 131 --accumulate 2"
    outcome = launch(f"{flags} --sync-bn --recalibrate-bn", 2, tmp_path / "run")
    assert [code for code, _ in outcome] == [0, 0], outcome
    assert 0 <= json.loads((tmp_path / "run" / "result.json").read_text())["test_top1_recalibrated_bn"] <= 100


def test_local_perturbations_leave_the_weights_the_same_and_do_something(tmp_path):
    """That weights are the same everywhere is compared by the run itself, after every epoch."""
    flags = f"{CONV} --epochs 2 --optmzr sgd-sam --sam-rho 0.5 {STATIC}"
    for name in ("", "--sam-local"):
        outcome = launch(f"{flags} {name}", 2, tmp_path / f"run{name}")
        assert [code for code, _ in outcome] == [0, 0], outcome
    one, other = state_of(tmp_path / "run"), state_of(tmp_path / "run--sam-local")
    assert not torch.equal(one["model"]["classifier.weight"], other["model"]["classifier.weight"])
    alone = launch(f"{flags} --sam-local", 1, tmp_path / "alone")
    assert alone[0][0] == 2
    assert "--sam-local has no effect in one process" in alone[0][1]


def test_a_difference_between_processes_is_found_and_named(tmp_path):
    @torch.no_grad()
    def move(state):
        state.model.stage2[0].conv1.weight[0, 0, 0, 0] += 1e-7

    def spoil(rank):
        if rank:
            TrainingStep.__call__ = before_step(7, move)

    outcome = launch(f"{CONV} --epochs 1", 2, tmp_path / "run", spoil)
    assert [code for code, _ in outcome] == [1, 1], outcome
    for _, text in outcome:
        assert "process 1 has another 'model." in text
        assert "Traceback" not in text
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("further", "name"),
    [
        ("--lr 0.2", "flags.lr"),
        ("--log-interval 5", "flags.log_interval"),
        ("--recalibrate-bn", "flags.recalibrate_bn"),
        ("--dataset {data}", "data.fingerprint"),
    ],
)
def test_processes_that_were_launched_differently_are_refused(tmp_path, further, name):
    flags = {"--dataset {data}": f"--dataset folder --data-dir {tmp_path / 'a'}"}.get(further, "")
    for place, shade in (("a", 1), ("b", 2)):
        for split, label in itertools.product(("train", "test"), "xy"):
            (tmp_path / place / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / place / split / label / "0.png")
    other = {"--dataset {data}": f"--data-dir {tmp_path / 'b'}"}.get(further, further)
    outcome = launch(f"{CONV} --epochs 1 {flags}", 2, tmp_path / "run", lambda rank: other if rank else "")
    assert [code for code, _ in outcome] == [1, 1], outcome
    for _, text in outcome:
        assert f"process 1 has another '{name}' than process 0" in text
        assert text.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_gone_ends_the_others_with_a_sentence(tmp_path):
    def vanish(rank):
        if rank:
            TrainingStep.__call__ = before_step(7, lambda state: os._exit(9))

    outcome = launch(f"{CONV} --epochs 1", 2, tmp_path / "run", vanish)
    assert [code for code, _ in outcome] == [1, 9], outcome
    assert outcome[0][1].startswith("error: another process of this training is gone")
    assert outcome[0][1].count("\n") == 1


def test_what_only_the_first_process_can_find_wrong_is_said_by_it(tmp_path):
    (tmp_path / "file").touch()
    first, second = launch(f"{CONV} --epochs 1", 2, tmp_path / "run", lambda rank: f"--output-dir {tmp_path}/file/run")
    assert first[0] == 2
    assert "file/run" in first[1]
    assert second == (-signal.SIGKILL, "")  # by the launcher, while it waits for the first
    assert "Traceback" not in first[1]


def test_what_another_process_alone_finds_wrong_is_said_by_it(tmp_path):
    further = f"--dataset folder --data-dir {tmp_path}/nowhere"
    _, second = launch(f"{CONV} --epochs 1", 2, tmp_path / "run", lambda rank: further if rank else "")
    assert second[0] == 2
    assert second[1].startswith("process 1: error: ")
    assert second[1].count("\n") == 1
    assert "nowhere" in second[1]


def test_a_signal_while_the_first_process_saves_waits_until_they_ask_each_other_again(tmp_path):
    def interrupt(rank):
        original = CheckpointWriter.save

        def save(writer, state):
            original(writer, state)
            if writer.writes and state.global_step == 12:
                signal.raise_signal(signal.SIGTERM)

        CheckpointWriter.save = save

    outcome = launch(f"{CONV} --epochs 4", 2, tmp_path / "run", interrupt)
    assert [code for code, _ in outcome] == [75, 75], outcome
    assert state_of(tmp_path / "run")["global_step"] == 16


def test_processes_do_not_outlive_torchrun(tmp_path):
    process = torchrun(f"{CONV} --epochs 500", tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    process.kill()
    _, err = process.communicate(timeout=60)  # until the last one that holds these pipes is gone
    assert "ended by SIGTERM" in err
    steps = int(re.search(r"after step ([\d,]+) with a checkpoint", err)[1].replace(",", ""))
    assert state_of(tmp_path / "run")["global_step"] == steps > 12


def test_a_run_of_several_processes_goes_on_in_one_but_for_local_perturbations(tmp_path):
    local = f"{CONV} --optmzr sgd-sam --epochs 2 --sam-local"
    both = launch(f"{local} --log-interval 1", 2, tmp_path / "local", ends_after(5))
    assert [code for code, _ in both] == [75, 75], both
    alone = launch(f"{local} --resume auto", 1, tmp_path / "local")
    assert alone[0][0] == 2
    assert "go on in 2 processes as before" in alone[0][1]
    assert [code for code, _ in launch(f"{local} --resume auto", 2, tmp_path / "local")] == [0, 0]
    assert json.loads((tmp_path / "local" / "args.json").read_text())["processes"] == 2

    flags = f"{CONV} --optmzr sgd-sam --epochs 2 --sync-bn --compile off"
    both = launch(f"{flags} --log-interval 1", 2, tmp_path / "run", ends_after(5))
    assert [code for code, _ in both] == [75, 75], both
    assert [code for code, _ in launch(f"{flags} --resume auto", 1, tmp_path / "run")] == [0]
    assert len(state_of(tmp_path / "run")["rows"]) == 2


def ends_after(steps):
    def interrupt(rank):
        TrainingStep.__call__ = before_step(steps, lambda state: signal.raise_signal(signal.SIGTERM))

    return interrupt


def test_synchronised_batch_norm_takes_one_image_a_process(tmp_path):
    """1,442 images in batches of 720: of the last two each process has one, of one pixel in the end."""
    flags = "--dataset digits --arch vgg --depth 16 --width 0.1 --batch-size 720 --epochs 1 --log-interval 4 --precision fp32"
    alone, synchronised = (launch(f"{flags} {more}", 2, tmp_path / f"run{more}") for more in ("", "--sync-bn"))
    assert alone[0][0] == 2
    assert "1 image" in alone[0][1]
    assert synchronised == [(0, ""), (0, "")]


def test_evaluation_takes_one_process(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    bad = train("--evaluate missing.pt", None, short=False)
    assert (bad.code, bad.err) == (2, "error: --evaluate takes one process: leave torchrun out\n")
    monkeypatch.setenv("WORLD_SIZE", "x")
    bad = train("--epochs 1")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "WORLD_SIZE in the environment has to be a number" in bad.err


def test_no_cuda_holds_under_torchrun_and_more_processes_than_gpus_are_refused(train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    bad = train("--epochs 1")
    assert (bad.code, bad.err) == (
        2, "error: there are 2 GPUs for 3 processes: launch fewer, or give --device cpu\n"
    )  # fmt: skip
    assert train("--epochs 1 --no-cuda --compile off").code == 0


def test_one_gpu_for_all_processes_is_refused(train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    bad = train("--epochs 1 --device cuda:1")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "--device cuda:1 names one GPU for 2 processes" in bad.err


def test_bad_flags_are_said_once(tmp_path):
    outcome = launch(f"{CONV} --epochs 0", 2, tmp_path / "run")
    assert [code for code, _ in outcome] == [2, 2]
    assert "argument --epochs" in outcome[0][1]
    assert outcome[1][1] == ""


def test_a_signal_to_one_ends_all_and_they_go_on_in_another_number(tmp_path):
    flags = f"{CONV} --epochs 3 --optmzr sgd-sam --sam-v2 {RIGL}"

    def interrupt(rank):
        if rank:
            TrainingStep.__call__ = before_step(13, lambda state: signal.raise_signal(signal.SIGTERM))

    outcome = launch(flags, 2, tmp_path / "run", interrupt)
    assert [code for code, _ in outcome] == [75, 75], outcome
    assert state_of(tmp_path / "run")["global_step"] == 16  # the next logged step
    shutil.copytree(tmp_path / "run", tmp_path / "three")
    for name, world in (("run", 2), ("three", 3), ("whole", 2)):
        outcome = launch(f"{flags} --resume auto", world, tmp_path / name)
        assert [code for code, _ in outcome] == [0] * world, outcome
    one, other, three = (state_of(tmp_path / name) for name in ("run", "whole", "three"))
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in one["model"].items())
    assert three["rows"][0] == one["rows"][0]
    assert three["global_step"] == one["global_step"]


def test_torchrun_launches_it(tmp_path):
    process = torchrun(f"{CONV} --epochs 1", tmp_path / "run")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "2 processes" in out.splitlines()[0]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 1


def test_shares_are_all_of_a_batch_and_differ_by_one_at_most():
    for size in (0, 1, 2, 7, 128):
        shares = [ProcessGroup(rank, 3).share(torch.arange(size)) for rank in range(3)]
        assert torch.cat(shares).tolist() == list(range(size))
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1


def test_alone_nothing_is_reduced():
    model, sums = nn.Linear(2, 2), torch.ones(2)
    assert ProcessGroup().reduce(model, sums) is sums
    assert model.weight.grad is None
