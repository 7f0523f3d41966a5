"""The studies: how a value is chosen, and what becomes of runs. A script stands in for training, but once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sweeps import ROOT, commands, value

from analysis.sharpness import build_parser
from analysis.study import best_value, main
from experiment.grid import SETTINGS
from experiment.study_list import gpu_study, tuning

# It leaves the files of a run whose accuracy on held-out images HELD_OUT has for its rho; null: it diverges.
STAND_IN = """
import json, os, sys
from pathlib import Path
from experiment.flags import parse, plain, resolve

args = plain(resolve(parse(sys.argv[1:])[0]))
directory = Path(args["output_dir"])
directory.mkdir(parents=True, exist_ok=True)
about = {"args": args, "git": os.environ.get("COMMIT"), "device": "cpu", "versions": {"torch": "2"}, "images": "0", "processes": 1}
(directory / "args.json").write_text(json.dumps(about))
accuracy = json.loads(os.environ["HELD_OUT"]).get(str(args["sam_rho"]), 50.0)
if accuracy is None:
    sys.exit("error: the training loss is nan after epoch 1, step 6: lower --lr or --sam-rho")
if accuracy < 0:
    sys.exit("error: there is no space left")
(directory / "metrics.csv").write_text(f"epoch,val_top1,test_top1\\n1,{accuracy + args['seed'] % 100},10\\n")
(directory / "result.json").write_text(json.dumps({"test_top1": 10.0, "passes_per_step": 1.0, "seconds": 1.0}))
sys.exit(0)
"""
# A run of main_prune_train.py that waits before its fifth step, in its first launch, until it is told to end.
WAITS = """
import signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from main_prune_train import main
from running import before_step

def wait(state):
    told, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *received: (told.append(1), before(*received)))
    while not told:
        time.sleep(0.01)

output = Path(sys.argv[sys.argv.index("--output-dir") + 1])
if output.exists():
    sys.exit(main(sys.argv[1:]))
with before_step(5, wait):
    sys.exit(main(sys.argv[1:]))
"""
TINY = "--depth 8 --width 0.25 --batch-size 256 --eval-every 3".split()
# Arms whose sharpness is not measured: that takes longer than all else, and the stand-in has no network.
TUNED, FINAL = "digits-noise/tune-random-0.9-late-0.1-*", "digits-noise/random-0.9-late-0.1-seed0"
NESTEROV = "digits-noise/random-0.9-nesterov-seed0"


@pytest.fixture
def study(tmp_path, monkeypatch, capfd):
    """study("--flag", SETTING="value") launches scripts/study.sh's study; returns exit code, output and errors."""
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    root = tmp_path / "checkout"
    for name in (*SETTINGS, "DATA_DIR", "STUDY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OUTPUT_DIR", "out")
    monkeypatch.setenv("HELD_OUT", "{}")

    def launch(*arguments, name="study", program=program, **settings):
        with monkeypatch.context() as patch:
            for setting, value in settings.items():
                patch.setenv(setting, value)
            capfd.readouterr()
            try:
                code = main([name, str(tmp_path), *arguments], root, program)
            except SystemExit as stopped:
                code = stopped.code
            return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    launch.root, launch.output = root, tmp_path / "out"
    return launch


@pytest.fixture
def checkout(study, monkeypatch):
    """The root of the study as a git repository, whose commit the stand-in's runs are of."""
    study.root.mkdir()
    (study.root / "sam.py").write_text("rho = 0.05")
    git = ["git", "-C", str(study.root), "-c", "user.name=A", "-c", "user.email=a@example.org"]
    for command in ("init --quiet", "add sam.py", "commit --quiet --message first"):
        subprocess.run([*git, *command.split()], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    monkeypatch.setenv("COMMIT", head.strip())
    return study.root


def choice(results):
    return json.loads((results / "digits-noise" / "chosen" / "late-0.1.json").read_text())


def script(name, directory, *arguments, **settings):
    """Run a script from a directory, without a number of threads or a list in the environment."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "STUDY")}
    environment = inherited | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | settings
    command = ["bash", str(ROOT / f"scripts/{name}.sh"), *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=200)


# choosing a value


def test_the_rho_with_the_best_mean_on_held_out_images_is_chosen_and_frozen(study):
    held_out = {"0.05": 60, "0.1": 70, "0.2": 70, "0.3": None, "0.5": 40}
    done = study("--only", TUNED, FINAL, EPOCHS="1", HELD_OUT=json.dumps(held_out))
    results = study.output / "results"
    assert done.returncode == 0, done.stderr
    assert "digits-noise: 11 runs in" in done.stdout
    chosen = choice(results)
    assert chosen["value"] == 0.1  # the smaller one of equals
    assert chosen["held_out"] == {"0.05": 60.5, "0.1": 70.5, "0.2": 70.5, "0.3": None, "0.5": 40.5}
    final = json.loads((results / f"{FINAL}.json").read_text())
    assert final["flags"]["sam_rho"] == 0.1
    assert "val_split" not in final["flags"]
    diverged = json.loads((results / "digits-noise/tune-random-0.9-late-0.1-rho0.3-seed100.json").read_text())
    assert diverged["state"] == "diverged"

    (results / "digits-noise/chosen/late-0.1.json").write_text('{"value": 0.2, "held_out": {"0.2": 70}}')
    listed = study("--dry-run", "--only", FINAL.replace("seed0", "seed1"), EPOCHS="1")
    (command,) = commands(listed)
    assert value("--sam-rho", command) == "0.2"  # what is written down, whatever the runs say
    assert "late-0.1.json' was chosen from other values than experiment/study_list.py has" in listed.stderr
    (results / "digits-noise/chosen/late-0.1.json").write_text("{}")
    refused = study("--only", FINAL.replace("seed0", "seed1"), EPOCHS="1")
    assert refused.returncode == 2
    assert "restore it from git, or remove it to choose again" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_choice_that_the_ledger_contradicts_is_refused_and_a_dry_run_writes_none(study):
    held_out = {"0.05": 60, "0.1": 70, "0.2": 65, "0.3": 50, "0.5": 40}
    done = study("--only", TUNED, FINAL, EPOCHS="1", HELD_OUT=json.dumps(held_out))
    assert done.returncode == 0, done.stderr
    path = study.output / "results/digits-noise/chosen/late-0.1.json"
    chosen = choice(study.output / "results")
    path.write_text(json.dumps(chosen | {"value": 0.3}))
    refused = study("--only", TUNED, FINAL, EPOCHS="1")
    assert refused.returncode == 2
    assert "has 0.3, and the runs in the ledger say 0.1: remove it to choose again" in refused.stderr
    path.unlink()
    tuned = next(path.parent.parent.glob("tune-*.json"))
    kept = tuned.read_text()
    tuned.unlink()  # as where a list of values grew: another one may be chosen
    refused = study("--only", FINAL, EPOCHS="1")
    assert refused.returncode == 2
    assert (
        "has a value of 'late-0.1', of which none is chosen now: train 'digits-noise/tune-*-late-0.1-*' alone first"
        in refused.stderr
    )
    tuned.write_text(kept)
    listed = study("--dry-run", "--only", FINAL.replace("seed0", "seed1"), EPOCHS="1")
    assert value("--sam-rho", commands(listed)[0]) == "0.1"
    assert not path.exists()


def test_a_run_without_its_sharpness_has_failed_and_is_measured_by_the_next_launch(study, monkeypatch):
    code = [1]

    def measure(argv):
        build_parser().parse_args(argv)
        (study.root.parent / "asked").write_text(json.dumps(argv))
        if not code[0]:
            args = json.loads((Path(argv[0]).parent / "args.json").read_text())["args"]
            found = {
                "checkpoint": argv[0],
                "args": args,
                "epochs": 1,
                "recalibrated_bn": False,
                "settings": {"images": 500},
            }
            found["train"] = {"living": {"eigenvalues": [{"value": 7.0}]}}
            (Path(argv[0]).parent / "sharpness.json").write_text(json.dumps([found]))
        return code[0]

    monkeypatch.setattr("analysis.sharpness.main", measure)
    only = ("--only", "digits-noise/random-0.9-sgd-seed0", "--device=cpu")
    failed = study(*only, EPOCHS="1")
    assert failed.returncode == 1
    assert "failed: digits-noise/random-0.9-sgd-seed0" in failed.stderr
    assert not list((study.output / "results").glob("*/*.json"))
    assert json.loads((study.root.parent / "asked").read_text())[-2:] == ["--device", "cpu"]
    (study.output / "digits-noise/random-0.9-sgd-seed0/checkpoint.pt").touch()
    code[0] = 0
    assert study(*only, EPOCHS="1").returncode == 0
    (entry,) = (study.output / "results").glob("*/*.json")
    assert json.loads(entry.read_text())["sharpness"] == {"train": 7.0}


def test_an_arm_whose_every_rho_diverged_has_no_runs_that_count(study):
    held_out = dict.fromkeys(["0.05", "0.1", "0.2", "0.3", "0.5"])
    done = study("--only", TUNED, FINAL, EPOCHS="1", HELD_OUT=json.dumps(held_out))
    assert done.returncode == 0
    assert choice(study.output / "results")["value"] is None
    assert "digits-noise: 10 runs in" in done.stdout
    assert "0 missing" in done.stdout

    next((study.output / "results/digits-noise").glob("tune-*.json")).unlink()
    again = study("--only", TUNED, EPOCHS="1", HELD_OUT=json.dumps(held_out))
    assert again.returncode == 0, again.stderr
    assert "begins anew (it left no checkpoint to go on from)" in again.stderr


def test_a_run_that_waits_for_a_rho_is_counted_and_not_begun(study):
    done = study("--dry-run", "--only", TUNED, FINAL)
    assert done.stdout.splitlines()[-1] == "10 runs, and 1 that wait for a value to be chosen or for a run before them"
    assert [value("--sam-rho", command) for command in commands(done)] == ["0.05", "0.1", "0.2", "0.3", "0.5"] * 2
    assert not study.output.exists()


# runs and the ledger


def test_what_runs_wait_for_is_told(study):
    done = study("--only", FINAL, EPOCHS="1")
    assert done.returncode == 1
    assert (
        "not begun: 1 run; the value of 'late-0.1' is not chosen: train digits-noise/tune-*-late-0.1-* first"
        in done.stderr
    )

    dense, oneshot = (f"methods/{name}-previous-seed0" for name in ("dense", "oneshot-0.9"))
    done = study("--dataset", "digits", "--only", oneshot)
    assert (done.returncode, f"not begun: 1 run; train {dense} first" in done.stderr) == (1, True)
    assert study("--dataset", "digits", "--only", dense).returncode == 0
    done = study("--dataset", "digits", "--only", oneshot)
    missing, entry = study.output / dense / "checkpoint.pt", study.output / "results" / f"{dense}.json"
    assert f"'{missing}' is not there: bring it, or remove '{entry}' to train that run again" in done.stderr
    missing.touch()
    assert study("--dataset", "digits", "--only", oneshot).returncode == 0


def test_a_trial_of_another_length_keeps_what_arms_are_to_each_other(study):
    for how in ({"EPOCHS": "4"}, {}):
        flags = [] if how else ["--epochs", "4"]
        listed = commands(study("--dry-run", *flags, "--only", "digits-noise/random-0.9-sgd*-seed0", **how))
        epochs = {
            Path(value("--output-dir", line)).name: line[len(line) - line[::-1].index("--epochs")] for line in listed
        }
        assert [epochs[f"random-0.9-sgd{arm}-seed0"] for arm in ("", "-quarter", "-half", "-long")] == list("4128")


def test_runs_of_a_clean_checkout_enter_the_ledger_once(study, checkout):
    only = ("--only", NESTEROV.replace("seed0", "seed[01]"))
    done = study(*only)
    assert done.returncode == 0, done.stderr
    entry = json.loads((checkout / f"results/{NESTEROV}.json").read_text())
    assert (entry["commit"], entry["flags"]["label_noise"]) == (os.environ["COMMIT"], 0.4)
    again = study(*only)
    assert "2 runs, 2 of them in the ledger" in again.stdout
    assert study("--dry-run", *only).stdout == "0 runs\n"
    (checkout / f"results/{NESTEROV}.json").unlink()
    once_more = study(*only)
    assert once_more.returncode == 0, once_more.stderr
    assert "begins anew (it left no checkpoint to go on from)" in once_more.stderr
    assert json.loads((checkout / f"results/{NESTEROV}.json").read_text())["final"] == entry["final"]


def test_a_run_that_an_unknown_commit_began_begins_anew(study, checkout):
    assert study("--only", NESTEROV).returncode == 0
    (checkout / f"results/{NESTEROV}.json").unlink()
    run = study.output / NESTEROV
    (run / "checkpoint.pt").touch()
    about = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(about | {"earlier_git": ["f" * 40]}))
    again = study("--only", NESTEROV)
    assert again.returncode == 0, again.stderr
    assert "begins anew (it was run at commit ffffffffffff, which is not in this repository" in again.stderr

    (checkout / f"results/{NESTEROV}.json").unlink()
    (run / "checkpoint.pt").touch()
    (run / "args.json").unlink()
    once_more = study("--only", NESTEROV)
    assert once_more.returncode == 0, once_more.stderr
    assert "begins anew (" in once_more.stderr


def test_a_changed_checkout_trains_nothing_for_the_ledger(study, checkout):
    (checkout / "sam.py").write_text("rho = 0.1")
    done = study("--only", NESTEROV)
    assert done.returncode == 2
    assert "the ledger takes runs of a git checkout without changes" in done.stderr
    assert not study.output.exists()


def test_code_that_a_launch_has_in_memory_is_not_replaced_by_a_commit(study, checkout, tmp_path):
    commits = tmp_path / "commits.py"
    git = ["git", "-C", str(checkout), "-c", "user.name=A", "-c", "user.email=a@example.org"]
    steps = [[*git, "add", "-A"], [*git, "commit", "--quiet", "--message", "second"]]
    then = f"import subprocess\n[subprocess.run(step, check=True) for step in {steps}]\nsys.exit(0)\n"
    commits.write_text(STAND_IN.replace("sys.exit(0)\n", then))
    for file, seeds, ended, count in (("docs/study.md", "[01]", 0, 2), ("experiment/study_list.py", "[23]", 1, 3)):
        (checkout / file).parent.mkdir()
        (checkout / file).touch()
        done = study("--only", NESTEROV.replace("seed0", f"seed{seeds}"), program=commits, JOBS="1")
        assert (done.returncode, f"{count} runs in" in done.stdout) == (ended, True), done.stderr
        assert ("files of the checkout were changed meanwhile" in done.stderr) == bool(ended)


def test_a_signal_just_before_a_run_begins_leaves_it_to_the_next_launch(study, checkout, monkeypatch):
    looks = []

    def interrupted_while_looking(root):
        looks.append(root)
        if len(looks) == 2:  # the first is before the launch takes signals
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    monkeypatch.setattr("analysis.study.dirty", interrupted_while_looking)
    done = study("--only", NESTEROV)
    assert (done.returncode, "0 runs in" in done.stdout, "failed:" in done.stderr) == (130, True, False)
    done = study("--only", NESTEROV)
    assert (done.returncode, "1 runs in" in done.stdout) == (0, True)


@pytest.mark.parametrize(("flags", "epochs"), [((), "1"), (("--lr", "0.2"), ""), (("--nonfinite", "skip"), "")])
def test_a_trial_never_enters_the_ledger(study, checkout, flags, epochs):
    (checkout / "sam.py").write_text("rho = 0.1")  # nor does it need a clean checkout
    done = study(*flags, "--only", NESTEROV, EPOCHS=epochs)
    assert done.returncode == 0, done.stderr
    assert not (checkout / "results").exists()
    assert (study.output / f"results/{NESTEROV}.json").exists()


def test_a_run_that_fails_is_shown_and_is_tried_again(study):
    only = ("--only", "digits-noise/tune-random-0.9-late-0.1-rho0.*-seed100")
    done = study(*only, EPOCHS="1", HELD_OUT='{"0.2": -1}')
    assert done.returncode == 1
    assert "failed: digits-noise/tune-random-0.9-late-0.1-rho0.2-seed100" in done.stderr
    assert "error: there is no space left" in done.stderr
    assert "4 runs in" in done.stdout
    again = study(*only, EPOCHS="1")
    assert (again.returncode, "5 runs in" in again.stdout) == (0, True)


def test_a_ledger_whose_flags_the_list_no_longer_has_is_refused(study, checkout):
    only = ("--only", NESTEROV)
    study(*only)
    path = checkout / f"results/{NESTEROV}.json"
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"flags": entry["flags"] | {"label_noise": 0.2}}))
    done = study(*only)
    assert done.returncode == 2
    assert "differs from experiment/study_list.py in label_noise" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        (["--only", "digits/*"], {}, "no run of the study has such a TASK/NAME"),
        (["--minutes", "0"], {}, "--minutes"),
        (["--rho", "0.1"], {}, "did you mean --sam-rho?"),
        (["--seed", "3"], {}, "--seed is set by the study"),
        (["--output-dir", "x"], {}, "--output-dir is set by the study"),
        (["--checkpoint-every", "10m"], {}, "--checkpoint-every is set by the study"),
        (["--config", "x"], {}, "--config is set by the study"),  # which would bring flags that nobody sees
        (["--sparsity=0.5"], {}, "--sparsity is set by the study"),
        (["--sam-rho", "0.1", "--only", "digits-noise/*-random-scaled-*"], {}, "--sam-rho is set by the study"),
        (["--weight-decay", "0", "--only", "digits-noise/*-sgd-decay-*"], {}, "--weight-decay is set by the study"),
        (["--val-split", "50", "--only", NESTEROV], {}, "--val-split is set by the study"),
        (["--label-noise", "0.1", "--only", NESTEROV, "methods/*-seed0"], {}, "--label-noise is set by the study"),
        (["--dry-run"], {"JOBS": "0"}, "JOBS takes one whole number above 0, not '0'"),
        (["--dry-run"], {"GPUS": "0,1"}, "GPUS takes whole numbers, such as '0 1', not '0,1'"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(study, arguments, settings, words):
    done = study(*arguments, **settings)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not study.output.exists()


@pytest.mark.parametrize("argv", [[], ["study"], ["study", "--list"], ["studies", "."]])
def test_what_only_scripts_launch_says_so(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert (ended.value.code, capsys.readouterr().err.startswith("error: scripts/study.sh")) == (2, True)


def test_minutes_interrupt_a_run_and_a_new_launch_ends_at_the_same_figures(study, tmp_path):
    waits = tmp_path / "waits.py"
    waits.write_text(WAITS.format(tests=str(ROOT / "tests")))
    run = "digits-noise/rigl-0.9-nesterov-seed0"
    flags = (*TINY, "--compile", "off", "--only", run)
    for _ in range(3):  # on a machine that is busy, time may be over before the run begins
        cut = study(*flags, "--minutes", "0.05", program=waits, EPOCHS="3")
        if (study.output / run).exists():
            break
    assert cut.returncode == 0, cut.stderr
    assert "digits-noise: 0 runs in" in cut.stdout
    assert (study.output / run / "checkpoint.pt").exists()
    assert study(*flags, program=waits, EPOCHS="3").returncode == 0
    log = (study.output / f"digits-noise/.sweep/{Path(run).name}.log").read_text()
    assert ", resumed after step 6" in log
    whole = script("study", tmp_path, *flags, EPOCHS="3", OUTPUT_DIR="whole")
    assert whole.returncode == 0, whole.stderr
    cut_entry, whole_entry = (
        json.loads((tmp_path / output / f"results/{run}.json").read_text()) for output in ("out", "whole")
    )
    assert cut_entry["final"] == whole_entry["final"]
    assert cut_entry["epochs"] == whole_entry["epochs"]
    assert "1 threads" in whole_entry["device"]


def test_the_gpu_script_lists_its_runs_without_a_gpu(tmp_path):
    (tmp_path / "images" / "train").mkdir(parents=True)
    done = script("study_gpu", tmp_path, "--dry-run", "--device", "cpu", "--epochs", "2", DATA_DIR="images")
    assert done.returncode == 0, done.stderr
    listed = commands(done)
    assert len(listed) == len(list(gpu_study()))
    assert value("--sparsity", listed[0]) == "0.98"
    assert value("--data-dir", listed[0]) == str(tmp_path / "images")


def test_a_trial_and_the_study_keep_out_of_each_others_directory(study, monkeypatch):
    monkeypatch.delenv("OUTPUT_DIR")
    only = ("--compile", "off", "--only", NESTEROV)
    assert study(*TINY, *only, EPOCHS="1").returncode == 0
    trial = study.root / "runs" / "study_trial"  # wherever it was launched
    assert (trial / "results" / f"{NESTEROV}.json").exists()
    assert [path.name for path in trial.parent.iterdir()] == ["study_trial"]
    mixed = study("--only", NESTEROV, OUTPUT_DIR=str(trial))
    assert (mixed.returncode, mixed.stderr) == (2, f"error: '{trial}' has runs of a trial: give another OUTPUT_DIR\n")
    mixed = study(*only, EPOCHS="1", OUTPUT_DIR=str(study.root))
    words = (
        f"error: OUTPUT_DIR: '{study.root / 'results'}' is the ledger of the study: give a trial another directory\n"
    )
    assert (mixed.returncode, mixed.stderr) == (2, words)
    (study.output / NESTEROV).mkdir(parents=True)
    mixed = study(*TINY, *only, EPOCHS="1", OUTPUT_DIR=str(study.output))
    assert mixed.stderr == f"error: '{study.output}' has runs of the study: give another OUTPUT_DIR\n"


@pytest.mark.parametrize(
    ("flags", "settings", "words"),
    [
        ((), {"EPOCH": "2"}, "EPOCH is no setting of this study, but EPOCHS is"),
        ((), {"SEEDS": "0"}, "SEEDS is a setting of sweeps, and not of this study"),
        ((), {"RHOS": "0.1"}, "and not of this study: unset it"),
        ((), {"DATA_DIR": "nowhere"}, "nowhere/train': name a folder with train and test"),
        (("--only", NESTEROV, "digits-nosie/*"), {}, "--only digits-nosie/*: no run of the study has such a TASK/NAME"),
    ],
)
def test_what_would_be_passed_over_is_refused(study, flags, settings, words):
    done = study(*flags, "--dry-run", **settings)
    assert done.returncode == 2
    assert words in done.stderr


def test_equals_of_rounded_accuracies_are_equals():
    """Of 237 images 229 and 229 were right with the smaller value, 230 and 228 with the larger one."""
    trials = [run for run in tuning("digits-noise", ("previous",)) if run.value in (0.05, 0.1)]
    right = {(0.05, 100): 96.62, (0.05, 101): 96.62, (0.1, 100): 97.05, (0.1, 101): 96.2}
    entries = {run.name: {"state": "finished", "epochs": {"val_top1": [right[run.value, run.seed]]}} for run in trials}
    assert best_value(trials, entries) == {"value": 0.05, "held_out": {"0.05": 96.62, "0.1": 96.625}}


def test_the_gpu_study_lists_the_other_one_when_asked(study):
    only = ("--dry-run", "--device", "cpu", "--epochs", "2", "--only", "digits-noise/random-0.9-sgd-seed[0-9]")
    done = study(*only, name="study_gpu", STUDY="study")
    assert done.returncode == 0, done.stderr
    assert [value("--seed", line) for line in commands(done)] == [str(seed) for seed in range(10)]
    done = study(*only, name="study_gpu", STUDY="gpu")
    assert (done.returncode, done.stderr) == (2, "error: STUDY takes study or study_gpu, not 'gpu'\n")
