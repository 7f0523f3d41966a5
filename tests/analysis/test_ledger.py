"""What `python -m analysis.ledger add` writes of a run, and which runs it refuses."""

import csv
import json
import shutil
import subprocess
from itertools import pairwise

import pytest

from analysis.ledger import MOST_BYTES, Ledger, main, read_run
from experiment.flags import NOT_OF_FIGURES, parse, resolve
from utils.errors import UsageError


class Checkout:
    """A git repository whose sam.py stands for all that decides figures."""

    def __init__(self, root):
        self.root = root
        root.mkdir()
        self.git("init", "--quiet")
        self.commit("sam.py", "rho = 0.05")

    def git(self, *arguments):
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(self.root), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, name, text):
        (self.root / name).write_text(text)
        self.git("add", name)
        self.git("commit", "--quiet", "--message", name)

    @property
    def head(self):
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "checkout")


@pytest.fixture
def run(finished, checkout):
    """The directory of a finished run of the checkout's commit."""
    edit(finished.directory / "args.json", git=checkout.head)
    return finished.directory


@pytest.fixture
def add(checkout, capsys):
    """add(RUN_DIR, ...) adds to the study `digits`; returns exit code, output and errors."""

    def call(*runs, study="digits"):
        capsys.readouterr()
        code = main(["add", "--study", study, *map(str, runs)], checkout.root)
        return (code, *capsys.readouterr())

    return call


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def entries(checkout):
    return {path.name: path.read_text() for path in sorted((checkout.root / "results").rglob("*.json"))}


def entry(checkout, name="run"):
    return json.loads((checkout.root / "results" / "digits" / f"{name}.json").read_text())


def rows(directory):
    with open(directory / "metrics.csv") as file:
        return list(csv.DictReader(file))


def refused(done, checkout):
    """Whether it ended in one sentence, with nothing written."""
    code, out, err = done
    return (code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: ") and not entries(checkout)


# what is written


def test_an_entry_has_what_a_table_needs_and_where_it_comes_from(add, run, checkout):
    assert add(run) == (0, f"1 run in {checkout.root}/results/digits\n", "")
    result, about = (json.loads((run / name).read_text()) for name in ("result.json", "args.json"))
    made = entry(checkout)
    assert (made["run"], made["state"], made["commit"]) == ("run", "finished", checkout.head)
    assert (made["device"], made["torch"]) == (about["device"], about["versions"]["torch"])
    assert len(made["mathematics"]) == 12
    assert made["seconds"] == pytest.approx(result["seconds"], abs=0.05)
    for name, value in made["final"].items():
        assert value == pytest.approx(result[name], rel=1e-5), name
    assert {"test_top1", "sparsity", "training_flops", "passes_per_step"} <= made["final"].keys()
    assert made["epochs"]["epoch"] == [1, 2, 3]
    for name in ("test_top1", "train_loss"):
        assert made["epochs"][name] == pytest.approx([float(row[name]) for row in rows(run)], rel=1e-3)


def test_flags_of_an_entry_are_those_that_decide_figures_and_are_no_defaults(add, run, checkout):
    add(run)
    flags = entry(checkout)["flags"]
    assert {name: flags[name] for name in flags.keys() - {"precision", "compile"}} == {  # which depend on the machine
        "batch_size": 96, "dataset": "digits", "depth": 8, "epochs": 3, "optmzr": "sgd-sam", "prune_method": "random",
        "sam_rho": 0.05, "sam_v2": True, "sparsity": 0.9, "train_images": 570, "width": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("", {}),
        ("--optmzr sgd-sam", {"optmzr": "sgd-sam", "sam_rho": 0.05}),
        ("--optmzr sgd-sam --adaptive", {"optmzr": "sgd-sam", "adaptive": True, "sam_rho": 0.5}),
        ("--optmzr adam", {"optmzr": "adam", "lr": 1e-3, "momentum": None}),
        ("--optmzr adamw", {"optmzr": "adamw", "lr": 1e-3, "momentum": None, "weight_decay": 0.01}),
        ("--optmzr sgd-cram", {"optmzr": "sgd-cram", "sam_rho": 0.2, "cram_sparsities": [0.5, 0.7, 0.8, 0.9, 0.95]}),
        ("--optmzr sgd-safe", {"optmzr": "sgd-safe", "sam_rho": 0.1, "safe_interval": 32, "safe_lambda": 1e-3}),
        ("--mixup", {"mixup": True, "alpha": 1.0}),
        ("--dataset imagefolder", {"dataset": "imagefolder", "image_size": 224}),
        ("--prune-method oneshot", {"prune_method": "oneshot", "lr": 0.01, "sparsity_distribution": "global"}),
    ],
)
def test_defaults_are_those_that_the_ledger_leaves_out(flags, changes):
    """Whoever changes a default first writes its old value into the flags of the ledger's entries."""
    defaults = {
        "accumulate": 1, "arch": "resnet", "augment": "crop-flip", "batch_size": 128, "compile": "auto",
        "dataset": "cifar10", "depth": 20, "epochs": 160, "lr": 0.1, "lr_scheduler": "cosine", "momentum": 0.9,
        "nonfinite": "stop", "optmzr": "sgd", "precision": "auto", "prune_method": "none", "rho_schedule": "constant",
        "sam_direction": "previous", "sam_every": 1, "sam_until": 1.0, "sparsity_pattern": "unstructured", "stem": "auto",
        "weight_decay": 5e-4, "width": 1.0,
    }  # fmt: skip
    args = vars(resolve(parse(flags.split())[0]))
    found = {name: value for name, value in args.items() if value and name not in NOT_OF_FIGURES}
    assert found == {name: value for name, value in (defaults | changes).items() if value}


def test_skipping_steps_that_are_not_finite_is_told(add, run, checkout):
    about = json.loads((run / "args.json").read_text())
    edit(run / "args.json", args=about["args"] | {"nonfinite": "skip"})
    add(run)
    assert entry(checkout)["flags"]["nonfinite"] == "skip"


def test_steps_that_an_earlier_launch_skipped_are_told(add, run, checkout):
    edit(run / "result.json", skipped_steps=1)
    add(run)
    assert entry(checkout)["flags"]["nonfinite"] == "skip"


def test_a_long_run_is_thinned_to_fit_and_keeps_its_last_epoch(add, run, checkout):
    first = rows(run)[0]
    with open(run / "metrics.csv", "w") as file:
        writer = csv.DictWriter(file, first)
        writer.writeheader()
        writer.writerows(first | {"epoch": number} for number in range(1, 401))
    add(run)
    (text,) = entries(checkout).values()
    epochs = entry(checkout)["epochs"]["epoch"]
    assert len(text.encode()) <= MOST_BYTES
    assert epochs[-1] == 400
    assert len(epochs) > 40
    assert len({after - before for before, after in pairwise(epochs)}) == 1


def test_adding_a_run_again_or_from_another_machine_changes_nothing(add, run, checkout):
    add(run)
    before = entries(checkout)
    edit(run / "args.json", device="cuda:0")
    edit(run / "result.json", seconds=1.0)
    assert add(run)[0] == 0
    assert entries(checkout) == before


def test_a_run_whose_curves_were_thinned_otherwise_is_the_same_run(add, run, checkout):
    add(run)
    path = checkout.root / "results" / "digits" / "run.json"
    whole = json.loads(path.read_text())
    thinned = whole | {"epochs": {name: values[::2] for name, values in whole["epochs"].items()}}
    path.write_text(json.dumps(thinned))
    assert add(run)[0] == 0
    wrong = thinned["epochs"] | {"train_loss": [9.0, *thinned["epochs"]["train_loss"][1:]]}
    path.write_text(json.dumps(whole | {"epochs": wrong}))
    code, _, err = add(run)
    assert (code, "and other figures" in err) == (2, True)


def test_sharpness_that_is_measured_later_is_added(add, run, checkout):
    add(run)
    assert "sharpness" not in entry(checkout)
    args = json.loads((run / "args.json").read_text())["args"]
    about = {"checkpoint": str(run / "checkpoint.pt"), "args": args, "epochs": 3, "recalibrated_bn": False}
    measured = about | {"settings": {"images": 500}, "train": {"living": {"eigenvalues": [{"value": 31.41592}]}}}
    others = [measured | {"checkpoint": "best.pt"}, measured | {"epochs": 2}, measured | {"recalibrated_bn": True}]
    others += [measured | {"args": args | {"seed": 7}}, measured | {"settings": {"images": 20}}]
    others.append(about | {"train": {"all": measured["train"]["living"]}})  # not over the living weights
    (run / "sharpness.json").write_text(json.dumps(others))  # of networks that are not the run's last
    assert add(run)[0] == 0
    assert "sharpness" not in entry(checkout)
    (run / "sharpness.json").write_text(json.dumps([*others, measured]))
    assert add(run)[0] == 0
    assert entry(checkout)["sharpness"] == {"train": 31.42}


def test_what_is_measured_of_a_run_later_joins_what_is_there(add, run, checkout):
    args = json.loads((run / "args.json").read_text())["args"]
    measured = {"checkpoint": str(run / "checkpoint.pt"), "args": args, "epochs": 3, "recalibrated_bn": False}
    measured |= {"settings": {"images": 500}, "train": {"living": {"eigenvalues": [{"value": 3.0}]}}}
    add(run)
    before = entry(checkout)
    edit(run / "result.json", test_top1_recalibrated_bn=81.97, seconds=99.0)
    add(run)
    final = before["final"] | {"test_top1_recalibrated_bn": 81.97}
    assert entry(checkout) == before | {"final": final}
    result = json.loads((run / "result.json").read_text())
    del result["test_top1_recalibrated_bn"]
    (run / "result.json").write_text(json.dumps(result))
    (run / "sharpness.json").write_text(json.dumps([measured]))
    assert add(run)[0] == 0
    assert entry(checkout) == before | {"final": final, "sharpness": {"train": 3.0}}


@pytest.mark.parametrize("other", ["elsewhere/run", "better"])
def test_runs_of_one_command_are_held_against_each_other(add, run, checkout, other):
    """Another run of the same name, and the same flags with other figures: which of them counts is not to be chosen."""
    second = shutil.copytree(run, run.parent / other)
    if other == "better":
        edit(second / "result.json", test_top1=99.0)
    else:
        about = json.loads((second / "args.json").read_text())
        edit(second / "args.json", args=about["args"] | {"label_noise": 0.2})
    assert refused(add(run, second), checkout)


def test_a_run_that_diverged_is_in_the_ledger_with_the_sentence_that_says_so(add, run, checkout):
    (run / "result.json").unlink()
    (run.parent / ".sweep").mkdir()
    log = run.parent / ".sweep" / "run.log"
    sentence = "the training loss is nan after epoch 2, step 1,012"
    log.write_text(f"epoch 1/3\nerror: {sentence}: lower --lr or --sam-rho\n")
    assert add(run)[0] == 0
    made = entry(checkout)
    assert (made["state"], made["end"]) == ("diverged", sentence)
    assert "final" not in made


def test_a_change_that_decides_no_figure_keeps_older_runs_welcome(add, run, checkout):
    checkout.commit("README.md", "words")
    assert add(run)[0] == 0


# what is refused


@pytest.mark.parametrize(
    ("git", "words"),
    [
        ("{head}-dirty", "was run with changes that are not committed: commit them and run it again"),
        ("0123456789abcdef0123456789abcdef01234567", "commit 0123456789ab, which is not in this repository: fetch it"),
        (None, "was not run in a git checkout, or lost its args.json"),
    ],
)
def test_a_run_whose_program_cannot_be_known_is_refused(add, run, checkout, git, words):
    edit(run / "args.json", git=git and git.format(head=checkout.head))
    done = add(run)
    assert refused(done, checkout)
    assert words in done[2]


def test_what_another_process_wrote_meanwhile_is_not_replaced(checkout, run):
    add_one, add_other = (Ledger(checkout.root / "results/digits", checkout.root) for _ in range(2))
    found = read_run(run)
    add_one.write(add_one.check(found))
    other = add_other.check(found | {"final": found["final"] | {"test_top1": 99.0}})
    with pytest.raises(UsageError, match="other figures: which run counts"):
        add_other.write(other)
    assert entry(checkout)["final"] == found["final"]


def test_a_run_of_other_mathematics_is_refused_by_the_files_that_differ(add, run, checkout):
    checkout.commit("sam.py", "rho = 0.1")
    done = add(run)
    assert refused(done, checkout)
    assert "files that decide its figures are others now (sam.py): check that commit out to add it" in done[2]


def test_a_run_that_was_begun_at_a_commit_of_other_mathematics_is_refused(add, run, checkout):
    first = checkout.head
    checkout.commit("README.md", "words")
    second = checkout.head
    edit(run / "args.json", git=second, earlier_git=[first])
    assert add(run)[0] == 0
    assert entry(checkout)["earlier_commits"] == [first]
    (checkout.root / "results/digits/run.json").unlink()
    checkout.commit("sam.py", "rho = 0.1")
    edit(run / "args.json", git=checkout.head, earlier_git=[first, second])
    done = add(run)
    assert refused(done, checkout)
    assert f"was run at commit {first[:12]}, and files that decide its figures are others now (sam.py)" in done[2]


def test_a_run_that_has_not_finished_is_refused(add, run, checkout):
    (run / "result.json").unlink()
    done = add(run)
    assert refused(done, checkout)
    assert "has not finished: go on with it by --resume auto" in done[2]


def test_a_run_that_failed_for_another_reason_has_not_diverged(add, run, checkout):
    (run / "result.json").unlink()
    (run.parent / ".sweep").mkdir()
    (run.parent / ".sweep" / "run.log").write_text("error: cannot write to '/full'\n")
    assert refused(add(run), checkout)


@pytest.mark.parametrize(
    ("study", "words"),
    [("../digits", "--study names a folder of results/"), ("digits", "name the directory of a finished run")],
)
def test_a_wrong_study_or_directory_is_refused(add, tmp_path, checkout, study, words):
    done = add(tmp_path, study=study)
    assert refused(done, checkout)
    assert words in done[2]


def test_the_same_flags_with_other_figures_are_refused_whatever_the_name(add, run, checkout):
    add(run)
    before = entries(checkout)
    edit(run / "result.json", test_top1=99.9)
    for directory in (run, shutil.copytree(run, run.parent / "better")):
        code, _, err = add(directory)
        assert code == 2
        assert "which run counts is not to be chosen by its figures" in err
    assert entries(checkout) == before


def test_the_same_run_under_two_names_is_refused(add, run, checkout):
    add(run)
    code, _, err = add(shutil.copytree(run, run.parent / "copy"))
    assert (code, list(entries(checkout))) == (2, ["run.json"])
    assert "'run' in" in err
    assert "is the same run as 'copy': one of them is enough" in err


def test_two_runs_of_one_name_are_refused(add, run, checkout):
    add(run)
    edit(run / "args.json", args=json.loads((run / "args.json").read_text())["args"] | {"seed": 1})
    code, _, err = add(run)
    assert code == 2
    assert "the ledger has another run 'run' in" in err
    assert "seed" not in entry(checkout)["flags"]


def test_of_several_runs_all_are_added_or_none(add, run, checkout):
    other = shutil.copytree(run, run.parent / "other")
    edit(other / "args.json", git=f"{checkout.head}-dirty")
    assert refused(add(run, other), checkout)


def test_a_damaged_file_of_the_ledger_is_named(add, run, checkout):
    add(run)
    (checkout.root / "results" / "digits" / "run.json").write_text('{"run": "other"}')
    code, _, err = add(run)
    assert code == 2
    assert "run.json' of the ledger (not a run's figures): restore it from git, or remove it" in err
