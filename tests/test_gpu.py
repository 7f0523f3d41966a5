"""What only a GPU can show. Skipped without one."""

import json
from functools import partial

import pytest
import torch

from imagedata.augment import Augmentation, Normalize
from imagedata.images import Images, channel_statistics
from imagedata.loaders import TrainLoader
from main_prune_train import main
from models import build_model
from prune import METHODS, Pruner
from prune.compact import compact
from prune.kernels import semi_structured
from training.optim import build_optimizer, radius
from training.state import TrainState
from training.step import TrainingStep, build_objective
from utils.precision import Execution

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
ARMS = [("sgd", False), ("sgd-sam", True), ("sgd-sam", False)]


class Run:
    """The parts of a training on random images, step by step."""

    def __init__(
        self, name="sgd-sam", v2=True, method="none", sparsity=None, execution=Execution(), workers=0, device=CUDA,
        interval=4, **schedule,
    ):  # fmt: skip
        torch.manual_seed(0)
        self.model = build_model("resnet", 8, 5).to(device, memory_format=torch.channels_last)
        optimizer = build_optimizer(name, self.model, lr=0.1, weight_decay=5e-4, momentum=0.9, rho=0.05, v2=v2)
        options = {"update_interval": interval} if METHODS[method].has_interval else {}
        self.pruner = Pruner(self.model, method, sparsity, total_steps=64, optimizers=[optimizer], **options)
        g = torch.Generator().manual_seed(0)
        images = Images(torch.randint(256, (256, 16, 16, 3), dtype=torch.uint8, generator=g), torch.arange(256) % 5)
        normalize = Normalize(**channel_statistics(images), device=device)
        augmentation = Augmentation(256, 32, seed=0, pad=2, flip=True)
        self.loader = TrainLoader(images, augmentation, 5, normalize, device, workers, execution)
        self.pruner.choose_masks(self.loader.sample)
        self.state = TrainState(self.model, optimizer, self.pruner)
        objective = build_objective(self.model, execution, 32)
        options = {"rho_varies": schedule.get("schedule", "constant") != "constant", "graphed": execution.graphed}
        if schedule:  # of SAM's radius
            options["rho_at"] = self.rho_at = partial(
                radius, **{"rho": -0.05, "schedule": "constant", "total_steps": 40, "steps_per_epoch": 8} | schedule
            )
        self.take = TrainingStep(self.state, objective, lambda step: 0.05, **options)

    def step(self, log: bool = False) -> torch.Tensor:
        sums, self.logged = self.take(self.loader.batch(self.state.schedule_step), log)
        return sums.clone()


@pytest.fixture
def no_waiting():
    """A function that makes every wait of the host for the device an error, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("execution", [Execution(), Execution(graphed=True)], ids=str)
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.pretrained])
@pytest.mark.parametrize(("name", "v2"), ARMS)
def test_no_step_waits_for_the_device(name, v2, method, execution, no_waiting):
    run = Run(name, v2, method, None if method == "none" else 0.5, execution)
    for step in range(
        24
    ):  # kernels are loaded, masks have changed, and logged steps, of which some change them, were captured
        run.step(log=step % 2 == 1)
    torch.cuda.synchronize()
    no_waiting()
    for step in range(16):  # over the borders of two epochs and four changes of masks
        run.step(log=step % 2 == 1)


@pytest.mark.parametrize(("name", "v2"), ARMS)
def test_no_compiled_step_waits_for_the_device(name, v2, no_waiting):
    run = Run(name, v2, "rigl", 0.5, Execution("bf16", compiled=True, graphed=True))
    for _ in range(8):
        run.step()
    torch.cuda.synchronize()
    no_waiting()
    for _ in range(8):
        run.step()


@pytest.fixture
def same_kernels(monkeypatch):
    """The same convolution kernels every time."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.parametrize("method", ["none", "random", "rigl", "gmp", "mest"])
@pytest.mark.parametrize(("name", "v2"), [*ARMS, ("adam-sam", True)])
def test_graphs_give_the_bits_of_single_kernels(name, v2, method, same_kernels):
    runs = [Run(name, v2, method, None if method == "none" else 0.5, Execution(graphed=g)) for g in (False, True)]
    losses = [[run.step()[0].item() for _ in range(40)] for run in runs]  # rigl: the third change of masks is a graph's
    assert losses[1] == losses[0]
    assert all(torch.equal(p, q) for p, q in zip(*(run.model.parameters() for run in runs), strict=True))


@pytest.mark.parametrize("window", [{"every": 3}, {"since": 0.3, "until": 0.8}], ids=str)
@pytest.mark.parametrize("v2", [True, False])
def test_graphs_know_which_steps_perturb(v2, window, same_kernels):
    runs = [Run("sgd-sam", v2, "rigl", 0.5, Execution(graphed=g), **window) for g in (False, True)]
    losses = [[run.step(log=step % 4 == 3)[0].item() for step in range(40)] for run in runs]
    assert losses[1] == losses[0]
    assert all(torch.equal(p, q) for p, q in zip(*(run.model.parameters() for run in runs), strict=True))
    assert runs[0].state.passes == runs[1].state.passes


@pytest.mark.parametrize("schedule", ["sqrt", "lr"])
@pytest.mark.parametrize("v2", [True, False])
def test_a_changing_radius_reaches_the_graph(v2, schedule):
    run = Run("sgd-sam", v2, "random", 0.5, Execution(graphed=True), schedule=schedule, relative_lr=0.5, since=0.25)
    for step in range(40):
        run.step(log=True)
        if run.rho_at(step):
            norm = run.logged["perturbation_norm"].item()
            assert norm == pytest.approx(abs(run.rho_at(step)), rel=1e-3), step
        else:
            assert "perturbation_norm" not in run.logged


@pytest.mark.parametrize("v2", [True, False])
def test_graphs_log_the_diagnostics_of_single_kernels(v2, same_kernels):
    runs = [Run("sgd-sam", v2, "random", 0.5, Execution(graphed=g)) for g in (False, True)]
    for _ in range(12):
        for run in runs:
            run.step(log=True)
        logged = [{name: value.item() for name, value in run.logged.items()} for run in runs]
        assert logged[0].keys() > {"ascent", "cos_e_gradient_at_w", "cos_e_gradient_at_perturbed"}
        assert logged[1] == logged[0]


@pytest.mark.parametrize("method", ["none", "rigl"])
@pytest.mark.parametrize(("name", "v2"), ARMS)
def test_compiled_graphs_train_like_eager_kernels(name, v2, method, same_kernels):
    sparsity = None if method == "none" else 0.5
    executions = (Execution(), Execution(compiled=True, graphed=True))
    runs = [Run(name, v2, method, sparsity, execution, interval=2) for execution in executions]
    losses = [[run.step()[0].item() for _ in range(8)] for run in runs]  # the third change of masks is from a graph
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)  # rounding grows to 7e-3 in eight steps


@pytest.mark.parametrize(("name", "v2"), ARMS)
def test_cpu_and_gpu_take_the_same_first_steps(name, v2):
    runs = [Run(name, v2, "random", 0.5, device=device) for device in (torch.device("cpu"), CUDA)]
    losses = [[run.step()[0].item() for _ in range(3)] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # rounding grows to 2e-4 in three steps
    masks = [[mask.cpu() for mask in run.pruner.masks.state_dict().values()] for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_workers_feed_the_gpu_the_same_batches():
    resident, streamed = Run(workers=0), Run(workers=2)
    for step in (0, 1, 7, 8, 9, 3):
        a, b = resident.loader.batch(step), streamed.loader.batch(step)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--sam-direction random --rho-schedule lr",
        "--precision bf16 --compile on",
        "--accumulate 2 --precision bf16 --compile on",
    ],
)
def test_a_whole_run_learns_and_goes_on_from_its_checkpoint(tmp_path, flags):
    command = "--dataset digits --depth 8 --epochs 4 --optmzr sgd-sam --sam-v2 --prune-method rigl --sparsity 0.8"
    argv = f"{command} --update-interval 5 --batch-size 64 {flags} --output-dir {tmp_path / 'run'}".split()
    assert main(argv) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert result["test_top1"] > 50
    assert main([*argv, "--resume", "auto"]) == 0


def test_two_of_four_weights_compute_the_same_in_torch_s_form():
    torch.manual_seed(0)
    model = build_model("vit", 2, 10).half().to(CUDA).eval()
    pruner = Pruner(model, "magnitude", pattern="2:4")
    pruner.choose_masks()
    layer, x = model.get_submodule("blocks.0.mlp.0"), torch.randn(64, 192, device=CUDA, dtype=torch.half)
    fast = semi_structured(layer)
    assert isinstance(fast.weight, torch.sparse.SparseSemiStructuredTensor)
    images = torch.randn(32, 3, 32, 32, device=CUDA, dtype=torch.half)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), layer(x), rtol=1e-2, atol=1e-2)
        small = compact(model, pruner.masks, images)
        torch.testing.assert_close(small(images), model(images), rtol=2e-2, atol=2e-2)
