"""--config replays a run: the same flags, except where and how it went, with those given beside it in their place."""

import json

import pytest
from running import same

from experiment.config import NOT_REPLAYED, as_argv, parse_and_replay
from experiment.flags import load_layer_sparsity, parse, plain, resolve
from experiment.run_name import run_name
from utils.errors import UsageError


@pytest.fixture
def recipe(tmp_path):
    """recipe("--flag value ...") writes the args.json of a run with these flags, and returns its path."""

    def write(flags: str, **changed):
        path = tmp_path / "args.json"
        args = plain(resolve(parse(flags.split())[0])) | changed
        path.write_text(json.dumps({"args": args}))
        return path

    return write


def replay(path, flags: str = ""):
    """Return the flags of a run by --config and others, complete, by name."""
    return vars(resolve(parse_and_replay(["--config", str(path), *flags.split()])[0]))


EVERYTHING = (
    "--arch vgg --depth 16 --width 0.5 --dataset folder --data-dir /images --image-size 32 --val-split 5 --train-images 100 "
    "--label-noise 0.1 --batch-size 7 --test-batch-size 9 --accumulate 2 --mixup --alpha 0.3 --smooth-eps 0.1 "
    "--optmzr sgd-sam --epochs 3 --lr 0.03 --momentum 0.8 --nesterov --weight-decay 1e-05 --lr-scheduler step "
    "--warmup-epochs 0.5 --clip-grad 2 --sam-rho 0.07 --adaptive --sam-local --prune-method mest --sparsity 0.8 "
    "--sparsity-distribution uniform --sparsity-pattern channel --dense-layers stem classifier --update-interval 2e "
    "--stop-update 0.5 --drop-fraction 0.4 --mest-lambda 2 --mest-soft --pretrained /weights.pt --summary --seed 3 "
    "--precision bf16 --compile off --nonfinite skip --deterministic --checkpoint-every 10m --recalibrate-bn --sharpness "
    "--log-interval 4"
)  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        "--dataset digits",
        EVERYTHING,
        "--optmzr adamw-sam --sam-v2 --prune-method rigl --sparsity 0.9",
        "--prune-method mest --sparsity 0.9 --mest-soft",
        "--prune-method mest --sparsity 0.9 --mest-soft --drop-fraction 0.2",
        "--prune-method lth --sparsity 0.5 --lth-rounds 2",
        "--prune-method random --sparsity-pattern 2:4",
        "--prune-method random --sparsity-config layers.yaml",
        "--prune-method oneshot --sparsity 0.9 --pretrained weights.pt --lr 0.1",
        "--arch vit --optmzr adam",
    ],
)
def test_a_replayed_run_has_the_flags_of_the_first(recipe, flags):
    first = vars(resolve(parse(flags.split())[0]))
    path = recipe(flags, device="cuda:3", output_dir="/there", remark="first", workers=2, resume="auto")
    again = replay(path)
    assert again.pop("config") == path
    for name in again.keys() - NOT_REPLAYED:
        assert str(again[name]) == str(plain(parse([])[0].__class__(**first))[name]), name
    assert [again[name] for name in ("device", "output_dir", "remark", "workers", "resume")] == [
        "auto", None, "", None, None,
    ]  # fmt: skip


def test_flags_beside_the_file_win(recipe):
    path = recipe(EVERYTHING)
    again = replay(path, "--seed 5 --sparsity 0.5 --no-deterministic --no-sharpness --precision auto --lr 1")
    assert [again[name] for name in ("seed", "sparsity", "deterministic", "sharpness", "precision", "lr")] == [
        5, 0.5, False, False, "auto", 1,
    ]  # fmt: skip
    assert (again["epochs"], again["recalibrate_bn"], again["compile"]) == (3, True, "off")


def test_what_the_file_leaves_at_its_default_follows_the_flags_beside_it(recipe):
    path = recipe("--optmzr sgd-sam --sam-v2 --prune-method rigl --sparsity 0.9 --depth 32 --weight-decay 0.01")
    adam = replay(path, "--optmzr adam-sam --adaptive")
    assert [adam[name] for name in ("lr", "momentum", "sam_rho", "weight_decay", "depth")] == [
        0.001,
        None,
        0.5,
        0.01,
        32,
    ]
    assert replay(path, "--arch vgg")["depth"] == 19
    assert replay(path, "--arch resnet")["depth"] == 32
    folder = recipe("--dataset folder --data-dir /images --image-size 32")
    assert [replay(folder, "--dataset digits")[name] for name in ("data_dir", "image_size")] == [None, None]


def test_flags_that_those_beside_the_file_leave_without_effect_are_left_out(recipe):
    path = recipe(
        "--optmzr sgd-sam --sam-v2 --sam-rho 0.1 --nesterov --prune-method rigl --sparsity 0.9 --drop-fraction 0.2"
    )
    sgd, given = parse_and_replay(["--config", str(path), "--optmzr", "sgd"])
    assert (sgd.sam_v2, sgd.sam_rho, sgd.nesterov) == (False, None, True)
    assert not given & {"sam_v2", "sam_rho"}
    dense = replay(path, "--prune-method none --optmzr adam")
    assert [dense[name] for name in ("sparsity", "drop_fraction", "nesterov", "sam_v2")] == [None, None, False, False]


def test_a_run_directory_is_a_recipe_and_trains_the_same_network(train, trained):
    again = train(f"--config {trained.directory}", short=False)
    assert again.code == 0, again.err
    same(again.checkpoint()["state"], trained.checkpoint()["state"])
    assert again.json("args.json")["args"]["config"] == str(trained.directory)
    resumed = train(f"--config {trained.directory} --resume auto", short=False)
    assert (resumed.code, "finished already" in resumed.out) == (0, True)


@pytest.mark.parametrize("beside", [None, "{", '{"args": {}}'])
def test_a_copy_of_a_recipe_tells_changed_sparsities_as_well(recipe, tmp_path, beside):
    layers = tmp_path / "layers.yaml"
    layers.write_text("prune_ratios: {stem: 0.5}")
    path = recipe(f"--prune-method random --sparsity-config {layers}")
    copied = tmp_path / "copies" / "recipe.json"
    copied.parent.mkdir()
    copied.write_text(json.dumps(json.loads(path.read_text()) | {"layer_sparsity": {"stem": 0.5}}))
    if beside is not None:
        (copied.parent / "args.json").write_text(beside)
    assert replay(copied)["sparsity_config"] == layers
    layers.write_text("prune_ratios: {stem: 0.6}")
    with pytest.raises(UsageError, match="has other sparsities than when the run of"):
        replay(copied)


def test_yaml_that_merges_one_mapping_into_another_names_nothing_twice(recipe, tmp_path):
    layers = tmp_path / "layers.yaml"
    layers.write_text("base: &base {stem: 0.5, classifier: 0.1}\nprune_ratios:\n  <<: *base\n  stem: 0.6\n")
    assert load_layer_sparsity(layers) == {"stem": 0.6, "classifier": 0.1}
    layers.write_text("all: {a: &a {stem: 0.4}, b: &b {<<: *a, stem: 0.5}}\nprune_ratios: {<<: *b}\n")
    assert load_layer_sparsity(layers) == {"stem": 0.5}


def test_the_name_of_a_replayed_run_is_that_of_its_flags(recipe):
    path = recipe("--optmzr sgd-sam --sam-v2 --prune-method random --sparsity 0.9", remark="first")
    args = resolve(parse_and_replay(["--config", str(path), "--seed", "2"])[0])
    flags = "--optmzr sgd-sam --sam-v2 --prune-method random --sparsity 0.9 --seed 2"
    assert run_name(args) == run_name(resolve(parse(flags.split())[0]))


def test_an_older_file_lacks_flags_and_a_newer_one_has_others_that_are_off(tmp_path):
    args = {"dataset": "digits", "epochs": 3, "later": None, "other": False, "more": []}
    (tmp_path / "args.json").write_text(json.dumps({"args": args}))
    again = replay(tmp_path)
    assert (again["dataset"], again["epochs"], again["batch_size"]) == ("digits", 3, 128)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"args": {"sam_version": 3, "epochs": 2}}',
            "has flags that this version of the program does not: --sam-version 3;",
        ),
        ('{"args": {"epochs": "many"}}', "args.json': argument --epochs: has to be a whole number above 0, not 'many'"),
        ('{"args": {"epochs": true}}', "args.json': argument --epochs: expected one argument"),
        ('{"args": {"optmzr": "lion"}}', "args.json': argument --optmzr: invalid choice: 'lion'"),
        ('{"args": {"help": true}}', "has flags that this version of the program does not: --help True"),
        ('{"args": [1]}', 'is not the args.json of a run: it has no flags under "args"'),
        ('{"epochs": 2}', "is not the args.json of a run"),
        ("epochs: 2", "is not the args.json of a run"),
        pytest.param("[" * 9999, "is not the args.json of a run", id="nested"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_cannot_be_replayed_is_refused_with_a_sentence(train, tmp_path, content, words):
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    refused = train(f"--config {tmp_path}/args.json", None, short=False)
    assert (refused.code, refused.err.count("\n"), refused.out) == (2, 1, "")
    assert words in refused.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--no-sam-v2", "--no-sam-v2 turns off what --config turns on: give --config, or leave it out"),
        ("--config args.json --evaluate x.pt", "--config is for a training and has no effect with --evaluate"),
        ("--config args.json --sam-rho 0.1", "--sam-rho has no effect with --optmzr sgd"),
    ],
)
def test_config_and_flags_that_contradict_each_other_are_refused(train, recipe, flags, words):
    recipe("--dataset digits")
    refused = train(flags, None, short=False)
    assert (refused.code, refused.err.count("\n"), refused.out) == (2, 1, "")
    assert words in refused.err


def test_flags_by_name_become_words():
    flags = {
        "dataset": "digits",
        "sam_v2": True,
        "nesterov": False,
        "lr": 1e-05,
        "alpha": None,
        "dense-layers": ["a", "b"],
    }
    assert as_argv(flags) == ["--dataset=digits", "--sam-v2", "--lr=1e-05", "--dense-layers", "a", "b"]
    assert as_argv({"config": "x", "sam_v2": False, "no_cuda": False}) == ["--config=x", "--no-sam-v2"]
    assert as_argv(["--epochs", 3]) == ["--epochs", "3"]
    for wrong in ("--epochs 3", ["--help"], {"help": True}):
        with pytest.raises(UsageError):
            as_argv(wrong)
