"""The pages are true: their examples run, their commands parse, and what they name exists."""

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from experiment.flags import build_parser, parse
from models import build_model
from prune import METHODS, methods, scores
from prune.masks import prunable_weights
from training.optim import OPTIMIZERS

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
}  # fmt: skip
METHODS_PAGE = PAGES["docs/methods.md"]
FLAG = r"(?<![\w-])--[a-z][a-z0-9_-]*"
YOURS = {"FILE.py", "mine.py"}  # files of the reader
OTHER_PROGRAMS = {"--standalone", "--nproc_per_node", "--logdir"}  # torchrun, tensorboard


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def section(page: str, heading: str) -> str:
    """Return what follows a heading, up to the next one."""
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)[1]


def table(text: str) -> list[list[str]]:
    """Return the cells of the first Markdown table, without its head."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].replace(r"\|", "").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_sam_in_your_own_loop_runs_and_perturbs():
    (example,) = blocks(section(PAGES["README.md"], "In your own loop"), "python")
    names = {}
    exec(example, names)
    assert all("sam_buffer" in values for values in names["optimizer"].state_dict()["state"].values())


@pytest.mark.parametrize("place", [("README.md", "Reading the results"), ("docs/export.md", "Load it")])
def test_the_lines_that_load_a_trained_network_classify_images(place, trained):
    (example,) = blocks(section(PAGES[place[0]], place[1]), "python")
    names = {"images": torch.rand(3, 1, 8, 8)}
    exec(re.sub('"runs/[^"]*"', repr(str(trained.directory)), example), names)
    assert names["logits"].shape == (3, 10)


def test_the_lines_that_train_from_a_notebook_return_the_result(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(section(PAGES["docs/export.md"], "Train from a notebook"), "python")
    names = {}
    exec(example.replace('"epochs": 3', '"epochs": 1, "depth": 8, "width": 0.25'), names)
    assert names["result"]["epochs"] == 1


def test_pruner_in_your_own_loop_keeps_its_sparsity():
    names = {}
    (example,) = blocks(section(METHODS_PAGE, "In your own loop"), "python")
    exec(example, names)
    weights = [layer.weight for layer in names["model"] if isinstance(layer, torch.nn.Linear)]
    alive = sum(int(weight.count_nonzero()) for weight in weights)
    total = sum(weight.numel() for weight in weights)
    assert names["step"] == 999
    assert 0 < alive <= round(0.1 * total)
    assert names["pruner"].ever_alive_fraction() > 0.1  # masks moved


def test_a_method_of_your_own_trains_the_network_of_the_quick_start(train, monkeypatch):
    function, line = blocks(section(METHODS_PAGE, "A method of your own"), "python")
    (name,) = re.findall(r"^def (\w+)", function, re.MULTILINE)
    monkeypatch.setattr(scores, name, None, raising=False)
    exec(function, vars(scores))
    for key, method in eval("{" + line.split("\n", 1)[1] + "}", vars(methods)).items():
        monkeypatch.setitem(METHODS, key, method)
    flags = re.search(r"main_prune_train\.py (.*?)--epochs", (ROOT / "scripts/quickstart.sh").read_text(), re.DOTALL)[1]
    flags = flags.replace("\\\n", "").replace("--prune-method random", f"--prune-method {key}")
    run = train(f"{flags} --epochs 1", short=False)
    assert run.code == 0, run.err
    assert run.json("args.json")["args"]["prune_method"] == key
    assert run.json("result.json")["sparsity"] == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_are_ones_the_program_takes(page):
    from experiment.checks import check

    for command in re.findall(r"^(?:python|torchrun)\b.*", "\n".join(commands(PAGES[page])), re.MULTILINE):
        words = [word for word in shlex.split(command, comments=True) if word != "..."]
        if "main_prune_train.py" in words:
            check(*parse(words[words.index("main_prune_train.py") + 1 :]))
        elif words[1] == "-m":
            assert (ROOT / f"{words[2].replace('.', '/')}.py").exists() or words[2] in ("pip", "tensorboard.main")


def commands(page: str) -> list[str]:
    return [block.replace("\\\n", "") for block in blocks(page, "bash")]


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_a_page_names_exists(page):
    assert set(re.findall(FLAG, PAGES[page])) <= existing_flags() | OTHER_PROGRAMS


@functools.cache
def existing_flags() -> set[str]:
    """Return the flags of the training program, of the other commands by their source, and of the scripts."""
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    for path in [*ROOT.glob("analysis/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).startswith(
                "add"
            ):
                flags |= {a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("--")}
    for path in [*ROOT.glob("scripts/*.sh"), *ROOT.glob("experiment/sweep.py")]:
        flags |= set(re.findall(FLAG, path.read_text()))
    return flags


@pytest.mark.parametrize("page", PAGES)
def test_files_and_anchors_a_page_links_to_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", prose(linked.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", PAGES)
def test_source_files_a_page_names_exist(page):
    text = "\n".join([prose(PAGES[page]), *commands(PAGES[page])])
    for name in re.findall(r"(?<![\w/.])(\w[\w/]*\.(?:py|sh|toml))\b", text):
        assert list(ROOT.glob(name)) + list(ROOT.glob(f"*/{name}")) or "NAME" in name or name in YOURS, name


def test_files_of_the_layout_are_where_it_says():
    layout = section(PAGES["docs/development.md"], "Layout").split("```")[1]
    directory, named = ROOT, 0
    for line in filter(None, layout.splitlines()):
        name = line.split()[0]
        if name.endswith("/"):
            directory = ROOT / name
            assert directory.is_dir(), name
        else:
            assert ((directory if line[0] == " " else ROOT) / name).exists(), line
            named += 1
    assert named > 40


def test_the_readme_names_every_method():
    named = {
        name for row in table(section(PAGES["README.md"], "Methods")) for name in re.findall(r"`([\w-]+)`", row[1])
    }
    assert {name for name in named if not name.startswith("-")} - OPTIMIZERS.keys() == METHODS.keys() - {"none"}


def test_the_table_of_methods_is_that_of_the_code():
    rows = {name: row for row in table(section(METHODS_PAGE, "Methods")) for name in re.findall(r"`([\w-]+)`", row[0])}
    assert rows.keys() == METHODS.keys() - {"none"}
    for name, row in rows.items():
        assert METHODS[name].paper in row[1]
        assert tuple(re.findall(r"`(\w+)`", row[3])) == METHODS[name].distributions


def test_the_table_of_options_is_that_of_the_code():
    declared = {}
    for name, method in METHODS.items():
        for option in method.options:
            declared.setdefault("--" + option.name.replace("_", "-"), ([], option.default_shown))[0].append(name)
    rows = table(section(METHODS_PAGE, "Options"))
    assert {row[0].strip("`"): (re.findall(r"`([\w-]+)`", row[1]), row[2]) for row in rows} == declared


def test_the_sparsities_by_layer_name_layers_of_resnet_20():
    (example,) = blocks(METHODS_PAGE, "yaml")
    layers = prunable_weights(build_model("resnet", 20, 10))
    assert yaml.safe_load(example)["prune_ratios"].keys() <= layers.keys()
