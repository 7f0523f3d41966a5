"""The 15 corruptions of Hendrycks and Dietterich (2019) at five severities, for images in memory.

Small images are corrupted here, in batches, with the strengths of CIFAR-10-C. Larger ones are corrupted by the package
imagecorruptions, one by one, with the strengths of ImageNet-C, which leave nothing to be seen of a small image. The
photographs of frost come from that package in both cases.

What is random follows from the name of the corruption, its severity and the number of the image: an image is corrupted in
the same way whatever is corrupted with it, and in whichever process.
"""

import contextlib
import importlib.util
import io
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import UsageError

Array = np.ndarray
Generators = Sequence[np.random.Generator]
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 8  # pixels a side
SMALL = 64  # pixels a side, up to which images get the strengths of CIFAR-10-C
GREY = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue


def corrupt(name: str, severity: int, pixels: Tensor, numbers: Sequence[int], seed: int = 0) -> Tensor:
    """Return corrupted images.

    Args:
        name: of the corruption, a key of CORRUPTIONS.
        severity: 1 to 5.
        pixels: uint8 [N, H, W, C], of one or three channels.
        numbers: of the images in their data set.
        seed: of what is random, with name, severity and number.

    Raises:
        UsageError: the package imagecorruptions is needed and not installed, or images have another number of channels.
    """
    images = pixels.numpy()
    refuse_uncorruptible((name,), images.shape[1:])
    kind = list(CORRUPTIONS).index(name)
    seeds = [[seed, 5, kind, severity, number] for number in numbers]
    if max(images.shape[1:3]) > SMALL:
        return torch.from_numpy(
            np.stack([_by_package(name, severity, *pair) for pair in zip(images, seeds, strict=True)])
        )
    function, strengths = CORRUPTIONS[name]
    corrupted = function(images / 255, strengths[severity - 1], [np.random.default_rng(words) for words in seeds])
    return torch.from_numpy(
        (corrupted.clip(0, 1) * 255).astype(np.uint8)
    )  # cut off, not rounded, as the official files


def refuse_uncorruptible(names: Sequence[str], shape: Sequence[int]) -> None:
    """Check that images can be corrupted.

    Args:
        names: of the corruptions.
        shape: height, width and channels.

    Raises:
        UsageError: they cannot.
    """
    height, width, channels = shape
    if min(height, width) < SMALLEST:
        raise UsageError(
            f"corruptions are for images of {SMALLEST} pixels a side and more: these have {min(height, width)}"
        )
    if channels not in (1, 3):
        raise UsageError(f"corruptions are for images of one or three channels: these have {channels}")
    if (max(height, width) > SMALL or "frost" in names) and importlib.util.find_spec("imagecorruptions") is None:
        what = (
            f"images of more than {SMALL} pixels a side need"
            if max(height, width) > SMALL
            else "frost needs photographs of"
        )
        raise UsageError(
            f"{what} the package imagecorruptions, which is not installed: pip install -r requirements-analysis.txt"
        )


def _by_package(name: str, severity: int, image: Array, words: list[int]) -> Array:
    """Corrupt one image by the package, with its random numbers seeded; a grey image stays grey."""
    try:
        import imagecorruptions  # here: two seconds, and not always installed
    except ImportError as error:  # opencv-python needs libGL, which a machine without a display may lack
        raise UsageError(
            f"the package imagecorruptions cannot be loaded ({error}): pip install opencv-python-headless, or libgl1 of the system"
        ) from error

    draw = int(np.random.default_rng(words).integers(2**31))
    options: dict[str, Any] = {"seed": draw} if name in ("impulse_noise", "glass_blur") else {}
    np.random.seed(draw)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of widths that it mends itself
        corrupted = imagecorruptions.corrupt(image, severity, name, **options)
    return corrupted if image.shape[2] == 3 else np.rint(_grey(corrupted)).astype(np.uint8)


# Below, images are float64 [N, H, W, C] from 0 to 1, and `c` is the strength, as in the released code.


def _drawn(draw: Callable[[np.random.Generator], Any], generators: Generators) -> Array:
    """Stack what each image's generator draws."""
    return np.stack([draw(generator) for generator in generators])


def gaussian_noise(x: Array, c: float, generators: Generators) -> Array:
    """Add normal noise of deviation c."""
    return x + c * _drawn(lambda g: g.standard_normal(x.shape[1:]), generators)


def shot_noise(x: Array, c: float, generators: Generators) -> Array:
    """Replace values by Poisson counts of a light of c photons."""
    return np.stack([g.poisson(image * c) for g, image in zip(generators, x, strict=True)]) / c


def impulse_noise(x: Array, c: float, generators: Generators) -> Array:
    """Make a share c of all values 0 or 1."""
    chance = _drawn(lambda g: g.random(x.shape[1:]), generators)
    return np.where(chance < c / 2, 0.0, np.where(chance < c, 1.0, x))


def defocus_blur(x: Array, c: tuple[float, float], generators: Generators) -> Array:
    """Blur by a disk of radius c[0], itself blurred with deviation c[1]."""
    from scipy.ndimage import correlate

    radius, deviation = c
    side = np.arange(-8, 9) if radius <= 8 else np.arange(-radius, radius + 1)
    disk = (side[:, None] ** 2 + side**2 <= radius**2).astype(float)
    edge = np.exp(-(np.arange(-1, 2) ** 2) / (2 * deviation**2))
    kernel = correlate(disk / disk.sum(), np.outer(edge, edge) / edge.sum() ** 2, mode="constant")
    used = np.flatnonzero(kernel.sum(0) > 1e-12)
    kernel = kernel[used[0] : used[-1] + 1, used[0] : used[-1] + 1]
    return correlate(x, kernel[None, :, :, None], mode="mirror")


def glass_blur(x: Array, c: tuple[float, int], generators: Generators) -> Array:
    """Blur with deviation c[0], let each pixel take the colour of one up or left of it c[1] times, and blur again.

    The released code means to swap two pixels, but copies one over the other, because numpy's rows are views.
    """
    deviation, passes = c
    _, height, width, _ = x.shape
    x = _cut_off(_gaussian(x, deviation))
    for _ in range(passes):
        up, left = _drawn(lambda g: g.integers(0, 2, (2, height, width)), generators).swapaxes(0, 1)
        for shift in (up, left):
            shift[:, :2], shift[:, :, :2] = 0, 0  # its loops leave out the first two rows and columns
        x = _take(x, np.arange(height)[:, None] - up, np.arange(width) - left)
    return _gaussian(x, deviation)


def motion_blur(x: Array, c: tuple[int, float], generators: Generators) -> Array:
    """Blur along a line at an angle of -45 to 45 degrees, as ImageMagick does; see _blur_along."""
    return _blur_along(x, c, _drawn(lambda g: g.uniform(-45, 45), generators))


def zoom_blur(x: Array, c: float, generators: Generators) -> Array:
    """Average the image with what zooms into it by 1, 1.01 and so on up to c show."""
    count, height, width, channels = x.shape
    columns = x.transpose(1, 2, 0, 3).reshape(height * width, -1)
    blurred = (_mean_of_zooms(height, width, c) @ columns).reshape(height, width, count, channels)
    return blurred.transpose(2, 0, 1, 3)


def snow(x: Array, c: tuple[float, float, float, float, int, float, float], generators: Generators) -> Array:
    """Whiten the image a little, and add flakes that fall at an angle, once more turned by half a turn."""
    mean, deviation, zoom, threshold, radius, sigma, kept = c
    _, height, width, _ = x.shape
    flakes = mean + deviation * _drawn(lambda g: g.standard_normal((height, width)), generators)
    flakes = _zoom(height, zoom) @ flakes @ _zoom(width, zoom).T
    flakes[flakes < threshold] = 0
    flakes = _cut_off(flakes.clip(0, 1))[..., None]
    flakes = _blur_along(flakes, (radius, sigma), _drawn(lambda g: g.uniform(-135, -45), generators))
    whiter = kept * x + (1 - kept) * np.maximum(x, _grey(x) * 1.5 + 0.5)
    return whiter + flakes + flakes[:, ::-1, ::-1]


def frost(x: Array, c: tuple[float, float], generators: Generators) -> Array:
    """Lay a part of a photograph of frost over the image."""
    _, height, width, channels = x.shape
    photographs = _frost_photographs(5 if max(height, width) <= 48 else 3)

    def part(generator: np.random.Generator) -> Array:
        photograph = photographs[generator.integers(len(photographs))]
        top = generator.integers(photograph.shape[0] - height)
        left = generator.integers(photograph.shape[1] - width)
        return photograph[top : top + height, left : left + width]

    ice = _drawn(part, generators)
    return c[0] * x + c[1] * (ice if channels == 3 else _grey(ice))


def fog(x: Array, c: tuple[float, float], generators: Generators) -> Array:
    """Add fog of c[0] times the brightest value, whose roughness falls by c[1] from one scale to the next."""
    _, height, width, _ = x.shape
    side = 1 << (max(height, width) - 1).bit_length()
    brightest = x.max((1, 2, 3), keepdims=True)
    cloud = _plasma(side, c[1], generators)[:, :height, :width, None]
    return (x + c[0] * cloud) * brightest / (brightest + c[0])


def brightness(x: Array, c: float, generators: Generators) -> Array:
    """Raise the value in HSV, the largest of the channels, by c, and keep hue and saturation."""
    value = x.max(3, keepdims=True)
    brighter = (value + c).clip(0, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def contrast(x: Array, c: float, generators: Generators) -> Array:
    """Shrink each channel's distance to its mean to c times what it was."""
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * c + mean


def elastic_transform(x: Array, c: tuple[float, float, float], generators: Generators) -> Array:
    """Move three points at random, and the image with them, then each pixel by a smooth random field.

    Args:
        x: the images.
        c: length of the field's vectors, its smoothness, and how far the points move, as shares of the image's side.
        generators: of each image.
    """
    from scipy.ndimage import gaussian_filter

    _, height, width, _ = x.shape
    side = min(height, width)
    length, smoothness, distance = (side * share for share in c)
    center, third = np.array([height // 2, width // 2]), side // 3
    corners = center + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + _drawn(lambda g: g.uniform(-distance, distance, (3, 2)), generators)
    to_source = np.linalg.solve(np.concatenate([moved, np.ones_like(moved[..., :1])], 2), corners)  # [N, 3, 2]
    row, column = np.mgrid[:height, :width].astype(float)
    places = np.stack([column, row, np.ones_like(row)], 2) @ to_source[:, None]
    x = _interpolate(x, places[..., 1], places[..., 0], "mirror")
    if not length:
        return x
    field = _drawn(lambda g: g.uniform(-1, 1, (2, height, width)), generators)
    field = length * gaussian_filter(field, (0, 0, smoothness, smoothness), mode="reflect", truncate=3)
    return _interpolate(x, row + field[:, 1], column + field[:, 0], "reflect")


def pixelate(x: Array, c: float, generators: Generators) -> Array:
    """Shrink the image to c times its size and enlarge it again."""

    def pixelated(image: Image.Image) -> Image.Image:
        small = (max(1, int(image.width * c)), max(1, int(image.height * c)))
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)

    return _by_pillow(x, pixelated)


def jpeg_compression(x: Array, c: int, generators: Generators) -> Array:
    """Compress the image as JPEG of quality c."""

    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=c)
        return Image.open(file)

    return _by_pillow(x, compressed)


# The strengths are those of the released code that made CIFAR-10-C; lengths are in pixels except where a function says
# otherwise.
CORRUPTIONS: dict[str, tuple[Callable[[Array, Any, Generators], Array], tuple]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
}  # fmt: skip


def _cut_off(x: Array) -> Array:
    """Cut values off to the levels of bytes."""
    return np.floor(x * 255) / 255


def _grey(x: Array) -> Array:
    """Return the luminance, with one channel."""
    return x if x.shape[-1] == 1 else (x @ GREY)[..., None]


def _gaussian(x: Array, deviation: float) -> Array:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (0, deviation, deviation, 0), mode="nearest")


def _take(x: Array, rows: Array, columns: Array) -> Array:
    """Return the pixels at places [N, H, W] of images."""
    count, height, width, channels = x.shape
    places = (np.arange(count)[:, None, None] * height + rows) * width + columns
    return x.reshape(-1, channels).take(places, axis=0)  # faster than to index by three arrays


def _blur_along(x: Array, c: tuple[int, float], angles: Array) -> Array:
    """Average pixels along half a line, by a Gaussian that begins at the pixel itself, and round to bytes.

    Args:
        x: the images.
        c: radius and deviation of the Gaussian. As many whole pixels are averaged as are in twice the radius, and one.
        angles: of each image, in degrees.
    """
    radius, deviation = c
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    weights /= weights.sum()
    across = np.ceil(steps * np.cos(np.deg2rad(angles))[:, None] - 0.5).astype(int)
    down = np.ceil(steps * np.sin(np.deg2rad(angles))[:, None] - 0.5).astype(int)
    _, height, width, _ = x.shape
    blurred = np.zeros_like(x)
    for step, weight in enumerate(weights):
        rows = (np.arange(height) + down[:, step, None]).clip(0, height - 1)
        columns = (np.arange(width) + across[:, step, None]).clip(0, width - 1)
        blurred += weight * _take(x, rows[:, :, None], columns[:, None, :])
    return np.rint(blurred * 255) / 255


def _interpolate(x: Array, rows: Array, columns: Array, edge: str) -> Array:
    """Return values at places [N, H, W] between pixels, bilinearly.

    Args:
        x: the images.
        rows, columns: the places.
        edge: how images go on beyond their edges: `mirror` about the last pixel, `reflect` about its outer edge.
    """

    def inside(index: Array, size: int) -> Array:
        if edge == "reflect":
            index = index % (2 * size)
            return np.minimum(index, 2 * size - 1 - index)
        index = index % max(1, 2 * size - 2)
        return np.minimum(index, 2 * size - 2 - index)

    _, height, width, _ = x.shape
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    tops, bottoms = inside(top, height), inside(top + 1, height)
    lefts, rights = inside(left, width), inside(left + 1, width)
    upper = (1 - right) * _take(x, tops, lefts) + right * _take(x, tops, rights)
    lower = (1 - right) * _take(x, bottoms, lefts) + right * _take(x, bottoms, rights)
    return (1 - down) * upper + down * lower


@cache
def _zoom(side: int, factor: float) -> Array:
    """Return the matrix [side, side] that enlarges the middle of a row of pixels, as scipy.ndimage.zoom does."""
    cropped = math.ceil(side / factor)
    enlarged = round(cropped * factor)
    place = (np.arange(side) + (enlarged - side) // 2) * (cropped - 1) / max(1, enlarged - 1)
    left = np.minimum(place.astype(int), max(0, cropped - 2))
    matrix, first = np.zeros((side, side + 1)), (side - cropped) // 2
    matrix[np.arange(side), first + left] += 1 - (place - left)
    matrix[np.arange(side), first + left + 1] += place - left
    return matrix[:, :side]


@cache
def _mean_of_zooms(height: int, width: int, end: float) -> Any:
    """Return the sparse matrix [H W, H W] that averages an image with its zooms by 1, 1.01 and so on up to `end`."""
    from scipy.sparse import csr_matrix, identity, kron

    factors = np.arange(1, end, 0.01)
    total = identity(height * width, format="csr")
    for factor in factors:
        total = total + kron(csr_matrix(_zoom(height, factor)), csr_matrix(_zoom(width, factor)), format="csr")
    return total / (len(factors) + 1)


def _plasma(side: int, decay: float, generators: Generators) -> Array:
    """Return clouds [N, side, side] from 0 to 1 by the diamond-square algorithm, as tiles that can be repeated.

    Args:
        side: a power of two.
        decay: noise of a scale over that of the next smaller one.
        generators: of each image.
    """
    noise = _drawn(lambda g: g.uniform(-1, 1, side * side), generators)
    heights, used, spread, step = np.zeros((len(noise), side, side)), 0, 100.0, side
    while step > 1:
        half, count = step // 2, (side // step) ** 2
        drawn = noise[:, used : used + 3 * count].reshape(len(noise), 3, side // step, side // step)
        corners = heights[:, ::step, ::step]
        above, beside = corners + np.roll(corners, -1, 1), corners + np.roll(corners, -1, 2)
        centers = (above + np.roll(above, -1, 2)) / 4 + spread**2 * drawn[:, 0]
        heights[:, half::step, half::step] = centers
        heights[:, ::step, half::step] = (centers + np.roll(centers, 1, 1) + beside) / 4 + spread**2 * drawn[:, 1]
        heights[:, half::step, ::step] = (centers + np.roll(centers, 1, 2) + above) / 4 + spread**2 * drawn[:, 2]
        used, step, spread = used + 3 * count, half, spread / decay
    heights -= heights.min((1, 2), keepdims=True)
    return heights / heights.max((1, 2), keepdims=True).clip(1e-12)


@cache
def _frost_photographs(shrink: int) -> list[Array]:
    """Return the five photographs that the released code uses, shrunk by an odd factor."""
    spec = importlib.util.find_spec("imagecorruptions")
    assert spec is not None
    assert spec.submodule_search_locations
    directory = os.path.join(spec.submodule_search_locations[0], "frost")
    # OpenCV's resize takes the middle one of so many pixels, too.
    files = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
    found = []
    for file in files:
        with Image.open(os.path.join(directory, file)) as photograph:
            found.append(np.asarray(photograph.convert("RGB"))[shrink // 2 :: shrink, shrink // 2 :: shrink] / 255)
    return found


def _by_pillow(x: Array, change: Callable[[Image.Image], Image.Image]) -> Array:
    """Change images by Pillow, which takes and gives bytes."""
    levels = np.rint(x * 255).astype(np.uint8)
    changed = [change(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)) for image in levels]
    return np.stack([np.asarray(image).reshape(x.shape[1:]) for image in changed]) / 255
