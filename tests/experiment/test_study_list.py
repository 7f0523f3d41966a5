"""The lists of runs that the studies train."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from sweeps import ROOT, value

from experiment.checks import check
from experiment.flags import parse, resolve
from experiment.grid import check_flags
from experiment.study_list import ARMS, MAIN, PAPER_ARMS, TASKS, TUNING_SEEDS, Run, cpu_study, gpu_study

FIRST_ALONE = {"sgd-1e-4", "sgd-lr", "sgd-quarter", "sgd-long"}  # how SGD is tuned is asked once in each of these tasks
FULL = {"digits-noise", "cifar-noise", "cifar-clean"}
# In a dense network nothing is masked, and at the first cell's sparsity a length per weight is the same length.
REPEATED = {("dense", "unmasked"), ("random-0.9", "random-scaled"), ("rigl-0.9", "random-scaled")}


@pytest.mark.parametrize("listed", [cpu_study, gpu_study])
def test_a_list_has_every_run_of_its_tasks_once(listed):
    runs = list(listed())
    assert len({(run.task, run.name) for run in runs}) == len(runs)
    for task in {run.task for run in runs} - {"methods"}:
        finals = {(run.cell, run.arm, run.seed) for run in runs if run.task == task and not run.tuning}
        cells, arms = TASKS[task].cells, TASKS[task].arms
        every = {(cell, arm, seed) for cell in cells for arm in arms for seed in TASKS[task].seeds_of(cell)}
        alone = FIRST_ALONE if task in FULL else set()
        assert every - finals == {
            (cell, arm, seed)
            for cell, arm, seed in every
            if (cell, arm) in REPEATED or (arm in alone and cell != TASKS[task].first)
        }


def test_the_parts_of_cifar_have_ten_seeds_in_the_first_cell_and_five_elsewhere():
    for task in ("cifar-noise", "cifar-clean"):
        runs = [run for run in cpu_study() if run.task == task and run.arm == "sam" and not run.tuning]
        assert [run.seed for run in runs] == [*range(2, 12), *4 * [*range(2, 7)]]


def test_a_rho_is_tuned_before_it_counts_and_the_most_telling_runs_come_first():
    runs = list(cpu_study())
    tuned = {(run.task, run.arm): place for place, run in enumerate(runs) if run.tuning}
    for place, run in enumerate(runs):
        if run.tuned_arm and not run.tuning:
            assert tuned[run.task, run.tuned_arm] < place, run
    first = [run for run in runs if not run.tuning][: 10 * len(MAIN)]
    assert {(run.task, run.cell, run.arm) for run in first} == {("digits-noise", "random-0.9", arm) for arm in MAIN}
    assert [run.seed for run in first] == [seed for seed in range(10) for _ in MAIN]


@pytest.mark.parametrize(("cell", "times"), [("dense", 10**0.5), ("random-0.95", 0.5**0.5), ("random-0.98", 0.2**0.5)])
def test_scaled_random_directions_move_each_living_weight_as_far_as_those_they_were_tuned_on(cell, times):
    flags = Run("digits-noise", cell, "random-scaled", 0).with_value(8.0).flags()
    assert float(value("--sam-rho", flags)) == pytest.approx(8 * times, rel=1e-5)
    assert value("--sam-rho", Run("digits-noise", cell, "random", 0).with_value(8.0).flags()) == "8"


@pytest.mark.parametrize(("arm", "flag"), [("sgd-lr", "--lr"), ("sgd-decay", "--weight-decay"), ("sam", "--sam-rho")])
def test_an_arm_is_tuned_by_one_flag_which_names_its_trials(arm, flag):
    trials = [run for run in cpu_study() if (run.task, run.arm, run.tuning) == ("cifar-noise", arm, True)]
    tried = Counter(value(flag, run.flags()) for run in trials)
    assert len(tried) >= 5
    assert set(tried.values()) == {2}
    name = flag.removeprefix("--").removeprefix("sam-")
    for run in trials:
        flags = run.flags()
        assert run.name == f"tune-random-0.9-{arm}-{name}{value(flag, flags)}-seed{value('--seed', flags)}"
    final = Run("cifar-noise", "dense", arm, 2).with_value(0.25).flags()
    assert value(flag, final) == "0.25"


def test_no_tuned_baseline_has_the_default_among_its_values():
    """Such a run would be one of another arm, and the ledger takes a run once."""
    baselines = [arm for arm in ARMS.values() if arm.tuned != "--sam-rho"]
    assert {arm.tuned for arm in baselines} == {"--lr", "--weight-decay"}
    for arm in baselines:
        assert vars(resolve(parse(arm.flags.split())[0]))[arm.tuned[2:].replace("-", "_")] not in arm.values


@pytest.mark.parametrize(("arm", "times"), [("sgd-quarter", 0.25), ("sgd-half", 0.5), ("sgd-long", 2)])
def test_a_training_of_another_length_has_a_multiple_of_its_task_s_epochs(arm, times):
    for task, epochs in {"digits-noise": 60, "cifar-clean": 100}.items():
        args, _ = parse(Run(task, "random-0.9", arm, 2).flags())
        assert args.epochs == times * epochs


def test_random_directions_move_each_weight_of_the_paper_s_networks_as_far_as_on_the_digits():
    length = 8 / 28_639**0.5  # living parameters of ResNet-20 at 90%
    living = {"0.98": 42_050, "0.95": 97_717, "0.9": 190_496}  # of ResNet-32 of width 2
    runs = [run for run in gpu_study() if run.arm == "random"]
    assert len(runs) == 6 * 5
    for run in runs:
        rho = float(value("--sam-rho", run.flags()))
        assert rho / living[run.cell.split("-")[1]] ** 0.5 == pytest.approx(length, rel=0.06)


def test_other_methods_take_the_rhos_that_the_digits_chose():
    for arm in ("sam", "msam", "previous", "random"):
        chosen = json.loads((ROOT / f"results/digits-noise/chosen/{arm}.json").read_text())["value"]
        flags, there = (
            replace(Run(task, cell, arm, 0), value=chosen).flags()
            for task, cell in (("methods-noise", "set-0.9"), ("digits-noise", "random-0.9"))
        )
        assert float(value("--sam-rho", flags)) == chosen
        assert set(flags) >= set(there) - set(TASKS["digits-noise"].cells["random-0.9"].split())


@pytest.mark.parametrize("task", ["digits-noise", "cifar-noise", "cifar-clean"])
def test_rules_are_tuned_again_at_the_weight_decay_that_was_chosen_for_sgd(task):
    chosen = json.loads((ROOT / f"results/{task}/chosen/sgd-decay.json").read_text())["value"]
    for arm in ("sgd", "previous"):
        run = Run(f"{task}-decay", "random-0.9", arm, 2, 0.1 if arm == "previous" else None)
        args, before = (parse(each.flags())[0] for each in (run, replace(run, task=task)))
        assert args.weight_decay == chosen
        assert vars(args) == vars(before) | {"weight_decay": chosen}
    runs = [run for run in cpu_study() if run.task == f"{task}-decay" and run.arm == "previous"]
    assert [run.seed for run in runs if not run.tuning] == list(TASKS[task].seeds_of("random-0.9"))
    assert len([run for run in runs if run.tuning]) == 2 * 5


def test_the_gpu_study_has_98_percent_first_and_whole_seeds():
    runs = list(gpu_study())
    assert len(runs) == 6 * 5 * len(PAPER_ARMS)
    cells = list(dict.fromkeys(run.cell for run in runs))
    assert [cell.split("-")[1] for cell in cells] == ["0.98", "0.98", "0.95", "0.95", "0.9", "0.9"]
    assert [cell.split("-")[2] for cell in cells[:2]] == ["batch64", "batch128"]
    for begin in range(0, len(runs), len(PAPER_ARMS)):
        together = runs[begin : begin + len(PAPER_ARMS)]
        assert [run.arm for run in together] == list(PAPER_ARMS)
        assert len({(run.cell, run.seed) for run in together}) == 1


@pytest.mark.parametrize("listed", [cpu_study, gpu_study])
def test_every_command_of_a_list_is_one_that_the_program_takes(listed, tmp_path):
    folder = ["--dataset", "folder", "--data-dir", str(tmp_path)]
    place = {"": [], "folder": folder, "cifar10": ["--dataset", "cifar10"]}
    checked, networks = set(), {}
    for run in listed():
        if run.tuned_arm and not run.tuning:
            run = run.with_value(ARMS[run.tuned_arm].values[0])
        flags = [*run.flags(), *place[TASKS[run.task].images]]
        if (run.task, run.cell, run.arm, run.value, run.tuning) not in checked:
            check(*parse(flags))
        checked.add((run.task, run.cell, run.arm, run.value, run.tuning))
        if "--pretrained" not in flags:  # the checkpoint of another run
            networks.setdefault(f"{run.task}/{run.cell}", flags)
    check_flags(networks, [], [])  # builds them too


def test_tuning_holds_images_out_and_takes_seeds_that_do_not_count():
    for run in cpu_study():
        assert (
            run.tuning == ("--val-split" in replace(run, value=run.value or 1.0).flags()) == (run.seed in TUNING_SEEDS)
        )
        assert not run.tuning or run.cell == next(iter(TASKS[run.task].cells))
