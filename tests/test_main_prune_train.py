"""Whole runs of main_prune_train.py on the real digits."""

import re

import pytest
import torch
from PIL import Image
from running import DATA, FINISHED, NEEDS_COMPILER, SMALL, SPARSE_SAM, before_step, interrupt, rows, same, scalars
from sklearn.datasets import load_digits


def test_a_run_writes_its_flags_metrics_checkpoint_and_result(trained):
    assert trained.err == ""
    names = {path.name for path in trained.directory.iterdir()}
    assert {"args.json", "metrics.csv", "checkpoint.pt", "result.json"} <= names
    assert "best.pt" not in names
    about = trained.json("args.json")
    assert about["args"]["sparsity_distribution"] == "erk"
    assert about["args"]["sam_rho"] == 0.05
    assert {"torch", "torchvision", "python", "numpy"} <= about["versions"].keys()
    assert about["device"].startswith("cpu")
    table = rows(trained.directory)
    assert list(table[0]) == [
        "epoch", "lr", "train_loss", "train_top1", "test_loss", "test_top1", "sparsity", "images_per_second", "seconds",
    ]  # fmt: skip
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    result = trained.json("result.json")
    assert result["test_top1"] == float(table[-1]["test_top1"]) == result["best_test_top1"]
    assert result["max_over_epochs_test_top1"] == max(float(row["test_top1"]) for row in table)
    assert result["epochs"] == 3
    weights = trained.checkpoint()["state"]["model"]
    prunable = [w for name, w in weights.items() if w.ndim == 4 or name == "classifier.weight"]
    total, alive = sum(w.numel() for w in prunable), sum(int(w.count_nonzero()) for w in prunable)
    assert result["sparsity"] == pytest.approx(1 - alive / total)
    assert alive == round(0.1 * total)
    assert result["seconds"] == pytest.approx(sum(float(row["seconds"]) for row in table))
    assert re.search(r"epoch 3/3 .*loss at w\+e .*test \d+\.\d+%", trained.out)
    assert f"{total - alive:,} of {total:,} convolution and linear weights are zero" in trained.out


@NEEDS_COMPILER
def test_a_compiled_run_trains_like_a_plain_one_and_resumes_bit_for_bit(train, tmp_path):
    """The last batch of an epoch is a smaller one, and the network small: compiling resnet-8 takes a minute."""
    (tmp_path / "small.py").write_text(SMALL)  # as in tests/utils/test_precision.py: both are compiled once
    flags = f"{DATA} --arch small.py:build --epochs 2 --optmzr sgd-sam --sam-v2 --prune-method random --sparsity 0.5"
    flags += " --precision fp32"
    whole = train(f"{flags} --compile on", "whole", short=False)
    assert whole.code == 0, whole.err
    assert "fp32, compiled" in whole.out.splitlines()[0]
    assert whole.json("args.json")["args"]["compile"] == whole.checkpoint()["args"]["compile"] == "on"
    plain = train(f"{flags} --compile off", "plain", short=False)
    losses = [float(rows(run.directory)[0]["train_loss"]) for run in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    with before_step(8, interrupt):
        assert train(f"{flags} --compile on", "cut", short=False).code == 130
    resumed = train(f"{flags} --compile auto --resume auto", "cut", short=False)
    assert resumed.code == 0, resumed.err
    same(whole.checkpoint()["state"], resumed.checkpoint()["state"])
    refused = train(f"{flags} --compile off --resume auto", "cut", short=False)
    assert refused.code == 2
    assert "--compile was on and is off" in refused.err


def test_the_precision_is_resolved_once_and_kept(train):
    run = train(f"{SPARSE_SAM} --epochs 1 --precision bf16")
    assert run.code == 0, run.err
    assert "bf16, not compiled" in run.out.splitlines()[0]
    assert all(t.dtype == torch.float32 for t in run.checkpoint()["state"]["model"].values() if t.is_floating_point())
    refused = train(f"{SPARSE_SAM} --epochs 1 --precision fp32 --resume auto")
    assert (refused.code, "--precision was bf16 and is fp32" in refused.err) == (2, True)
    evaluated = train(f"--evaluate {run.directory / 'checkpoint.pt'}", output=None, short=False)
    shown = float(re.search(r"test loss ([\d.]+)", evaluated.out)[1])
    assert shown == pytest.approx(run.json("result.json")["test_loss"], abs=1e-4)


def test_auto_comes_to_a_precision_and_to_no_compilation_of_a_short_run(trained):
    flags = trained.json("args.json")["args"]
    assert flags["precision"] in ("fp32", "bf16")
    assert flags["compile"] == "off"


def test_batches_from_workers_train_the_same_network(train, trained):
    streamed = train(f"{FINISHED} --workers 2")
    assert streamed.code == 0, streamed.err
    same(trained.checkpoint()["state"], streamed.checkpoint()["state"])


def test_another_seed_gives_other_weights(train, trained):
    other = train(f"{FINISHED} --seed 1")
    with pytest.raises(AssertionError):
        same(trained.checkpoint()["state"]["model"], other.checkpoint()["state"]["model"])


@pytest.fixture(scope="module")
def plain(run_once):
    """A finished run of one epoch of SGD."""
    return run_once("--epochs 1")


def test_one_step_sam_without_a_radius_is_its_base_optimizer(train, plain):
    sam = train("--optmzr sgd-sam --sam-v2 --epochs 1", "sam")
    zero = train("--optmzr sgd-sam --sam-v2 --sam-rho 0 --epochs 1", "zero")
    same(zero.checkpoint()["state"]["model"], plain.checkpoint()["state"]["model"])
    with pytest.raises(AssertionError):
        same(sam.checkpoint()["state"]["model"], plain.checkpoint()["state"]["model"])


@pytest.mark.parametrize(
    "flags",
    [
        "--mixup",
        "--mixup --alpha 0.1",
        "--cutmix",
        "--augment randaugment",
        "--random-erasing 0.5",
        "--smooth-eps 0.1",
        "--clip-grad 0.1",
        "--warmup-epochs 0.5",
        "--lr-scheduler step",
        "--nesterov",
        "--weight-decay 0.1",
        "--no-norm-decay",
        "--momentum 0.5",
        "--accumulate 2",
        "--width 0.5",
        "--stem imagenet",
        "--batch-size 100",
        "--val-split 100",
        "--train-images 1000",
        "--label-noise 0.1",
        "--optmzr adam",
        "--optmzr sgd-sam",
        "--prune-method magnitude --sparsity 0.5",
    ],
)
def test_every_flag_of_the_mathematics_changes_the_weights(train, plain, flags):
    changed = train(f"--epochs 1 {flags}")
    assert changed.code == 0, changed.err
    with pytest.raises(AssertionError):
        same(plain.checkpoint()["state"]["model"], changed.checkpoint()["state"]["model"])


def test_the_deterministic_flag_reaches_torch(train):
    try:
        assert train("--epochs 1 --deterministic").code == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("method", ["gmp --sparsity 0.98", "lth --sparsity 0.9 --lth-rounds 2"])
def test_no_epoch_of_a_denser_network_counts_as_the_best(train, method):
    run = train(f"--width 0.5 --epochs 6 --val-split 300 --optmzr sgd --prune-method {method}")
    table, result = rows(run.directory), run.json("result.json")
    sparse = [row for row in table if row["sparsity"] == table[-1]["sparsity"]]
    assert 1 < len(sparse) < len(table)
    assert max(float(row["val_top1"]) for row in table) > max(float(row["val_top1"]) for row in sparse)  # else no trap
    best = max(sparse, key=lambda row: float(row["val_top1"]))
    assert (result["best_epoch"], result["best_test_top1"]) == (int(best["epoch"]), float(best["test_top1"]))
    assert result["max_over_epochs_test_top1"] == max(float(row["test_top1"]) for row in sparse)
    kept = run.checkpoint("best.pt")["state"]
    assert len(kept["rows"]) == result["best_epoch"]


def test_sparsities_that_differ_by_units_of_a_pattern_are_one(train):
    sparse = "--prune-method rigl --sparsity 0.8 --sparsity-pattern 3x5 --update-interval 2"
    run = train(f"--width 0.5 --epochs 6 --val-split 300 --train-images 1090 --batch-size 256 --optmzr sgd {sparse}")
    table, result = rows(run.directory), run.json("result.json")
    best = max(table, key=lambda row: float(row["val_top1"]))
    assert 0 < max(float(row["sparsity"]) for row in table) - float(best["sparsity"]) < 0.005  # else no trap
    assert (result["best_epoch"], result["best_test_top1"]) == (int(best["epoch"]), float(best["test_top1"]))
    assert len(run.checkpoint("best.pt")["state"]["rows"]) == result["best_epoch"]


def test_evaluation_every_few_epochs_leaves_cells_empty_and_trains_the_same(train):
    flags = "--epochs 3 --val-split 200 --optmzr sgd-sam --sam-v2 --lr 0.05"
    whole = train(flags, "whole")
    with before_step(14, interrupt):
        assert train(f"{flags} --eval-every 2").code == 130
    refused = train(f"{flags} --eval-every 1 --resume auto")
    assert (refused.code, "--eval-every was 2 and is 1" in refused.err) == (2, True)  # it chooses best.pt
    run = train(f"{flags} --eval-every 2 --resume auto")
    assert run.code == 0, run.err
    same(whole.checkpoint()["state"]["model"], run.checkpoint()["state"]["model"])
    expected, found = rows(whole.directory), rows(run.directory)
    for row in (expected[0], *expected, *found):
        row.update(dict.fromkeys(("seconds", "images_per_second"), ""))
    expected[0].update(dict.fromkeys(("val_loss", "val_top1", "test_loss", "test_top1"), ""))
    assert found == expected
    assert [step for step, _ in scalars(run.directory)["accuracy/val"]] == [12, 18]
    result = run.json("result.json")
    best = max(found[1:], key=lambda row: float(row["val_top1"]))
    assert (result["best_epoch"], result["best_test_top1"]) == (int(best["epoch"]), float(best["test_top1"]))
    assert result["max_over_epochs_test_top1"] == max(float(row["test_top1"]) for row in found[1:])
    assert {n: result[n] for n in ("val_top1", "val_loss")} == {
        n: float(found[-1][n]) for n in ("val_top1", "val_loss")
    }
    assert len(run.checkpoint("best.pt")["state"]["rows"]) == result["best_epoch"]


def test_every_round_ends_in_an_evaluation_and_its_interval_may_change(train):
    flags = "--epochs 3 --prune-method lth --lth-rounds 1 --lth-rewind 0 --sparsity 0.5"
    with before_step(24, interrupt):
        run = train(f"{flags} --eval-every 4")
    lines = [line for line in run.out.splitlines() if line.startswith("epoch")]
    assert ["test" in line for line in lines] == [False, False, True, True]
    run = train(f"{flags} --eval-every 5 --resume auto")
    assert run.code == 0, run.err
    assert [row["test_top1"] != "" for row in rows(run.directory)] == [False, False, True, True, True, True]


@torch.no_grad()
def forget(state):
    """Zero all weights."""
    torch._foreach_zero_(list(state.model.parameters()))


def test_the_best_epoch_on_held_out_images_is_kept_although_no_checkpoint_is_due(train):
    with before_step(range(15, 20), forget):  # so that the last epoch is not the best, in any precision
        run = train("--epochs 4 --val-split 200 --checkpoint-every 9")
    table = rows(run.directory)
    val = [float(row["val_top1"]) for row in table]
    best = val.index(max(val))
    assert best < 3
    result = run.json("result.json")
    assert result["best_epoch"] == best + 1
    assert result["best_test_top1"] == float(table[best]["test_top1"])
    assert result["test_top1"] == float(table[-1]["test_top1"])
    assert len(run.checkpoint("best.pt")["state"]["rows"]) == best + 1
    again = train(f"--evaluate {run.directory}/best.pt", None, short=False)
    assert f"test top-1 {float(table[best]['test_top1']):.2f}%" in again.out


def test_evaluate_repeats_the_last_epoch(train, trained):
    again = train(f"--evaluate {trained.directory}/checkpoint.pt", None, short=False)
    last = rows(trained.directory)[-1]
    assert again.code == 0
    assert f"test loss {float(last['test_loss']):.4f}   test top-1 {float(last['test_top1']):.2f}%" in again.out
    assert f"sparsity {float(last['sparsity']):.4f}" in again.out


def test_a_folder_of_images_trains_end_to_end(train, tmp_path):
    source = load_digits()
    for index in range(300):
        path = tmp_path / "images" / ("test" if index % 5 == 0 else "train") / f"class{source.target[index]}"
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray((source.images[index] * 15).astype("uint8")).convert("RGB").save(path / f"{index}.png")
    flags = f"--dataset folder --data-dir {tmp_path}/images --image-size 16 --depth 8 --width 0.25 --batch-size 64 --epochs 2"
    run = train(f"{flags} --optmzr adam-sam --sam-v2", short=False)
    assert run.code == 0, run.err
    assert len(rows(run.directory)) == 2
    assert len(run.checkpoint()["data"]["mean"]) == 3


@pytest.mark.parametrize(
    "network",
    [
        "resnet --depth 18 --width 0.125",
        "resnet --depth 50 --width 0.125",
        "vgg --depth 16 --width 0.125",
        "wideresnet --depth 10 --width 0.5",
        "mobilenet --width 0.25",
        "vit --depth 1 --width 0.34",
    ],
)
def test_every_family_of_networks_trains_sparse(train, network):
    flags = "--dataset digits --train-images 480 --batch-size 120 --epochs 1 --lr 0.01 --optmzr sgd-sam --sam-v2"
    run = train(f"{flags} --prune-method rigl --sparsity 0.7 --update-interval 2 --arch {network}", short=False)
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


def test_training_flops_compare_with_one_dense_training_without_sam(train, plain):
    flags = {
        "sam": "--optmzr sgd-sam",
        "rounds": "--optmzr sgd --prune-method lth --lth-rounds 1 --sparsity 0.5 --sparsity-distribution uniform",
    }
    runs = {"sgd": plain} | {name: train(f"--epochs 1 {flag}", name) for name, flag in flags.items()}
    results = {name: run.json("result.json") for name, run in runs.items()}
    dense = {result["dense_training_flops"] for result in results.values()}
    assert dense == {results["sgd"]["training_flops"]}
    ratio = {name: result["training_flops"] / result["dense_training_flops"] for name, result in results.items()}
    assert ratio["sam"] == 2
    assert ratio["rounds"] == pytest.approx(1.5, abs=0.01)


def test_oneshot_prunes_the_weights_that_were_trained(train, plain):
    weights = f"--pretrained {plain.directory}/checkpoint.pt"
    run = train(f"--epochs 1 --lr 1e-9 --momentum 0 --prune-method oneshot --sparsity 0.5 {weights}")
    assert run.code == 0, run.err
    before, after = (r.checkpoint()["state"]["model"] for r in (plain, run))
    scores = torch.cat([w.abs().flatten() for name, w in before.items() if w.ndim == 4 or name == "classifier.weight"])
    threshold = scores.sort(descending=True).values[round(len(scores) / 2) - 1]
    for name, w in before.items():
        if w.ndim == 4 or name == "classifier.weight":
            torch.testing.assert_close(after[name], torch.where(w.abs() >= threshold, w, 0), rtol=1e-4, atol=1e-6)
    other = train(f"--depth 14 --epochs 1 {weights}", "other")
    assert "its --depth is 8, not 14" in other.err
    stem = train(f"--stem imagenet --epochs 1 {weights}", "other")
    assert "the checkpoint's --stem is cifar, and that of this network imagenet: give --stem cifar" in stem.err


def test_the_sparsity_of_each_layer_comes_from_a_file(train, tmp_path):
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
    (tmp_path / "layers.yaml").write_text("prune_ratios: {stage3.0.conv1: 0.75, stage3.0.conv1.weight: 0.5}")
    assert "names a layer both" in train("--epochs 1 --prune-method random --sparsity-config layers.yaml", "bad").err
    (tmp_path / "layers.yaml").write_text("prune_ratios:\n  stage3.0.conv1: 0.75\n  stage3.0.conv1: 0.5\n")
    assert (
        "names 'stage3.0.conv1' twice"
        in train("--epochs 1 --prune-method random --sparsity-config layers.yaml", "bad").err
    )


def test_a_result_tells_the_size_without_dead_channels(train, trained):
    flags = "--epochs 1 --prune-method random --sparsity 0.7 --sparsity-distribution uniform --sparsity-pattern channel --summary"
    run = train(flags)
    assert run.code == 0, run.err
    result = run.json("result.json")
    # A channel takes its weights in the layers on both sides along, and its batch norm. The classifier's biases stay.
    living = sum(p.numel() for name, p in alive_parameters(run.checkpoint()))
    assert result["parameters_compacted"] == living < 0.4 * result["parameters"]
    assert result["flops_compacted"] == pytest.approx(result["inference_flops"])
    assert f"without dead channels: {living:,} parameters, {result['flops_compacted']:,} FLOPs" in run.out
    unstructured = trained.json("result.json")
    assert unstructured["parameters_compacted"] == unstructured["parameters"]
    assert unstructured["flops_compacted"] > 2 * unstructured["inference_flops"]


CHANNELS = (
    "--width 0.5 --epochs 2 --precision fp32 --prune-method random --sparsity 0.7 --sparsity-distribution uniform "
    "--sparsity-pattern channel"
)


@pytest.fixture(scope="module")
def compacted(run_once):
    """A finished run of CHANNELS on the smaller network."""
    return run_once(f"{CHANNELS} --compact")


def test_a_compacted_run_is_the_masked_run_and_smaller(train, compacted):
    masked = train(CHANNELS)
    refused = train(f"{CHANNELS} --compact --resume auto")
    assert "--compact was False and is True" in refused.err
    for one, other in zip(rows(compacted.directory), rows(masked.directory), strict=True):
        assert float(one["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-3)
        assert one["sparsity"] == other["sparsity"]
    result, whole = compacted.json("result.json"), masked.json("result.json")
    assert result["test_loss"] == pytest.approx(whole["test_loss"], rel=0.02)
    for name in ("parameters", "nonzero_parameters", "parameters_compacted", "inference_flops", "training_flops"):
        assert result[name] == whole[name], name
    sizes = [(run.directory / "checkpoint.pt").stat().st_size for run in (compacted, masked)]
    assert sizes[0] < 0.6 * sizes[1]
    weights = compacted.checkpoint()["state"]["model"]
    assert sum(w.numel() for name, w in weights.items() if "running" not in name) == result["parameters_compacted"]


def test_a_compacted_run_resumes_bit_for_bit(train, compacted):
    with before_step(8, interrupt):
        assert train(f"{CHANNELS} --compact").code == 130
    resumed = train(f"{CHANNELS} --compact --resume auto")
    assert resumed.code == 0, resumed.err
    same(resumed.checkpoint()["state"], compacted.checkpoint()["state"])


def test_a_checkpoint_of_a_compacted_run_is_read_as_the_whole_network(train, compacted, trained):
    path = compacted.directory / "checkpoint.pt"
    evaluated = train(f"--evaluate {path}", output=None, short=False)
    assert evaluated.code == 0, evaluated.err
    assert f"test top-1 {compacted.json('result.json')['test_top1']:.2f}%" in evaluated.out
    tuned = train(f"--width 0.5 --epochs 1 --pretrained {path} --keep-masks --compact --lr 1e-9", "tuned")
    assert tuned.code == 0, tuned.err
    assert tuned.json("result.json")["sparsity"] == compacted.json("result.json")["sparsity"]
    unstructured = train(f"--epochs 1 --pretrained {trained.directory / 'checkpoint.pt'} --keep-masks --compact")
    assert (unstructured.code, unstructured.err.count("\n")) == (2, 1)
    assert "--compact: these masks leave no channel dead: leave it out" in unstructured.err


def alive_parameters(checkpoint):
    """Return the living entries of each parameter of a checkpoint, by name."""
    state, masks = checkpoint["state"]["model"], checkpoint["state"]["pruner"]["masks"]
    for name, tensor in state.items():
        if not name.endswith(("running_mean", "running_var")):
            mask = masks.get(name, masks.get(name.removesuffix(".weight")))
            yield name, tensor if mask is None else tensor[mask]


def test_part_of_the_images_and_wrong_labels_are_recorded_and_resumed(train):
    flags = "--epochs 2 --train-images 300 --label-noise 0.4 --val-split 100"
    run = train(flags)
    assert (run.code, run.err) == (0, "")
    assert "300 training and 355 test images" in run.out
    right = train("--epochs 1 --train-images 300", "right").json("args.json")
    assert run.json("args.json")["images"] != right["images"]
    assert "finished already" in train(f"{flags} --resume auto").out
    changed = train("--epochs 2 --train-images 300 --val-split 100 --resume auto")
    assert "--label-noise was 0.4 and is 0.0" in changed.err
    evaluated = train(f"--evaluate {run.directory}/checkpoint.pt", None, short=False)
    assert f"{run.json('result.json')['test_top1']:.2f}%" in evaluated.out
    refused = train("--epochs 1 --train-images 1442", "refused")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "the same number of each class, are more than there are: at most" in refused.err
