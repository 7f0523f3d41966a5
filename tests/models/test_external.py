"""Networks of torchvision, of timm and of one's own."""

import copy
import importlib.util
import pickle
import textwrap

import pytest
import torch
import torchvision
from running import before_step, interrupt, same
from torch import nn

from analysis import export
from experiment import build
from experiment.flags import parse
from experiment.load import load
from models import build_model
from models.external import NetworkError, load_published_weights
from prune import Pruner
from prune.masks import Masks
from training.checkpoint import load_network
from training.foreign import fitting
from utils.errors import UsageError

NEEDS_TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="no timm")

PUBLISHED = {  # parameters, as torchvision's documentation has them
    "alexnet": 61_100_840,
    "convnext_tiny": 28_589_128,
    "densenet121": 7_978_856,
    "efficientnet_b0": 5_288_548,
    "mobilenet_v2": 3_504_872,
    "resnet50": 25_557_032,
    "resnext50_32x4d": 25_028_904,
    "shufflenet_v2_x1_0": 2_278_604,
    "squeezenet1_1": 1_235_496,
    "vgg16": 138_357_544,
    "vit_b_16": 86_567_656,
}

OWN = """
    from torch import nn

    def build(num_classes, in_channels, image_size):
        height, width = image_size
        layers = [nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(4 * height * width, num_classes))

    def broken(num_classes, in_channels, image_size):
        return build(num_classes, 7, image_size)

    def endless(num_classes, in_channels, image_size):
        layers = build(num_classes, in_channels, image_size)
        layers[1].momentum = None
        return layers

    def several(num_classes, in_channels, image_size):
        return build(num_classes + 1, in_channels, image_size)
"""


@pytest.fixture
def own(tmp_path):
    """A file with networks of one's own."""
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(OWN))
    return path


def outline(arch, size=224, channels=3, classes=1000):
    with torch.device("meta"):
        return build_model(arch, None, classes, in_channels=channels, image_size=(size, size))


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_of_torchvision_have_the_published_number_of_parameters(name):
    assert sum(p.numel() for p in outline(f"torchvision:{name}").parameters()) == PUBLISHED[name]


def test_batch_norm_of_every_dimension_goes_without_a_counter(tmp_path):
    """A process without images of a last batch would count otherwise than the others."""
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def build(classes, channels, size):\n"
        "    count = channels * size[0] * size[1]\n"
        "    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(count), nn.Linear(count, classes))\n"
    )
    model = build_model(f"{tmp_path}/own.py:build", None, 10, in_channels=1, image_size=(8, 8))
    assert "1.num_batches_tracked" not in model.state_dict()


@pytest.mark.parametrize(
    ("name", "stem", "classifier"),
    [
        ("densenet121", "features.conv0", "classifier"),
        ("squeezenet1_1", "features.0", "classifier.1"),
        ("vgg16", "features.0", "classifier.6"),
        ("vit_b_16", "conv_proj", "heads.head"),
        ("swin_t", "features.0.0", "head"),
    ],
)
def test_stem_and_classifier_are_found_by_position_and_attention_is_pruned(name, stem, classifier):
    model = outline(f"torchvision:{name}")
    pruner = Pruner(model, "random", 0.3, "uniform", dense_layers=["stem", "classifier"])
    assert pruner.dense_layers == {"stem": [stem], "classifier": [classifier]}
    weights = {id(weight) for weight in pruner.masks.weights.values()}
    assert {name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in weights} <= {
        "encoder.pos_embedding", "class_token", *(n for n, _ in model.named_parameters() if "relative_position" in n)
    }  # fmt: skip


def test_a_grey_image_gives_what_its_colours_would():
    torch.manual_seed(0)
    colour = build_model("torchvision:resnet18", None, 5, image_size=(32, 32)).eval()
    torch.manual_seed(0)
    grey = build_model("torchvision:resnet18", None, 5, in_channels=1, image_size=(32, 32)).eval()
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_published_weights_come_from_the_cache_and_the_classifier_fits_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    source = torchvision.models.shufflenet_v2_x0_5()
    nn.init.constant_(source.conv1[0].weight, 0.5)
    url = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url
    (tmp_path / "checkpoints").mkdir()
    torch.save(source.state_dict(), tmp_path / "checkpoints" / url.rpartition("/")[2])
    for channels, classes in ((3, 1000), (1, 7)):
        model = build_model("torchvision:shufflenet_v2_x0_5", None, classes, in_channels=channels, image_size=(32, 32))
        drawn = copy.deepcopy(model.fc)
        load_published_weights(model, "torchvision:shufflenet_v2_x0_5", "DEFAULT")
        assert (model.conv1[0].weight == 1.5 / channels).all()
        assert torch.equal(model.conv5[0].weight, source.conv5[0].weight)
        assert torch.equal(model.fc.weight, source.fc.weight if classes == 1000 else drawn.weight)
    with pytest.raises(NetworkError, match="no published weights 'BEST': choose IMAGENET1K_V1 or DEFAULT"):
        load_published_weights(model, "torchvision:shufflenet_v2_x0_5", "BEST")


@pytest.mark.parametrize(("name", "side"), [("googlenet", 32), ("inception_v3", 75)])
def test_published_weights_keep_the_scale_of_their_inputs_wherever_they_are_loaded(name, side, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    torch.manual_seed(0)
    source = torchvision.models.get_model(name, transform_input=True, aux_logits=False, init_weights=False).eval()
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    (tmp_path / "checkpoints").mkdir()
    torch.save(source.state_dict(), tmp_path / "checkpoints" / url.rpartition("/")[2])
    arch, size = f"torchvision:{name}", (side, side)
    model = build_model(arch, None, 1000, image_size=size).eval()
    images = torch.randn(2, 3, *size)
    plain = copy.deepcopy(source)
    plain.transform_input = False
    model.load_state_dict(fitting(model, source.state_dict(), "a file"))  # which does not tell
    torch.testing.assert_close(model(images), plain(images))
    load_published_weights(model, arch, "DEFAULT")
    torch.testing.assert_close(model(images), source(images))
    again = build_model(arch, None, 1000, image_size=size).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(copy.deepcopy(again)(images), source(images))
    older = model.state_dict()
    del older["input_scale"], older["input_shift"]
    again.load_state_dict(older)  # which leaves them as they are
    torch.testing.assert_close(again(images), source(images))
    whole = build_model(arch, None, 1000, image_size=size).eval()
    state = {"model": older, "pruner": {"masks": {}}}
    load_network(whole, Masks.of(whole), {"state": state, "args": {}})
    torch.testing.assert_close(whole(images), plain(images))
    torch.testing.assert_close(pickle.loads(pickle.dumps(again))(images), source(images))
    grey = build_model(arch, None, 1000, in_channels=1, image_size=size)
    assert grey(torch.randn(2, 1, *size)).shape == (2, 1000)
    with pytest.raises(NetworkError, match="scale each colour: take images in colour"):
        load_published_weights(grey, arch, "DEFAULT")


def test_published_weights_that_cannot_be_had_are_refused_with_their_address(tmp_path, monkeypatch, train):
    def no_network(*args, **kwargs):
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    bad = train("--dataset digits --arch torchvision:shufflenet_v2_x0_5 --pretrained-weights DEFAULT", short=False)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert "could not be downloaded (Temporary failure" in bad.err
    assert "put https://download.pytorch.org/models/shufflenet" in bad.err
    assert not (tmp_path / "run").exists()


@NEEDS_TIMM
def test_networks_of_timm_take_the_size_and_the_channels_of_the_images():
    assert (
        sum(p.numel() for p in outline("timm:deit_tiny_patch16_224").parameters()) == 5_717_416
    )  # Touvron et al. 2021
    small = outline("timm:deit_tiny_patch16_224", 32, 1, 10)
    assert small.pos_embed.shape[1] == 5
    assert small.patch_embed.proj.in_channels == 1
    assert outline("timm:resnet18", 32, 1, 10).fc.out_features == 10  # of any size


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("torchvision:resnet19", "there is no torchvision:resnet19: did you mean resnet18"),
        ("torchvision:vit_b_16", "does not work for images of 50x50 pixels and 3 channels"),
        ("nowhere.py:build", "there is no file 'nowhere.py'"),
        ("nowhere:build", "there is no module 'nowhere'"),
        ("{own}:build2", "mine.py' has no function 'build2'"),
        ("{own}:broken", "mine.py:broken does not work for images of 50x50 pixels and 3 channels \\(RuntimeError"),
        ("{own}:several", r"mine.py:several gives \(2, 11\) for two images: it has to give a tensor of \(2, 10\)"),
        ("{own}:endless", r"batch norm '1' of .*mine.py:endless averages over all of training \(momentum=None\)"),
        pytest.param("timm:resnet19", "there is no timm:resnet19: did you mean resnet", marks=NEEDS_TIMM),
    ],
)
def test_networks_that_cannot_be_had_are_refused_in_one_sentence(own, arch, words):
    with pytest.raises(NetworkError, match=words) as error:
        outline(arch.format(own=own), 50, classes=10)
    assert "\n" not in str(error.value)


OTHERS = "--dataset digits --batch-size 512 --epochs 2 --optmzr sgd-sam --sam-v2 --prune-method rigl --sparsity 0.9"


def test_a_network_of_ones_own_with_dropout_resumes_bit_for_bit(train, own):
    flags = f"{OTHERS} --arch {own}:build --dense-layers stem"
    whole = train(flags, "whole", short=False)
    assert whole.code == 0, whole.err
    assert f"{own}:build on cpu" in whole.out
    assert "(stem: 0)" in whole.out
    with before_step(4, interrupt):
        assert train(flags, "cut", short=False).code == 130
    resumed = train(f"{flags} --resume auto", "cut", short=False)
    assert resumed.code == 0, resumed.err
    same(whole.checkpoint()["state"], resumed.checkpoint()["state"])
    again = train(f"--evaluate {whole.directory}/checkpoint.pt --arch {own}:build", None, short=False)
    assert f"test top-1 {whole.json('result.json')['test_top1']:.2f}%" in again.out


def test_a_checkpoint_alone_does_not_choose_which_function_runs(train, own, tmp_path):
    run = train(f"--dataset digits --batch-size 512 --epochs 1 --arch {own}:build", short=False)
    assert run.code == 0, run.err
    assert load(run.directory, arch=f"{own}:build").model[0].weight.shape == (4, 1, 3, 3)
    code = own.read_text()
    own.write_text("import os\nos.mkdir('it-ran')\n")
    for flags in (
        f"--evaluate {run.directory}",
        f"--resume {run.directory}/checkpoint.pt",
        f"--config {run.directory}",
    ):
        bad = train(flags, None, short=False)
        assert (bad.code, bad.err.count("\n")) == (2, 1)
        assert f"name its function again, as --arch {own}:build, if you trust it" in bad.err
    assert not (tmp_path / "it-ran").exists()
    with pytest.raises(UsageError, match="name its function again"):
        load(run.directory)
    assert not (tmp_path / "it-ran").exists()
    own.write_text(code)
    again = train(f"--config {run.directory} --arch {own}:build", "again", short=False)
    assert again.code == 0, again.err
    same(again.checkpoint()["state"], run.checkpoint()["state"])


@pytest.mark.parametrize("format", ["safetensors", "onnx", "pt2"])
def test_a_network_of_ones_own_is_exported_where_its_function_is_named(train, own, tmp_path, capsys, format):
    for package in {"safetensors": ["safetensors", "zstandard"], "onnx": ["onnxscript", "onnxruntime"]}.get(format, []):
        pytest.importorskip(package)
    flags = "--dataset digits --batch-size 512 --epochs 1 --prune-method random --sparsity 0.9"
    run = train(f"{flags} --arch {own}:build", short=False)
    assert run.code == 0, run.err
    command = [str(run.directory), "--format", format, "--output", str(tmp_path / "network")]
    assert export.main(command) == 2
    assert "name its function again" in capsys.readouterr().err
    assert export.main([*command, "--arch", f"{own}:build"]) == 0
    if format == "safetensors":
        both = [load(path, arch=f"{own}:build") for path in (run.directory, tmp_path / "network")]
        same(*(dict(trained.model.state_dict()) for trained in both))
        same(*(trained.masks.state_dict() for trained in both))


def test_a_network_that_torch_cannot_export_is_refused_with_a_sentence(train, own, tmp_path, capsys):
    own.write_text(
        textwrap.dedent("""
            from torch import nn

            class Branching(nn.Linear):
                def forward(self, x):
                    return super().forward(x.flatten(1)) * (2 if not x.is_meta and x.sum() > 0 else 1)

            def build(num_classes, in_channels, image_size):
                return Branching(in_channels * image_size[0] * image_size[1], num_classes)
        """)
    )
    run = train(f"--dataset digits --batch-size 512 --epochs 1 --arch {own}:build", short=False)
    assert run.code == 0, run.err
    command = [str(run.directory), "--format", "pt2", "--output", str(tmp_path / "x.pt2"), "--arch", f"{own}:build"]
    assert export.main(command) == 1
    assert "as pt2 (" in (said := capsys.readouterr().err)
    assert (said.count("\n"), (tmp_path / "x.pt2").exists()) == (1, False)


def test_a_file_of_torchvisions_weights_is_read(train, tmp_path):
    torch.manual_seed(3)
    torch.save(torchvision.models.squeezenet1_1(num_classes=10).state_dict(), tmp_path / "squeezenet.pth")
    flags = "--dataset cifar10 --arch torchvision:squeezenet1_1"
    args = parse(f"{flags} --pretrained {tmp_path / 'squeezenet.pth'}".split())[0]
    build.check_on_meta(args)
    args.arch = "torchvision:squeezenet1_0"
    with pytest.raises(UsageError, match="features.0.weight is 64x3x3x3 there and 96x3x7x7 here"):
        build.check_on_meta(args)
