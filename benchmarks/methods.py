"""Does each method train? Real images, several seeds, beside the same runs without it; and what a step of it costs.

    python benchmarks/methods.py --jobs 2
    python benchmarks/methods.py --jobs 2 --data_dir <CIFAR-10>
    python benchmarks/methods.py --costs

The first trains a CNN on the digits of scikit-learn, then for every method a CNN of half its width on a few of them,
once per seed, with search_hyperparams.py; what counts is the last epoch's accuracy on the validation images, on which
nothing is selected. The second takes CIFAR-10 instead (a folder of images, or what torchvision downloads). Run again,
both go on where they stopped. The third takes steps of ResNet-56 to ResNet-20, each method in turns with plain KD in
one process, and once alone for its memory. All write benchmarks/results/methods.md, each its own part.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from cifar100_recipes import methods
from common import ROOT, create_parser, dataset_options, run_script, spread, stamp
from scipy.stats import t
from tabulate import tabulate

from utils import read_json, write_file, write_json

RESULT = ROOT / "benchmarks" / "results" / "methods.md"
RUNS = ROOT / "benchmarks" / "runs"
USUAL: dict[str, dict[str, Any]] = {
    "digits": {"work_dir": RUNS / "methods", "epochs": 40, "teacher_epochs": 30, "subset": 0.06},
    "CIFAR-10": {"work_dir": RUNS / "methods_cifar10", "epochs": 12, "teacher_epochs": 6, "subset": 0.1},
}
WITHOUT = {"ce": [{"name": "ce"}]}
# Which nets meet: a CNN of 32 channels teaches one of 16, but where the method asks for another pair.
WIDE, NARROW = ({"name": "cnn", "num_channels": width, "dropout_rate": 0.0} for width in (32, 16))
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cnn": (WIDE, NARROW),
    "equal": (WIDE, WIDE),  # FSP compares matrices of channels by channels
    "pooled": ({"name": "tiny", "width": 64}, {"name": "tiny", "width": 32}),  # SimKD: a classifier of averaged maps
}
# Their weights for CIFAR-100 and ResNets make terms here that are many times the labels'; a twentieth is about as much.
MILD = ("fitnets", "at", "rkd", "pkt", "nst", "ft", "dist")
PAIR_OF = {"fsp": "equal", "simkd": "pooled"}


def parse_args() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--cache_dir", type=Path, help="for decoded images; by default inside the image folder")
    parser.add_argument("--work_dir", type=Path, help="default: a folder in benchmarks/runs for each dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[230, 231, 232])
    parser.add_argument("--epochs", type=int, help="of a student (default 40; of CIFAR-10 12)")
    parser.add_argument("--teacher_epochs", type=int, help="default 30; of CIFAR-10 6")
    parser.add_argument("--subset", type=float, help="part of the training images (default 0.06; of CIFAR-10 0.1)")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--methods", nargs="+", help="only these (default: all)")
    parser.add_argument("--costs", action="store_true", help="time and memory of a step, instead")
    parser.add_argument("--rounds", type=int, default=3, help="of --costs (default 3)")
    parser.add_argument("--step", metavar="METHOD", help=argparse.SUPPRESS)
    parser.add_argument("--limit", choices=["nst", "rkd", "crd"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, usual in USUAL["CIFAR-10" if args.data_dir else "digits"].items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    return args


def objectives(epochs: int) -> dict[str, list[dict[str, Any]]]:
    """Returns every method's objective: that of the recipes, with stages and warm-ups of their share of the epochs."""
    found = {**methods("resnet56", "resnet20")}
    found["dml"] = [{"name": "ce"}, {"name": "dml"}]
    for name in MILD:
        [ce, method] = found[name]
        found[f"{name}_mild"] = [ce, {**method, "weight": method["weight"] / 20}]
    found["tfkd"] = [{"name": "ce", "weight": 0.9}, {"name": "tfkd", "weight": 0.1}]
    for losses in found.values():
        for loss in losses:
            if "initial_epochs" in loss:
                loss["initial_epochs"] = max(2, epochs // 8)  # two at least: what of it is to fall needs a second one
            if isinstance(loss.get("weight"), dict):
                loss["weight"] = {**loss["weight"], "warmup_epochs": max(1, epochs // 8)}
            for option in ("student_stage", "teacher_stage"):
                loss.pop(option, None)
    return found


# --- accuracy -------------------------------------------------------------------------------------------------


def params_of(args: argparse.Namespace, student: dict[str, Any], losses: list[dict[str, Any]]) -> dict[str, Any]:
    dataset: dict[str, Any] = {"name": "digits", "val_fraction": 0.25}
    if args.data_dir:
        dataset = {"name": "cifar10", "augmentation": "crop_flip", "val_fraction": 0.04, **dataset_options(args)}
    dataset |= {"batch_size": 16 if dataset["name"] == "digits" else 64}
    params = {
        "seed": args.seeds[0],
        "num_epochs": args.epochs,
        "dataset": {**dataset, "subset_fraction": args.subset},
        "student": student,
        "loss": losses,
        "optimizer": {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"name": "cosine", "per": "iteration"},
        "precision": "auto",
    }
    if losses[0]["name"] == "mlkd":
        params["dataset"]["second_augmentation"] = ["crop", "horizontal_flip", "rand_augment"]
    return params


def train_teachers(args: argparse.Namespace) -> None:
    """Trains the teacher of each pair on all training images."""
    for pair, (net, _) in PAIRS.items():
        if pair == "equal":  # the same teacher
            continue
        folder = args.work_dir / "teachers" / pair
        folder.mkdir(parents=True, exist_ok=True)
        params = params_of(args, net, WITHOUT["ce"])
        params["dataset"].pop("subset_fraction")
        write_json(folder / "params.json", {**params, "num_epochs": args.teacher_epochs})
        run_script("train.py", "--model_dir", folder, "--quiet")


def train_group(args: argparse.Namespace, name: str, pair: str, losses: list[dict[str, Any]]) -> list[Path]:
    """Trains a student per seed; returns their directories."""
    parent = args.work_dir / pair / name
    parent.mkdir(parents=True, exist_ok=True)
    params = params_of(args, PAIRS[pair][1], losses)
    if name not in ("ce", "dml", "tfkd"):
        taught_by = "cnn" if pair == "equal" else pair
        params["teacher"] = {"model_dir": str(args.work_dir / "teachers" / taught_by), "restore_file": "last"}
    write_json(parent / "params.json", params)
    write_json(parent / "search.json", {"seed": args.seeds})
    run_script("search_hyperparams.py", "--parent_dir", parent, "--jobs", args.jobs)
    return [parent / f"seed_{seed}" for seed in args.seeds]


def journal_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def epoch_seconds(folder: Path) -> float:
    """Returns the time of a run's last attempt by the epochs that it took, start and validation included."""
    attempt = read_json(folder / "run.json")["attempts"][-1]
    return float(attempt["seconds"]) / (attempt["to_epoch"] - attempt["from_epoch"])


def own_terms(folder: Path) -> dict[str, tuple[float, float]]:
    """Returns each term of a method in training: its mean over the first epoch in which it counts, and over the last.

    Divided by its weight where that changes with the epoch, so that a warm-up does not look like a rise.
    """
    records = journal_of(folder)
    known = {"loss", "accuracy", "accuracy_top5", "ce", "peers"}
    names = dict.fromkeys(name for record in records for name in record["train"] if name not in known)
    found = {}
    for name in names:
        # ab and fsp are 0 after their stage.
        values = [(record["epoch"], record["train"][name]) for record in records if record["train"].get(name)]
        warmup = warmup_of(read_json(folder / "params.json")["loss"], name)
        (first, start), (last, end) = values[0], values[-1]
        found[name] = start / min(1, first / warmup), end / min(1, last / warmup)
    return found


def warmup_of(losses: list[dict[str, Any]], term: str) -> int:
    for loss in losses:
        if loss["name"] == term and isinstance(loss.get("weight"), dict):
            return int(loss["weight"]["warmup_epochs"])
    return 1


def percent(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"


def paired(with_it: list[float], without: list[float]) -> tuple[float, float]:
    """Returns the mean difference in points, seed by seed, and the half-width of its 95 % interval (Student's t)."""
    differences = [100 * (a - b) for a, b in zip(with_it, without, strict=True)]
    n = len(differences)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    return statistics.mean(differences), half


def accuracy_part(args: argparse.Namespace) -> str:
    train_teachers(args)
    chosen = {name: losses for name, losses in objectives(args.epochs).items() if name in (args.methods or [name])}
    groups: dict[tuple[str, str], list[Path]] = {}
    for name, losses in chosen.items():
        pair = PAIR_OF.get(name, "cnn")
        if (pair, "ce") not in groups:
            groups[pair, "ce"] = train_group(args, "ce", pair, WITHOUT["ce"])
        groups[pair, name] = train_group(args, name, pair, losses)
    scores = {key: [journal_of(folder)[-1]["val"]["accuracy"] for folder in folders] for key, folders in groups.items()}
    seconds = {key: statistics.mean(map(epoch_seconds, folders)) for key, folders in groups.items()}

    def times(*key: str) -> tuple[str, str]:
        kd = seconds.get(("cnn", "kd")) if key[0] == "cnn" else None
        return f"{seconds[key]:.2f}", f"{seconds[key] / kd:.2f}" if kd else ""

    rows = []
    for (pair, name), folders in groups.items():
        if name == "ce":
            rows.append([f"without ({pair})", "", "", percent(scores[pair, name]), "", "", *times(pair, name)])
            continue
        terms = [own_terms(folder) for folder in folders]
        fell = [all(end < start for start, end in each.values()) for each in terms]
        means = {term: [statistics.mean(each[term][k] for each in terms) for k in (0, 1)] for term in terms[0]}
        shown = "; ".join(f"{term} {start:.4g} -> {end:.4g}" for term, (start, end) in means.items())
        gain, half = paired(scores[pair, name], scores[pair, "ce"])
        verdict = "below" if gain + half < 0 else "above" if gain - half > 0 else "no difference told"
        rows.append(
            [
                f"`{name}`" if pair == "cnn" else f"`{name}` ({pair})",
                shown,
                f"{sum(fell)} of {len(fell)}",
                percent(scores[pair, name]),
                f"{gain:+.2f} ± {half:.2f}",
                verdict,
                *times(pair, name),
            ]
        )
    teachers = ", ".join(
        f"{pair} {100 * journal_of(args.work_dir / 'teachers' / pair)[-1]['val']['accuracy']:.2f}"
        for pair in PAIRS
        if pair != "equal"
    )
    terms_header = "own terms in training, first -> last epoch"
    headers = ["method", terms_header, "fell", "accuracy, last epoch", "gain", "told", "epoch, s", "/ kd's"]
    changed = "" if args.seeds == [230, 231, 232] else f" --seeds {' '.join(map(str, args.seeds))}"
    changed += f" --methods {' '.join(args.methods)}" if args.methods else ""
    some = next(iter(groups.values()))[0]
    run = read_json(some / "run.json")["attempts"][-1]
    lines = (some / "train.log").read_text().splitlines()
    data = next(line.partition("INFO: ")[2] for line in lines if " train (" in line)  # a resumed run has it again
    return f"""## Does it train? {"CIFAR-10" if args.data_dir else "Digits"}

{data}. {args.epochs} epochs, seeds {", ".join(map(str, args.seeds))}.

Pairs: `cnn`, the ancestor's CNN of 16 channels taught by one of 32 that has seen all training images; `equal`, both of
32; `pooled`, the net `tiny` of width 32 taught by one of 64. Teachers' val accuracy: {teachers}. Weights are those of
the recipes for ResNet-56 to 20, found on CIFAR-100 with other nets, and of `_mild` a twentieth: nothing was tuned here.
Initial stages and warm-ups take an eighth of the epochs, stages two at least. Terms are means over the images of an
epoch and over seeds, weights included (without the warm-up's share); "fell": in how many seeds every own term did.
Accuracy in percent on the validation images, mean ± sample standard deviation; gain: points against the same run
without the method, paired by seed, ± half of the 95 % interval (Student's t). Time: of a whole run by its epochs,
validation included, mean over seeds; {args.jobs} run(s) at a time. Rows ran one after the other, so what else the
machine did shows in them; the costs below, for which methods take turns with KD, compare better.

{tabulate(rows, headers, tablefmt="github")}

Command: `python benchmarks/methods.py{" --data_dir <folder>" if args.data_dir else ""} --jobs {args.jobs}{changed}`.
{stamp(run["device"], f"precision {run['precision']}", f"{run['threads']} thread(s) per run")}.
"""


# --- costs ------------------------------------------------------------------------------------------------------

BATCH, CLASSES, STEPS = 64, 100, 1
IMAGES = {"crd": 50_000, "crd_kd": 50_000}  # whose memories grow with them; 5,000 for the others


class FirstSteps:
    """The first steps of a loader's epochs."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.split, self.seed = loader.split, loader.seed

    def __len__(self) -> int:
        return STEPS

    def epoch(self, epoch: int, start: int = 0) -> Iterable[Any]:
        return islice(self.loader.epoch(epoch, start), STEPS)


def learner_of(losses: list[dict[str, Any]]) -> Any:
    """Returns a function that takes some steps of ResNet-56 to ResNet-20 with an objective."""
    import torch

    from model import losses as library
    from model import nets
    from model.engine import Learner, probe, train_epoch
    from model.nets import NETS
    from model.optim import OPTIMIZERS, SCHEDULES, create_optimizer, create_schedule
    from model.teacher import FrozenTeacher
    from teaching import complete

    torch.manual_seed(0)
    images = max(IMAGES.get(loss["name"], 5_000) for loss in losses)
    options = {"num_classes": CLASSES, "train_size": images, "image_size": 32, "batch_size": BATCH}
    if losses[0]["name"] == "mlkd":
        options["second_augmentation"] = ["crop", "horizontal_flip", "rand_augment"]
    splits = data_of(json.dumps(options))
    section = NETS.resolve({"name": "resnet20", "shortcut": "conv"})[0]
    student = nets.create(section, CLASSES)
    large = nets.create(NETS.resolve({"name": "resnet56", "shortcut": "conv"})[0], CLASSES)
    norms = [module for module in large.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = (
            None  # one batch decides: with the statistics of a new net its maps would grow from layer to layer
        )
    with torch.no_grad():
        large(next(iter(splits.train.epoch(0))).images)
    teacher = FrozenTeacher(large)
    resolved, problems = library.resolve(losses)
    assert not problems, problems
    loss = library.create_objective(resolved, 1000)
    complete(
        loss, probe(student, "student", splits.shape), probe(teacher.net, "teacher", splits.shape), splits, section, 0
    )
    student, _ = loss.equip(student)
    optimizer = create_optimizer(
        OPTIMIZERS.resolve({"name": "sgd", "learning_rate": 1e-4})[0], [*student.parameters(), *loss.parameters()]
    )
    schedule = create_schedule(SCHEDULES.resolve({"name": "constant"})[0], optimizer, 10, STEPS)
    learner = Learner(student, loss, optimizer, schedule)
    return functools.partial(
        train_epoch,
        learner,
        FirstSteps(splits.lessons),
        seed=0,
        teacher=teacher if loss.needs_teacher else None,
    )


@functools.cache
def data_of(options: str) -> Any:
    import torch

    from model import data
    from model.data import DATASETS

    section, problems = DATASETS.resolve({"name": "synthetic", **json.loads(options), "num_workers": 0})
    assert not problems, problems
    return data.create(section, seed=0, device=torch.device("cpu"))


def measure(args: argparse.Namespace) -> None:
    """Prints, as JSON, the peak memory of a method alone, then seconds per step of it and of KD in turns."""
    import torch

    torch.set_num_threads(1)
    found = objectives(8)
    own = learner_of(found[args.step])
    # Its main stage, and its initial one if it has such.
    epochs = [20, 0] if any("initial_epochs" in loss for loss in found[args.step]) else [20]
    for epoch in epochs:
        own(epoch=epoch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kd = learner_of(found["kd"])
    ways = {"kd": functools.partial(kd, epoch=20)} | {f"epoch {e}": functools.partial(own, epoch=e) for e in epochs}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(args.rounds + 1):  # the first warms up
        for way, run in ways.items():
            begun = time.perf_counter()
            run()
            if round_:
                seconds[way].append((time.perf_counter() - begun) / STEPS)
    print(json.dumps({"bytes": peak, "seconds": seconds}))


def measure_limit(name: str) -> None:
    """Prints, as JSON, what the largest inputs of a method take: bytes above those before, and seconds."""
    import torch

    torch.set_num_threads(1)
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "nst":
        from model.losses.nst import nst_loss

        own, other = torch.randn(256, 64, 32, 32, requires_grad=True), torch.randn(256, 64, 32, 32)
        nst_loss(own, other).backward()
    elif name == "rkd":
        from model.losses.rkd import rkd_angle_loss, rkd_distance_loss

        own, other = torch.randn(256, 640, requires_grad=True), torch.randn(256, 640)
        (rkd_distance_loss(own, other) + rkd_angle_loss(own, other)).backward()
    else:
        learner, samples = learner_of(objectives(8)["crd"]), torch.arange(BATCH)
        learner(epoch=20)
        begun = time.perf_counter()
        for _ in range(3):
            learner(epoch=20)
        step = (time.perf_counter() - begun) / (3 * STEPS)
        [crd] = [part for label, part in learner.args[0].loss.parts() if label == "crd"]
        begun = time.perf_counter()
        for _ in range(10):
            crd.negatives_of(samples % CLASSES, samples)
        print(json.dumps({"share": (time.perf_counter() - begun) / 10 / step}))
        return
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"bytes": (after - before) * 1024, "seconds": time.perf_counter() - begun}))


def child(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def costs_part(args: argparse.Namespace) -> str:
    # What is the same step with other numbers, or a sum of two, is left out.
    others = {*(f"{name}_mild" for name in MILD), "ls_kd", "ls_dkd", "crd_kd"}
    names = [name for name in objectives(8) if name not in others and name in (args.methods or [name])]
    kd_bytes = child("--step", "kd", "--rounds", 1)["bytes"]
    rows = []
    for name in names:
        measured = child("--step", name, "--rounds", args.rounds)
        memory, found = measured["bytes"], measured["seconds"]
        kd = found.pop("kd")
        ratios = [[own / plain for own, plain in zip(times, kd, strict=True)] for times in found.values()]
        shown = [spread(each) for each in ratios] + [""]
        used = [f"{memory / 1e9:.2f}", f"{memory / kd_bytes:.2f}"]
        rows.append([f"`{name}`", f"{statistics.median(kd):.2f}", *shown[:2], *used])
        print(rows[-1], flush=True)
    nst, rkd, crd = (child("--limit", name) for name in ("nst", "rkd", "crd"))
    limits = [
        "Forward and backward alone, inputs included:",
        f"NST of 256 maps of 64x32x32 takes {nst['bytes'] / 1e9:.2f} GB and {nst['seconds']:.1f} s;",
        f"RKD of 256 embeddings of 640 numbers {rkd['bytes'] / 1e9:.2f} GB and {rkd['seconds']:.1f} s.",
        f"Of a step with CRD, drawing 16,384 negatives for each sample takes {crd['share']:.1%}.",
    ]
    headers = ["method", "KD's own step, s", "step / KD's", "initial stage / KD's", "peak memory, GB", "/ KD's"]
    return f"""## What does it cost?

A training step of batch {BATCH}, ResNet-56 (teacher, fp32, not folded) to ResNet-20, 32x32 images, {CLASSES} classes,
5,000 training images in memory (50,000 for CRD, whose memories have a row for each that is trained on); one thread.
Method and plain KD take turns in one process, {args.rounds} rounds after one to warm up: median (smallest to largest)
of the ratios of the rounds. Memory is the peak of the process before KD joins in;
nearly all of CRD's goes into making ten times as many images.

{tabulate(rows, headers, tablefmt="github")}

{chr(10).join(limits)}

Command: `python benchmarks/methods.py --costs`.
{stamp("cpu", "precision fp32", "1 thread")}.
"""


def write_part(text: str) -> None:
    """Puts a part into the result file in place of its older form."""
    parts = {}
    if RESULT.exists():
        parts = {part.splitlines()[0]: f"## {part}" for part in RESULT.read_text().split("\n## ")[1:]}
    parts[text.splitlines()[0].removeprefix("## ")] = text
    body = "\n".join(part.strip() + "\n" for part in parts.values())
    write_file(RESULT, f"# The methods on real images, and what they cost\n\n{body}".encode())
    print(text)


def main() -> None:
    args = parse_args()
    if args.limit:
        measure_limit(args.limit)
    elif args.step:
        measure(args)
    else:
        write_part(costs_part(args) if args.costs else accuracy_part(args))


if __name__ == "__main__":
    main()
