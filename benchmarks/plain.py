"""The plain way to distil, as most published code does it: what the other benchmarks compare with.

    python benchmarks/plain.py --model_dir benchmarks/runs/kd_step/online

Trains the experiment that a params.json describes (loss `kd`, optimizer `adam`, augmentation `crop_flip`) and writes
plain.json beside it; with `--steps N` it only measures images/s over N steps. Nets, images, split, initial weights and
recipe are those of train.py; the way is not: images are PIL images, cropped, mirrored and normalised one by one in the
workers of a DataLoader; all is float32 and contiguous; the teacher runs at every step; loss and accuracy are read out
at every step, for the progress bar.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import create_parser
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from model import data, nets, schema
from model.data import Data
from model.data.images import Split
from model.data.loader import Loader
from model.devices import choose_device
from model.rng import derive_seed
from process import available_cores
from sources import load_teacher_checkpoint
from utils import OK, Params, write_json

WARM_UP = 5  # steps before the clock starts: workers start, memory is allocated, algorithms are chosen


class PILImages(Dataset[tuple[Tensor, int]]):
    """Decoded images in one array, as torchvision's CIFAR10 has them; each becomes a PIL image when it is asked for."""

    def __init__(self, loader: Loader, transform: transforms.Compose) -> None:
        assert isinstance(loader.split, Split), "the images must be in memory"
        images = loader.split.images[loader.indices]  # (N, C, H, W) uint8
        self.images: np.ndarray[Any, Any] = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels: list[int] = loader.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def create_loaders(splits: Data, batch_size: int, seed: int, workers: int, pin: bool) -> tuple[DataLoader, DataLoader]:
    """Returns the loaders of the training and the validation images."""
    to_tensor = [transforms.ToTensor(), transforms.Normalize(splits.mean, splits.std)]
    augment = [transforms.RandomCrop(splits.shape[-1], padding=4), transforms.RandomHorizontalFlip()]
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": pin,
    }
    order = torch.Generator().manual_seed(seed)
    train = PILImages(splits.train, transforms.Compose([*augment, *to_tensor]))
    val = PILImages(splits.val, transforms.Compose(to_tensor))
    return DataLoader(train, shuffle=True, generator=order, **options), DataLoader(val, **options)


@dataclass
class Distiller:
    """The student, and what trains it step by step."""

    student: nn.Module
    teacher: nn.Module
    optimizer: torch.optim.Optimizer
    alpha: float
    temperature: float
    reduction: str
    device: torch.device

    def step(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Trains on a batch; returns its loss and the share of correct answers."""
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        logits = self.student(images)
        kd = F.kl_div(
            F.log_softmax(logits / self.temperature, dim=1),
            F.softmax(teacher_logits / self.temperature, dim=1),
            reduction="batchmean",
        )
        if self.reduction == "mean":
            kd = kd / logits.shape[1]
        loss = self.alpha * self.temperature**2 * kd + (1 - self.alpha) * F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), (logits.argmax(1) == labels).float().mean().item()

    def epoch(self, loader: DataLoader, name: str) -> None:
        """Trains on all batches of a loader, under a progress bar."""
        self.student.train()
        loss_sum = accuracy_sum = 0.0
        with tqdm(loader, desc=name, disable=None, leave=False) as bar:
            for number, batch in enumerate(bar, start=1):
                loss, accuracy = self.step(*batch)
                loss_sum, accuracy_sum = loss_sum + loss, accuracy_sum + accuracy
                bar.set_postfix(loss=f"{loss_sum / number:.3f}", accuracy=f"{accuracy_sum / number:.3f}")

    @torch.no_grad()
    def validate(self, loader: DataLoader) -> float:
        """Returns the student's accuracy."""
        self.student.eval()
        hits = samples = 0
        for images, labels in loader:
            answers = self.student(images.to(self.device)).argmax(1)
            hits += int((answers == labels.to(self.device)).sum())
            samples += len(labels)
        return hits / samples

    def measure(self, loader: DataLoader, steps: int) -> float:
        """Returns images/s over so many steps, after those that warm up."""
        self.student.train()
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        for batch in itertools.islice(batches, WARM_UP):
            self.step(*batch)
        started, images = time.perf_counter(), 0
        for batch in itertools.islice(batches, steps):
            self.step(*batch)  # reads its loss out, so the device has finished
            images += len(batch[0])
        return images / (time.perf_counter() - started)


def create_distiller(params: Params, num_classes: int, device: torch.device) -> Distiller:
    """Returns student, teacher and optimizer of an experiment."""
    names = params.loss["name"], params.optimizer["name"], params.dataset["augmentation"]
    assert names == ("kd", "adam", "crop_flip"), f"{names} is not written here"
    torch.manual_seed(derive_seed(params.seed, "init"))  # the initial weights that train.py draws
    student = nets.create(params.student, num_classes).to(device)
    teacher_dir = Path(params.teacher["model_dir"])
    state, _ = load_teacher_checkpoint(teacher_dir, params.teacher["restore_file"])
    teacher = nets.restore(state, str(teacher_dir)).to(device).eval()
    optimizer = torch.optim.Adam(student.parameters(), lr=params.optimizer["learning_rate"])
    loss = {key: params.loss[key] for key in ("alpha", "temperature", "reduction")}
    return Distiller(student, teacher, optimizer, **loss, device=device)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = create_parser(__doc__)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="only measure images/s over so many steps")
    parser.add_argument("--workers", type=int, default=min(8, available_cores()), help="of each DataLoader")
    parser.add_argument("--device", default="auto", help="as for train.py: auto (default), cpu, cuda, ...")
    args = parser.parse_args(arguments)
    params, device = Params.load(args.model_dir, schema.resolve), choose_device(args.device)
    torch.backends.cudnn.benchmark = True
    splits = data.create(params.dataset, seed=params.seed, device=torch.device("cpu"))
    train, val = create_loaders(
        splits, params.dataset["batch_size"], params.seed, args.workers, pin=device.type == "cuda"
    )
    distiller = create_distiller(params, splits.num_classes, device)
    result: dict[str, Any] = {"workers": args.workers, "warm_up": WARM_UP}
    if args.steps:
        result["images_per_second"] = distiller.measure(train, args.steps)
    else:
        for epoch in range(params.num_epochs):
            started = time.perf_counter()
            distiller.epoch(train, f"epoch {epoch + 1}/{params.num_epochs}")
            result["images_per_second"] = splits.train.num_samples / (time.perf_counter() - started)
            result["val_accuracy"] = distiller.validate(val)
            print(f"epoch {epoch + 1}/{params.num_epochs}: val accuracy {result['val_accuracy']:.4f}", flush=True)
    write_json(args.model_dir / "plain.json", result)
    return OK


if __name__ == "__main__":
    sys.exit(main())
