"""The Python that scripts find or make, tried with stubs of Python and pip: no network, nothing installed."""

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import wait_for

from benchmarks.imagenet import main as estimate_imagenet

ROOT = Path(__file__).parent.parent

# A Python of another version, whose packages are the lines of a file of its prefix, with a venv and a pip to match.
STUB = """#!{python} -I
import importlib.metadata as metadata, os, pathlib, signal, sys, time, types
import packaging.requirements  # while the version is the true one: it takes ways around faults of some
path = pathlib.Path(sys.argv[0])
del sys.argv[0]
version = (*{version}, 0, "final", 0)
sys.version_info, sys.executable, sys.prefix = version, str(path), str(path.parents[1])
sys._base_executable = {base!r} or str(path)
packages = pathlib.Path(sys.prefix, "packages")
installed = packages.read_text().split() if packages.exists() else []
def version_of(name):
    if name not in installed:
        raise metadata.PackageNotFoundError(name)
    return "1.0"
metadata.version = version_of
what, *rest = sys.argv
if what in ("-", "-c"):
    code = sys.stdin.read() if what == "-" else rest[0]
    if {bare}:
        sys.modules["ensurepip"] = None
    exec(code, {{"__name__": "__main__"}})
elif rest[:1] == ["venv"]:
    source, target = path.read_text(), pathlib.Path(rest[1], "bin")
    target.mkdir(parents=True, exist_ok=True)
    target.joinpath("python").write_text(source.replace("_base_executable = ''", f"_base_executable = {{str(path)!r}}"))
    target.joinpath("python").chmod(0o755)
elif rest[:2] == ["pip", "install"]:
    print("Collecting torch>=2.8", flush=True)
    print("  Downloading torch-2.14.1-manylinux_2_28_x86_64.whl (888.1 MB)", flush=True)
    pathlib.Path("asked").write_text(" ".join(rest))
    time.sleep(float(os.environ.get("PIP_SECONDS", 0)))
    if "PIP_FAILS" in os.environ:
        sys.exit("ERROR: No matching distribution found for torch>=2.8")
    if "PIP_KILLED" in os.environ:
        os.kill(os.getppid(), signal.SIGKILL)
    packages.write_text("torch")
"""


class Machine:
    """A checkout with scripts/setup.sh, and a PATH with stubs of Python."""

    def __init__(self, root):
        self.root, self.path = root, root / "usr" / "bin"
        self.path.mkdir(parents=True)
        (root / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "setup.sh", root / "scripts")
        (root / "requirements.txt").write_text("torch>=1  # any\n")
        for tool in ("bash", "dirname", "rm", "mkdir", "touch", "sed", "grep", "head", "tail", "du", "cut", "cat"):
            (self.path / tool).symlink_to(shutil.which(tool))

    def python(self, name, version, directory=None, bare=False, base=""):
        file = (directory or self.path) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(STUB.format(python=sys.executable, version=version, bare=bare, base=base))
        file.chmod(0o755)
        return file

    def setup(self, path="", stderr=subprocess.PIPE, **environment):
        """What a script sees once it has sourced setup.sh; its last line is the Python."""
        script = 'set -euo pipefail; set -- requirements.txt; source scripts/setup.sh; echo "$PYTHON"'
        environment = {"PATH": f"{path}:{self.path}", "HOME": str(self.root)} | environment
        return subprocess.run(
            ["bash", "-c", script], cwd=self.root, env=environment, text=True, stdout=subprocess.PIPE, stderr=stderr,
            timeout=60,
        )  # fmt: skip


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_a_python_that_has_everything_is_used_and_nothing_is_made(machine):
    machine.python("python3", (3, 9))
    machine.python("python3.11", (3, 11))
    (machine.root / "usr" / "packages").write_text("torch")
    done = machine.setup()
    assert (done.returncode, done.stdout, done.stderr) == (0, "python3.11\n", "")
    assert not (machine.root / ".venv").exists()


@pytest.mark.parametrize(("names", "chosen"), [({"python3": 9, "python3.12": 12}, 12), ({"python": 10}, 10)])
def test_the_environment_is_made_by_a_python_of_at_least_3_10(machine, names, chosen):
    for name, minor in names.items():
        machine.python(name, (3, minor))
    done = machine.setup()
    assert (done.returncode, done.stdout) == (0, ".venv/bin/python\n"), done.stderr
    assert f"version = (*(3, {chosen})" in (machine.root / ".venv/bin/python").read_text()
    assert done.stderr.startswith("installing requirements.txt into .venv: about 6 GB and five minutes")
    again = machine.setup()
    assert (again.stdout, again.stderr) == (".venv/bin/python\n", "")


@pytest.mark.parametrize(
    ("pythons", "words"),
    [
        ([], "Python 3.10 or newer is needed, and there is none on PATH: install one"),
        ([("python3", (3, 9), False)], "Python 3.10 or newer is needed, and python3 is Python 3.9: install one"),
        ([("python3", (3, 9), False), ("python3.12", (3, 12), True)], "python3.12 cannot make environments"),
    ],
)
def test_without_a_python_one_sentence_says_so_and_nothing_is_made(machine, pythons, words):
    for name, version, bare in pythons:
        machine.python(name, version, bare=bare)
    (machine.root / ".venv").mkdir()
    done = machine.setup()
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert list((machine.root / ".venv").iterdir()) == []


@pytest.mark.parametrize(("version", "kept"), [((3, 9), False), ((3, 11), True)])
def test_an_environment_is_made_anew_if_its_python_is_too_old_and_else_filled(machine, version, kept):
    machine.python("python3", (3, 12))
    machine.python("python", version, machine.root / ".venv" / "bin")
    (machine.root / ".venv" / "old").touch()
    done = machine.setup()
    assert (done.returncode, done.stdout) == (0, ".venv/bin/python\n"), done.stderr
    assert ("note: .venv is of Python 3.9, which is too old, and is made anew\n" in done.stderr) != kept
    assert (machine.root / ".venv" / "old").exists() == kept


def test_a_search_path_for_cd_sends_no_script_elsewhere(machine, tmp_path):
    (tmp_path / "elsewhere" / "scripts").mkdir(parents=True)
    machine.python("python3", (3, 12))
    assert machine.setup(CDPATH=str(tmp_path / "elsewhere")).returncode == 0
    assert (machine.root / ".venv").exists()
    assert not (tmp_path / "elsewhere" / ".venv").exists()


def test_an_environment_whose_python_is_gone_is_made_anew(machine):
    machine.python("python3", (3, 12))
    (machine.root / ".venv" / "bin").mkdir(parents=True)
    (machine.root / ".venv" / "bin" / "python").symlink_to("/nowhere/python")
    done = machine.setup()
    assert done.returncode == 0
    assert "note: .venv has no Python that runs, and is made anew\n" in done.stderr


def test_a_half_installed_environment_is_made_anew_even_if_it_is_active(machine):
    machine.python("python3", (3, 12))
    assert machine.setup(PIP_KILLED="1").returncode == -9
    venv = machine.root / ".venv"
    (venv / "packages").write_text(
        "torch"
    )  # its metadata are there: only the installation knows that it was not finished
    shutil.copy(venv / "bin" / "python", venv / "bin" / "python3")
    done = machine.setup(path=venv / "bin")
    assert (done.returncode, done.stdout) == (0, ".venv/bin/python\n"), done.stderr
    assert "note: .venv was left half-installed, and is made anew\n" in done.stderr
    assert not (venv / "bin" / "python3").exists()
    assert machine.setup(path=venv / "bin").stderr == ""


def test_an_environment_that_lacks_a_package_is_filled_not_made_anew(machine):
    machine.python("python3", (3, 12))
    machine.python("python", (3, 12), machine.root / ".venv" / "bin")
    (machine.root / ".venv" / "mine").touch()
    done = machine.setup()
    assert (done.returncode, done.stdout) == (0, ".venv/bin/python\n")
    assert "made anew" not in done.stderr
    assert (machine.root / ".venv" / "mine").exists()


def test_an_index_of_cpu_builds_goes_to_pip(machine):
    machine.python("python3", (3, 12))
    done = machine.setup(TORCH_INDEX="https://index.example/cpu")
    assert "torch from https://index.example/cpu" in done.stderr
    asked = (machine.root / "asked").read_text()
    assert (
        asked
        == "pip install --progress-bar off --extra-index-url=https://index.example/cpu --requirement=requirements.txt"
    )


def test_a_failing_pip_ends_in_its_error_and_one_sentence(machine):
    machine.python("python3", (3, 12))
    done = machine.setup(PIP_FAILS="1")
    assert (done.returncode, done.stdout) == (1, "")
    error, sentence = done.stderr.splitlines()[-2:]
    assert error == "ERROR: No matching distribution found for torch>=2.8"
    assert sentence.startswith("error: pip could not install requirements.txt: .venv/pip.log has all it said")


def test_a_line_on_the_terminal_tells_what_pip_is_at(machine):
    machine.python("python3", (3, 12))
    reader, writer = pty.openpty()
    assert machine.setup(stderr=writer, PIP_SECONDS="1.3").returncode == 0
    os.close(writer)
    shown = os.read(reader, 10_000).decode()
    assert "0:01" in shown
    assert "MB in .venv  Downloading torch-2.14.1" in shown


def test_a_line_that_comes_in_pieces_is_logged_whole(tmp_path):
    function = re.search(r"^show_progress.*?^}", (ROOT / "scripts" / "setup.sh").read_text(), re.DOTALL | re.MULTILINE)[
        0
    ]
    pieces = "{ printf 'ERROR: No match'; sleep 1.3; printf 'ing distribution\\nlast'; } | show_progress"
    done = subprocess.run(["bash", "-c", f"{function}\n{pieces}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "ERROR: No matching distribution\nlast\n"


def imagenet(tmp_path, *words, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "imagenet.sh"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "bench_gpu.sh --device", "bench_gpu.sh --output", "bench_gpu.sh --minutes x", "bench_gpu.sh --minutes=x",
        "bench_gpu.sh --output=/", "sweep_slurm.sh none.sh",
    ],
)  # fmt: skip
def test_a_script_that_lacks_a_value_says_so_in_one_sentence(command):
    script, *arguments = command.split()
    done = subprocess.run(["bash", str(ROOT / "scripts" / script), *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")


SLOW_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *benchmarks.imagenet* | *build_parser*) ;;
    *torch.distributed.run* | *"-m pytest"*) trap 'touch ended; exit 75' TERM; touch began; while :; do sleep 0.05; done ;;
    -c*) ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def slow(tmp_path):
    """slow(SCRIPT, ...) launches a script with a Python that trains and tests for ever, and touches `began` and `ended`."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(SLOW_PYTHON.replace("{python}", sys.executable).replace("touch ", f"touch {tmp_path}/"))
    python.chmod(0o755)
    (tmp_path / "data" / "train").mkdir(parents=True)

    def launch(script, *words, **settings):
        environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "PROCESSES": "1"} | settings
        command = ["bash", str(ROOT / "scripts" / script), *words]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return launch


@pytest.mark.parametrize(("script", "words"), [("imagenet.sh", ["data"]), ("bench_gpu.sh", ["--device", "cpu"])])
def test_a_signal_to_a_script_ends_what_it_runs(slow, tmp_path, script, words):
    running = slow(script, *words)
    wait_for(tmp_path / "began", lambda: running.poll() is None)
    running.terminate()
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130, (out, err)
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize(
    ("method", "words", "there", "absent"),
    [
        ("none", [], "--prune-method none", "--sparsity"),
        ("lamp", [], "--prune-method lamp --sparsity 0.8", "--sparsity-distribution"),
        ("random", ["--arch", "vit"], "--arch vit", "--depth"),
    ],
)
def test_the_recipe_for_imagenet_takes_every_method_and_network(slow, method, words, there, absent):
    one = {"SEEDS": "0", "EPOCHS": "90", "SPARSITIES": "0.8", "OPTIMIZERS": "sgd"}
    out, err = slow("imagenet.sh", "data", "--dry-run", *words, METHOD=method, **one).communicate(timeout=30)
    assert err == ""
    assert there in out
    assert absent not in out


def test_the_recipe_for_imagenet_prints_commands_and_what_they_would_compute(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        (tmp_path / "data" / "train" / name / "1.JPEG").touch()
    one = {"SEEDS": "0", "EPOCHS": "90", "SPARSITIES": "0.9", "OPTIMIZERS": "samv2", "IMAGES_PER_SECOND": "0.05"}
    done = imagenet(tmp_path, "data", "--dry-run", "--batch-size", "64", **one, PROCESSES="3")
    assert (done.returncode, done.stderr) == (0, "")
    command, estimate = done.stdout.splitlines()
    assert "--nproc_per_node 3 main_prune_train.py --dataset imagefolder" in command
    assert "--optmzr sgd-sam --sam-v2 --sam-rho 1.0" in command
    assert command.rstrip().endswith(f"{tmp_path}/runs/imagenet/samv2-0.9-90-0 --batch-size 64")
    dense = float(estimate.split(", ")[1].split()[0])
    assert dense == pytest.approx(180 * 3 * 8.18e9, rel=0.02)  # He et al. 2016: 4.1e9 multiply-adds forward
    assert estimate.startswith("# 180 images, ")
    assert estimate.endswith(", 1.0 hours at 0.05 images/s a pass")
    program = shlex.split(command)[6:]  # what the script passes on
    late = [word for word in program if word != "--sam-v2"] + ["--sam-from", "0.75"]
    assert estimate_imagenet([str(tmp_path / "data"), "0.05", *late]) == 0
    assert capsys.readouterr().out.endswith(", 1.2 hours at 0.05 images/s a pass\n")  # 1.25 passes
    more = ["--val-split", "1", "--sparsity-pattern", "unstructured"]
    assert estimate_imagenet([str(tmp_path / "data"), "0.05", *program, *more]) == 0
    assert capsys.readouterr().out.startswith("# 90 images, ")
    bad = (
        ["1,000", *program],
        *(["0", *program, *more.split()] for more in ("--sparsity-pattern 2:4", "--dataset folder", "--val-split 2")),
    )
    for words in bad:
        assert estimate_imagenet([str(tmp_path / "data"), *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for words, environment, sentence in (
        (["--dry-run"], {}, "name the directory"),
        ([str(tmp_path)], {}, "train': name the directory"),
        (["data", "--dry-run"], {"METHODS": "snip"}, "METHODS is no setting of this script, but METHOD is"),
        (["data", "--dry-run"], {"RHOS": "0.1"}, "and not of this script: unset it"),
    ):
        bad = imagenet(tmp_path, *words, **environment)
        assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
        assert sentence in bad.stderr
