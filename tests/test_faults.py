"""Runs killed at random moments, checkpoints damaged at random places, flags at random. Each test prints what it counted."""

import random
import time
from collections import Counter

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import Child, forks
from running import rows, same

from experiment import build
from experiment.flags import build_parser, parse
from experiment.run_directory import locate_run
from training.checkpoint import load_checkpoint
from utils.errors import UsageError

RUN = "--dataset digits --train-images 480 --depth 8 --width 0.25 --batch-size 80 --epochs 2 --log-interval 3 --precision fp32"
ARMS = [
    "--optmzr sgd",
    "--optmzr sgd-sam --sam-v2 --prune-method random --sparsity 0.8 --val-split 100",
    "--optmzr sgd-sam --prune-method rigl --sparsity 0.8 --update-interval 4",
    "--optmzr adam-sam --sam-v2 --adaptive --prune-method gmp --sparsity 0.8 --update-interval 5",
    "--optmzr sgd-sam --sam-v2 --prune-method lth --sparsity 0.8 --lth-rounds 1 --lth-rewind 5",
]
KILLS = 6  # of each arm


@forks
def test_runs_killed_at_random_moments_end_bit_for_bit_the_same(tmp_path, record_property):
    """A checkpoint comes every 30 ms, so that many are killed while they write one."""
    chance, kills = random.Random(0), Counter()
    for number, arm in enumerate(ARMS):
        flags = f"{RUN} {arm} --checkpoint-every 0.0005m --resume auto"
        whole, cut = tmp_path / f"whole{number}", tmp_path / f"cut{number}"
        began = time.monotonic()
        assert Child(flags, whole).wait() == 0
        duration = time.monotonic() - began
        hit = tries = 0
        while hit < KILLS:
            tries += 1
            assert tries <= 10 * KILLS
            child = Child(flags, cut)
            if child.wait(chance.uniform(0.05, 0.6) * duration) is None:
                child.kill()
                child.wait()
                kills["killed"] += 1
                hit += 1
            else:  # once more, from the beginning
                assert child.wait() == 0, child.err
                kills["ended before the kill"] += 1
                kills["bit-identical"] += identical(whole, cut)
                for file in cut.iterdir():
                    file.unlink()
        last = Child(flags, cut)
        assert last.wait() == 0, last.err
        kills["bit-identical"] += identical(whole, cut)
        assert last.err == ""
    record_property("SIGKILL at random moments", f"{dict(kills)}, tracebacks: 0")
    assert kills["killed"] == KILLS * len(ARMS) >= 30
    assert kills["bit-identical"] == kills["ended before the kill"] + len(ARMS)


def identical(whole, cut) -> bool:
    same(*(torch.load(run / "checkpoint.pt", weights_only=True)["state"] for run in (whole, cut)))
    same(*(rows(run) for run in (whole, cut)))
    return all((run / "result.json").exists() for run in (whole, cut))


def test_a_damaged_checkpoint_is_refused_or_read_as_it_was(trained, tmp_path, record_property):
    """500 of them, cut short or with a flipped bit: a sentence, or (a bit of the padding) every value as it was."""
    whole = (trained.directory / "checkpoint.pt").read_bytes()
    original, chance, outcomes = load_checkpoint(trained.directory / "checkpoint.pt"), random.Random(1), Counter()
    path = tmp_path / "damaged.pt"
    for number in range(500):
        content = bytearray(whole)
        if number % 2:
            content = content[: chance.randrange(len(whole))]
        else:
            content[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        kind = "cut short" if number % 2 else "bit flipped"
        try:
            same(original, load_checkpoint(path))
            outcomes[f"{kind}, harmless"] += 1
        except UsageError as error:
            outcomes[f"{kind}, refused" if "\n" not in str(error) else "more than a line"] += 1
    record_property("damaged checkpoints", f"{dict(outcomes)}, tracebacks: 0")
    assert outcomes["cut short, refused"] == 250
    assert outcomes["bit flipped, refused"] > 200


USUAL = st.sampled_from(["1", "2", "8", "0.5", "0.9"])
VALUES = st.sampled_from(
    ["0", "1", "-1", "2", "0.5", "0.9", "1e30", "nan", "inf", "", "x", "2:4", "4x1", "1e-9", "99999999999999999999", "auto", "é",
     "missing.pt", "/", "5m"]
)  # fmt: skip
OPTIONS = [action for action in build_parser()._actions if action.dest != "help"]


@st.composite
def flag_sets(draw):
    argv = ["--depth", "8"] if draw(st.integers(0, 3)) else []  # small networks mostly: building one takes the longest
    for action in draw(st.lists(st.sampled_from(OPTIONS), max_size=5)):
        argv.append(draw(st.sampled_from(action.option_strings)))
        if action.nargs != 0:
            usual = st.sampled_from([str(c) for c in action.choices]) if action.choices else USUAL
            argv.append(draw(usual if draw(st.integers(0, 9)) else VALUES))
    return argv


def test_random_flags_are_accepted_or_refused_with_a_sentence(tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    outcomes = Counter()

    @settings(
        max_examples=500, database=None, derandomize=True, deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip
    @given(flag_sets())
    def check(argv):
        try:
            with locate_run(*parse(argv)) as located:
                build.check_on_meta(located.args)
            outcomes["taken"] += 1
        except UsageError as error:
            outcomes["refused" if "\n" not in str(error) else "more than a line"] += 1

    check()
    assert list(tmp_path.iterdir()) == []
    record_property("flag sets at random", f"{dict(outcomes)}, tracebacks: 0")
    assert outcomes["taken"] + outcomes["refused"] == sum(outcomes.values()) >= 500
    assert min(outcomes["taken"], outcomes["refused"]) > 50
