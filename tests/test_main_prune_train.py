"""Whole runs of main_prune_train.py on the real digits."""

import contextlib
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
import torch
from running import NEEDS_COMPILER, ROOT, SPARSE_SAM, rows, same, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from training import loop as engine


def test_a_run_leaves_everything_it_promises(train):
    run = train(f"{SPARSE_SAM} --epochs 3")
    assert (run.code, run.err) == (0, "")
    names = {path.name for path in run.directory.iterdir()}
    assert {"args.json", "metrics.csv", "checkpoint.pt", "result.json"} <= names
    assert "best.pt" not in names
    about = run.json("args.json")
    assert about["args"]["sparsity_distribution"] == "erk"
    assert about["args"]["sam_rho"] == 0.05
    assert {"torch", "torchvision", "python", "numpy"} <= about["versions"].keys()
    assert about["device"].startswith("cpu")
    table = rows(run.directory)
    assert list(table[0]) == [
        "epoch", "lr", "train_loss", "train_top1", "test_loss", "test_top1", "sparsity", "images_per_second", "seconds",
    ]  # fmt: skip
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    result = run.json("result.json")
    assert result["test_top1"] == float(table[-1]["test_top1"]) == result["best_test_top1"]
    assert result["max_over_epochs_test_top1"] == max(float(row["test_top1"]) for row in table)
    assert result["epochs"] == 3
    weights = run.checkpoint()["state"]["model"]
    prunable = [w for name, w in weights.items() if w.ndim == 4 or name == "classifier.weight"]
    total, alive = sum(w.numel() for w in prunable), sum(int(w.count_nonzero()) for w in prunable)
    assert result["sparsity"] == pytest.approx(1 - alive / total)
    assert alive == round(0.1 * total)
    assert result["seconds"] == pytest.approx(sum(float(row["seconds"]) for row in table))
    assert re.search(r"epoch 3/3 .*loss at w\+e .*test \d+\.\d+%", run.out)
    assert f"{total - alive:,} of {total:,} convolution and linear weights are zero" in run.out


@NEEDS_COMPILER
def test_a_compiled_run_trains_resumes_bit_for_bit_and_says_so(train):
    flags = f"{SPARSE_SAM} --epochs 2 --precision fp32 --compile on"  # the last batch of an epoch is a smaller one
    whole = train(flags, "whole")
    assert whole.code == 0, whole.err
    assert "fp32, compiled" in whole.out.splitlines()[0]
    assert whole.json("args.json")["args"]["compile"] == whole.checkpoint()["args"]["compile"] == "on"
    plain = train(flags.replace("compile on", "compile off"), "plain")
    losses = [float(rows(run.directory)[0]["train_loss"]) for run in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

    original, calls = engine.evaluate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return original(*args)

    engine.evaluate = interrupted
    try:
        assert train(flags, "cut").code == 130
    finally:
        engine.evaluate = original
    resumed = train("--compile auto " + flags.replace("--compile on", "") + " --resume auto", "cut")
    assert resumed.code == 0, resumed.err
    same(whole.checkpoint()["state"], resumed.checkpoint()["state"])
    refused = train(flags.replace("compile on", "compile off") + " --resume auto", "cut")
    assert refused.code == 2
    assert "--compile was on and is off" in refused.err


def test_precision_is_resolved_once_and_kept(train):
    run = train(f"{SPARSE_SAM} --epochs 1 --precision bf16")
    assert run.code == 0, run.err
    assert "bf16, not compiled" in run.out.splitlines()[0]
    assert all(t.dtype == torch.float32 for t in run.checkpoint()["state"]["model"].values() if t.is_floating_point())
    refused = train(f"{SPARSE_SAM} --epochs 1 --precision fp32 --resume auto")
    assert (refused.code, "--precision was bf16 and is fp32" in refused.err) == (2, True)
    evaluated = train(f"--evaluate {run.directory / 'checkpoint.pt'}", output=None, short=False)
    shown = float(re.search(r"test loss ([\d.]+)", evaluated.out)[1])
    assert shown == pytest.approx(run.json("result.json")["test_loss"], abs=1e-4)
    auto = train("--epochs 1", "auto")
    assert auto.json("args.json")["args"]["precision"] in ("fp32", "bf16")
    assert auto.json("args.json")["args"]["compile"] == "off"


def test_batches_from_workers_train_the_same_run(train):
    plain, streamed = (train(f"{SPARSE_SAM} --epochs 2 --workers {n}", str(n)) for n in (0, 2))
    assert streamed.code == 0, streamed.err
    same(plain.checkpoint()["state"], streamed.checkpoint()["state"])


def test_tensorboard_shows_what_one_step_sam_bets_on(train):
    run = train(f"{SPARSE_SAM} --epochs 2")
    logged = scalars(run.directory)
    steps = [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in logged["loss/train_batch_at_perturbed_weights"]] == steps
    for name in ("lr", "gradient_norm", "perturbation_norm", "alignment"):
        assert [step for step, _ in logged[f"optimizer/{name}"]] == steps
    assert [value for _, value in logged["optimizer/perturbation_norm"]] == pytest.approx([0.05] * 6, rel=1e-3)
    assert all(-1 <= value <= 1 for _, value in logged["optimizer/alignment"])
    assert [step for step, _ in logged["accuracy/test"]] == [6, 12]
    assert logged["accuracy/test"][-1][1] == pytest.approx(run.json("result.json")["test_top1"])
    events = EventAccumulator(str(run.directory)).Reload()
    assert "_hparams_/experiment" in events.summary_metadata
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    row = HParamsPluginData.FromString(content).session_start_info.hparams
    # What its table shows at once, as words where they are no quantities.
    assert sorted(row)[:5] == ["optimizer", "prune_method", "sam_rho", "seed", "sparsity"]
    assert (row["optimizer"].string_value, row["seed"].string_value) == ("sgd-sam one-step", "0")
    assert row["sparsity"].number_value == 0.9
    assert row["training/adaptive"].string_value == "no"
    assert row["training/lr"].number_value == 0.1


def test_tensorboard_begins_with_accuracy_and_loss_and_draws_no_masks_that_stay(train):
    static = scalars(train(f"{SPARSE_SAM} --epochs 1", "static").directory)
    moving = scalars(train("--epochs 1 --prune-method rigl --sparsity 0.9 --update-interval 2", "moving").directory)
    for logged in (static, moving):
        groups = sorted({tag.split("/")[0] for tag in logged})
        assert groups[:2] == ["accuracy", "loss"]
    layers = [values[-1][1] for tag, values in moving.items() if tag.startswith("sparsity_by_layer/")]
    assert len(layers) == 10
    assert min(layers) < 0.8 < max(layers)
    assert not [tag for tag in static if tag.startswith("sparsity_by_layer/")]


def test_the_last_step_of_an_epoch_is_logged_in_a_run_of_any_length(train):
    logged = scalars(train(f"{SPARSE_SAM} --epochs 2 --log-interval 4").directory)
    for name in ("alignment", "gradient_norm", "perturbation_norm"):
        assert [step for step, _ in logged[f"optimizer/{name}"]] == [4, 6, 8, 12]


def test_the_same_flags_give_the_same_bits_and_another_seed_does_not(train):
    first, again = train(f"{SPARSE_SAM} --epochs 1", "a"), train(f"{SPARSE_SAM} --epochs 1", "b")
    other = train(f"{SPARSE_SAM} --epochs 1 --seed 1", "c")
    same(first.checkpoint()["state"], again.checkpoint()["state"])
    with pytest.raises(AssertionError):
        same(first.checkpoint()["state"], other.checkpoint()["state"])


def test_one_step_sam_is_not_its_base_optimizer(train):
    sam = train("--optmzr sgd-sam --sam-v2 --epochs 1", "sam")
    zero = train("--optmzr sgd-sam --sam-v2 --sam-rho 0 --epochs 1", "zero")
    plain = train("--optmzr sgd --epochs 1", "plain")
    same(zero.checkpoint()["state"]["model"], plain.checkpoint()["state"]["model"])
    with pytest.raises(AssertionError):
        same(sam.checkpoint()["state"]["model"], plain.checkpoint()["state"]["model"])


@pytest.mark.parametrize("method", ["gmp --sparsity 0.98", "lth --sparsity 0.9 --lth-rounds 2"])
def test_no_epoch_of_a_denser_network_is_the_best(train, method):
    run = train(f"--epochs 6 --val-split 300 --optmzr sgd --prune-method {method}")
    table, result = rows(run.directory), run.json("result.json")
    sparse = [row for row in table if row["sparsity"] == table[-1]["sparsity"]]
    assert 1 < len(sparse) < len(table)
    assert max(float(row["val_top1"]) for row in table) > max(float(row["val_top1"]) for row in sparse)  # else no trap
    best = max(sparse, key=lambda row: float(row["val_top1"]))
    assert (result["best_epoch"], result["best_test_top1"]) == (int(best["epoch"]), float(best["test_top1"]))
    assert result["max_over_epochs_test_top1"] == max(float(row["test_top1"]) for row in sparse)
    kept = run.checkpoint("best.pt")["state"]
    assert len(kept["rows"]) == result["best_epoch"]


def test_the_best_epoch_is_chosen_on_held_out_images(train):
    run = train(f"{SPARSE_SAM} --epochs 5 --val-split 300 --lr 0.02")
    table = rows(run.directory)
    val = [float(row["val_top1"]) for row in table]
    best = val.index(max(val))
    result = run.json("result.json")
    assert result["best_epoch"] == best + 1
    assert result["best_test_top1"] == float(table[best]["test_top1"])
    assert result["test_top1"] == float(table[-1]["test_top1"])
    assert len(run.checkpoint("best.pt")["state"]["rows"]) == best + 1
    again = train(f"--evaluate {run.directory}/best.pt", None, short=False)
    assert f"test top-1 {float(table[best]['test_top1']):.2f}%" in again.out


def test_evaluate_repeats_the_last_epoch(train):
    run = train(f"{SPARSE_SAM} --epochs 2")
    again = train(f"--evaluate {run.directory}/checkpoint.pt", None, short=False)
    last = rows(run.directory)[-1]
    assert again.code == 0
    assert f"test loss {float(last['test_loss']):.4f}   test top-1 {float(last['test_top1']):.2f}%" in again.out
    assert "sparsity 0.9000" in again.out


def test_runs_are_named_by_their_hyper_parameters(train, tmp_path):
    train(f"{SPARSE_SAM} --epochs 1 --remark first/try", None)
    train("--epochs 1 --optmzr adamw-sam --adaptive --weight-decay 0.1", None)
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [
        "resnet8_digits_adamw-sam-adaptive-rho0.5_dense_lr0.001_epochs1_batch-size256_weight-decay0.1_width0.5_seed0",
        "resnet8_digits_sgd-sam-v2-rho0.05_random-erk-0.9_lr0.1_epochs1_batch-size256_width0.5_seed0_first-try",
    ]


def test_a_loss_that_stops_being_finite_ends_the_run_and_keeps_the_checkpoint(train):
    run = train("--lr 0.05 --epochs 3 --lr-scheduler constant")
    before = run.checkpoint()
    failed = train("--lr 1e12 --epochs 2 --optmzr sgd", "failed")
    assert failed.code == 1
    assert re.fullmatch(r"error: .* step \d+ with learning rate [\d.e+]+: .*\n", failed.err)
    assert not (failed.directory / "result.json").exists()
    # A good checkpoint stays when a later epoch goes wrong.
    broken = shutil.copytree(run.directory, run.directory.parent / "broken")
    (broken / "result.json").unlink()
    saved = torch.load(broken / "checkpoint.pt", weights_only=True)
    saved["args"]["lr"] = 1e12
    torch.save(saved, broken / "checkpoint.pt")
    failed = train(f"--resume {broken}/checkpoint.pt --epochs 5", None, short=False)
    assert failed.code == 1
    same(torch.load(broken / "checkpoint.pt", weights_only=True)["state"], before["state"])


@pytest.mark.parametrize("optmzr", ["sgd", "sgd-sam", "adam-sam --sam-v2"])
def test_folder_images_train_end_to_end(train, tmp_path, optmzr):
    from PIL import Image
    from sklearn.datasets import load_digits

    source = load_digits()
    for index in range(300):
        path = tmp_path / "images" / ("test" if index % 5 == 0 else "train") / f"class{source.target[index]}"
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray((source.images[index] * 15).astype("uint8")).convert("RGB").save(path / f"{index}.png")
    run = train(
        f"--dataset folder --data-dir {tmp_path}/images --image-size 16 --epochs 2 --optmzr {optmzr} --batch-size 64"
    )
    assert run.code == 0, run.err
    assert len(rows(run.directory)) == 2
    assert len(run.checkpoint()["data"]["mean"]) == 3


def test_a_pipe_gets_one_plain_line_an_epoch(tmp_path):
    command = [sys.executable, str(ROOT / "main_prune_train.py"), *"--dataset digits --depth 8 --epochs 2".split()]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "run")], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stderr == ""
    assert [line[:9] for line in done.stdout.splitlines() if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout


def test_a_terminal_gets_a_bar(tmp_path):
    command = [sys.executable, str(ROOT / "main_prune_train.py"), *"--dataset digits --depth 8 --epochs 1".split()]
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen([*command, "--output-dir", str(tmp_path / "run")], stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
        while chunk := os.read(master, 65536):
            shown += chunk
    assert process.wait() == 0
    assert b"epoch 1/1:" in shown
    assert b"/12 [" in shown


@pytest.mark.parametrize(
    "flags",
    [
        "--mixup",
        "--mixup --alpha 0.1",
        "--smooth-eps 0.1",
        "--clip-grad 0.1",
        "--warmup-epochs 0.5",
        "--lr-scheduler step",
        "--nesterov",
        "--weight-decay 0.1",
        "--momentum 0.5",
        "--accumulate 2",
        "--width 1",
        "--batch-size 100",
        "--val-split 100",
        "--optmzr adam",
        "--optmzr sgd-sam",
        "--prune-method magnitude --sparsity 0.5",
    ],
)
def test_every_flag_of_the_mathematics_changes_the_weights(train, flags):
    plain, changed = train("--epochs 1", "plain"), train(f"--epochs 1 {flags}", "changed")
    assert changed.code == 0, changed.err
    with pytest.raises(AssertionError):
        same(plain.checkpoint()["state"]["model"], changed.checkpoint()["state"]["model"])


def test_the_deterministic_flag_reaches_torch(train):
    try:
        assert train("--epochs 1 --deterministic").code == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_gradient_norm_is_logged_before_it_is_clipped(train):
    run = train("--epochs 1 --clip-grad 0.001 --lr 0.001")
    assert min(value for _, value in scalars(run.directory)["optimizer/gradient_norm"]) > 0.01


@pytest.mark.parametrize(
    "network",
    [
        "resnet --depth 18 --width 0.125",
        "resnet --depth 50 --width 0.125",
        "vgg --depth 16 --width 0.125",
        "wideresnet --depth 16 --width 0.5",
        "mobilenet --width 0.25",
        "vit --depth 2 --width 0.34",
    ],
)
def test_every_family_trains_sparse(train, network):
    flags = f"--dataset digits --batch-size 256 --epochs 1 --prune-method rigl --sparsity 0.7 --update-interval 2 --arch {network}"
    run = train(f"{flags} --optmzr sgd-sam --sam-v2 --lr 0.01", short=False)
    assert run.code == 0, run.err
    result = run.json("result.json")
    assert result["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert 0.3 < result["ever_alive"] <= 1
    assert result["training_flops"] < result["dense_training_flops"]


def test_lottery_tickets_run_all_rounds_in_one_command(train):
    run = train("--epochs 2 --prune-method lth --lth-rounds 2 --lth-rewind 3 --sparsity 0.75")
    assert run.code == 0, run.err
    assert run.out.count("epoch ") == 6
    assert [round(float(row["sparsity"]), 3) for row in rows(run.directory)] == [0, 0, 0.5, 0.5, 0.75, 0.75]
    assert "epoch 6/6" in run.out


def test_training_flops_compare_with_one_dense_training_without_sam(train):
    flags = {
        "sgd": "--optmzr sgd",
        "sam": "--optmzr sgd-sam",
        "rounds": "--optmzr sgd --prune-method lth --lth-rounds 1 --sparsity 0.5 --sparsity-distribution uniform",
    }
    results = {name: train(f"--epochs 1 {flag}", name).json("result.json") for name, flag in flags.items()}
    dense = {result["dense_training_flops"] for result in results.values()}
    assert dense == {results["sgd"]["training_flops"]}
    ratio = {name: result["training_flops"] / result["dense_training_flops"] for name, result in results.items()}
    assert ratio["sam"] == 2
    assert ratio["rounds"] == pytest.approx(1.5, abs=0.01)


def test_oneshot_prunes_what_was_trained(train):
    first = train("--epochs 1 --lr 0.01", "first")
    run = train(
        f"--epochs 1 --lr 1e-9 --momentum 0 --prune-method oneshot --sparsity 0.5 --pretrained {first.directory}/checkpoint.pt"
    )
    assert run.code == 0, run.err
    before, after = (r.checkpoint()["state"]["model"] for r in (first, run))
    scores = torch.cat([w.abs().flatten() for name, w in before.items() if w.ndim == 4 or name == "classifier.weight"])
    threshold = scores.sort(descending=True).values[round(len(scores) / 2) - 1]
    for name, w in before.items():
        if w.ndim == 4 or name == "classifier.weight":
            torch.testing.assert_close(after[name], torch.where(w.abs() >= threshold, w, 0), rtol=1e-4, atol=1e-6)
    other = train(f"--depth 14 --epochs 1 --pretrained {first.directory}/checkpoint.pt", "other")
    assert "its --depth is 8, not 14" in other.err


def test_the_sparsity_of_layers_comes_from_a_file(train, tmp_path):
    (tmp_path / "layers.yaml").write_text("prune_ratios: {stage3.0.conv1: 0.75, stage3.0.conv2.weight: 0.5}")
    run = train("--epochs 1 --prune-method random --sparsity-config layers.yaml --summary")
    assert run.code == 0, run.err
    assert re.search(r"stage3.0.conv1 .* 0\.2500 ", run.out)
    weights = run.checkpoint()["state"]["model"]
    zeros = {n: int((w == 0).sum()) / w.numel() for n, w in weights.items() if w.ndim == 4}
    assert zeros.pop("stage3.0.conv1.weight") == 0.75
    assert zeros.pop("stage3.0.conv2.weight") == 0.5
    assert set(zeros.values()) == {0}
    (tmp_path / "layers.yaml").write_text("prune_ratios: {stage9.0.conv1: 0.75}")
    bad = train("--epochs 1 --prune-method random --sparsity-config layers.yaml", "bad")
    assert "the nearest name is 'stage" in bad.err
    (tmp_path / "layers.yaml").write_text("!!python/object/apply:os.mkdir [it-ran]")
    assert train("--epochs 1 --prune-method random --sparsity-config layers.yaml", "bad").code == 2
    assert not (tmp_path / "it-ran").exists()


def test_a_layer_that_empties_during_training_ends_it_with_a_sentence(train):
    flags = "--epochs 1 --prune-method gmp --sparsity 0.999 --sparsity-distribution global --sparsity-pattern channel"
    failed = train(f"{flags} --update-interval 2")
    assert failed.code == 1
    assert re.fullmatch(r"error: this sparsity leaves layer '.*' without a weight: .*\n", failed.err)
    assert not (failed.directory / "result.json").exists()


def test_part_of_the_images_and_wrong_labels_are_recorded_and_resumed(train):
    flags = "--epochs 2 --train-images 300 --label-noise 0.4 --val-split 100"
    run = train(flags)
    assert (run.code, run.err) == (0, "")
    assert "300 training and 355 test images" in run.out
    assert (
        run.json("args.json")["images"] != train("--epochs 1 --train-images 300", "other").json("args.json")["images"]
    )
    assert "finished already" in train(f"{flags} --resume auto").out
    assert (
        "--label-noise was 0.4 and is 0.0" in train("--epochs 2 --train-images 300 --val-split 100 --resume auto").err
    )
    evaluated = train(f"--evaluate {run.directory}/checkpoint.pt", None, short=False)
    assert f"{run.json('result.json')['test_top1']:.2f}%" in evaluated.out
    refused = train("--epochs 1 --train-images 1442", "refused")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "the same number of each class, are more than there are: at most" in refused.err
