"""Sharpness against Hessians and maxima that are known in closed form, in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from analysis.hessian import sam_sharpness, top_eigenvalues, trace
from analysis.landscape import FixedImagesLoss, living_weights
from models import build_model
from prune import Pruner
from utils.precision import Execution


def softmax_regression(features=4, classes=3, count=30):
    """A linear layer with bias, its data, and the Hessian of its loss written out: mean of (diag p - p p^T) x (x 1)(x 1)^T."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(features, classes).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (count,), generator=generator)
    z = np.concatenate([x.numpy(), np.ones((count, 1))], 1)
    weight = np.concatenate([model.weight.detach().numpy(), model.bias.detach().numpy()[:, None]], 1)
    logits = z @ weight.T
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    hessian = np.zeros((classes * (features + 1),) * 2)
    for p, row in zip(share, z, strict=True):
        hessian += np.kron(np.diag(p) - np.outer(p, p), np.outer(row, row)) / count
    # By class and feature with the bias last; parameters are the weight by class and feature, then the biases.
    grid = np.arange(hessian.shape[0]).reshape(classes, features + 1)
    order = np.concatenate([grid[:, :-1].ravel(), grid[:, -1]])
    return model, x, y, hessian[np.ix_(order, order)]


def test_products_eigenvalues_and_trace_are_those_of_the_closed_form():
    model, x, y, hessian = softmax_regression()
    loss = FixedImagesLoss(model, x, y, batch_size=7)  # an uneven last batch
    size = len(hessian)
    products = np.stack([loss.hessian_product(v).numpy() for v in torch.eye(size, dtype=torch.float64)])
    np.testing.assert_allclose(products, hessian, atol=1e-14)

    found = top_eigenvalues(loss, 3, tolerance=1e-10)
    np.testing.assert_allclose([e.value for e in found], np.linalg.eigvalsh(hessian)[::-1][:3], rtol=1e-9)
    assert max(e.residual for e in found) < 1e-8

    estimate, error = trace(FixedImagesLoss(model, x, y), 300)
    assert 0 < error < 0.1 * np.trace(hessian)
    assert abs(estimate - np.trace(hessian)) < 4 * error
    # The error of a mean of Hutchinson's samples: 2 (||H||_F^2 - sum of H_ii^2) / samples, squared.
    expected = math.sqrt(2 * ((hessian**2).sum() - (np.diag(hessian) ** 2).sum()) / 300)
    assert error == pytest.approx(expected, rel=0.15)


def test_the_largest_come_first_whatever_lies_below():
    """Of eigenvalues of both signs the largest, not those of the largest magnitude."""

    class Quadratic(nn.Module):
        """Two logits whose cross-entropy at w = 0 has the Hessian -diag(d): loss = log(1 + exp(q)), q = -w^T diag(d) w."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, dtype=torch.float64))

        def forward(self, inputs):
            q = -(self.w.square() * torch.tensor([9.0, 1.0, -2.0, -4.0], dtype=torch.float64)).sum()
            return torch.stack([torch.zeros_like(q), q]).expand(len(inputs), 2)

    loss = FixedImagesLoss(Quadratic(), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    found = top_eigenvalues(loss, 2, tolerance=1e-10)
    np.testing.assert_allclose([e.value for e in found], [4.0, 2.0], rtol=1e-8)  # sigmoid(0) * 2 * d


def test_living_weights_have_the_submatrix():
    model, x, y, hessian = softmax_regression()
    pruner = Pruner(model, "random", 0.5)
    pruner.masks.set({"": torch.rand(model.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5})
    alive = living_weights(model, pruner.masks)
    assert alive.tolist() == [*(model.weight.detach() != 0).flatten().tolist(), True, True, True]
    loss = FixedImagesLoss(model, x, y)
    assert torch.equal(loss.weights, torch.cat([model.weight.flatten(), model.bias]))
    columns = [loss.hessian_product(v).numpy() for v in torch.eye(len(hessian), dtype=torch.float64)]
    sub = np.stack(columns)[np.ix_(alive, alive)]
    found = top_eigenvalues(loss, 2, alive, tolerance=1e-10)
    np.testing.assert_allclose([e.value for e in found], np.linalg.eigvalsh(sub)[::-1][:2], rtol=1e-8)
    estimate, error = trace(loss, 100, alive)
    assert abs(estimate - np.trace(sub)) < 4 * error


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rho", [0.1, 0.7])
def test_one_example_of_two_classes_has_a_known_maximum(adaptive, rho):
    """L = log(1 + exp(m)), m linear in the weights: its maximum over the ball is at m + rho ||T dm/dw||, one step away."""
    torch.manual_seed(0)
    model = nn.Linear(5, 2, bias=False).double()
    x = torch.randn(1, 5, dtype=torch.float64)
    loss = FixedImagesLoss(model, x, torch.tensor([0]))
    slope = np.stack([-x[0].numpy(), x[0].numpy()])
    w = model.weight.detach().numpy()
    margin, reach = (w * slope).sum(), rho * np.linalg.norm(slope * (np.abs(w) if adaptive else 1))
    expected = math.log1p(math.exp(margin + reach)) - math.log1p(math.exp(margin))
    one, bound = sam_sharpness(loss, rho, 4, adaptive=adaptive)
    assert one == pytest.approx(expected, rel=1e-12)
    assert bound == pytest.approx(expected, rel=1e-12)


def test_more_steps_come_closer_to_the_maximum_and_never_pass_it():
    """Two weights, six examples: the maximum over the circle by trying all of it."""
    torch.manual_seed(4)
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0], [-2.0]]))
    x = torch.tensor([[1.0], [0.2], [-3.0], [4.0], [-0.5], [2.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0, 0, 0])
    loss, rho = FixedImagesLoss(model, x, y), 1.5
    base = loss.loss()[0]
    angles = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    logits = (model.weight.detach()[None, :, 0] + rho * torch.stack([angles.cos(), angles.sin()], 1))[:, None, :] * x
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(len(angles)), reduction="none")
    maximum = losses.view(len(angles), -1).mean(1).max().item() - base
    one, bound = sam_sharpness(loss, rho, 50)
    assert one <= bound <= maximum * (1 + 1e-6)
    assert bound > 0.999 * maximum
    assert sam_sharpness(loss, rho, 1) == (one, one)


def test_a_sparse_network_with_batch_norm_has_its_hessian_and_is_left_alone():
    """Against torch's own dense Hessian, of the classifier's weights; the model keeps every bit and its mode."""
    torch.manual_seed(0)
    model = build_model("resnet", 8, 3, 0.25).train()
    pruner = Pruner(model, "random", 0.5)
    pruner.choose_masks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = torch.randn(6, 3, 8, 8), torch.randint(3, (6,))
    loss = FixedImagesLoss(model, x, y)
    found = top_eigenvalues(loss, 1, entries_of(model, "classifier.weight"), tolerance=1e-6)[0]
    one, bound = sam_sharpness(loss, 0.1, 3, living_weights(model, pruner.masks))
    assert 0 < one <= bound
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    model.eval()

    def loss_of(weight):
        return nn.functional.cross_entropy(torch.func.functional_call(model, {"classifier.weight": weight}, (x,)), y)

    weight = model.classifier.weight.detach()
    assert loss.loss()[0] == pytest.approx(loss_of(weight).item(), rel=1e-5)
    dense = torch.autograd.functional.hessian(loss_of, weight).reshape(weight.numel(), weight.numel())
    assert found.value == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), rel=1e-4)


def entries_of(model, wanted):
    """Which entries of the flat vector are one parameter's."""
    return torch.cat([torch.full((p.numel(),), name == wanted) for name, p in model.named_parameters()])


def test_compiled_products_are_those_of_the_eager_network(monkeypatch):
    """As far as kernels, whose compilation would take half a minute."""
    traced = []
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: traced.append(f) or original(f, backend="aot_eager"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    x, y = torch.randn(5, 1, 4, 4), torch.randint(2, (5,))
    eager, compiled = (
        FixedImagesLoss(model, x, y, 4, Execution(compiled=c)) for c in (False, True)
    )  # 4 images, then 1
    vector = torch.randn_like(eager.weights)
    torch.testing.assert_close(compiled.hessian_product(vector), eager.hessian_product(vector))
    assert compiled.loss() == pytest.approx(eager.loss())
    assert len(traced) == 2


def test_a_hessian_of_zeros_has_no_figures_and_no_traceback():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(5, dtype=torch.float64))

        def forward(self, inputs):
            return (0 * self.w.sum()).expand(len(inputs), 2)

    loss = FixedImagesLoss(Constant(), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    assert all(eigenvalue.value == 0 for eigenvalue in top_eigenvalues(loss, 1))
    assert trace(loss, 2) == (0, 0)
    assert sam_sharpness(loss, 0.1, 2) == (0, 0)


def test_a_network_that_torch_cannot_derive_twice_is_refused_in_one_sentence():
    model = nn.Sequential(nn.Linear(4, 8), nn.Hardsigmoid(), nn.Linear(8, 3))
    loss = FixedImagesLoss(model, torch.randn(4, 4), torch.randint(3, (4,)))
    with pytest.raises(ValueError, match=r"no Hessian in torch.*aten::hardsigmoid_backward") as refused:
        loss.hessian_product(torch.ones_like(loss.weights))
    assert "\n" not in str(refused.value)


def test_attention_can_be_differentiated_twice():
    torch.manual_seed(0)
    model = build_model("vit", 2, 3, 1 / 3).double()
    loss = FixedImagesLoss(model, torch.randn(4, 3, 8, 8).double(), torch.randint(3, (4,)))
    v = nn.functional.normalize(torch.randn_like(loss.weights), dim=0)
    step = 1e-4
    change = loss.gradient(loss.weights + step * v)[1] - loss.gradient(loss.weights - step * v)[1]
    torch.testing.assert_close(loss.hessian_product(v), change / (2 * step), rtol=1e-5, atol=1e-7)
