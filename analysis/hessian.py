"""Sharpness of a trained network's minimum: eigenvalues and trace of the Hessian, and SAM's own measure."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from analysis.landscape import FixedImagesLoss, fixed_images, living_weights, resolve_compilation
from imagedata.augment import Normalize
from imagedata.images import Dataset
from prune.flops import count_flops
from prune.masks import Masks


@dataclass(frozen=True)
class Settings:
    """What `measure` measures, and how precisely.

    Attributes:
        images: number of images of each split.
        splits: train, test.
        spaces: `living` for the weights that are not pruned (with biases and normalisation), `all` for all weights.
        top: number of largest eigenvalues.
        tolerance: relative residual at which an eigenvalue is accepted.
        trace_samples: number of random vectors, at least 2; 0 for no trace.
        rhos: radii of SAM's neighbourhood.
        adaptive_rhos: radii of adaptive SAM's neighbourhood.
        steps: number of ascent steps in each neighbourhood.
        batch_size: images per forward pass.
    """

    images: int = 2000
    splits: tuple[str, ...] = ("train", "test")
    spaces: tuple[str, ...] = ("living", "all")
    top: int = 5
    tolerance: float = 1e-3
    trace_samples: int = 10
    rhos: tuple[float, ...] = (0.05, 0.1)
    adaptive_rhos: tuple[float, ...] = (0.5, 1.0)
    steps: int = 5
    batch_size: int = 250


SPLITS, SPACES = Settings.splits, Settings.spaces


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue of the Hessian.

    Attributes:
        value: lambda.
        residual: ||Hv - lambda v|| / |lambda| of its unit eigenvector v.
    """

    value: float
    residual: float


def top_eigenvalues(
    loss: FixedImagesLoss, count: int, selected: Tensor | None = None, tolerance: float = 1e-3, seed: int = 0
) -> list[Eigenvalue]:
    """Find the algebraically largest eigenvalues of the Hessian by ARPACK's implicitly restarted Lanczos method.

    Args:
        loss: whose Hessian.
        count: how many eigenvalues.
        selected: bool [P]; keep only the rows and columns of these weights. All by default.
        tolerance: relative residual at which an eigenvalue is accepted.
        seed: of the start vector.

    Returns:
        Eigenvalues in descending order, each with its residual computed anew. Fewer than `count` where the others did not
        converge; none for a Hessian that is zero or not finite.

    Raises:
        ValueError: there are fewer than count + 1 weights.
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh  # here, because it takes 0.3 s

    product, size = _product_over(loss, selected)
    if not 0 < count < size:
        raise ValueError(f"a Hessian of {size} weights has no {count} eigenvalues to be found by Lanczos")
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(size)
    krylov = min(size, max(2 * count + 1, 12))  # vectors: enough for a few eigenvalues, not too many products for one
    try:
        values, vectors = eigsh(operator, count, which="LA", v0=start, ncv=krylov, tol=tolerance)
    except ArpackError as error:  # nothing converged, or the Hessian is zero or not finite
        values = getattr(error, "eigenvalues", np.zeros(0))
        vectors = getattr(error, "eigenvectors", np.zeros((size, 0)))
    found = []
    for value, vector in sorted(zip(values.tolist(), vectors.T, strict=True), key=lambda pair: -pair[0]):
        residual = float(np.linalg.norm(product(vector) - value * vector))
        found.append(Eigenvalue(value, residual / abs(value) if value else residual))
    return found


def trace(loss: FixedImagesLoss, samples: int, selected: Tensor | None = None, seed: int = 0) -> tuple[float, float]:
    """Estimate the Hessian's trace with random signs (Hutchinson's method); return it with its standard error.

    Args:
        loss: whose Hessian.
        samples: number of random vectors, at least 2.
        selected: bool [P]; keep only the rows and columns of these weights. All by default.
        seed: of the random vectors.
    """
    product, size = _product_over(loss, selected)
    generator = np.random.default_rng(seed)
    signs = (generator.choice([-1.0, 1.0], size) for _ in range(samples))
    values = [float(vector @ product(vector)) for vector in signs]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(samples))


def sam_sharpness(
    loss: FixedImagesLoss, rho: float, steps: int, selected: Tensor | None = None, adaptive: bool = False
) -> tuple[float, float]:
    """Measure how much the loss rises within radius rho: max L(w + e) - L(w) over ||e / T|| <= rho.

    T is |w| if adaptive, else 1. The maximum is approached by projected ascent in u = e / T from u = 0:
    u <- P(u + rho T g / ||T g||), where P projects onto the ball. Its first step is SAM's own perturbation (Foret et al.
    2021, equation 2; adaptive: Kwon et al. 2021, equation 8).

    Args:
        loss: the function that rises.
        rho: radius of the neighbourhood.
        steps: number of ascent steps.
        selected: bool [P]; only these weights move. All by default.
        adaptive: take the neighbourhood of ASAM.

    Returns:
        The rise after the first step, and the largest rise of all steps. Both are lower bounds of the maximum.
    """
    scale = loss.weights.abs() if adaptive else torch.ones_like(loss.weights)
    if selected is not None:
        scale = scale * selected
    base, gradient = loss.gradient()
    moved, rises = torch.zeros_like(scale), []
    for step in range(1, steps + 1):
        direction = scale * gradient
        moved = moved + rho * direction / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)
        moved = moved * (rho / moved.norm().clamp_min(rho))
        weights = loss.weights + scale * moved
        if step < steps:
            value, gradient = loss.gradient(weights)
        else:
            value, _ = loss.loss(weights)
        rises.append(value - base)
    return rises[0], max(rises)


def measure(
    model: nn.Module,
    masks: Masks,
    dataset: Dataset,
    normalize: Normalize,
    device: torch.device,
    settings: Settings = Settings(),
    compilation: str = "auto",
    watch: Callable[[str], object] = lambda text: None,
) -> dict:
    """Measure the sharpness of one network, on the same images for every network of a data set.

    Computes in the dtype of the model, without autocast; batch norm is in evaluation mode, and there is no augmentation
    and no label smoothing.

    Args:
        model: the network.
        masks: its masks.
        dataset: the images to draw from.
        normalize: turns pixels into inputs.
        device: where to compute.
        settings: what to measure.
        compilation: auto, on or off, for Hessian products.
        watch: called with the name of what is measured next.

    Returns:
        {"settings": ..., split: {"images", "loss", "top1", space: {"weights", "eigenvalues": [{"value", "residual"}],
        "trace", "trace_standard_error", "sam": [{"rho", "adaptive", "steps", "one_step", "lower_bound"}]}}}, with None for
        a figure that is not finite.
    """
    per_space = 4 * settings.top + settings.trace_samples  # products with the Hessian, at least
    products = len(settings.splits) * len(settings.spaces) * per_space
    flops = 2.0 * count_flops(model, dataset.image_shape).dense_training
    execution = resolve_compilation(compilation, device, products * settings.images * flops)
    results: dict = {"settings": asdict(settings)}
    for split in settings.splits:
        images = fixed_images(getattr(dataset, split), settings.images)
        inputs = normalize(images.load().to(device)).contiguous(memory_format=torch.channels_last)
        loss = FixedImagesLoss(model, inputs, images.labels.to(device), settings.batch_size, execution)
        mean_loss, top1 = loss.loss()
        results[split] = {"images": len(images), "loss": mean_loss, "top1": top1}
        for space in settings.spaces:
            selected = living_weights(model, masks) if space == "living" else None
            results[split][space] = _figures(loss, selected, settings, watch, f"{split} images, {space} weights")
    return results


def _figures(
    loss: FixedImagesLoss, selected: Tensor | None, settings: Settings, watch: Callable[[str], object], place: str
) -> dict:
    """Measure one split in one space of weights; `place` names both."""
    figures: dict = {"weights": len(loss.weights) if selected is None else int(selected.sum())}
    if settings.top:
        watch(f"{place}: eigenvalues")
        found = top_eigenvalues(loss, settings.top, selected, settings.tolerance)
        figures["eigenvalues"] = [asdict(eigenvalue) for eigenvalue in found]
    if settings.trace_samples:
        watch(f"{place}: trace")
        estimate, error = trace(loss, settings.trace_samples, selected)
        figures |= {"trace": _finite(estimate), "trace_standard_error": _finite(error)}
    figures["sam"] = []
    for adaptive, radii in ((False, settings.rhos), (True, settings.adaptive_rhos)):
        for rho in radii:
            watch(f"{place}: {'adaptive ' if adaptive else ''}rho {rho:g}")
            one_step, bound = sam_sharpness(loss, rho, settings.steps, selected, adaptive)
            rises = {"one_step": _finite(one_step), "lower_bound": _finite(bound)}
            figures["sam"].append({"rho": rho, "adaptive": adaptive, "steps": settings.steps} | rises)
    return figures


def scalars(results: dict) -> dict[str, float]:
    """Name the figures of `measure` for TensorBoard; leave out those that are not finite."""
    named: dict[str, float | None] = {}
    for split in results["settings"]["splits"]:
        for space in results["settings"]["spaces"]:
            figures, place = results[split][space], f"{split}/{space}"
            for rank, eigenvalue in enumerate(figures.get("eigenvalues", []), 1):
                named[f"{place}/eigenvalue_{rank}"] = eigenvalue["value"]
            if "trace" in figures:
                named[f"{place}/trace"] = figures["trace"]
            for sam in figures["sam"]:
                name = f"{place}/sam_{'adaptive_' if sam['adaptive'] else ''}rho{sam['rho']:g}"
                named |= {f"{name}_one_step": sam["one_step"], f"{name}_lower_bound": sam["lower_bound"]}
    return {name: value for name, value in named.items() if value is not None}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _product_over(loss: FixedImagesLoss, selected: Tensor | None) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Return the product with the Hessian over selected weights, for scipy's float64 vectors, and their length."""
    weights = loss.weights
    chosen = torch.ones_like(weights, dtype=torch.bool) if selected is None else selected

    def product(vector: np.ndarray) -> np.ndarray:
        full = torch.zeros_like(weights)
        full[chosen] = torch.from_numpy(vector.ravel()).to(full)
        return loss.hessian_product(full)[chosen].double().cpu().numpy()

    return product, int(chosen.sum())
