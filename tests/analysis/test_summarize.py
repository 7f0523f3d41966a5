"""The tables of a study, from run directories with known figures."""

import csv
import json
import math
from pathlib import Path

import pandas as pd
import pytest

from analysis import paper_table
from analysis.summarize import main

FLAGS = {
    "adaptive": False, "optmzr": "sgd", "output_dir": "x", "prune_method": "random", "resume": "auto", "sam_rho": None,
    "sam_v2": False, "seed": 0, "sparsity": 0.9, "lr": 0.1, "dataset": "cifar10", "arch": "resnet", "depth": 32, "width": 2.0,
    "epochs": 160,
}  # fmt: skip
SAM = {"optmzr": "sgd-sam", "sam_v2": True, "sam_rho": 0.05}


@pytest.fixture
def study(tmp_path):
    """study(accuracy, flag=value, ...) leaves a run; without an accuracy one that did not finish."""

    def add(accuracy, images=None, processes=1, **flags):
        directory = tmp_path / "study" / f"run{len(list(tmp_path.glob('study/*')))}"
        directory.mkdir(parents=True)
        args = FLAGS | flags | {"output_dir": str(directory)}
        about = {"args": args, "git": "abc123", "device": "cuda:0", "images": images, "processes": processes}
        (directory / "args.json").write_text(json.dumps(about))
        rows = [accuracy / 2, accuracy] if accuracy else [50.0]
        lines = "".join(f"{epoch},{value}\n" for epoch, value in enumerate(rows, 1))
        (directory / "metrics.csv").write_text("epoch,test_top1\n" + lines)
        if accuracy:
            result = {"test_top1": accuracy, "sparsity": 0.9, "seed": args["seed"], "args": args}
            (directory / "result.json").write_text(json.dumps(result))
        return directory

    add.root = tmp_path / "study"
    return add


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
    assert f"{broken}: failed after 1 epochs" in out
    assert f"{cut}: incomplete after 1 epochs" in out
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


@pytest.mark.parametrize("case", ["nothing", "empty", "unfinished", "damaged"])
def test_bad_input_ends_in_a_sentence(study, case, capsys, tmp_path):
    root = study.root
    if case == "empty":
        root.mkdir()
    elif case == "unfinished":
        study(None)
    elif case == "damaged":
        (study(80.0) / "result.json").write_text("{")
    with pytest.raises(SystemExit) as stopped:
        main([str(root)])
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert not (root / "summary").exists()


def test_the_papers_table_names_its_source_and_leaves_cells_empty(study, capsys):
    for seed, accuracy in enumerate((90.0, 92.0)):
        study(accuracy, seed=seed, prune_method="rigl", **SAM)
    study(None, seed=2, prune_method="rigl", **SAM)
    study(70.0, prune_method="set", sparsity=0.98, dataset="cifar100")
    assert paper_table.main([str(study.root)]) == 0
    page = capsys.readouterr().out
    assert "4 runs: 3 finished, 1 incomplete." in page
    assert "- commit: abc123\n- device: cuda:0" in page
    first, second = page.split("## ")[1:]
    assert first.startswith("resnet-32, width 2, on cifar10")
    cells = {line.strip() for line in first.split("|")} - {""}
    assert "91.00 ± 1.41 (2)" in cells
    assert not any("70.00" in text for text in cells)
    assert second.count("(1)") == second.count("70.00") == 1
    study(60.0, prune_method="gmp", sparsity=0.8)
    assert paper_table.main([str(study.root)]) == 0
    assert capsys.readouterr().out.count("60.00 (1)") == 1  # beyond the paper's methods and sparsities


@pytest.mark.parametrize(
    ("flags", "words"),
    [({"epochs": 10}, "one length"), ({"sam_rho": 0.5}, "differ in --sam_rho"), ({"lr": 9.0}, "differ in --lr")],
)
def test_no_cell_of_the_papers_table_mixes_runs(study, flags, words, capsys):
    study(90.0, **SAM)
    study(80.0, seed=1, **SAM | flags)
    with pytest.raises(SystemExit):
        paper_table.main([str(study.root)])
    assert words in capsys.readouterr().err
