"""Accuracy with batch norm's statistics estimated anew, at the end of a run and by --evaluate."""


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
