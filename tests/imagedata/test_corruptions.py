"""The corruptions against formulas and, where the package imagecorruptions is installed, against its functions."""

import importlib.util

import numpy as np
import pytest
import torch

from imagedata.corruptions import CORRUPTIONS, SEVERITIES, corrupt, refuse_uncorruptible
from utils.errors import UsageError

WITHOUT_PHOTOGRAPHS = [name for name in CORRUPTIONS if name != "frost"]
INSTALLED = importlib.util.find_spec("imagecorruptions") is not None
NEEDS_PACKAGE = pytest.mark.skipif(not INSTALLED, reason="imagecorruptions is not installed")


def photographs(count: int, side: int = 32, channels: int = 3) -> torch.Tensor:
    """Return smooth random images, which have what blurs and compression act on."""
    noise = torch.rand(count, channels, side // 4, side // 4, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)
    return (smooth * 255).byte().permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("name", [*WITHOUT_PHOTOGRAPHS, pytest.param("frost", marks=NEEDS_PACKAGE)])
@pytest.mark.parametrize(("side", "channels"), [(32, 3), (8, 1), (64, 3)])
def test_an_image_is_corrupted_the_same_way_in_any_company(name, side, channels):
    images = photographs(5, side, channels)
    whole = corrupt(name, 3, images, range(5))
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
    assert not torch.equal(whole, images)
    assert torch.equal(corrupt(name, 3, images[[4, 1]], [4, 1]), whole[[4, 1]])


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "elastic_transform", "fog"])
def test_random_numbers_differ_between_images_severities_and_seeds(name):
    image = photographs(1).expand(2, -1, -1, -1)
    first, second = corrupt(name, 1, image, [0, 1])
    assert not torch.equal(first, second)
    assert not torch.equal(corrupt(name, 1, image[:1], [0], seed=1)[0], first)


@pytest.mark.parametrize("name", WITHOUT_PHOTOGRAPHS)
def test_the_last_severity_changes_images_more_than_the_first(name):
    images = photographs(40)
    first, last = (
        (corrupt(name, severity, images, range(40)).double() - images).square().mean()
        for severity in (SEVERITIES[0], SEVERITIES[-1])
    )
    if name == "elastic_transform":  # the first moves three points farther, without a field
        assert min(first, last) > 100
    else:
        assert last > 1.5 * first > 0


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_contrast_and_brightness_are_those_of_their_formulas(severity):
    images = torch.full((200, 16, 16, 3), 128, dtype=torch.uint8)
    images[:, ::2, :, 0] = 64
    strength = {name: strengths[severity - 1] for name, (_, strengths) in CORRUPTIONS.items()}
    x = images.double() / 255

    def moved(name):
        return corrupt(name, severity, images, range(200)).double() / 255 - x

    deviation = strength["gaussian_noise"]
    assert moved("gaussian_noise").std() == pytest.approx(deviation, rel=0.02)
    photons = strength["shot_noise"]
    assert moved("shot_noise")[..., 1].std() == pytest.approx((128 / 255 / photons) ** 0.5, rel=0.02)
    shares = [(corrupt("impulse_noise", severity, images, range(200)) == level).double().mean() for level in (0, 255)]
    assert shares == pytest.approx([strength["impulse_noise"] / 2] * 2, rel=0.1)
    mean = x.mean((1, 2), keepdim=True)
    assert (moved("contrast") - (mean - x) * (1 - strength["contrast"])).abs().max() < 1.01 / 255
    # The value of HSV is the largest channel; hue and saturation stay where the channels keep their ratios.
    value = x.amax(3, keepdim=True)
    assert (moved("brightness") - x * strength["brightness"] / value).abs().max() < 1.01 / 255


@pytest.mark.parametrize("name", ["motion_blur", "zoom_blur", "defocus_blur", "elastic_transform"])
def test_a_blurred_or_bent_image_of_one_colour_stays_as_it_is(name):
    images = torch.full((3, 32, 24, 3), 200, dtype=torch.uint8)
    for severity in SEVERITIES:
        assert (corrupt(name, severity, images, range(3)).int() - 200).abs().max() <= 1


@NEEDS_PACKAGE
@pytest.mark.parametrize(
    ("name", "strength", "severity"),
    [
        ("gaussian_noise", 0.12, 2), ("shot_noise", 25, 2), ("defocus_blur", (4, 0.5), 2), ("motion_blur", (15, 5), 2),
        ("zoom_blur", 1.16, 2), ("fog", (2.0, 2), 2), ("brightness", 0.2, 2), ("contrast", 0.3, 2), ("jpeg_compression", 18, 2),
    ],
)  # fmt: skip
def test_a_corruption_is_the_packages_at_its_strength_and_random_numbers(name, strength, severity):
    """The package has other strengths. Two levels: it computes some in float32, and rounds motion blur down."""
    import imagecorruptions

    function, _ = CORRUPTIONS[name]
    for number, image in enumerate(photographs(4).numpy()):
        np.random.seed(number)
        theirs = imagecorruptions.corrupt(image, severity, name)
        ours = function(image[None] / 255, strength, [np.random.RandomState(number)])[0]
        assert np.abs((ours.clip(0, 1) * 255).astype(np.uint8).astype(int) - theirs).max() <= 2


@NEEDS_PACKAGE
@pytest.mark.parametrize("name", ["frost", "glass_blur", "impulse_noise", "snow"])
def test_large_images_are_the_packages_and_the_same_every_time(name):
    images = photographs(2, side=72, channels=1)
    first = corrupt(name, 2, images, [0, 1])
    assert first.shape == images.shape
    assert torch.equal(corrupt(name, 2, images[1:], [1]), first[1:])
    assert not torch.equal(corrupt(name, 2, images[:1], [1]), first[:1])


def test_what_cannot_be_corrupted_is_refused():
    with pytest.raises(UsageError, match="8 pixels a side and more: these have 7"):
        refuse_uncorruptible(["contrast"], (7, 32, 3))
    with pytest.raises(UsageError, match="one or three channels: these have 4"):
        refuse_uncorruptible(["contrast"], (32, 32, 4))


@pytest.mark.skipif(INSTALLED, reason="imagecorruptions is installed")
@pytest.mark.parametrize(("names", "side"), [(["frost"], 32), (["contrast"], 65)])
def test_a_missing_package_is_named_where_it_is_needed(names, side):
    with pytest.raises(UsageError, match=r"imagecorruptions.*pip install -r requirements-analysis"):
        refuse_uncorruptible(names, (side, side, 3))
    refuse_uncorruptible(["contrast"], (32, 32, 3))
