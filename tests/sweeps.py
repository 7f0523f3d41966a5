"""A sweep for tests, the script that stands in for its runs, and how to read what it printed and left."""

import json
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = [path.name for path in sorted((ROOT / "scripts").glob("*.sh")) if "experiment.sweep" in path.read_text()]
GRID = """
# A sweep for tests.
RHOS = 0.1 0.2  # radius
samv2-rho{RHOS}  --optmzr sgd-sam --sam-v2 --sam-rho {RHOS}
"""
# What becomes of a run is said by FATES for its rho: it fails, is killed or preempted, waits for three others, is there twice, or
# has its sweep end.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

def value(flag):
    joined = [word.partition("=")[2] for word in sys.argv if word.startswith(flag + "=")]
    return joined[0] if joined else sys.argv[sys.argv.index(flag) + 1]

directory = Path(value("--output-dir"))
directory.mkdir(exist_ok=True)
seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
(directory / "begun.json").write_text(json.dumps(seen | {"argv": sys.argv[1:]}))
fate = json.loads(os.environ.get("FATES", "{}")).get(value("--sam-rho"))
if fate == "measure":  # fails after its training
    (directory / "result.json").write_text('{"error": "poisoned"}')
if fate in ("fail", "measure"):
    print("error: poisoned", file=sys.stderr)
    sys.exit(1)
if fate == "twice":  # another job for this run has been refused meanwhile
    (directory.parent / ".sweep" / f"{directory.name}.failed").touch()
if fate == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if fate == "orphan":
    os.kill(os.getppid(), signal.SIGKILL)
while fate == "orphan" and not (directory / "go").exists():
    time.sleep(0.01)
while fate == "meet" and len(list(directory.parent.glob("*/begun.json"))) < 4:
    time.sleep(0.01)
if fate == "preempt":
    sys.exit(75)
if fate in ("SIGINT", "SIGTERM", "SIGHUP", "Ctrl-C"):
    def end(*_):
        (directory / "checkpoint.pt").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, end)
    if fate == "Ctrl-C":
        (directory / "ready").touch()
    else:
        os.kill(os.getppid(), getattr(signal, fate))
    time.sleep(60)
(directory / "result.json").write_text("{}")
"""


def grid_of(script):
    return (ROOT / "scripts" / script).read_text().split("<<'GRID'\n")[1].removesuffix("GRID\n")


def commands(done):
    return [shlex.split(line) for line in done.stdout.splitlines() if "main_prune_train.py" in line]


def value(flag, command):
    return command[command.index(flag) + 1]


def begun(directory):
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*/begun.json"))]


def refused(done):
    """Whether it ended in one sentence."""
    return (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout
    )
