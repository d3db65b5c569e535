"""Scores a checkpoint: `python evaluate.py --model_dir experiments/cnn_distill --restore_file best`.

The only reader of the test split. Writes, beside the checkpoint, metrics_<split>_<which>_weights.json, and as csv the
accuracy of each class and the confusion matrix.
"""

from __future__ import annotations

import argparse
import csv
import io
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint import load_checkpoint
from experiment import load_teacher_checkpoint
from model import data, metrics, nets, schema
from model.engine import choose_device, choose_precision, evaluate, place
from model.losses import LOSSES
from model.losses.base import Loss
from model.outputs import Batch, Outputs
from model.teacher import FrozenTeacher, create_teacher
from process import log, run_main, set_logger
from utils import OK, Params, RunError, write_file, write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="a trained experiment directory")
    parser.add_argument("--restore_file", default="best", help="best (default), last, or another <name>.pth.tar in it")
    parser.add_argument("--split", default="test", choices=["test", "val", "train"])
    parser.add_argument(
        "--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="such as dataset.data_dir=/data"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    parser.add_argument("--save_predictions", action="store_true", help="also write logits, labels and indices (npz)")
    return parser.parse_args()


def load_teacher(params: Params, student: dict[str, Any]) -> FrozenTeacher | None:
    """Returns the experiment's teacher; None if it has none, or if it is no longer there."""
    if params.teacher is None:
        return None
    teacher_dir = Path(params.teacher["model_dir"])
    try:
        state, _ = load_teacher_checkpoint(teacher_dir, params.teacher["restore_file"])
    except RunError as error:
        log.warning("no comparison with the teacher: %s", error)
        return None
    return create_teacher(state, f"teacher {teacher_dir}", student)


def sizes(net: torch.nn.Module, teacher: FrozenTeacher | None, shape: tuple[int, ...]) -> dict[str, float]:
    """Returns parameters, MACs and bytes of the net, and how many times smaller than the teacher it is."""
    size: dict[str, float] = {
        "parameters": metrics.count_parameters(net),
        "macs": metrics.count_macs(net, shape),
        "weight_bytes": metrics.weight_bytes(net),
    }
    if teacher is not None:
        size["compression_parameters"] = metrics.count_parameters(teacher.net) / size["parameters"]
        size["compression_macs"] = metrics.count_macs(teacher.net, shape) / size["macs"]
    return size


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_file(path, text.getvalue().encode())


def write_classes(folder: Path, stem: str, classes: Sequence[str], confusion: torch.Tensor) -> None:
    """Writes the confusion matrix (rows: true classes) and the accuracy of each class."""
    rows = zip(classes, confusion.tolist(), strict=True)
    write_csv(folder / f"confusion_{stem}.csv", ["true", *classes], ([name, *row] for name, row in rows))
    facts = zip(classes, confusion.sum(1).tolist(), confusion.diagonal().tolist(), strict=True)
    accuracies = ((name, images, correct / images if images else "") for name, images, correct in facts)
    write_csv(folder / f"per_class_{stem}.csv", ["class", "images", "accuracy"], accuracies)


def main() -> int:
    args = parse_args()
    set_logger()
    if "/" in args.restore_file or args.restore_file.endswith(".pth.tar"):
        raise RunError(f"--restore_file {args.restore_file}: name a checkpoint of the directory: best or last")
    path = args.model_dir / f"{args.restore_file}.pth.tar"
    if not path.exists():
        command = f"python train.py --model_dir {shlex.quote(str(args.model_dir))}"
        raise RunError(f"{path} does not exist; train it with: {command}, or name another --restore_file")
    state, sha = load_checkpoint(path)
    params = Params.check(state["params"], path, schema.resolve, args.overrides)
    device = choose_device(args.device)
    precision = choose_precision(params.precision, device)
    for constant in ("mean", "std"):  # the net's own, whatever the images it is tried on
        if f"dataset.{constant}" not in [override.partition("=")[0] for override in args.overrides]:
            params.dataset[constant] = state["net"][constant]
    splits = data.create(params.dataset, seed=params.seed, device=device)
    loader = {"test": splits.test, "val": splits.val, "train": splits.train}[args.split]
    if loader is None:
        raise RunError(f"dataset {params.dataset['name']!r} has no {args.split} split; choose another --split", "data")
    if list(splits.classes) != state["net"]["classes"]:
        raise RunError(
            f"{path}: trained on other classes than the dataset's; give the dataset it was trained on", "data"
        )
    if args.split != "test" and splits.fingerprint != state["identity"]["data"]:
        line = f"{path}: these are not the {args.split} images that the run had"
        raise RunError(f"{line}; restore them, or score --split test", "data")
    if list(splits.shape) != state["net"]["shape"]:
        raise RunError(f"{path}: trained on images of {state['net']['shape']}, not of {list(splits.shape)}", "data")
    net = place(nets.restore(state, str(path)), device)
    teacher = load_teacher(params, state["net"])
    if teacher is not None:
        teacher = place(teacher, device)
    loss: Loss | None = LOSSES.create(params.loss).to(device)
    if loss is not None and loss.needs_teacher and teacher is None:
        loss = None
    if loss is not None:
        loss.load_state_dict(state["loss_dict"])

    columns: dict[str, list[torch.Tensor]] = {"logits": [], "labels": [], "indices": [], "teacher_logits": []}

    def collect(batch: Batch, outputs: Outputs, teacher_outputs: Outputs | None) -> None:
        columns["logits"].append(outputs.logits.cpu())
        columns["labels"].append(batch.labels.cpu())
        columns["indices"].append(batch.indices.cpu())
        if teacher_outputs is not None:
            columns["teacher_logits"].append(teacher_outputs.logits.cpu())

    scores = evaluate(net, loader.plain(), precision=precision, loss=loss, teacher=teacher, after_batch=collect)
    table = {name: torch.cat(parts) for name, parts in columns.items() if parts}
    scores["ece"] = metrics.expected_calibration_error(table["logits"], table["labels"])
    if teacher is not None:
        scores |= metrics.agreement(table["logits"], table["teacher_logits"])
    scores |= sizes(net, teacher, splits.shape)
    scores["checkpoint_bytes"] = path.stat().st_size
    origin = {
        "split": args.split,
        "images": len(table["labels"]),
        "epoch": state["epoch"],
        "selected_on": "val" if args.restore_file == "best" else "nothing",
        "overrides": args.overrides,
    }

    stem = f"{args.split}_{args.restore_file}_weights"
    write_json(args.model_dir / f"metrics_{stem}.json", {**scores, **origin, "checkpoint_sha256": sha})
    confusion = metrics.confusion_matrix(table["logits"].argmax(1), table["labels"], splits.num_classes)
    write_classes(args.model_dir, stem, splits.classes, confusion)
    if args.save_predictions:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: column.numpy() for name, column in table.items()})  # type: ignore[arg-type]
        write_file(args.model_dir / f"predictions_{stem}.npz", buffer.getvalue())
    for name, value in {**scores, **origin}.items():
        log.info("%s: %s", name, f"{value:.4f}" if isinstance(value, float) else value)
    return OK


if __name__ == "__main__":
    run_main(main)
