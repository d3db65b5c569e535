"""How fast is a step of distillation? The plain way, train.py, and train.py with a warm store of teacher outputs.

    python benchmarks/kd_step.py --data_dir /path/to/cifar10-images --teacher_dir /path/to/resnet18
    python benchmarks/kd_step.py --data_dir ... --teacher_dir ... --accuracy

Three ways to run experiments/cnn_distill (5-layer CNN, ResNet-18 teacher, batch 128): (a) benchmarks/plain.py, (b)
train.py with `teacher.cache` off, (c) train.py with a store that holds all it will ask for. They take turns, a process
at a time, and each counts its own images/s in the midst of training. The table goes to benchmarks/results/kd_step.md.
`--accuracy` trains a few epochs each way with several seeds and compares what is learnt (kd_step_accuracy.md; by
default on 5,000 images, with 5,000 others for validation); `--profile` shows what the time of (c) goes to
(kd_step_profile.md).

Without `--data_dir` the images are synthetic, without `--teacher_dir` the teacher has random weights: the speed depends
on neither, what is learnt does. On a GPU a round should be longer: `--train_images 45000 --plain_steps 500`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, create_parser, dataset_options, run_script, spread, stamp, write_result
from tabulate import tabulate

from utils import OK, read_json, write_json

WAYS = {
    "plain": "(a) the plain way",
    "online": "(b) train.py, teacher at every step",
    "stored": "(c) train.py, warm store",
}
TARGETS = {"online": 4, "stored": 30}
CIFAR10_IMAGES = 50_000


# --- the runs, also of grid.py ----------------------------------------------------------------------------


def create_options(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Returns a parser of which images, which teacher and which device the runs of a benchmark have."""
    parser = create_parser(doc)
    parser.add_argument("--data_dir", type=Path, help="class folders of images, or CIFAR-10; default: synthetic images")
    parser.add_argument("--cache_dir", type=Path, help="for decoded images; by default inside the image folder")
    parser.add_argument("--teacher_dir", type=Path, help="a trained ResNet-18; by default one of random weights")
    parser.add_argument("--train_images", type=int, help="default 10,000")
    parser.add_argument("--val_images", type=int, help="default 1,111: a tenth of all, as in the experiment")
    parser.add_argument("--plain_steps", type=int, default=30, help="of the plain way, for its speed (default 30)")
    parser.add_argument("--device", default="auto", help="as for train.py: auto (default), cpu, cuda, ...")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "benchmarks" / "runs" / name)
    parser.add_argument("--quick", action="store_true", help="only see that all of it runs; no result is written")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    train, val = (5_000, 5_000) if getattr(args, "accuracy", False) else (10_000, 1_111)
    if args.quick:
        train, val, args.plain_steps = 512, 57, 3
    args.train_images, args.val_images = args.train_images or train, args.val_images or val
    args.work_dir = args.work_dir.absolute()
    return args


def dataset_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the options change of a committed dataset section: which images, and how many."""
    train, val = args.train_images, args.val_images
    options: dict[str, Any] = {"name": "synthetic", "num_classes": 10, "image_size": 32, "noise": 0.5}
    if args.data_dir is None:
        options["train_size"] = available = train + val
    else:
        options, available = dataset_options(args), CIFAR10_IMAGES
        if "name" in options:
            available = sum(1 for _ in (args.data_dir / "train").glob("*/*"))
    fractions = {"val_fraction": val / available, "subset_fraction": min(1.0, train / (available - val))}
    return options | fractions


def write_run(folder: Path, params: dict[str, Any], args: argparse.Namespace) -> Path:
    """Writes an experiment directory with the params of a committed one, on the images that were asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "params.json", {**params, "dataset": params["dataset"] | dataset_of(args)})
    return folder


def teacher_of(args: argparse.Namespace) -> Path:
    """Returns the teacher's directory: the one given, or one whose weights are as they were drawn."""
    if args.teacher_dir:
        return args.teacher_dir.absolute()
    params = read_json(ROOT / "experiments" / "base_resnet18" / "params.json")
    folder = write_run(args.work_dir / "teacher", {**params, "num_epochs": 0}, args)
    train(folder, args)
    return folder


def distillation(num_epochs: int, seed: int, teacher_dir: Path, cache: str, store: Path) -> dict[str, Any]:
    """Returns the params of experiments/cnn_distill, changed in what the arguments say."""
    params = read_json(ROOT / "experiments" / "cnn_distill" / "params.json")
    teacher = {"model_dir": str(teacher_dir), "cache": cache, "cache_dir": str(store)}
    return {**params, "num_epochs": num_epochs, "seed": seed, "teacher": teacher}


def train(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains an experiment directory anew and returns its run.json."""
    run_script("train.py", "--model_dir", folder, "--restart", "--quiet", "--device", args.device)
    return read_json(folder / "run.json")


def plain_command(folder: Path, args: argparse.Namespace, *options: object) -> list[str]:
    """Returns the command that runs the plain way on an experiment directory; it leaves plain.json there."""
    command = [sys.executable, ROOT / "benchmarks" / "plain.py", "--model_dir", folder, "--device", args.device]
    return [str(word) for word in (*command, *options)]


def run_plain(folder: Path, args: argparse.Namespace, *options: object) -> dict[str, Any]:
    """Runs the plain way on an experiment directory and returns what it has measured."""
    subprocess.run(plain_command(folder, args, *options), check=True)
    return read_json(folder / "plain.json")


def report(name: str, text: str, args: argparse.Namespace, run: dict[str, Any]) -> None:
    """Writes a result, with its command and what it was measured on; `run` is the run.json of one of its runs."""
    attempt = run["attempts"][-1]
    details = attempt["device"], f"{attempt['precision']} in train.py", f"{attempt['threads']} thread(s) per run"
    text = f"{text}\nCommand: `{command_line()}`.\n{stamp(*details)}.\n"
    if args.quick:
        print(text)
    else:
        write_result(name, text)


def command_line() -> str:
    """Returns the command as it was given, without the places that only this machine has."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return " ".join(
        f"<{before.removeprefix('--')}>" if before.startswith("--") and before.endswith("_dir") else word
        for before, word in zip(["", *words], words, strict=False)
    )


def subject(args: argparse.Namespace, teacher_dir: Path) -> str:
    """Returns what is trained on what, for the top of a result."""
    net = read_json(teacher_dir / "params.json")["student"]["name"]
    weights = "trained" if args.teacher_dir else "random weights"
    images = "synthetic images" if args.data_dir is None else "CIFAR-10"
    return f"`experiments/cnn_distill`: 5-layer CNN, batch 128; teacher {net} ({weights}); {images}"


def table_of(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


# --- speed ------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace, teacher_dir: Path) -> None:
    """Lets the three ways take turns and writes their speeds."""
    store = args.work_dir / "store"
    shutil.rmtree(store, ignore_errors=True)
    # Two epochs, of which the second counts: the first also pays for what is done once.
    folders = {
        way: write_run(args.work_dir / way, distillation(2, 230, teacher_dir, cache, store), args)
        for way, cache in (("online", "off"), ("stored", "lazy"))
    }
    print("filling the store", flush=True)
    train(folders["stored"], args)
    filled = last_written(store)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        plain = run_plain(folders["online"], args, "--steps", args.plain_steps)
        rates["plain"].append(plain["images_per_second"])
        for way, folder in folders.items():
            run = train(folder, args)
            rates[way].append(run["progress"]["images_per_second"])
        shown = ", ".join(f"{way} {values[-1]:,.0f}" for way, values in rates.items())
        print(f"round {number + 1}/{args.rounds}: {shown} images/s", flush=True)
    assert last_written(store) == filled, "the store was not warm: (c) has added to it"
    rows = []
    for way, title in WAYS.items():
        ratios = [rate / plain for rate, plain in zip(rates[way], rates["plain"], strict=True)]
        target = f"at least {TARGETS[way]}" if way in TARGETS else ""
        rows.append([title, spread(rates[way], ",.0f"), spread(ratios, ".1f"), target])
    parts = [[name, spread(values, ",.0f")] for name, values in alone(folders["online"], args).items()]
    text = f"""# A step of distillation

{subject(args, teacher_dir)}.
Median (smallest to largest) of {args.rounds} rounds in which the ways take turns; ratios are taken round by round.

{table_of(["way", "images/s", "times (a)", "target"], rows)}

(a): PIL transforms in {plain["workers"]} DataLoader workers, float32, teacher at every step; counted over
{args.plain_steps} steps after {plain["warm_up"]} others. (b), (c): counted over the second epoch of \
{args.train_images:,} images.

What bounds them: the parts that cannot be left out, each alone on a batch that is there already.

{table_of(["part", "images/s"], parts)}
"""
    report("kd_step", text, args, run)


def alone(folder: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Returns images/s of what no way does without: a teacher's forward, a student's step, on a batch that is there."""
    import torch
    from plain import create_distiller

    from model import data, losses, optim, schema
    from model.devices import choose_device, choose_precision, place
    from model.engine import Learner, train_epoch
    from model.teacher import FrozenTeacher
    from utils import Params

    class Repeated:
        """One batch as an epoch."""

        def __init__(self, steps: int) -> None:
            self.steps = steps

        def __len__(self) -> int:
            return self.steps

        def epoch(self, epoch: int, start: int = 0) -> Iterable[Any]:
            return itertools.repeat(batch, self.steps)

    params, device = Params.load(folder, schema.resolve), choose_device(args.device)
    precision = choose_precision(params.precision, device)
    splits = data.create(params.dataset, seed=params.seed, device=device)
    batch = next(iter(splits.train.epoch(0)))
    distiller = create_distiller(params, splits.num_classes, device)
    fast = place(FrozenTeacher(distiller.teacher).fast(precision, frozenset({"logits"}), splits.shape), device)
    loss = losses.LOSSES.create(losses.LOSSES.resolve({"name": "ce"})[0])
    student = place(distiller.student, device)
    optimizer = optim.create_optimizer(params.optimizer, student.parameters())
    schedule = optim.create_schedule(params.schedule, optimizer, 1, 10)
    learner = Learner(student, loss, optimizer, schedule, precision)

    def forward(net: torch.nn.Module, images: torch.Tensor, steps: int) -> None:
        with torch.no_grad():
            for _ in range(steps):
                logits = net(images)
        logits.sum().item()  # the device has finished

    work: dict[str, Callable[[int], object]] = {
        "the teacher's forward in (a)": functools.partial(forward, distiller.teacher, batch.images.contiguous()),
        "the teacher's forward in (b)": functools.partial(forward, fast, batch.images),
        "the student's step in (b) and (c)": lambda n: train_epoch(learner, Repeated(n), epoch=0, seed=0),
    }
    rates: dict[str, list[float]] = {}
    for name, run in work.items():
        steps = args.plain_steps if name.startswith("the student") else max(args.plain_steps // 6, 1)
        run(steps)
        for _ in range(args.rounds):
            started = time.perf_counter()
            run(steps)
            rates.setdefault(name, []).append(steps * len(batch.labels) / (time.perf_counter() - started))
    return rates


def last_written(store: Path) -> int:
    """Returns when answers were last added to any store in a folder."""
    return max(path.stat().st_mtime_ns for path in store.rglob("*.rows"))


# --- what is learnt ---------------------------------------------------------------------------------------


def accuracy(args: argparse.Namespace, teacher_dir: Path) -> None:
    """Trains the three ways with several seeds and writes what they reach."""
    store = args.work_dir / "store"
    shutil.rmtree(store, ignore_errors=True)
    scores: dict[str, list[float]] = {way: [] for way in WAYS}
    for number, seed in enumerate(args.seeds, start=1):
        folders = {
            way: write_run(args.work_dir / way, distillation(args.num_epochs, seed, teacher_dir, cache, store), args)
            for way, cache in (("online", "off"), ("stored", "lazy"))
        }
        scores["plain"].append(run_plain(folders["online"], args)["val_accuracy"])
        train(folders["stored"], args)  # fills the store
        filled = last_written(store)
        for way, folder in folders.items():
            run = train(folder, args)
            scores[way].append(read_json(folder / "metrics_val_last_weights.json")["accuracy"])
        assert last_written(store) == filled, "the store was not warm: (c) has added to it"
        shown = ", ".join(f"{way} {values[-1]:.4f}" for way, values in scores.items())
        print(f"seed {number}/{len(args.seeds)}: val accuracy {shown}", flush=True)
    rows = [[WAYS[way], len(values), mean(values, statistics.stdev)] for way, values in scores.items()]
    differences = [
        [f"{WAYS[one][:3]} - {WAYS[other][:3]}", mean(gaps, standard_error)]
        for one, other in (("online", "plain"), ("stored", "plain"), ("stored", "online"))
        if (gaps := [a - b for a, b in zip(scores[one], scores[other], strict=True)])
    ]
    text = f"""# Does the fast way learn the same?

{subject(args, teacher_dir)}.
{args.num_epochs} epochs of {args.train_images:,} images, {args.val_images:,} others for validation; seeds \
{", ".join(map(str, args.seeds))}.

Accuracy in percent on the validation images after the last epoch, mean ± sample standard deviation over the seeds:

{table_of(["way", "n", "val accuracy"], rows)}

Differences in points, seed by seed, mean ± standard error:

{table_of(["", "points"], differences)}

With the same seed all three begin with the same weights. (b) and (c) then see the same views in the same order, (a)
others: between (a) and the others there is the noise of a seed, between (b) and (c) that of rounding.
"""
    report("kd_step_accuracy", text, args, run)


def mean(values: Sequence[float], uncertainty: Callable[[Sequence[float]], float]) -> str:
    """Returns `mean ± uncertainty` of fractions, in percent."""
    return f"{100 * statistics.mean(values):.2f} ± {100 * uncertainty(values):.2f}"


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


# --- what takes the time ----------------------------------------------------------------------------------


def profile(args: argparse.Namespace, teacher_dir: Path) -> None:
    """Has torch's profiler watch the second epoch of train.py with a warm store, in this process."""
    import torch
    from torch.autograd import DeviceType

    import train as script

    store = args.work_dir / "store"
    shutil.rmtree(store, ignore_errors=True)
    folder = write_run(args.work_dir / "stored", distillation(2, 230, teacher_dir, "lazy", store), args)
    filled = train(folder, args)
    on_gpu = torch.cuda.is_available() and filled["attempts"][-1]["device"] != "cpu"
    watch, train_epoch, microseconds = torch.profiler.profile(), script.train_epoch, []

    def watched(*positional: Any, epoch: int, **options: Any) -> dict[str, float]:
        with watch if epoch == 1 else contextlib.nullcontext():
            started = time.perf_counter()
            metrics = train_epoch(*positional, epoch=epoch, **options)  # its means wait for the device
            microseconds.append(1e6 * (time.perf_counter() - started))
        return metrics

    script.train_epoch = watched
    given = sys.argv
    sys.argv = ["train.py", "--model_dir", str(folder), "--restart", "--quiet", "--device", args.device]
    script.main()
    sys.argv = given

    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    column = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # An annotation, such as the one of the optimizer's step, lasts through the gaps in what it annotates.
    events = [e for e in watch.events() if e.device_type == kind and not e.is_user_annotation]
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    sums: Counter[str] = Counter()
    for event in events:
        sums[event.name] += getattr(event, column)
    calls = Counter(event.name for event in events)
    rows = [
        [f"`{name[:60]}`", f"{calls[name]:,}", f"{100 * part / sums.total():.1f}"]
        for name, part in sums.most_common(15)
    ]
    what = "kernels and copies run on the GPU" if on_gpu else "operators of torch run"
    text = f"""# Where the time of a step goes

{subject(args, teacher_dir)}.
The second epoch of {args.train_images:,} images from a warm store, under torch's profiler, which slows the host down:
during {100 * covered(spans) / microseconds[1]:.0f} % of {microseconds[1] / 1e6:.2f} s (unwatched, the first epoch \
takes {microseconds[0] / 1e6:.2f} s) {what}; the rest are gaps.

{table_of(["of these", "calls", "% of their time"], rows)}
"""
    report("kd_step_profile", text, args, read_json(folder / "run.json"))


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Returns the length of the union of spans of time."""
    total, reached = 0.0, -math.inf
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, reached))
        reached = max(reached, last)
    return total


def main() -> int:
    parser = create_options(__doc__, "kd_step")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--accuracy", action="store_true", help="compare what is learnt, not the speed")
    parser.add_argument("--profile", action="store_true", help="show what the time goes to, not the speed")
    parser.add_argument("--num_epochs", type=int, default=5, help="with --accuracy (default 5)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[230, 231, 232], help="with --accuracy")
    args = parse(parser)
    if args.accuracy and len(args.seeds) < 2:
        parser.error("a spread needs two seeds")
    measure = accuracy if args.accuracy else profile if args.profile else speed
    measure(args, teacher_of(args))
    return OK


if __name__ == "__main__":
    sys.exit(main())
