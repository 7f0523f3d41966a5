"""Write a trained network to one file: for this program, or for ONNX Runtime or torch without this program.

safetensors: living weights and a bit for each weight; `load` of experiment/load.py reads it. onnx and pt2 (torch.export):
the network with its normalisation, from uint8 images [B, C, H, W], however many, to logits; with --compact it is the smaller
network without dead channels. Before it is written it is compared with the network it was made of: on test images of the run
where they are at hand, else on random images.
"""

import argparse
import io
import json
import logging
import sys
import warnings
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from analysis.command import make_room_for, run_command, writing_to
from analysis.text_table import text_table
from experiment.build import network_name
from experiment.checks import complete_flags
from experiment.load import Trained, load, network_file
from imagedata.sources import DATASETS, is_at_hand, load_dataset
from prune.compact import compact
from training.exported import REQUIREMENTS, exported_bytes
from utils.errors import TrainingError, UsageError
from utils.files import write_atomically
from utils.packages import require_packages

IMAGES = 1000  # that a written network is compared on, at most
BATCH = 250
TOLERANCE = 1e-4  # of logits; relative to the largest where that is above 1
GZIP, ZSTD = 6, 12  # levels; the highest take half a minute for a ResNet-18

Logits = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        write: makes its content of a network and images; None for safetensors, which is no program.
        open: makes a function from images to logits of the content.
        packages: that it needs.
    """

    write: Callable[[Trained, Tensor], bytes]
    open: Callable[[bytes], Logits] | None
    packages: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("path", metavar="CKPT", type=Path, help="a checkpoint, the directory of a run, or an exported safetensors file")
    add("--format", choices=FORMATS, help="(what --output ends in, else safetensors)")
    add("--compact", action="store_true", help="take out channels that are dead; for onnx and pt2")
    add("--output", type=Path, metavar="FILE", help="(beside CKPT, with the format's ending)")
    add("--arch", metavar="FILE.py:FUNCTION", help="a network of your own again: a checkpoint alone never runs code")
    add("--data-dir", type=Path, metavar="DIR", help="where the images are now (where the run had them)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(run, build_parser().parse_args(argv))


def run(args: Namespace) -> None:
    """Write the file, and print its size and how it was checked."""
    name, output = destination(args)
    chosen = FORMATS[name]
    if args.compact and chosen.open is None:
        raise UsageError(
            f"--compact has no effect on {name}, which holds living weights alone: take --format onnx or pt2, or leave it out"
        )
    if args.data_dir and chosen.open is None:
        raise UsageError(f"--data-dir has no effect on {name}, which is compared on no images: leave it out")
    require_packages(REQUIREMENTS, *chosen.packages)
    trained = load(args.path, arch=args.arch)
    written = without_dead_channels(trained) if args.compact else trained
    make_room_for(output, f".{name}")
    sizes = {}
    checked = "load() of experiment/load.py reads it"
    if chosen.open is None:
        content = chosen.write(written, torch.empty(0))
        sizes = compressed_sizes(trained)
    else:
        images, source = images_to_compare(trained, args.data_dir)
        with failures(name, trained):
            with silenced():
                content = chosen.write(written, images)
            difference = compare(as_one(trained), chosen.open(content), images)
        checked = f"compared on {source}: the same top-1 for all, logits within {difference:.1e}"
    with writing_to(output):
        write_atomically(output, lambda file: file.write(content))
    dense = sum(tensor.nbytes for tensor in trained.model.state_dict().values())
    rows = {output.name: len(content), "all weights as float32": dense} | sizes
    network = network_name(Namespace(**complete_flags(trained.args)))
    print(f"{args.path}: {network}, sparsity {trained.masks.sparsity():.4f}\n")
    print(text_table([{"": row, "bytes": f"{n:,}", "of float32": f"{n / dense:.1%}"} for row, n in rows.items()]))
    print(f"\n{checked}\n{output}")


def destination(args: Namespace) -> tuple[str, Path]:
    """Return the format and the file that the arguments name. Raises UsageError where they contradict each other."""
    ending = args.output.suffix[1:] if args.output else ""
    named = ending if ending in FORMATS else None
    if args.format and named and args.format != named:
        raise UsageError(
            f"--format {args.format} and --output '{args.output}' contradict each other: leave one of them out"
        )
    name = args.format or named or "safetensors"
    source = network_file(args.path)
    output = args.output or source.with_suffix(f".{name}")
    if output.resolve() == source.resolve():
        raise UsageError(f"'{output}' is the network itself: name another file by --output")
    return name, output


def without_dead_channels(trained: Trained) -> Trained:
    """Return the network without its dead channels. Raises UsageError where there are none that can go."""
    small = compact(trained.model, trained.masks)
    if sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in trained.model.parameters()):
        raise UsageError(
            "--compact has no effect: the masks of this network leave no channel dead, see --sparsity-pattern channel; leave "
            "it out"
        )
    return replace(trained, model=small)


def as_one(trained: Trained) -> nn.Module:
    """Return the network from images to logits."""
    return nn.Sequential(trained.normalize, trained.model).eval().to(memory_format=torch.contiguous_format)


def about(trained: Trained) -> dict[str, dict]:
    """Return what a file tells of its network beside the weights."""
    return {"args": trained.args, "data": trained.data, "metrics": trained.metrics}


def safetensors_file(trained: Trained, images: Tensor) -> bytes:
    """Return the content of a safetensors file."""
    return exported_bytes(trained.model, trained.masks, about(trained))


def onnx_file(trained: Trained, images: Tensor) -> bytes:
    """Return the content of an ONNX file."""
    import torch.onnx

    program = torch.onnx.export(
        as_one(trained), (images[:2],), dynamo=True, dynamic_shapes=({0: "batch"},), input_names=["images"],
        output_names=["logits"], external_data=False, verbose=False,
    )  # fmt: skip
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # names source files of this machine
    for name, value in about(trained).items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    return model.SerializeToString()


def open_onnx(content: bytes) -> Logits:
    """Return a function from images to logits by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def pt2_file(trained: Trained, images: Tensor) -> bytes:
    """Return the content of a file of torch.export."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(as_one(trained), (images[:2],), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names source files of this machine
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={f"{name}.json": json.dumps(v) for name, v in about(trained).items()})
    return file.getvalue()


def open_pt2(content: bytes) -> Logits:
    """Return a function from images to logits by the program in a file of torch.export."""
    with silenced():
        module = torch.export.load(io.BytesIO(content)).module()
    return lambda images: module(torch.from_numpy(images)).numpy()


FORMATS = {
    "safetensors": Format(safetensors_file, None, ("safetensors", "zstandard")),
    "onnx": Format(onnx_file, open_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "pt2": Format(pt2_file, open_pt2, ()),
}


def images_to_compare(trained: Trained, data_dir: Path | None) -> tuple[Tensor, str]:
    """Return images to compare on, uint8 [B, C, H, W], and what they are in words.

    Args:
        trained: the network.
        data_dir: where its images are, or None for where its run had them.

    Raises:
        UsageError: they are not in a data_dir that was given, or nothing tells how large they are.
    """
    args, shape = trained.args, trained.data.get("image_shape")
    if data_dir and not DATASETS[args["dataset"]].takes_directory:
        raise UsageError(
            f"--data-dir has no effect on a network of {args['dataset']}, which has no directory: leave it out"
        )
    place = data_dir or (Path(args["data_dir"]) if args["data_dir"] else None)
    data = None
    if is_at_hand(args["dataset"], place):
        try:
            data = load_dataset(args["dataset"], place, args["image_size"])
        except UsageError:
            if data_dir:
                raise
    if data and list(data.image_shape) == (shape or list(data.image_shape)):
        count = min(IMAGES, len(data.test))
        chosen = torch.arange(count) * len(data.test) // count  # from all classes, where they follow each other
        images = data.test[chosen].load().permute(0, 3, 1, 2).contiguous()
        return images, f"{count:,} test images of {args['dataset']}"
    if data_dir:
        raise UsageError(
            f"'{data_dir}' does not have the images of this network: name their directory, or leave --data-dir out"
        )
    if shape is None:
        raise UsageError("the checkpoint does not tell how large its images are: give their directory by --data-dir")
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, 256, (BATCH, *shape), dtype=torch.uint8, generator=generator)
    return random, f"{BATCH} random images, since those of the run are not at hand"


@torch.inference_mode()
def compare(network: nn.Module, written: Logits, images: Tensor) -> float:
    """Return the largest difference between the logits of two networks.

    Args:
        network: as it is here.
        written: as it is in a file; it is given one image too, then many.
        images: uint8 [B, C, H, W].

    Raises:
        TrainingError: another top-1, or logits that differ by more than TOLERANCE.
    """
    expected = torch.cat([network(part) for part in images.split(BATCH)])
    parts = [images[:1], *images[1:].split(BATCH)]
    found = torch.from_numpy(np.concatenate([written(part.numpy()) for part in parts if len(part)]))
    difference = (found - expected).abs().max().item()
    others = int((found.argmax(1) != expected.argmax(1)).sum())
    if others or not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise TrainingError(
            f"the file would compute something else: logits differ by up to {difference:.1e} and top-1 for {others} of "
            f"{len(images):,} images; nothing was written, try another version of torch or onnxruntime"
        )
    return difference


def compressed_sizes(trained: Trained) -> dict[str, int]:
    """Return the sizes of all weights, zeros included, under usual compression."""
    import zstandard

    tensors = trained.model.state_dict().values()
    dense = b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors)
    return {
        f"the same, gzip -{GZIP}": len(zlib.compress(dense, GZIP)),
        f"the same, zstd -{ZSTD}": len(zstandard.ZstdCompressor(level=ZSTD).compress(dense)),
    }


@contextmanager
def failures(name: str, trained: Trained) -> Iterator[None]:
    """Turn whatever torch's exporters raise for a network that they cannot export into a TrainingError."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:  # of any kind: they run the network's own code
        told = next(iter(str(error).splitlines()), "")
        raise TrainingError(
            f"torch {torch.__version__} cannot write {trained.args['arch']} as {name} ({type(error).__name__}: {told}): take "
            "another --format"
        ) from error


@contextmanager
def silenced() -> Iterator[None]:
    """Show nothing of what torch's exporters tell their developers."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


if __name__ == "__main__":
    sys.exit(main())
