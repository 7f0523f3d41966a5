"""Networks against published parameter counts, and what all families have in common."""

import math

import pytest
import torch
from torch import nn

from models import ARCHITECTURES, build_model
from models.vit import positions

SMALL = [  # (arch, depth, width): every family, and every kind of block of a family
    ("mobilenet", 28, 0.25),
    ("resnet", 8, 0.5),
    ("resnet", 18, 0.125),
    ("resnet", 50, 0.125),
    ("vgg", 16, 0.125),
    ("vit", 2, 1 / 3),
    ("wideresnet", 10, 0.5),
]
small = pytest.mark.parametrize(("arch", "depth", "width"), SMALL)


def outline(*args, **kwargs):
    """A network that has shapes but neither memory nor values."""
    with torch.device("meta"):
        return build_model(*args, **kwargs)


def size(model):
    return sum(p.numel() for p in model.parameters())


def prunable(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def test_the_small_networks_cover_every_family():
    assert {arch for arch, _, _ in SMALL} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("arch", "depth", "classes", "width", "parameters"),
    [
        ("resnet", 20, 10, 1, 272_474),
        ("resnet", 32, 10, 2, 1_860_522),
        ("resnet", 32, 100, 2, 1_872_132),
        ("resnet", 18, 10, 1, 11_173_962),
        ("resnet", 34, 10, 1, 21_282_122),
        ("resnet", 50, 10, 1, 23_520_842),
        ("vgg", 19, 10, 1, 20_035_018),
        ("mobilenet", 28, 10, 1, 3_217_226),
        ("wideresnet", 28, 10, 10, 36_479_194),
    ],
)
def test_networks_have_the_published_number_of_parameters(arch, depth, classes, width, parameters):
    assert size(outline(arch, depth, classes, width)) == parameters


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_resnets_for_imagenet_have_the_published_parameters_and_quarter_the_image(depth, parameters):
    model = outline("resnet", depth, 1000, stem="imagenet")
    assert size(model) == parameters
    assert model.stem(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 64, 56, 56)


@pytest.mark.parametrize(("image_size", "kernel"), [((32, 32), 3), ((63, 100), 3), ((64, 64), 7), ((224, 224), 7)])
def test_the_stem_of_a_resnet_follows_the_smaller_side_of_the_images(image_size, kernel):
    model = outline("resnet", 8, 10, image_size=image_size, stem="auto")
    assert model.stem[0].kernel_size == (kernel, kernel)
    assert outline("resnet", 8, 10, image_size=image_size, stem="cifar").stem[0].kernel_size == (3, 3)


@pytest.mark.parametrize(("depth", "k", "millions"), [(40, 4, 8.9), (16, 8, 11.0), (28, 10, 36.5)])
def test_wide_resnets_have_the_size_of_the_paper(depth, k, millions):
    """Zagoruyko & Komodakis 2016, tables 4 and 5, and the count layer by layer."""
    blocks = (depth - 4) // 6
    parameters = 3 * 16 * 9
    before = 16
    for after in (16 * k, 32 * k, 64 * k):
        convolutions = 9 * before * after + 9 * after * after * (2 * blocks - 1)
        norms = 2 * before + 2 * after * (2 * blocks - 1)
        parameters += convolutions + norms + before * after
        before = after
    parameters += 2 * before + before * 10 + 10
    assert size(outline("wideresnet", depth, 10, k)) == parameters
    assert round(parameters / 1e6, 1) == millions


def test_vit_has_the_blocks_of_deit_tiny():
    """Touvron et al. 2021: 5,717,416 with 16x16 patches, a class token and learned positions, which are not here."""
    model = outline("vit", 12, 1000)
    patches, token, learned = 192 * (3 * 16 * 16 + 1), 192, 192 * (14 * 14 + 1)
    assert size(model) - size(model.stem) == 5_717_416 - patches - token - learned


@pytest.mark.parametrize(
    ("arch", "depth", "width", "projections"),
    [
        *[("resnet", depth, 1, 2) for depth in (20, 32, 44, 56, 110)],
        ("resnet", 18, 1, 3),
        ("resnet", 34, 1, 3),
        ("resnet", 50, 1, 4),
        ("mobilenet", 28, 1, 0),
    ],
)
def test_depth_counts_the_layers_on_the_longest_path(arch, depth, width, projections):
    names = list(prunable(outline(arch, depth, 10, width)))
    shortcuts = [name for name in names if "shortcut" in name.split(".")]
    assert (len(names) - len(shortcuts), len(shortcuts)) == (depth, projections)


def test_depth_in_the_families_that_count_otherwise():
    def count(kind, *args):
        return sum(isinstance(module, kind) for module in outline(*args).modules())

    for depth in (16, 28, 40):  # convolutions, with the three projections of any width but 1
        assert count(nn.Conv2d, "wideresnet", depth, 10, 4) == depth
    for depth in (16, 19):  # convolutions, and three linear layers of which the last remains
        assert count(nn.Conv2d, "vgg", depth, 10) == depth - 3
    for depth in (1, 6):  # blocks, of six linear layers each
        assert count(nn.Linear, "vit", depth, 10) == 6 * depth + 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_without_a_depth_a_network_has_the_default_one(arch):
    def shapes(depth):
        return [(name, p.shape) for name, p in outline(arch, depth, 10).named_parameters()]

    assert shapes(None) == shapes(ARCHITECTURES[arch].default_depth)


def test_parameters_of_the_cifar_resnet_keep_their_names():
    stem = {f"stem.{part}" for part in ("0.weight", "1.weight", "1.bias")}
    block = ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias")
    blocks = {f"stage{s}.{b}.{part}" for s in (1, 2, 3) for b in (0, 1, 2) for part in block}
    shortcuts = {f"stage{s}.0.shortcut.{part}" for s in (2, 3) for part in ("0.weight", "1.weight", "1.bias")}
    names = {name for name, _ in outline("resnet", 20, 10).named_parameters()}
    assert names == stem | blocks | shortcuts | {"classifier.weight", "classifier.bias"}


@small
def test_users_find_stem_shortcuts_and_classifier_by_name(arch, depth, width):
    model = build_model(arch, depth, 7, width, in_channels=1)
    names = {module: name for name, module in prunable(model).items()}
    called = []
    for module in names:
        module.register_forward_hook(lambda module, args, output: called.append(module))
    model(torch.zeros(2, 1, 8, 8))
    assert names[called[0]].split(".")[0] == "stem"
    assert called[0].in_channels == 1
    assert names[called[-1]] == "classifier"
    assert called[-1].out_features == 7
    assert len(called) == len(names)  # each layer is used, and once
    shortcuts = {module for module, name in names.items() if "shortcut" in name.split(".")}
    assert all(module.kernel_size == (1, 1) for module in shortcuts)
    assert bool(shortcuts) == ("resnet" in arch)  # the transformer's residual path is never projected


@small
@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (64, 3)])
def test_any_input_size_and_channel_count(arch, depth, width, side, channels):
    model = build_model(arch, depth, 7, width, in_channels=channels)
    assert model(torch.randn(2, channels, side, side)).shape == (2, 7)
    assert model(torch.randn(2, channels, side + 1, side + 5)).shape == (2, 7)


@small
def test_training_in_channels_last_reaches_every_parameter(arch, depth, width):
    torch.manual_seed(0)
    model = build_model(arch, depth, 7, width).double()
    inputs, targets = torch.randn(4, 3, 16, 16).double(), torch.tensor([0, 1, 2, 3])
    plain = model(inputs)
    model.to(memory_format=torch.channels_last)
    logits = model(inputs.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, plain)
    nn.functional.cross_entropy(logits, targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A key's bias adds one number to all scores of a query, which softmax does not see.
        assert parameter.grad.any() or name.endswith("key.bias"), name


@pytest.mark.parametrize(("depth", "counts"), [(16, [2, 2, 3, 3, 3]), (19, [2, 2, 4, 4, 4])])
def test_vgg_is_the_published_formula(depth, counts):
    """Convolutions, batch norm and ReLU; four max pools of 2, then one average pool of 2, as GraSP and S2-SAM have it."""
    torch.manual_seed(0)
    model = build_model("vgg", depth, 10, 0.125).double()
    inputs = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model(inputs)  # running statistics that are not 0 and 1
    model.eval()
    weights = iter(model.state_dict().values())
    x = inputs
    for number, count in enumerate(counts):
        for _ in range(count):
            kernel, scale, shift, mean, variance = (next(weights) for _ in range(5))
            x = nn.functional.conv2d(x, kernel, padding=1) - mean[:, None, None]
            x = x / (variance[:, None, None] + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]
            x = x.clamp_min(0)
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        x = x.amax(4) if number < 4 else x.mean(4)
    logits = x.flatten(1) @ next(weights).T + next(weights)
    torch.testing.assert_close(model(inputs), logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("arch", "depth", "width", "threads"),
    [("resnet", 8, 0.25, 1), ("resnet", 8, 0.25, 2), ("resnet", 8, 1, 2), ("wideresnet", 10, 0.25, 2)],
)
def test_projections_are_right_where_onednn_is_not(arch, depth, width, threads):
    """Few channels, a stride, fp32 and channels last: against products and sums written out in float64."""
    torch.manual_seed(0)
    model = build_model(arch, depth, 7, width).to(memory_format=torch.channels_last)
    layers = [module for name, module in prunable(model).items() if ".shortcut" in name]
    assert len(layers) >= 2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for layer in layers:
            x = torch.randn(32, layer.in_channels, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
            out = layer(x)
            slope = torch.randn_like(out)
            out.backward(slope)
            stride = layer.stride[0]
            seen = x.detach().double()[:, :, ::stride, ::stride]
            weight = layer.weight.detach().double()[:, :, 0, 0]
            torch.testing.assert_close(out.double(), torch.einsum("bihw,oi->bohw", seen, weight), rtol=1e-4, atol=1e-4)
            back = torch.zeros_like(x, dtype=torch.float64)
            back[:, :, ::stride, ::stride] = torch.einsum("bohw,oi->bihw", slope.double(), weight)
            torch.testing.assert_close(x.grad.double(), back, rtol=1e-4, atol=1e-4)
            gradient = torch.einsum("bohw,bihw->oi", slope.double(), seen)
            torch.testing.assert_close(layer.weight.grad[:, :, 0, 0].double(), gradient, rtol=1e-4, atol=1e-2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("arch", ["mobilenet", "resnet", "vgg", "wideresnet"])
def test_weights_start_with_the_variance_of_he(arch):
    torch.manual_seed(0)
    for name, module in prunable(build_model(arch, None, 10)).items():
        if isinstance(module, nn.Conv2d):
            fan = math.prod(module.kernel_size) * module.out_channels / module.groups  # out
        else:
            fan = module.in_features
            assert not module.bias.any()
        assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.15), name


def test_transformer_weights_start_small_and_its_patches_keep_the_variance():
    torch.manual_seed(0)
    model = build_model("vit", 1, 10)
    for name, module in prunable(model).items():
        deviation = 1 / math.sqrt(3 * 4 * 4) if name == "stem" else 0.02
        assert module.weight.std().item() == pytest.approx(deviation, rel=0.1), name
        assert not module.bias.any()
    assert model.stem(torch.randn(8, 3, 32, 32)).std().item() == pytest.approx(1, rel=0.1)


def test_transformer_tells_patches_apart_by_where_they_are():
    for height, width in [(2, 2), (8, 8), (3, 5)]:
        table = positions(height, width, 64)
        assert table.shape == (height * width, 64)
        assert torch.cdist(table, table).add(torch.eye(height * width)).min() > 0.1
        row, column = table.view(height, width, 2, 32).unbind(2)
        assert (row == row[:, :1]).all()
        assert (column == column[:1]).all()
    torch.manual_seed(0)
    model = build_model("vit", 2, 10, 1 / 3)
    image = torch.randn(1, 3, 8, 8)
    assert not torch.allclose(model(image), model(image.flip(2).roll(1, 3)))


def test_transformer_sees_every_pixel_where_patches_do_not_fit():
    image = torch.randn(1, 3, 9, 11, requires_grad=True)
    build_model("vit", 2, 10, 1 / 3)(image)[0, 0].backward()
    assert (image.grad != 0).all()


def test_transformer_has_second_derivatives_under_the_plain_kernel():
    model = build_model("vit", 1, 10, 1 / 3)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        loss = model(torch.randn(2, 3, 8, 8)).logsumexp(1).sum()
        (gradient,) = torch.autograd.grad(loss, [model.stem.weight], create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), [model.stem.weight])
    assert second.isfinite().all()
    assert second.any()


@small
def test_the_seed_decides_the_weights(arch, depth, width):
    def weights(seed):
        torch.manual_seed(seed)
        return build_model(arch, depth, 10, width).state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in ("classifier.weight", next(iter(first))))


@pytest.mark.parametrize(
    ("arch", "depth", "message"),
    [
        *[("resnet", depth, r"6n\+2 .* or 18, 34, 50, not") for depth in (-4, 0, 2, 21, 101)],
        *[("wideresnet", depth, r"6n\+4 .*, not") for depth in (-2, 4, 20)],
        ("vgg", 13, "16 or 19, not 13"),
        ("mobilenet", 20, "28, not 20"),
        ("vit", 0, "at least 1 block, not 0"),
    ],
)
def test_impossible_depths_are_refused(arch, depth, message):
    with pytest.raises(ValueError, match=message):
        build_model(arch, depth, 10)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("width", [0, -1, 0.001, math.inf, math.nan])
def test_widths_without_a_channel_are_refused(arch, width):
    with pytest.raises(ValueError, match="width"):
        build_model(arch, None, 10, width)


def test_transformers_are_as_wide_as_their_heads():
    assert outline("vit", 1, 10, 0.33).classifier.in_features == 64
    assert outline("vit", 1, 10, 2).classifier.in_features == 384
    with pytest.raises(ValueError, match="multiple of 1/3, which is one head: .*, not 1.5"):
        build_model("vit", 1, 10, 1.5)


def test_unknown_architectures_are_refused_with_the_list_of_known_ones():
    with pytest.raises(ValueError, match="choose one of mobilenet, resnet, vgg, vit, wideresnet$"):
        build_model("alexnet", 20, 10)


@pytest.mark.parametrize(("arch", "depth", "width"), [network for network in SMALL if network[:2] != ("resnet", 18)])
def test_every_architecture_compiles_as_one_graph(arch, depth, width):
    """Where tracing breaks off, nothing is fused across."""
    torch._dynamo.reset()
    model = build_model(arch, depth, 7, width)
    inputs = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(inputs)
    torch.testing.assert_close(compiled, model(inputs))
