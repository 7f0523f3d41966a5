"""The tables of a study, from run directories with known figures."""

import csv
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from analysis.run_table import read_curves
from analysis.summarize import main

SAM = {"optmzr": "sgd-sam", "sam_v2": True, "sam_rho": 0.05}


def summarize(root: Path, capsys) -> tuple[str, dict[str, list[dict]]]:
    assert main([str(root)]) == 0
    tables = {}
    for path in (root / "summary").glob("*.csv"):
        with path.open() as file:
            tables[path.stem] = list(csv.DictReader(file)) if path.stat().st_size > 1 else []
    return capsys.readouterr().out, tables


def test_means_deviations_and_pairs_are_those_of_the_formulas(study, capsys):
    for seed, (sgd, sam) in enumerate([(90.0, 91.0), (92.0, 92.5), (94.0, 96.0)]):
        study(sgd, seed=seed)
        study(sam, seed=seed, **SAM)
    study(99.0, seed=7, **SAM)  # without a partner: in the mean, in no pair
    out, tables = summarize(study.root, capsys)
    sgd, sam = tables["summary"]
    assert (sgd["optimizer"], float(sgd["mean"]), float(sgd["std"]), sgd["runs"]) == ("sgd", 92.0, 2.0, "3")
    assert sam["optimizer"] == "sgd SAM.v2"
    assert float(sam["mean"]) == pytest.approx(94.625)
    (pair,) = tables["paired"]
    differences = [1.0, 0.5, 2.0]
    centre = sum(differences) / 3
    deviation = math.sqrt(sum((d - centre) ** 2 for d in differences) / 2)
    half = 4.302652729911275 * deviation / math.sqrt(3)  # Student's t at 0.975 with 2 degrees of freedom, from a table
    assert pair["pairs"] == "3"
    assert [float(pair[k]) for k in ("difference", "low", "high")] == pytest.approx(
        [centre, centre - half, centre + half]
    )
    assert "92.00 ± 2.00" in out
    assert "**94.62 ± " in out or "**94.63 ± " in out
    assert (study.root / "summary" / "accuracy_over_epochs.png").stat().st_size > 10_000


def test_flags_that_are_lists_are_read(study, capsys):
    study(90.0)
    for rho in (0.1, 0.2):
        study(91.0, optmzr="sgd-cram", sam_rho=rho, cram_sparsities=[0.5, 0.9], prune_method="final", sparsity=0.9)
    _, tables = summarize(study.root, capsys)
    assert {row["optimizer"] for row in tables["summary"]} == {"sgd", "sgd-cram"}


def test_what_an_optimizer_alone_has_is_no_setting_of_its_own(study, capsys):
    final = {"prune_method": "final", "sparsity": 0.9}
    study(90.5, **final)
    study(91.5, **SAM, **final)
    study(95.5, optmzr="sgd-cram", sam_rho=0.2, cram_sparsities=[0.5, 0.9], **final)
    study(93.5, optmzr="sgd-safe", sam_rho=0.1, safe_lambda=1e-3, safe_interval=32, **final)
    _, tables = summarize(study.root, capsys)
    assert [row["optimizer"] for row in tables["summary"] if row["best"] == "True"] == ["sgd-cram"]


def test_images_that_seeds_chose_are_not_averaged_where_one_seed_has_several(study, capsys):
    for seed, accuracy, images in ((0, 90.0, "a0"), (1, 91.0, "a1"), (1, 11.0, "b1"), (2, 12.0, "b2")):
        study(accuracy, seed=seed, train_images=100, images=images * 8)
    assert main([str(study.root)]) == 0
    assert "note: runs of seed 1 on cifar10 have different images" in capsys.readouterr().err
    _, tables = summarize(study.root, capsys)
    assert sorted((float(row["mean"]), row["runs"]) for row in tables["summary"]) == [
        (accuracy, "1") for accuracy in (11.0, 12.0, 90.0, 91.0)
    ]


def test_the_best_is_marked_within_each_setting(study, capsys):
    for sparsity, sgd, sam in [(0.9, 91.0, 90.0), (0.98, 70.0, 72.0)]:
        study(sgd, sparsity=sparsity)
        study(sam, sparsity=sparsity, **SAM)
        study(sam - 5, sparsity=sparsity, **SAM | {"sam_rho": 0.5})
    out, tables = summarize(study.root, capsys)
    best = {
        (row["--sparsity"], row["optimizer"], row["--sam_rho"]) for row in tables["summary"] if row["best"] == "True"
    }
    assert best == {("0.9", "sgd", ""), ("0.98", "sgd SAM.v2", "0.05")}
    assert out.count("**") == 4
    assert r"\textbf{72.00}" in (study.root / "summary" / "summary.tex").read_text()
    assert {p.name for p in (study.root / "summary").glob("*.png")} == {
        "accuracy_over_epochs.png", "accuracy_against_rho.png", "accuracy_against_sparsity.png",
    }  # fmt: skip


def test_a_rho_is_marked_by_held_out_images_where_runs_have_them(study, capsys):
    for seed in (0, 1):
        for rho, held_out, test in [(0.05, 70.0, 93.0), (0.1, 80.0, 91.0), (0.2, 75.0, 92.0)]:
            study(test + seed, held_out=held_out + 2 * seed, val_split=237, seed=seed, **SAM | {"sam_rho": rho})
    out, tables = summarize(study.root, capsys)
    assert [(row["--sam_rho"], float(row["held_out"]), row["best"]) for row in tables["summary"]] == [
        ("0.05", 71.0, "False"), ("0.1", 81.0, "True"), ("0.2", 76.0, "False"),
    ]  # fmt: skip
    assert "| held-out accuracy (%)   | test accuracy (%)   |" in out
    assert re.search(r"\*\*81\.00 ± 1\.41\*\* +\| 91\.50 ± 0\.71", out)
    assert out.count("**") == 2
    assert "Bold: the highest mean of a setting on held-out images.\n" in out
    assert "is chosen on the test images" not in out
    assert r"\textbf{81.00 $\pm$ 1.41} & 91.50" in (study.root / "summary" / "summary.tex").read_text()


def test_adaptive_and_two_step_arms_are_lines_of_their_own(study, capsys):
    study(80.0)
    for v2 in (False, True):
        for adaptive in (False, True):
            study(81.0, **SAM | {"sam_v2": v2, "adaptive": adaptive})
    names = {row["optimizer"] for row in summarize(study.root, capsys)[1]["summary"]}
    assert names == {"sgd", "sgd SAM", "sgd SAM.v2", "sgd ASAM", "sgd ASAM.v2"}


def test_local_perturbations_are_an_optimizer_of_their_own(study, capsys):
    for seed in range(2):
        study(80.0 + seed, seed=seed)
        study(81.0 + seed, seed=seed, **SAM | {"sam_v2": False})
        study(82.0 + seed, seed=seed, **SAM | {"sam_v2": False, "sam_local": True})
    _, tables = summarize(study.root, capsys)
    assert {row["optimizer"]: row["pairs"] for row in tables["paired"]} == {"sgd SAM": "2", "sgd SAM local": "2"}
    assert [row["best"] for row in tables["summary"]] == ["False", "False", "True"]


def test_runs_from_before_a_flag_existed_had_its_default(study, capsys):
    study(80.0, seed=0, **SAM)
    study(81.0, seed=1, sam_direction="previous", sam_from=0.0, label_noise=0.0, dense_layers=[], **SAM)
    study(82.0, seed=1, sam_direction="random", sam_unmasked=True, **SAM)
    rows = summarize(study.root, capsys)[1]["summary"]
    assert {row["optimizer"]: row["runs"] for row in rows} == {"sgd SAM.v2": "2", "sgd SAM.v2 random unmasked": "1"}
    assert not [name for name in rows[0] if name.startswith("--")]


def test_curves_go_through_the_epochs_that_were_evaluated(study, capsys):
    run = study(80.0)
    (run / "metrics.csv").write_text("epoch,test_top1\n1,\n2,70.0\n3,\n4,80.0\n")
    (curve,) = read_curves(pd.DataFrame({"directory": [run]}))
    assert dict(zip(curve["epoch"], curve["test_top1"], strict=True)) == {2: 70.0, 4: 80.0}
    out, _ = summarize(study.root, capsys)
    assert "80.00" in out
    assert (study.root / "summary" / "accuracy_over_epochs.png").stat().st_size > 10_000


def test_runs_on_other_images_or_in_other_processes_are_never_mixed(study, capsys):
    folder = {"dataset": "folder", "data_dir": "/data"}
    study(90.0, images="a" * 40, **folder)
    study(10.0, images="b" * 40, **folder)  # the folder was filled anew
    study(90.0, images="a" * 40, dataset="folder", data_dir="/moved")  # the same run once more
    study(80.0, images="a" * 40, processes=4, **folder)
    out, tables = summarize(study.root, capsys)
    assert "4 runs: 3 finished, 1 repeated." in out
    lines = {(row["data"], row["processes"]): float(row["mean"]) for row in tables["summary"]}
    assert lines == {
        ("folder (/data)", "1"): 90.0,
        ("folder (/data) bbbbbbbb", "1"): 10.0,
        ("folder (/data)", "4"): 80.0,
    }
    assert all(row["unfinished"] == "0" for row in tables["summary"])


@pytest.mark.parametrize("drawn", [{"label_noise": 0.4}, {"train_images": 500}, {"val_split": 237}])
def test_images_and_labels_that_the_seed_chose_are_one_setting(study, drawn, capsys):
    for seed, (sgd, sam) in enumerate([(90.0, 91.0), (92.0, 95.0)]):
        study(sgd, images=f"{seed}a" * 20, seed=seed, **drawn)
        study(sam, images=f"{seed}a" * 20, seed=seed, **drawn, **SAM)
    _, tables = summarize(study.root, capsys)
    assert [(float(row["mean"]), row["runs"]) for row in tables["summary"]] == [(91.0, "2"), (93.0, "2")]
    assert [(row["pairs"], float(row["difference"])) for row in tables["paired"]] == [("2", 2.0)]


def test_images_that_the_seed_chose_are_one_setting_at_each_size(study, capsys):
    for seed in range(3):
        for size in (16, 32):
            images = f"{seed}{size:x}" * 10
            study(float(size + seed), images=images, seed=seed, dataset="folder", image_size=size, label_noise=0.4)
    _, tables = summarize(study.root, capsys)
    assert [(row["--image_size"], float(row["mean"]), row["runs"]) for row in tables["summary"]] == [
        ("16", 17.0, "3"), ("32", 33.0, "3"),
    ]  # fmt: skip


def test_what_did_not_finish_is_shown_and_in_no_mean(study, capsys):
    study(80.0, seed=0)
    broken, cut = study(None, seed=1), study(None, seed=2)
    (study.root / ".sweep").mkdir()
    (study.root / ".sweep" / f"{broken.name}.failed").touch()
    (study.root / ".sweep" / "never-begun.command").touch()
    out, tables = summarize(study.root, capsys)
    (row,) = tables["summary"]
    assert (float(row["mean"]), row["runs"], row["unfinished"]) == (80.0, "1", "2")
    assert "4 runs: 1 finished, 2 incomplete, 1 failed." in out
    assert f"{broken}: failed after 1 epoch" in out
    assert f"{cut}: incomplete after 1 epoch" in out
    assert "never-begun: incomplete after 0 epochs" in out


def test_a_run_that_two_sweeps_have_counts_once(study, capsys):
    for _ in range(2):
        study(80.0, seed=0)
        study(81.0, seed=0, compile="on", **SAM)
    study(82.0, seed=1)
    study(84.0, seed=1, compile="off", **SAM)  # what --compile auto came to is no setting
    out, tables = summarize(study.root, capsys)
    assert [row["runs"] for row in tables["summary"]] == ["2", "2"]
    assert [row["pairs"] for row in tables["paired"]] == ["2"]
    assert "6 runs: 4 finished, 2 repeated." in out


def test_flags_that_are_lists_and_names_that_latex_would_read(study, capsys):
    study(80.0, dense_layers=[])
    study(81.0, dense_layers=["stem", "shortcut"], sparsity_config="a_b%c.yaml")
    _, tables = summarize(study.root, capsys)
    assert [row["--dense_layers"] for row in tables["summary"]] == ["", "stem shortcut"]
    tex = (study.root / "summary" / "summary.tex").read_text()
    assert r"a\_b\%c.yaml" in tex
    assert r"test accuracy (\%)" in tex


def test_runs_csv_has_every_run(study, capsys):
    study(80.0, seed=0)
    study(None, seed=1)
    summarize(study.root, capsys)
    assert list(pd.read_csv(study.root / "summary" / "runs.csv")["state"]) == ["finished", "incomplete"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("nothing", "there is no directory"),
        ("empty", "no runs in"),
        ("unfinished", "none of 1 run has finished"),
        ("damaged", "cannot read the run in"),
        ("list", "cannot read the run in"),
        ("curveless", "cannot read the run in"),
        ("unwritable", "cannot write to '/proc'"),
        ("pivot", "--pivot names a flag of the runs"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(study, case, words, capsys):
    root, flags = study.root, []
    if case == "empty":
        root.mkdir()
    elif case == "unfinished":
        study(None)
    elif case == "damaged":
        (study(80.0) / "result.json").write_text("{")
    elif case == "list":
        (study(80.0) / "args.json").write_text("[1]")
    elif case == "curveless":
        (study(80.0) / "metrics.csv").unlink()
    elif case == "unwritable":
        study(80.0)
        flags = ["--output", "/proc"]
    elif case == "pivot":
        study(80.0)
        flags = ["--pivot", "flavour"]
    assert main([str(root), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (root / "summary").exists()


def test_a_lone_run_is_not_bold_and_has_no_pairs(study, capsys):
    study(80.0, epochs_done=1, update_interval=10)
    study(81.0, sparsity=0.5)
    (study.root / "summary").mkdir()
    stale = [study.root / "summary" / name for name in ("paired.csv", "pivot.md", "accuracy_against_rho.png")]
    for file in stale:
        file.touch()
    out, tables = summarize(study.root, capsys)
    assert "**" not in out
    assert "Bold" not in out
    assert not any(file.exists() for file in stale)
    assert {row["--update_interval"] for row in tables["summary"]} == {"10", ""}  # not 10.0
    assert "| 10 " in out


def pivot(root, capsys, flag="prune_method"):
    assert main([str(root), "--pivot", flag]) == 0
    text = (root / "summary" / "pivot.md").read_text()
    assert text in capsys.readouterr().out
    head, *tables = text.split("## ")
    return head, tables


def cells(table):
    """The rows of a Markdown table, from column names to texts."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_a_pivot_has_a_column_per_value_and_a_table_per_network_and_data(study, capsys):
    for seed, accuracy in enumerate((90.0, 92.0)):
        study(accuracy, seed=seed, prune_method="rigl", update_interval=100, **SAM)
    study(None, seed=2, prune_method="rigl", update_interval=100, **SAM)
    study(85.0, **SAM)
    study(75.0)
    study(None, prune_method="snip")
    study(70.0, prune_method="set", sparsity=0.98, dataset="cifar100")
    head, (first, second) = pivot(study.root, capsys, "prune-method")
    assert "7 runs: 5 finished, 2 incomplete." in head
    assert "- commit: abc123\n- device: cuda:0\n- torch: unknown\n- epochs: 160" in head
    assert f"`python -m analysis.summarize {study.root} --pivot prune-method`" in head
    assert first.startswith("resnet-32, width 2, on cifar10, 160 epochs\n")
    base, sam = cells(first)
    assert sam == {
        "optimizer": "sgd SAM.v2",
        "sam rho": "0.05",
        "random": "85.00 (1)",
        "rigl": "91.00 ± 1.41 (2)",
        "snip": "",
    }
    assert base == {"optimizer": "sgd", "sam rho": "", "random": "75.00 (1)", "rigl": "", "snip": ""}
    assert "Columns or rows also differ in update interval." in first
    assert cells(second) == [{"set": "70.00 (1)"}]


@pytest.mark.parametrize(("flag", "value"), [("sam_rho", 0.5), ("lr", 9.0), ("epochs", 10)])
def test_no_cell_of_a_pivot_mixes_runs_that_differ_in_more_than_the_seed(study, flag, value, capsys):
    study(90.0, **SAM)
    study(80.0, seed=1, **SAM | {flag: value})
    _, tables = pivot(study.root, capsys)
    found = [row["random"] for table in tables for row in cells(table)]
    assert sorted(found) == ["80.00 (1)", "90.00 (1)"]


@pytest.mark.parametrize("column", ["update_interval", "prune_method"])
def test_a_pivot_of_steps_and_epochs_has_steps_first(study, column, capsys):
    for interval, method in (("1e", "set"), (100, "rigl"), (20, "rigl")):
        study(90.0, update_interval=interval, prune_method=method)
    _, (table,) = pivot(study.root, capsys, column)
    rows = cells(table)
    found = list(rows[0]) if column == "update_interval" else [row["update interval"] for row in rows]
    assert found[-3:] == ["20", "100", "1e"]


def test_a_pivot_by_optimizer_puts_optimizers_side_by_side(study, capsys):
    for sparsity in (0.9, 0.98):
        study(90.0, sparsity=sparsity)
        study(91.0, sparsity=sparsity, **SAM)
    _, (table,) = pivot(study.root, capsys, "optimizer")
    assert cells(table)[0] == {"sparsity": "0.9", "sgd": "90.00 (1)", "sgd SAM.v2": "91.00 (1)"}
