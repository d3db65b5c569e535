"""Scores a checkpoint: `python evaluate.py --model_dir experiments/cnn_distill --restore_file best`.

The only reader of the test split, unless params.json asks to validate on that. Writes, beside the checkpoint,
metrics_<split>_<which>_weights.json, and as csv the accuracy of each class and the confusion matrix; on request
predictions, scores at a temperature, or the temperature at which the net is calibrated. Samples always come in the
dataset's own order.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint import load_checkpoint
from model import data, metrics, nets, parallel, schema
from model.data.pipeline import Loader
from model.devices import choose_device, choose_precision, place
from model.engine import evaluate, probe, probe_teacher
from model.ensemble import Teacher, create_teachers
from model.legacy import is_flat, net_record
from model.losses import create_objective
from model.losses.objective import Objective
from model.outputs import Batch, Outputs
from process import log, run_main, set_logger
from sources import AND, load_teacher_checkpoints
from teaching import complete
from utils import OK, Params, RunError, apply_overrides, read_json, teachers_of, write_file, write_json


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
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="also write softmax scores at T, hits and confusions as text"
    )
    parser.add_argument("--calibrate", action="store_true", help="also find the temperature of the best likelihood")
    args = parser.parse_args()
    if args.temperature is not None and not 1e-3 <= args.temperature <= 1000:
        parser.error(f"--temperature {args.temperature}: must be a number from 0.001 to 1000")
    return args


def open_checkpoint(args: argparse.Namespace) -> tuple[Path, dict[str, Any], str, Params]:
    """Returns the checkpoint that is to be scored: its file, state and SHA-256, and the params it was trained with."""
    if "/" in args.restore_file or args.restore_file.endswith(".pth.tar"):
        raise RunError(f"--restore_file {args.restore_file}: name a checkpoint of the directory: best or last")
    path = args.model_dir / f"{args.restore_file}.pth.tar"
    if not path.exists():
        command = f"python train.py --model_dir {shlex.quote(str(args.model_dir))}"
        raise RunError(f"{path} does not exist; train it with: {command}, or name another --restore_file")
    state, sha = load_checkpoint(path, foreign=True)
    if state["net"] is None:
        log.warning("%s: written by another program; params.json beside it has to say what it is", path)
        state["params"] = read_json(args.model_dir / "params.json")
    return path, state, sha, Params.check(copy.deepcopy(state["params"]), path, schema.resolve, args.overrides)


def open_split(
    args: argparse.Namespace, path: Path, state: dict[str, Any], params: Params, device: torch.device
) -> tuple[data.Data, Loader]:
    """Returns the data of a checkpoint and the loader of the split that is to be scored; completes `state["net"]`.

    Raises:
        RunError: These are not the classes, images or sizes that it was trained on.
    """
    constants = state["net"] or net_record(state["params"], {})
    given = apply_overrides(copy.deepcopy(state["params"]), args.overrides)  # the whole keys of what may be short
    for constant in ("mean", "std"):  # the net's own, whatever the images it is tried on
        if constant in constants and f"dataset.{constant}" not in given:
            params.dataset[constant] = constants[constant]
    # Unlabelled images are a part of what tells the data of a run; nothing is scored on them.
    unlabelled = None if args.split == "test" else params.unlabelled
    splits = data.create(params.dataset, seed=params.seed, device=device, unlabelled=unlabelled)
    state["net"] = net = state["net"] or net_record(state["params"], splits.facts())
    loader = {"test": splits.test, "val": splits.val, "train": splits.train}[args.split]
    if loader is None:
        raise RunError(f"dataset {params.dataset['name']!r} has no {args.split} split; choose another --split", "data")
    if list(splits.classes) != net["classes"]:
        line = f"{path}: trained on other classes than the dataset's; give the dataset it was trained on"
        raise RunError(line, "data")
    if args.split != "test" and "identity" in state and splits.fingerprint != state["identity"]["data"]:
        line = f"{path}: these are not the {args.split} images that the run had"
        raise RunError(f"{line}; restore them, or score --split test", "data")
    if list(splits.shape) != net["shape"]:
        raise RunError(f"{path}: trained on images of {net['shape']}, not of {list(splits.shape)}", "data")
    return splits, loader


def load_teacher(params: Params, loss: Objective, student: dict[str, Any], sha: str | None) -> Teacher | None:
    """Returns the experiment's teacher, or several together; None if it has none, or if one is no longer there.

    Args:
        params: The experiment's.
        loss: What the teacher is for.
        student: The `net` record of the images that both will see.
        sha: The SHA-256 of the teacher's checkpoint, of several joined; None if it is not known, or if the loss used
            no teacher.
    """
    if params.teacher is None:
        return None
    sections = [*teachers_of(params.teacher).values()]
    try:
        states, found = load_teacher_checkpoints(sections)
        if sha not in (found, None):
            pairs = zip(sections, found.split(AND), sha.split(AND), strict=False)
            others = [section["model_dir"] for section, now, before in pairs if now != before]
            raise RunError(f"{' and '.join(others)} has other weights than those that taught this run")
    except RunError as error:
        log.warning("no comparison with the teacher: %s", error)
        return None
    return create_teachers(states, sections, student, params.combine_teachers, loss)


def sizes(net: torch.nn.Module, teacher: Teacher | None, shape: tuple[int, ...]) -> dict[str, float]:
    """Returns parameters, MACs and bytes of the net, and how many times smaller than its teachers together it is."""
    size: dict[str, float] = {
        "parameters": metrics.count_parameters(net),
        "macs": metrics.count_macs(net, shape),
        "weight_bytes": metrics.weight_bytes(net),
    }
    if teacher is not None:
        theirs = [member.net for member in teacher.members]
        size["compression_parameters"] = sum(map(metrics.count_parameters, theirs)) / size["parameters"]
        size["compression_macs"] = sum(metrics.count_macs(each, shape) for each in theirs) / size["macs"]
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


def write_scores(folder: Path, stem: str, temperature: float, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Writes the ancestor's analysis as text, a line per sample: softmax scores, hits (1 or 0); and the confusions."""
    hits = (logits.argmax(1) == labels).double()
    confusion = metrics.confusion_matrix(logits.argmax(1), labels, logits.shape[1])
    tables = {
        "softmax_scores": torch.softmax(logits.double() / temperature, dim=1),
        "predict_correct": hits,
        "confusion_matrix": confusion.double(),
    }
    for name, values in tables.items():
        text = io.StringIO()
        np.savetxt(text, values.numpy())
        write_file(folder / f"{stem}_temp{temperature}_{name}.txt", text.getvalue().encode())


def calibrate(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Returns the calibrated temperature, and likelihood and calibration error at temperature 1 and there."""
    temperature = metrics.calibrated_temperature(logits, labels)
    found = {"temperature": temperature}
    for when, scaled in (("before", logits.double()), ("after", logits.double() / temperature)):
        found[f"nll_{when}"] = torch.nn.functional.cross_entropy(scaled, labels).item()
        found[f"ece_{when}"] = metrics.expected_calibration_error(scaled, labels)
    return found


def main() -> int:
    args = parse_args()
    set_logger()
    parallel.refuse_several("evaluate.py")
    path, state, sha, params = open_checkpoint(args)
    device = choose_device(args.device)
    precision = choose_precision(params.precision, device)
    foreign = state["net"] is None
    splits, loader = open_split(args, path, state, params, device)
    net = place(nets.restore(state, str(path)), device)
    shown = {**state["net"], "mean": list(splits.mean), "std": list(splits.std)}
    objective = create_objective(params.loss, params.num_epochs)
    teacher = load_teacher(params, objective, shown, state.get("identity", {}).get("teacher"))
    loss = None if foreign or (objective.needs_teacher and teacher is None) else objective
    if loss is not None:
        name = params.student["name"]
        taught = None if teacher is None else probe_teacher(teacher, splits.shape)
        complete(loss, probe(net, name, splits.shape), taught, splits, params.student, params.seed)
        try:
            loss.load_state_dict(state["loss_dict"])
        except RuntimeError as error:  # a memory of other samples, say
            log.warning("scored without the loss, whose state does not fit this data: %s", nets.mismatch_of(error))
            loss = None
    if loss is not None:
        loss.on_epoch(max(state["epoch"] - (state["step"] == 0), 0))
        loss.to(device)
    size = sizes(net, teacher, splits.shape)
    if teacher is not None:
        teacher = place(teacher, device)
        if loss is None or loss.teacher_statistics == "running":
            needs = loss.teacher_needs if loss else frozenset({"logits"})
            teacher = teacher.of([member.fast(precision, needs, splits.shape) for member in teacher.members])
        for member in teacher.members:
            member.precision = precision

    columns: dict[str, list[torch.Tensor]] = {"logits": [], "labels": [], "indices": [], "teacher_logits": []}

    def collect(batch: Batch, outputs: Outputs, teacher_outputs: Outputs | None) -> None:
        columns["logits"].append(outputs.logits.cpu())
        columns["labels"].append(batch.labels.cpu())
        columns["indices"].append(batch.indices)
        if teacher_outputs is not None:
            columns["teacher_logits"].append(teacher_outputs.logits.cpu())

    scores = evaluate(net, loader.plain(), precision=precision, loss=loss, teacher=teacher, after_batch=collect)
    table = {name: torch.cat(parts) for name, parts in columns.items() if parts}
    logits, labels = table["logits"], table["labels"]
    scores["ece"] = metrics.expected_calibration_error(logits, labels)
    if teacher is not None:
        scores |= metrics.agreement(logits, table["teacher_logits"])
    scores |= size
    scores["checkpoint_bytes"] = path.stat().st_size
    selected_on = splits.selected_on if args.restore_file == "best" else "nothing"
    if foreign and not is_flat(state["params"]):
        selected_on = "unknown"
    origin = {
        "split": args.split,
        "images": len(labels),
        "epoch": state["epoch"],
        "selected_on": selected_on,
        "overrides": args.overrides,
    }

    stem = f"{args.split}_{args.restore_file}"
    write_json(args.model_dir / f"metrics_{stem}_weights.json", {**scores, **origin, "checkpoint_sha256": sha})
    confusion = metrics.confusion_matrix(logits.argmax(1), labels, splits.num_classes)
    write_classes(args.model_dir, f"{stem}_weights", splits.classes, confusion)
    if args.save_predictions:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: column.numpy() for name, column in table.items()})  # type: ignore[arg-type]
        write_file(args.model_dir / f"predictions_{stem}_weights.npz", buffer.getvalue())
    if args.temperature is not None:
        which = args.split if args.restore_file == "best" else stem  # the ancestor's names for the best weights
        write_scores(args.model_dir, which, args.temperature, logits, labels)
    found = calibrate(logits, labels) if args.calibrate else {}
    if found:
        write_json(args.model_dir / f"calibration_{stem}.json", {**found, **origin, "checkpoint_sha256": sha})
    calibration = {f"calibrated_{name}": value for name, value in found.items()}
    for name, value in {**scores, **calibration, **origin}.items():
        log.info("%s: %s", name, f"{value:.4f}" if isinstance(value, float) else value)
    return OK


if __name__ == "__main__":
    run_main(main)
