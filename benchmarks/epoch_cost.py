"""How do time and memory of an epoch grow with images, classes and batch size, and a store with its rows?

    python benchmarks/epoch_cost.py

Each case is a process of train.py on images of noise: the 5-layer CNN learns from a tiny teacher whose answers all are
in a store already (a run before has filled it), with all 162 views of crop and flip. The second epoch is timed; memory
is the peak of the whole process, or on a GPU what torch had allocated there. Stores are filled and read on their own.
The tables go to benchmarks/results/epoch_cost.md, each growth beside what it should be.
"""

from __future__ import annotations

import argparse
import math
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT, create_parser, spread, stamp, write_result
from kd_step import last_written, table_of
from torch import Tensor

from model.data import DATASETS
from model.data.images import Images, Split
from model.teacher_store import TeacherStore
from utils import OK, read_json, write_json

VIEWS = 162
READS = (128, 65_536)  # rows at a time: those of a step, and far more


@DATASETS.register("noise")
def noise(*, num_classes: int, train_size: int) -> Images:
    """Noise in no time and no memory but its own, so that what is measured is training."""

    generator = torch.Generator().manual_seed(230)

    def draw(size: int) -> Split:
        images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Split(images, torch.arange(size) % num_classes)

    names = tuple(map(str, range(num_classes)))
    # A validation split of one size: what is carved from the training list would grow with it.
    return Images(draw(train_size), draw(1000), None, names, (0.5,) * 3, (0.3,) * 3, "crop_flip")


@dataclass(frozen=True)
class Case:
    """What an epoch is of."""

    images: int = 10_000
    classes: int = 10
    batch_size: int = 128


@dataclass(frozen=True)
class Cost:
    """What an epoch takes."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class StoreCost:
    """What a store takes."""

    rows: int
    sparse: float  # bytes on disk a row, while one view of each sample is stored
    full: float  # the same when all are
    seconds: dict[int, list[float]]  # a row, by how many are read at a time


Series = dict[str, list[Case]]
SERIES: Series = {
    "images": [Case(images=n) for n in (1_000, 3_000, 10_000, 30_000, 50_000)],
    "classes": [Case(classes=n) for n in (10, 100, 1000)],
    "batch_size": [Case(batch_size=n) for n in (32, 64, 128, 256, 512, 1024)],
}
QUICK: Series = {
    "images": [Case(images=n) for n in (500, 1_000, 2_000)],
    "classes": [Case(1_000, n) for n in (10, 100)],
    "batch_size": [Case(1_000, batch_size=n) for n in (32, 128, 512)],
}
SAMPLES = (100, 1_000, 10_000, 50_000)  # of a store, each in all views
SHOULD_BE = {
    ("seconds", "images"): "1",
    ("seconds", "classes"): "0 to 1: classifier, loss and rows grow, convolutions do not",
    ("seconds", "batch_size"): "at most 0: the same images in fewer steps",
    ("memory", "images"): "a line: 3,072 of the image, up to 3,888 of its rows in the map of the store, some for order",
    ("memory", "classes"): "at most a line: rows grow, and pages of 4,096 bytes are what counts",
    ("memory", "batch_size"): "a line: the maps of a batch",
}


# --- one case: a process of its own -----------------------------------------------------------------------


def run_case(model_dir: str, device: str) -> int:
    """Is train.py with one dataset more, and leaves the peak of its memory beside what it has trained."""
    import train

    sys.argv = ["train.py", "--model_dir", model_dir, "--restart", "--quiet", "--device", device]
    status = train.main()
    write_json(Path(model_dir) / "memory.json", {"peak_bytes": peak_memory()})
    return status


def peak_memory() -> int:
    """Returns the bytes that this process has had at most: on the GPU if it has used one, else of main memory."""
    if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
        return allocated
    status = Path("/proc/self/status")
    if status.exists():  # getrusage begins with the memory of the process that started this one
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def start(folder: Path, params: dict[str, object], args: argparse.Namespace) -> None:
    """Runs params in a process of their own, in a directory that is made for them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "params.json", params)
    command = [sys.executable, __file__, "--run", str(folder), "--device", args.device]
    subprocess.run(command, check=True)


def measure(case: Case, args: argparse.Namespace) -> Cost:
    """Trains from a store that was filled by the same run before."""
    teacher, student = args.work_dir / f"teacher_{case.classes}", args.work_dir / "student"
    dataset = {"name": "noise", "num_classes": case.classes, "train_size": case.images}
    # Validation in larger batches than those of training would hide how the peak grows.
    dataset |= {"batch_size": case.batch_size, "eval_batch_size": case.batch_size}
    optimizer = {"name": "adam", "learning_rate": 0.001}
    if not (teacher / "run.json").exists():
        few = {**dataset, "train_size": case.classes}
        start(teacher, {"num_epochs": 0, "dataset": few, "student": {"name": "tiny"}, "optimizer": optimizer}, args)
    params = {
        "num_epochs": 2,
        "dataset": dataset,
        "student": {"name": "cnn"},
        "teacher": {"model_dir": str(teacher), "cache": "lazy", "cache_dir": str(args.work_dir / "store")},
        "loss": {"name": "kd", "alpha": 0.9, "temperature": 4.0},
        "optimizer": optimizer,
    }
    shutil.rmtree(args.work_dir / "store", ignore_errors=True)
    seconds, peaks, filled = [], [], 0
    for number in range(1 + args.repeats):  # the first fills the store
        start(student, params, args)
        filled = filled if number else last_written(args.work_dir / "store")
        seconds.append(case.images / read_json(student / "run.json")["progress"]["images_per_second"])
        peaks.append(read_json(student / "memory.json")["peak_bytes"])
        print(f"{case}, {number}/{args.repeats}: {seconds[-1]:.2f} s, {peaks[-1] / 1e6:.0f} MB", flush=True)
    assert last_written(args.work_dir / "store") == filled, "the store was not warm"
    return Cost(statistics.median(seconds[1:]), int(statistics.median(peaks[1:])))


# --- the store on its own ---------------------------------------------------------------------------------


def open_store(root: Path, num_samples: int) -> TeacherStore:
    shutil.rmtree(root, ignore_errors=True)
    return TeacherStore.open(
        root, {"for": "a benchmark"}, num_samples=num_samples, num_views=VIEWS, widths={"logits": 10}
    )


def size_on_disk(root: Path) -> int:
    return sum(512 * path.stat().st_blocks for path in root.rglob("*") if path.is_file())


def measure_store(num_samples: int, args: argparse.Namespace) -> StoreCost:
    """Fills a store with rows of noise and reads them."""
    root = args.work_dir / "store"
    generator = torch.Generator().manual_seed(230)

    def draw(number: int) -> tuple[Tensor, Tensor]:
        samples = torch.randint(num_samples, (number,), generator=generator)
        return samples, torch.randint(VIEWS, (number,), generator=generator)

    store = open_store(root, num_samples)
    for samples in torch.randperm(num_samples, generator=generator).split(4096):
        _, views = draw(len(samples))
        store.write({"logits": torch.randn(len(samples), 10)}, samples, views)
    sparse = size_on_disk(root) / num_samples

    store = open_store(root, num_samples)
    for samples in torch.arange(num_samples).split(4096):
        pairs = samples.repeat_interleave(VIEWS), torch.arange(VIEWS).repeat(len(samples))
        store.write({"logits": torch.randn(len(pairs[0]), 10)}, *pairs)
    full = size_on_disk(root) / store.num_rows

    seconds: dict[int, list[float]] = {number: [] for number in READS}
    for _ in range(1 + args.repeats):  # the first maps the files
        for number, taken in seconds.items():
            batches = [draw(number) for _ in range(max(READS) // number)]
            started = time.perf_counter()
            for batch in batches:
                _, valid = store.read(*batch)
                assert valid.all()
            taken.append((time.perf_counter() - started) / max(READS))
    shutil.rmtree(root)
    return StoreCost(store.num_rows, sparse, full, {number: taken[1:] for number, taken in seconds.items()})


# --- the report -------------------------------------------------------------------------------------------


def exponent(x: Sequence[float], y: Sequence[float]) -> str:
    """Returns the slope of the line through the logarithms, by least squares."""
    slope = statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope
    return f"{slope:.2f}"


def line(x: Sequence[float], y: Sequence[float]) -> str:
    """Returns the slope of the straight line through the values themselves, and how well they fit it."""
    return f"{statistics.linear_regression(x, y).slope:,.0f} (r = {statistics.correlation(x, y):.3f})"


def describe(found: Mapping[Case, Cost], series: Series, stores: Sequence[StoreCost], repeats: int) -> str:
    """Returns the tables of all that was measured, and how each of it grows."""
    epochs = [
        [
            f"{case.images:,}",
            case.classes,
            case.batch_size,
            f"{cost.seconds:.2f}",
            f"{1e6 * cost.seconds / case.images:.0f}",
            f"{cost.peak_bytes / 1e6:,.0f}",
        ]
        for case, cost in found.items()
    ]
    columns = ["rows", "bytes a row, 1 view of each sample", "bytes a row, all views"]
    columns += [f"us a row, {number:,} at a time" for number in READS]
    rows = [
        [
            f"{store.rows:,}",
            f"{store.sparse:,.0f}",
            f"{store.full:.1f}",
            *(spread([1e6 * second for second in store.seconds[number]]) for number in READS),
        ]
        for store in stores
    ]
    exponents, lines = [], []
    for what, cases in series.items():
        x = [getattr(case, what) for case in cases]
        seconds, peaks = [found[case].seconds for case in cases], [found[case].peak_bytes for case in cases]
        against = what.replace("_", " ")
        exponents.append(["seconds an epoch", against, exponent(x, seconds), SHOULD_BE["seconds", what]])
        lines.append([against, line(x, peaks), SHOULD_BE["memory", what]])
    x = [store.rows for store in stores]
    exponents.append(["bytes of a full store", "rows", exponent(x, [s.rows * s.full for s in stores]), "1"])
    for number in READS:
        seconds = [statistics.median(store.seconds[number]) for store in stores]
        exponents.append([f"seconds a row, {number:,} at a time", "rows", exponent(x, seconds), "0"])
    return f"""# What an epoch costs, and how that grows

The 5-layer CNN learns from answers that are stored; 3x32x32 images, 162 views; medians of {repeats} runs.

{table_of(["images", "classes", "batch size", "s an epoch", "us an image", "peak MB"], epochs)}

A store of the logits of 10 classes in fp16, 24 bytes a row with its check; random rows are read, median (smallest to
largest) of {repeats}. Rows that lie apart take a page of the disk each, until the views between them are stored, too.

{table_of(columns, rows)}

Growth of time and size, as exponents: the slopes in double logarithmic scale.

{table_of(["of", "against", "exponent", "should be"], exponents)}

Growth of peak memory, most of which does not grow: the slopes of straight lines.

{table_of(["against", "bytes for one more", "should be"], lines)}
"""


def main() -> int:
    parser = create_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="default 3; medians count")
    parser.add_argument("--device", default="auto", help="as for train.py: auto (default), cpu, cuda, ...")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "benchmarks" / "runs" / "epoch_cost")
    parser.add_argument("--quick", action="store_true", help="only see that all of it runs; no result is written")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return run_case(args.run, args.device)
    args.work_dir = args.work_dir.absolute()
    series, samples = (QUICK, SAMPLES[:2]) if args.quick else (SERIES, SAMPLES)
    args.repeats = 1 if args.quick else args.repeats
    for folder in ("store", "student", *(f"teacher_{case.classes}" for case in series["classes"])):
        shutil.rmtree(args.work_dir / folder, ignore_errors=True)
    cases = dict.fromkeys(case for cases in series.values() for case in cases)
    found = {case: measure(case, args) for case in cases}
    stores = [measure_store(number, args) for number in samples]
    text = describe(found, series, stores, args.repeats)
    run = read_json(args.work_dir / "student" / "run.json")["attempts"][-1]
    details = run["device"], run["precision"], f"{run['threads']} thread(s)"
    text += f"\nCommand: `python benchmarks/epoch_cost.py`.\n{stamp(*details)}.\n"
    if args.quick:
        print(text)
    else:
        write_result("epoch_cost", text)
    return OK


if __name__ == "__main__":
    sys.exit(main())
