"""Worker processes where shared memory is full, in a mount namespace with a /dev/shm of 64 KiB."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = "mount -t tmpfs -o size=64k tmpfs /dev/shm"

PROGRAM = """
import sys
import torch
from imagedata.augment import Augmentation
from imagedata.images import Images
from imagedata.loaders import Stream
from main_prune_train import main
from utils.distributed import ProcessGroup
from utils.errors import TrainingError

images = Images(torch.zeros(64, 8, 8, 1, dtype=torch.uint8), torch.zeros(64))
stream = Stream(images, Augmentation(64, 4, 0), 1, False, ProcessGroup())
kept = []
try:
    for step in range(100):  # a page each, of 16
        kept.append(stream(step))
    print("there was room")
except TrainingError as error:
    print(error)
flags = "--dataset digits --depth 8 --width 0.25 --epochs 1 --workers 2 --batch-size 512 --output-dir"
print("code", main([*flags.split(), sys.argv[1]]))
"""


def can_mount():
    try:
        return subprocess.run([*NAMESPACE, MOUNT], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.skipif(not can_mount(), reason="mounts nothing here")
def test_full_shared_memory_is_one_sentence_before_and_during_training(tmp_path):
    command = [*NAMESPACE, f'{MOUNT} && exec "$@"', "sh", sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    sentence = (
        "shared memory (/dev/shm) has no room for the batches of {} worker processes: make room there, or give fewer"
    )
    assert done.stdout.splitlines()[0].startswith(sentence.format(1)), done
    assert done.stdout.splitlines()[-1] == "code 1"
    assert f"error: {sentence.format(2)} --workers" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
