"""How sharp the minimum is that a trained network lies in: eigenvalues and trace of the Hessian, and SAM's own measure."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from analysis.landscape import FixedImagesLoss, fixed_images, living
from imagedata.images import Dataset
from imagedata.loaders import Normalize
from prune.flops import count_flops
from prune.masks import Masks
from utils.precision import Execution, resolve_execution, what_compilation_lacks


@dataclass(frozen=True)
class Settings:
    """What is measured, and how closely.

    Attributes:
        images: of each split.
        splits: train, test.
        spaces: living: over the weights that are not pruned (biases and normalisation included); all: over all.
        top: how many of the largest eigenvalues.
        tolerance: relative residual at which an eigenvalue is accepted.
        trace_samples: random vectors, at least 2; 0 for no trace.
        rhos, adaptive_rhos: radii of SAM's neighbourhood, plain and adaptive.
        steps: of the ascent in it.
        batch_size: images at once.
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

# On a CPU: seconds that compilation takes, and seconds that it saves for each FLOP of a Hessian product. One over 250 images
# took ResNet-20 2.5 s on a core, and 1.5 s compiled.
COMPILATION_TAKES, COMPILATION_SAVES = 40.0, 7.5e-12


@dataclass(frozen=True)
class Eigenvalue:
    """value: lambda; residual: ||Hv - lambda v|| / |lambda| of its unit eigenvector v."""

    value: float
    residual: float


def top_eigenvalues(
    landscape: FixedImagesLoss, count: int, free: Tensor | None = None, tolerance: float = 1e-3, seed: int = 0
) -> list[Eigenvalue]:
    """The algebraically largest eigenvalues of the Hessian, in descending order, by ARPACK's implicitly restarted Lanczos.

    Args:
        count: how many.
        free: bool [P]: over these weights only, the rows and columns of the others left out.
        tolerance: relative; each residual is computed anew and returned, so that it can be checked.

    Returns:
        Fewer than `count` where the others did not converge; none of a Hessian that is zero or not finite.

    Raises:
        ValueError: fewer than count + 1 weights.
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh  # here: it costs every start 0.3 s

    product, size = _restricted(landscape, free)
    if not 0 < count < size:
        raise ValueError(f"a Hessian of {size} weights has no {count} eigenvalues to be found by Lanczos")
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(size)
    krylov = min(size, max(2 * count + 1, 12))  # vectors: enough for a few eigenvalues, and no product too many for one
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


def trace(landscape: FixedImagesLoss, samples: int, free: Tensor | None = None, seed: int = 0) -> tuple[float, float]:
    """Hutchinson's estimate of the Hessian's trace by random signs, and its standard error.

    Args:
        samples: random vectors, at least 2.
        free: see top_eigenvalues.
    """
    product, size = _restricted(landscape, free)
    generator = np.random.default_rng(seed)
    signs = (generator.choice([-1.0, 1.0], size) for _ in range(samples))
    values = [float(vector @ product(vector)) for vector in signs]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(samples))


def sam_sharpness(
    landscape: FixedImagesLoss, rho: float, steps: int, free: Tensor | None = None, adaptive: bool = False
) -> tuple[float, float]:
    """How much the loss rises within radius rho: max L(w + e) - L(w) over ||e / T|| <= rho, T = |w| if adaptive, else 1.

    In u = e / T, projected ascent u <- P(u + rho T g / ||T g||) from u = 0, P onto the ball: the first step leads to SAM's
    own perturbation (Foret et al. 2021, equation 2; adaptive: Kwon et al. 2021, equation 8).

    Args:
        free: only these weights move.

    Returns:
        The rise after the first step, and the largest of all steps: lower bounds of the maximum, both.
    """
    scale = landscape.weights.abs() if adaptive else torch.ones_like(landscape.weights)
    if free is not None:
        scale = scale * free
    base, gradient = landscape.gradient()
    moved, rises = torch.zeros_like(scale), []
    for step in range(1, steps + 1):
        direction = scale * gradient
        moved = moved + rho * direction / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)
        moved = moved * (rho / moved.norm().clamp_min(rho))
        weights = landscape.weights + scale * moved
        if step < steps:
            loss, gradient = landscape.gradient(weights)
        else:
            loss, _ = landscape.loss(weights)
        rises.append(loss - base)
    return rises[0], max(rises)


def measure(
    model: nn.Module,
    masks: Masks,
    dataset: Dataset,
    normalize: Normalize,
    device: torch.device,
    settings: Settings = Settings(),
    compilation: str = "auto",
    watch: Callable[[str], object] = lambda what: None,
) -> dict:
    """All of it for one network, on the same images for every network of a data set.

    In the dtype of the model, without autocast; batch norm in evaluation mode; no augmentation, no label smoothing.

    Args:
        compilation: auto, on or off, of Hessian products.
        watch: called with what is measured next.

    Returns:
        {"settings": ..., split: {"loss", "top1", space: {"eigenvalues": [{"value", "residual"}], "trace",
        "trace_standard_error", "sam": [{"rho", "adaptive", "one_step", "lower_bound", "steps"}]}}}; None for a figure that
        is not finite.
    """
    execution = _execution(compilation, device, model, dataset, settings)
    results: dict = {"settings": asdict(settings)}
    for split in settings.splits:
        images = fixed_images(getattr(dataset, split), settings.images)
        inputs = normalize(images.pixels.to(device)).contiguous(memory_format=torch.channels_last)
        landscape = FixedImagesLoss(model, inputs, images.labels.to(device), settings.batch_size, execution)
        loss, top1 = landscape.loss()
        results[split] = {"images": len(images), "loss": loss, "top1": top1}
        for space in settings.spaces:
            free = living(model, masks) if space == "living" else None
            figures: dict = {"weights": int(free.sum()) if free is not None else len(landscape.weights)}
            if settings.top:
                watch(f"{split}, {space} weights: eigenvalues")
                found = top_eigenvalues(landscape, settings.top, free, settings.tolerance)
                figures["eigenvalues"] = [asdict(eigenvalue) for eigenvalue in found]
            if settings.trace_samples:
                watch(f"{split}, {space} weights: trace")
                estimate, error = trace(landscape, settings.trace_samples, free)
                figures |= {"trace": _finite(estimate), "trace_standard_error": _finite(error)}
            figures["sam"] = []
            radii = [(rho, False) for rho in settings.rhos] + [(rho, True) for rho in settings.adaptive_rhos]
            for rho, adaptive in radii:
                watch(f"{split}, {space} weights: {'adaptive ' if adaptive else ''}rho {rho:g}")
                one, bound = sam_sharpness(landscape, rho, settings.steps, free, adaptive)
                figures["sam"].append(
                    {
                        "rho": rho, "adaptive": adaptive, "steps": settings.steps,
                        "one_step": _finite(one), "lower_bound": _finite(bound),
                    }
                )  # fmt: skip
            results[split][space] = figures
    return results


def scalars(results: dict) -> dict[str, float]:
    """The figures of `measure` by name, for TensorBoard."""
    named = {}
    for split in results["settings"]["splits"]:
        for space in results["settings"]["spaces"]:
            figures, place = results[split][space], f"{split}/{space}"
            for number, eigenvalue in enumerate(figures.get("eigenvalues", []), 1):
                named[f"{place}/eigenvalue_{number}"] = eigenvalue["value"]
            if "trace" in figures:
                named[f"{place}/trace"] = figures["trace"]
            for sam in figures["sam"]:
                name = f"{place}/sam_{'adaptive_' if sam['adaptive'] else ''}rho{sam['rho']:g}"
                named |= {f"{name}_one_step": sam["one_step"], f"{name}_lower_bound": sam["lower_bound"]}
    return {name: value for name, value in named.items() if value is not None}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _execution(
    compilation: str, device: torch.device, model: nn.Module, dataset: Dataset, settings: Settings
) -> Execution:
    """fp32; compiled, where `auto` may choose, if products are many and large enough."""
    if compilation == "auto":
        a_space = 4 * settings.top + settings.trace_samples  # products, at least
        products = len(settings.splits) * len(settings.spaces) * a_space
        flops = 2 * count_flops(model, dataset.image_shape).dense_training
        saved = COMPILATION_SAVES * products * settings.images * flops
        worthwhile = device.type == "cpu" and saved > COMPILATION_TAKES  # on CUDA nobody has measured it
        compilation = "on" if worthwhile and not what_compilation_lacks(device) else "off"
    return resolve_execution("fp32", compilation, device)


def _restricted(landscape: FixedImagesLoss, free: Tensor | None) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """The product with the Hessian over free weights, for scipy: float64 vectors, whatever the network computes in."""
    weights = landscape.weights
    free = torch.ones_like(weights, dtype=torch.bool) if free is None else free

    def product(vector: np.ndarray) -> np.ndarray:
        whole = torch.zeros_like(weights)
        whole[free] = torch.from_numpy(vector.ravel()).to(whole)
        return landscape.hessian_product(whole)[free].double().cpu().numpy()

    return product, int(free.sum())
