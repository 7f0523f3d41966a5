"""`pip install .` gives the modules sam and prune, and nothing else of the checkout."""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TRAIN = """
from importlib.metadata import version
from importlib.util import find_spec
import torch
from prune import Pruner
from sam import SAM
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9).attach(model)
pruner = Pruner(model, "random", 0.5, optimizers=[optimizer])
pruner.choose_masks()
inputs = torch.randn(64, 10)
targets = (inputs.sum(1) > 0).long()
losses = []
for step in range(20):
    optimizer.zero_grad()
    losses.append(torch.nn.functional.cross_entropy(model(inputs), targets))
    losses[-1].backward()
    pruner.mask_gradients(step)
    optimizer.step()
    pruner.mask_weights()
assert losses[-1] < losses[0] / 2, losses
assert not any(find_spec(name) for name in ("models", "utils", "training", "experiment", "imagedata", "analysis"))
print(version("one-step-sam"), find_spec("sam").origin)
"""


def test_the_wheel_trains_in_an_empty_environment(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"  # a build writes beside what it builds
    source.mkdir()
    for name in ("pyproject.toml", "sam.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "prune", source / "prune")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob("one_step_sam-*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    assert names == {"sam.py", "prune"}
    assert "prune/py.typed" in zipfile.ZipFile(wheel).namelist()
    venv.create(tmp_path / "empty")
    python = tmp_path / "empty" / "bin" / "python"
    (packages,) = (tmp_path / "empty").glob("lib/python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", f"--target={packages}", str(wheel)], check=True)
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))  # torch, which is not installed again
    result = subprocess.run([str(python), "-I", "-c", TRAIN], check=True, capture_output=True, text=True, cwd=tmp_path)
    version, origin = result.stdout.split()
    assert version == "0.1.0"
    assert Path(origin).parent == packages
