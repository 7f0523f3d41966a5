"""Accuracy with batch norm's statistics estimated anew, at the end of a run and by --evaluate."""

from PIL import Image


def test_recalibrated_statistics_are_reported_beside_the_runs_own(train):
    """The same from training and from --evaluate; training itself goes on as if nothing had been asked."""
    flags = "--width 0.25 --epochs 1 --optmzr sgd-sam --sam-v2 --sam-rho 0.5 --precision fp32"
    run, plain = train(f"{flags} --recalibrate-bn"), train(flags, "plain")
    result = run.json("result.json")
    assert result["test_top1"] == plain.json("result.json")["test_top1"]
    assert result["test_loss"] != result["test_loss_recalibrated_bn"]
    evaluated = train(f"--evaluate {run.directory}/checkpoint.pt --recalibrate-bn", None, short=False)
    assert f"test loss {result['test_loss_recalibrated_bn']:.4f}" in evaluated.out
    assert f"test loss {result['test_loss']:.4f}" in evaluated.out


def test_recalibration_of_a_network_without_batch_norm_is_refused(train):
    refused = train("--arch vit --depth 1 --width 0.34 --recalibrate-bn --dataset digits", "vit", short=False)
    assert refused.code == 2
    assert "no effect on a network without batch norm" in refused.err


def test_an_external_network_without_batch_norm_is_refused_before_it_is_trained(train, tmp_path):
    """On a folder of images, whose size is known only with them."""
    for split in ("train", "test"):
        for color, name in enumerate(("dark", "light")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(4):
                image = Image.new("RGB", (8, 8), (100 * color + number,) * 3)
                image.save(tmp_path / "data" / split / name / f"{number}.png")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n"
        "def network(num_classes, channels, size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], num_classes))\n"
    )
    flags = f"--dataset folder --data-dir {tmp_path}/data --arch {tmp_path}/mine.py:network --epochs 1 --recalibrate-bn"
    refused = train(flags, short=False)
    assert refused.code == 2
    assert "--recalibrate-bn has no effect on a network without batch norm" in refused.err
    assert not refused.directory.exists()
