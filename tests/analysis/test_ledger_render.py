"""Pages and pictures made from a small ledger with figures that are known."""

import json
import math
import re

import pytest
from scipy.stats import nct
from scipy.stats import t as student

from analysis.comparison import compare
from analysis.ledger import Ledger, main, telling_flags
from analysis.results_pictures import sparsities
from experiment.flags import parse, plain, resolve
from experiment.study_list import TASKS, Run

TASK, CELL = "digits-noise", "random-0.9"
PAGE = "# Results\n\n" + "\n".join(
    f"<!-- ledger: {name} -->\n<!-- /ledger -->\n"
    for name in ("headlines", "frontier", "sparsities", TASK, "methods", "methods-noise")
)
ACCURACIES = {  # by seed
    "sgd": [90.0, 91.0, 92.0],
    "sam": [94.0, 95.1, 95.9],
    "previous": [91.0, 91.5, 94.0],
}


def entry(run, accuracy, *, commit="1234567890", **more):
    """Return an entry of the ledger; one without an accuracy diverged."""
    flags = telling_flags(plain(resolve(parse(run.flags())[0])))
    if run.tuned_arm and run.value is None:
        arm = TASKS[run.task].arms[run.tuned_arm]
        flags[arm.tuned[2:].replace("-", "_")] = arm.values[1]
    about = {
        "run": run.name, "commit": commit, "mathematics": "abc", "device": "cpu (x86_64, 2 threads)", "torch": "2.14",
        "seconds": 1800.0, "images": f"seed {run.seed}", "flags": flags,
    }  # fmt: skip
    if accuracy is None:
        return about | {"state": "diverged", "end": "the loss is nan"} | more
    figures = {"test_top1": accuracy, "passes_per_step": 2.0 if run.arm == "sam" else 1.0}
    epochs = {"epoch": [1, 60], "train_top1": [20.0, accuracy - 30]}
    return about | {"state": "finished", "final": figures, "epochs": epochs} | more


@pytest.fixture
def checkout(tmp_path):
    """A directory with a page and a ledger; checkout.add(run, accuracy, ...) puts a run into it."""

    class Checkout:
        root, page = tmp_path, tmp_path / "RESULTS.md"

        def add(self, run, accuracy, **more):
            folder = tmp_path / "results" / run.task
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{run.name}.json").write_text(json.dumps(entry(run, accuracy, **more)))

        def add_cell(self, cell=CELL):
            for arm, accuracies in ACCURACIES.items():
                for seed, accuracy in enumerate(accuracies):
                    self.add(Run(TASK, cell, arm, seed), accuracy)

        def render(self, *flags):
            return main(["render", *flags], root=tmp_path)

        def rows(self, headlines=False):
            """Return the cells of all rows of tables, or of the first table, by their first cell; of equal ones the first."""
            found = {}
            parts = self.page.read_text().partition("<!-- /ledger -->")  # the headlines come first
            for line in re.findall(r"^\|(.*)\|$", parts[0 if headlines else 2], re.MULTILINE):
                first, *cells = (cell.strip() for cell in line.split("|"))
                found.setdefault(first, cells)
            return found

        def compared(self):
            rows = compare(TASK, CELL, Ledger(tmp_path / "results" / TASK, None).entries)
            return {row.arm: row for row in rows}

    Checkout.page.write_text(PAGE)
    return Checkout()


def test_a_row_has_pairs_interval_and_corrected_p_of_the_formulas(checkout):
    checkout.add_cell()
    previous = checkout.compared()["previous"]
    differences = [1.0, 0.5, 2.0]
    mean = sum(differences) / 3
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2) / math.sqrt(3)
    half = 4.302652729911275 * error  # Student's t at 0.975 with 2 degrees of freedom, from a table
    t = mean / error
    p = 1 - t / math.sqrt(2 + t * t)  # two-sided, in closed form for 2 degrees of freedom
    assert previous.differences == tuple(differences)
    assert previous.difference == pytest.approx((mean, mean - half, mean + half))
    assert previous.p == pytest.approx(p)  # the larger one of two stays as it is
    sam = checkout.compared()["sam"]
    t = 4 / (0.1 / math.sqrt(3))  # 4.0, 4.1, 3.9
    assert sam.p == pytest.approx(2 * (1 - t / math.sqrt(2 + t * t)))  # the smaller one is doubled
    assert (sam.verdict, previous.verdict) == (1, 0)


def test_the_tables_show_every_figure_with_the_control_after_sgd(checkout):
    checkout.add_cell()
    checkout.add(Run(TASK, CELL, "previous", 0), 91.0, sharpness={"train": 320.5})
    assert checkout.render() == 0
    rows, text = checkout.rows(), checkout.page.read_text()
    assert list(rows)[2:5] == ["SGD", "SAM (two-step), the positive control", "one-step SAM"]
    assert rows["SGD"] == ["", "1", "91.00 ± 1.00", "3", "", "", "", "", ""]
    assert rows["one-step SAM"] == [
        "rho 0.1",
        "1",
        "92.17 ± 1.61",
        "3",
        "+1.17",
        "-0.73 to +3.06",
        "3",
        "0.118",
        "320.5",
    ]
    assert "above SGD: *SAM (two-step)*; not told apart from SGD: *one-step SAM*" in text
    assert "SGD ends at 61.0% of the training labels, as they were given." in text
    assert "standard deviation of 0.43 points" in text  # the median of 0.1 and 0.76
    for difference, level in zip(
        re.findall(r"([\d.]+) points (?:is found|at Holm's)", text), (0.05, 0.025), strict=True
    ):
        shift, limit = float(difference) / (0.432 / math.sqrt(3)), student.ppf(1 - level / 2, 2)
        assert nct.sf(limit, 2, shift) == pytest.approx(0.8, abs=0.01)
    assert rows["SAM (two-step) minus one-step SAM"] == ["+2.83", "+0.69 to +4.98", "3", "0.030"]  # 3.0, 3.6 and 1.9
    assert (
        "not in the ledger yet: *SGD* 7, *SAM (two-step)* 7, *one-step SAM* 7, *MSAM* 10, *random* 10, *SGD, weight"
        in text
    )
    assert "9.0 core-hours, 9 runs; cpu (x86_64, 2 threads); torch 2.14; commit 1234567." in text
    assert checkout.rows(headlines=True) == {
        "minus SGD (points)": ["passes", f"{TASKS[TASK].title}: 90% sparse, random, 3 seeds"],
        "---": ["---", "---"],
        "SAM (two-step)": ["2", "**+4.00 (+3.75 to +4.25)**"],
        "one-step SAM": ["1", "+1.17 (-0.73 to +3.06)"],
    }


def test_a_run_that_diverged_is_counted_and_in_no_mean(checkout):
    checkout.add_cell()
    checkout.add(Run(TASK, CELL, "previous", 3), None)
    checkout.add(Run(TASK, CELL, "msam", 0), None)
    checkout.render()
    rows = checkout.rows()
    assert rows["arm"].index("diverged") == 4
    assert rows["one-step SAM"][2:5] == ["92.17 ± 1.61", "3", "1"]
    assert rows["MSAM"] == ["rho -1", "", "", "0", "1", "", "", "", ""]
    assert "2 runs diverged, and are in no mean and no pair, which favours their arms." in checkout.page.read_text()


@pytest.mark.parametrize("other", [{"device": "cuda (NVIDIA H100)"}, {"flags": {"precision": "bf16"}}])
def test_runs_of_another_kind_of_device_or_precision_are_no_pair(checkout, other):
    checkout.add_cell()
    checkout.add(Run(TASK, CELL, "previous", 1), 91.5, **other)
    checkout.add(Run(TASK, CELL, "previous", 2), 94.0, device="cpu (another, 1 threads)")
    assert checkout.compared()["previous"].differences == (1.0, 2.0)


def test_a_column_says_how_many_seeds_its_rows_have(checkout):
    checkout.add_cell()
    for arm in ("sgd", "previous"):
        checkout.add(Run(TASK, CELL, arm, 3), 91.0)
    checkout.render()
    title = checkout.rows(headlines=True)["minus SGD (points)"][1]
    assert title == f"{TASKS[TASK].title}: 90% sparse, random, 3 to 4 seeds"
    for arm in ("sam", "msam"):
        for seed in range(4):
            checkout.add(Run(TASK, CELL, arm, seed), 91.0)
    for seed in range(3):  # which the headlines do not show
        checkout.add(Run(TASK, CELL, "nesterov", seed), 91.0)
    checkout.render()
    title = checkout.rows(headlines=True)["minus SGD (points)"][1]
    assert title == f"{TASKS[TASK].title}: 90% sparse, random, 4 seeds"


def test_an_arm_whose_every_value_diverged_lacks_no_run(checkout):
    checkout.add_cell()
    choices = checkout.root / "results" / TASK / "chosen"
    choices.mkdir()
    (choices / "msam.json").write_text('{"value": null}')
    assert checkout.render() == 0
    assert "*one-step SAM* 7, *random* 10" in checkout.page.read_text()


def test_runs_on_other_images_are_no_pair(checkout):
    checkout.add_cell()
    checkout.add(Run(TASK, CELL, "previous", 1), 91.5, images="others", mathematics="def", commit="fedcba9876")
    assert checkout.compared()["previous"].differences == (1.0, 2.0)
    checkout.render()
    assert "commits 1234567, fedcba9, which compute in 2 ways" in checkout.page.read_text()


def test_the_chosen_value_is_bold_and_one_at_an_end_is_named(checkout):
    arm = TASKS[TASK].arms["previous"]
    held_out = dict(zip(arm.values, [90.0, 91.0, 92.0, 93.0, 94.0], strict=True))
    for value, accuracy in held_out.items():
        for seed in (100, 101):
            run = Run(TASK, CELL, "previous", seed, value, tuning=True)
            checkout.add(run, 1.0, epochs={"val_top1": [1.0, accuracy + seed - 100]})
    checkout.add(Run(TASK, CELL, "previous", 100, arm.values[1], tuning=True), None)
    checkout.render()
    cells = checkout.rows()["one-step SAM"]
    assert cells == ["rho", "0.05: 90.50", "0.1: diverged", "0.2: 92.50", "0.3: 93.50", "**0.5: 94.50**"]
    assert "may be a better one beyond: *one-step SAM*" in checkout.page.read_text()
    (checkout.root / "results" / TASK / "chosen").mkdir()
    (checkout.root / "results" / TASK / "chosen" / "previous.json").write_text('{"value": 0.2}')
    assert checkout.render("--check") == 1
    checkout.render()
    assert checkout.rows()["one-step SAM"][3:] == ["**0.2: 92.50**", "0.3: 93.50", "0.5: 94.50"]


def test_what_rules_add_at_another_weight_decay_stands_in_a_table_of_its_own(checkout):
    checkout.add_cell()
    for arm, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            checkout.add(Run(f"{TASK}-decay", CELL, arm, seed), 2 * accuracy - 90)
    checkout.page.write_text(PAGE + "\n<!-- ledger: headlines-decay -->\n<!-- /ledger -->\n")
    checkout.render()
    assert checkout.rows(headlines=True)["SAM (two-step)"] == ["2", "**+4.00 (+3.75 to +4.25)**"]
    apart = checkout.page.read_text().partition("headlines-decay -->")[2]
    assert "| minus SGD (points) | passes | Digits, 40% of the training labels wrong, weight decay 0.01: " in apart
    assert "| SAM (two-step) | 2 | **+8.00 (+7.50 to +8.50)** |" in apart


def test_what_arms_gain_in_every_network_stands_in_one_table_from_dense_to_sparse(checkout):
    cells = ("random-0.98", "dense", CELL, "rigl-0.9")
    for cell in cells[:3]:
        checkout.add_cell(cell)
    for seed in (0, 1):  # too few for a column
        for arm in ("sgd", "sam"):
            checkout.add(Run(TASK, "rigl-0.9", arm, seed), 90.0 + seed)
    for seed, accuracy in enumerate([80.0, 80.1, 82.2]):
        checkout.add(Run(TASK, "dense", "random-scaled", seed), accuracy)
    checkout.add(Run(TASK, "random-0.98", "msam", 0), 99.0)
    checkout.page.write_text("# Page\n\n<!-- ledger: networks -->\n<!-- /ledger -->\n")
    checkout.render()
    assert checkout.page.read_text().split("\n\n")[-1].splitlines() == [
        f"| {TASKS[TASK].title} | passes | dense, 3 seeds | 90% sparse, random, 3 seeds | 98% sparse, random, 3 seeds |",
        "| --- | --- | --- | --- | --- |",
        "| SAM (two-step) | 2 | **+4.00** | **+4.00** | **+4.00** |",
        "| one-step SAM | 1 | +1.17 | +1.17 | +1.17 |",
        "| random, scaled | 1 | **-10.23** | | |",
        "<!-- /ledger -->",
    ]
    for seed in range(3):
        for arm in ("sgd", "sam", "previous"):
            (checkout.root / "results" / TASK / f"{Run(TASK, 'dense', arm, seed).name}.json").unlink()
            (checkout.root / "results" / TASK / f"{Run(TASK, CELL, arm, seed).name}.json").unlink()
    checkout.render()
    assert "No comparison is in the ledger yet." in checkout.page.read_text()  # one network is no table of networks


def test_a_tuned_baseline_says_which_flag_was_chosen(checkout):
    checkout.add_cell()
    checkout.add(Run(TASK, CELL, "sgd-decay", 0), 92.0)
    checkout.add(Run(TASK, CELL, "sgd-lr", 0), 92.0)
    checkout.add(Run(TASK, CELL, "sgd-decay", 100, 0.005, tuning=True), 1.0, epochs={"val_top1": [80.0]})
    checkout.render()
    assert checkout.rows()["SGD, weight decay tuned"][0] == "weight decay 0.001"
    assert checkout.rows()["SGD, learning rate tuned"][0] == "lr 0.02"
    assert "| SGD, weight decay tuned | weight decay | | | | 0.005: 80.00 (1 run) |" in checkout.page.read_text()


def test_an_unfinished_tuning_has_no_choice(checkout):
    checkout.add(Run(TASK, CELL, "sam", 100, 0.1, tuning=True), 1.0, epochs={"val_top1": [80.0]})
    checkout.render()
    assert checkout.rows()["SAM (two-step)"] == ["rho", "", "0.1: 80.00 (1 run)", "", "", ""]


def test_rendering_twice_changes_nothing_and_a_check_agrees(checkout, capsys):
    for cell in (CELL, "dense", "rigl-0.9"):
        checkout.add_cell(cell)
    assert checkout.render() == 0
    files = [checkout.page, *sorted((checkout.root / "docs/results").iterdir())]
    assert [file.name for file in files] == ["RESULTS.md", "frontier.svg", "sparsities.svg"]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    capsys.readouterr()
    assert checkout.render() == 0
    assert capsys.readouterr().out == "nothing to change\n"
    assert checkout.render("--check") == 0
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    files[1].unlink()
    assert checkout.render() == 0
    assert files[1].read_bytes() == before[1][0]  # drawn anew to the same bytes


def test_a_training_of_twice_the_length_takes_twice_the_passes(checkout):
    checkout.add_cell()
    checkout.add(Run(TASK, CELL, "sgd-long", 0), 90.5, epochs={"epoch": [1, 120], "train_top1": [20.0, 60.0]})
    checkout.render()
    assert checkout.rows()["SGD, twice as long"][:3] == ["", "2", "90.50"]
    assert checkout.rows()["SAM (two-step), the positive control"][1] == "2"


def test_an_eigenvalue_is_bold_where_its_paired_difference_to_sgd_stands(checkout):
    eigenvalues = {"sgd": [100.0, 110.0, 130.0], "sam": [50.0, 60.5, 79.0], "previous": [90.0, 70.0, 129.0]}
    for arm, values in eigenvalues.items():
        for seed, (accuracy, value) in enumerate(zip(ACCURACIES[arm], values, strict=True)):
            checkout.add(Run(TASK, CELL, arm, seed), accuracy, sharpness={"train": value})
    checkout.render()
    assert checkout.rows()["SAM (two-step), the positive control"][-1] == "**63 ± 15**"
    assert checkout.rows()["one-step SAM"][-1] == "96 ± 30"
    t = (50.0 + 49.5 + 51.0) / 3 / (0.7637626158 / math.sqrt(3))
    (sam,) = (row for row in checkout.compared().values() if row.arm == "sam")
    assert sam.sharpness_p == pytest.approx(2 * (1 - t / math.sqrt(2 + t * t)))  # of two arms


@pytest.mark.parametrize("cell", [CELL, "dense"])
def test_two_steps_are_compared_with_random_directions_of_the_same_length_per_weight(checkout, cell):
    checkout.add_cell(cell)
    for arm, gain in {"random": 1.0, "random-scaled": 2.0}.items():
        if TASKS[TASK].has(cell, arm):
            for seed, accuracy in enumerate(ACCURACIES["sgd"]):
                checkout.add(Run(TASK, cell, arm, seed), accuracy + gain)
    checkout.render()
    noise, gain = ("random, scaled", 2.0) if cell == "dense" else ("random", 1.0)
    assert checkout.rows()[f"SAM (two-step) minus {noise}"][0] == f"{4.0 - gain:+.2f}"
    assert [row for row in checkout.rows() if "SAM (two-step) minus random" in row] == [f"SAM (two-step) minus {noise}"]


def test_the_picture_over_sparsities_shows_random_directions_of_one_length_per_weight(checkout):
    gains = {(CELL, "random"): 2.0, ("dense", "random"): 1.0, ("dense", "random-scaled"): 3.0}
    for (cell, arm), gain in gains.items():
        checkout.add_cell(cell)
        for seed, accuracy in enumerate(ACCURACIES["sgd"]):
            checkout.add(Run(TASK, cell, arm, seed), accuracy + gain)
    entries = Ledger(checkout.root / "results" / TASK, None).entries
    (panel,) = sparsities({(TASK, cell): compare(TASK, cell, entries) for cell in ("dense", CELL)})
    shown = {at["cell"]: {each["arm"]: each["mean"] for each in at["points"]} for at in panel["places"]}
    assert shown["dense"]["random, scaled"] == 3.0
    assert shown["90%"]["random, scaled"] == 2.0  # where it is the same as random
    assert shown["dense"].keys() == {"SAM (two-step)", "one-step SAM", "random, scaled"}


def test_a_check_names_what_differs_and_changes_nothing(checkout, capsys):
    checkout.add_cell()
    checkout.render()
    page, picture = checkout.page.read_text(), checkout.root / "docs/results/frontier.svg"
    checkout.page.write_text(edited := page.replace("92.17 ± 1.61", "93.17 ± 1.61"))
    capsys.readouterr()
    assert checkout.render("--check") == 1
    told = "error: not what the ledger makes: {}: run python -m analysis.ledger render\n"
    assert capsys.readouterr().err == told.format(f"RESULTS.md ({TASK})")
    assert checkout.page.read_text() == edited
    checkout.page.write_text(page)
    checkout.add(Run(TASK, CELL, "sam", 0), 94.5)
    drawn = picture.read_bytes()
    assert checkout.render("--check") == 1
    assert capsys.readouterr().err == told.format(f"RESULTS.md (headlines, {TASK}), docs/results/frontier.svg")
    assert picture.read_bytes() == drawn


def test_without_runs_every_block_says_so_and_no_picture_is_left(checkout):
    checkout.add_cell()
    checkout.render()
    for file in (checkout.root / "results" / TASK).iterdir():
        file.unlink()
    assert checkout.render() == 0
    text = checkout.page.read_text()
    assert "No comparison is in the ledger yet." in text
    assert "No run of it is in the ledger yet." in text
    assert "Not run at today's defaults." in text
    assert not list((checkout.root / "docs/results").iterdir())
    assert "|" not in text


def test_text_outside_of_markers_stays(checkout):
    checkout.page.write_text("before\n" + PAGE + "\nafter `<!-- ledger: NAME -->`\n")
    checkout.render()
    assert checkout.page.read_text().startswith("before\n# Results\n")
    assert checkout.page.read_text().endswith("\nafter `<!-- ledger: NAME -->`\n")


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        (PAGE.replace("<!-- /ledger -->\n", "", 1), "belong together"),
        (PAGE + "<!-- /ledger -->\n", "belong together"),
        (PAGE.replace("headlines", "headline"), "'RESULTS.md' has a marker for 'headline'"),
    ],
)
def test_a_wrong_marker_is_one_sentence(checkout, capsys, page, sentence):
    checkout.page.write_text(page)
    assert checkout.render() == 2
    assert sentence in capsys.readouterr().err
    assert checkout.page.read_text() == page


def test_an_entry_without_figures_is_one_sentence(checkout, capsys):
    run = Run(TASK, CELL, "sgd", 0)
    checkout.add(run, 90.0, final={})
    assert checkout.render() == 2
    assert f"cannot read '{checkout.root / 'results' / TASK / run.name}.json'" in capsys.readouterr().err


def test_a_run_that_the_study_does_not_list_is_told_of(checkout, capsys):
    checkout.add(Run(TASK, CELL, "sgd", 77), 90.0)
    assert checkout.render() == 0
    assert f"results/{TASK} has 1 run that experiment/study_list.py does not list" in capsys.readouterr().err
    assert checkout.rows() == {}


def test_an_arm_that_no_study_lists_in_a_cell_is_in_no_row_and_no_correction(checkout):
    checkout.add_cell("random-0.95")
    checkout.render()
    before = checkout.rows()["one-step SAM"]
    for seed in range(3):
        checkout.add(Run(TASK, "random-0.95", "sgd-long", seed), 91.0 + seed / 7)
    checkout.render()
    assert checkout.rows()["one-step SAM"] == before
    assert "SGD, twice as long" not in checkout.rows()


def test_a_run_of_another_value_than_was_chosen_is_refused(checkout, capsys):
    checkout.add_cell()  # with the second value of each arm: 0.1 of one-step SAM
    choices = checkout.root / "results" / TASK / "chosen"
    choices.mkdir()
    (choices / "previous.json").write_text('{"value": 0.1}')
    assert checkout.render() == 0
    (choices / "previous.json").write_text('{"value": 0.3}')
    assert checkout.render() == 2
    (choices / "previous.json").write_text('{"value": null}')
    assert checkout.render() == 2
    words = f"-previous-seed0.json' of the ledger differs from experiment/study_list.py and '{choices / 'previous.json'}' in sam_rho"
    assert words in capsys.readouterr().err


def test_a_run_of_other_flags_than_its_name_says_is_in_no_row(checkout, capsys):
    checkout.add_cell()
    before = checkout.page.read_text()
    run = Run(TASK, CELL, "nesterov", 0)
    flags = telling_flags(plain(resolve(parse([*run.flags(), "--lr", "7"])[0])))
    checkout.add(run, 33.0, flags={name: value for name, value in flags.items() if name != "nesterov"})
    assert checkout.render() == 2
    words = f"'{TASK}/{run.name}.json' of the ledger differs from experiment/study_list.py in lr, nesterov: it would stand in"
    assert words in capsys.readouterr().err
    assert checkout.page.read_text() == before


def test_every_method_has_a_row_with_both_sparsities(checkout):
    figures = {"passes_per_step": 1.0, "inference_flops": 14.52e6, "ever_alive": 0.1}

    def add(cell, arm, accuracy, flops, sparsity, **more):
        final = figures | {"test_top1": accuracy, "training_flops": flops, "sparsity": sparsity} | more
        checkout.add(Run("methods", cell, arm, 0), accuracy, final=final)

    add("dense", "previous", 41.0, 1000.0, 0.0)
    add("random-0.9", "previous", 39.0, 174.0, 0.9)
    add("random-0.9", "sgd", 42.5, 174.0, 0.9)
    add("random-0.98", "previous", 36.8, 50.0, 0.98)
    add("mest-soft-0.9", "previous", 37.0, 194.0, 0.9)
    add("final-0.9", "sgd", 11.0, 1000.0, 0.9, test_top1_recalibrated_bn=21.0)
    add("final-0.9", "cram", 30.0, 2000.0, 0.9, test_top1_recalibrated_bn=40.0)
    checkout.add(Run("methods", "oneshot-0.9", "previous", 0), None)
    checkout.render()
    rows = checkout.rows()
    assert rows["`none`"] == ["0.0000", "41.00", "", "14.5", "1.000", "0.100", "", ""]
    assert rows["`random`"] == ["0.9000", "39.00", "42.50", "14.5", "0.174", "0.100", "0.9800", "36.80"]
    assert rows["`mest --mest-soft`"][4] == "0.194"
    assert rows["`oneshot` (from the run of `none` with one-step SAM)"][:2] == ["diverged", "diverged"]
    assert rows["`final --recalibrate-bn`, CrAM+"][1:5] == ["30.00; 40.00", "", "14.5", "2.000"]
    assert "`snip`" not in rows


def test_methods_with_wrong_labels_are_corrected_over_the_whole_table(checkout):
    task = TASKS["methods-noise"]
    gains = {"sam": [4.0, 4.1, 3.9, 4.2, 3.8], "msam": [2.0, -1.0, 1.0, 3.0, 0.0]}
    for cell in task.cells:
        for seed in task.seeds:
            checkout.add(Run("methods-noise", cell, "sgd", seed), 90.0 + seed)
            for arm, gain in gains.items():
                if (cell, arm, seed) != ("set-0.9", "msam", 4):
                    checkout.add(Run("methods-noise", cell, arm, seed), 90.0 + seed + gain[seed])
    checkout.render()
    half = 2.7764451051977934 * math.sqrt(2.5 / 5)  # Student's t at 0.975 with 4 degrees of freedom, from a table
    rows = checkout.rows()
    assert rows["method"] == ["SGD", "SAM (two-step) minus SGD", "MSAM minus SGD"]
    assert rows["`dsr`"] == [
        "92.00 ± 1.58",
        "**+4.00 (+3.80 to +4.20)**",
        f"+1.00 ({1 - half:+.2f} to {1 + half:+.2f})",
    ]
    assert rows["`set`"][2].startswith("+1.25 (")
    assert rows["mean of the methods"] == ["", "**+4.00 (+3.80 to +4.20)**", ""]  # MSAM lacks a run
    assert "SAM (two-step) minus MSAM" not in rows
    headlines = checkout.rows(headlines=True)
    assert headlines["minus SGD (points)"] == ["passes", f"{task.title}, their mean, 5 seeds"]
    assert headlines["SAM (two-step)"] == ["", "**+4.00 (+3.80 to +4.20)**"]
    assert "MSAM" not in headlines
    assert "correction over the 12 differences" in checkout.page.read_text()
    checkout.add(Run("methods-noise", "set-0.9", "msam", 4), None)
    checkout.render()
    assert checkout.rows()["mean of the methods"][2] == ""
    assert "1 run diverged, and is in no mean and no pair, which favours its arm." in checkout.page.read_text()


def test_means_over_methods_are_corrected_over_the_arms(checkout):
    task = TASKS["methods-noise"]
    gains = {"sgd": 0.0, "sam": 1.0, "msam": 2.0}  # the same t for both, whose p of 0.030 is doubled
    for cell in task.cells:
        for seed, gain in zip(task.seeds, [3.0, 1.0, 0.8, 2.0, 0.6], strict=True):
            for arm in ("sgd", "sam"):
                checkout.add(Run("methods-noise", cell, arm, seed), 90.0 + gain * gains[arm])
    checkout.render()
    assert checkout.rows()["mean of the methods"][1].startswith("**+1.48 (")
    for cell in task.cells:
        for seed, gain in zip(task.seeds, [3.0, 1.0, 0.8, 2.0, 0.6], strict=True):
            checkout.add(Run("methods-noise", cell, "msam", seed), 90.0 + gain * gains["msam"])
    checkout.render()
    assert [text[:7] for text in checkout.rows()["mean of the methods"][1:]] == ["+1.48 (", "+2.96 ("]
    between = checkout.rows()["SAM (two-step) minus MSAM"]
    assert between == ["-1.48", "-2.73 to -0.23", "5", "0.030"]  # the mean itself, with its p


def test_methods_with_wrong_labels_are_shown_while_runs_are_missing(checkout):
    checkout.add(Run("methods-noise", "lth-0.9", "sgd", 0), 90.0)
    checkout.add(Run("methods-noise", "lth-0.9", "sam", 0), 94.0)
    checkout.add(Run("methods-noise", "set-0.9", "sam", 0), 94.0)
    assert checkout.render() == 0
    rows = checkout.rows()
    assert (rows["`lth`"], rows["`set`"]) == (["90.00", "+4.00"], ["", ""])
    assert "`dsr`" not in rows
