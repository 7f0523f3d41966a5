"""What the README shows runs, and what it names exists."""

import re
from pathlib import Path

from experiment.flags import build_parser

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
    from experiment.flags import check, parse

    (command,) = re.findall(r"python main_prune_train.py (--arch.*)", README)
    check(*parse(command.split()))


def test_files_in_the_layout_exist():
    layout = README[README.index("## Layout") : README.index("Read `main_prune_train.py`")]
    for name in re.findall(r"\b\w+\.(?:py|sh)\b", layout):
        assert list(ROOT.glob(name)) + list(ROOT.glob(f"*/{name}")), name


def test_the_method_of_ones_own_works():
    """Its two pieces, put where the README says."""
    import torch

    from prune import METHODS, Pruner, methods, scores

    block = README[README.index("# prune/scores.py\n") : README.index("```\n\n## Reading the results")]
    function, line = block.split("# prune/methods.py, in METHODS\n")
    exec(function, vars(scores))
    try:
        METHODS |= eval("{" + line + "}", vars(methods))
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        with torch.no_grad():
            model[1].weight.mul_(100)
        pruner = Pruner(model, "relative", 0.5)
        pruner.before_training()
        assert sum(pruner.masks.alive().values()) == 64
        assert min(pruner.masks.alive().values()) > 20  # plain magnitude would empty the first layer
    finally:
        METHODS.pop("relative", None)
        del scores.relative_magnitude
