"""What the README shows runs, and what it names exists."""

import re
from pathlib import Path

from utils.cli import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_perturbs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["optimizer"].state_dict()["sam_memory"] is not None


def test_every_flag_is_named_and_every_named_flag_exists():
    table = README[README.index("## Flags by purpose") : README.index("A flag that the others")]
    named = set(re.findall(r"--[a-z][a-z0-9-]*", table)) - {"--help"}
    existing = {option for action in build_parser()._actions for option in action.option_strings}
    assert named <= existing
    aliases = {"--wd", "--save-model", "--help"}
    assert {o for o in existing if o.startswith("--")} - aliases == named


def test_the_research_command_parses():
    from utils.cli import check, parse

    (command,) = re.findall(r"python main_prune_train.py (--arch.*)", README)
    check(*parse(command.split()))


def test_files_in_the_layout_exist():
    layout = README[README.index("## Layout") : README.index("Read `main_prune_train.py`")]
    for name in re.findall(r"\b\w+\.(?:py|sh)\b", layout):
        assert list(ROOT.glob(name)) + list(ROOT.glob(f"*/{name}")), name
