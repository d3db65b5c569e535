"""Batches that worker processes decode and transform, bitwise the same however many they are."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model import parallel
from model.data.augmentations import Transforms
from model.data.images import AnySplit, FileSplit
from model.data.loader import Loader
from model.errors import InputError
from model.rng import derive_seed

MAX_WORKERS = 8  # by default: more read ahead more than one device takes
GRACE = 30  # seconds that a worker lives on after SIGTERM, so that the run can be saved first
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

Request = tuple[int, list[int]]  # an epoch, and the samples of a batch


class StreamLoader(Loader):
    """Reads samples when they are due: image files, or any samples under transforms whose views have no number.

    The transforms of a sample draw from a generator seeded by (seed, epoch, sample index). Only one epoch can be under
    way at a time; workers stay from one to the next, and end with the loader.

    Args:
        split: In memory, on the CPU, or in files.
        transforms: Applied to every image; with them, views are -1.
        num_workers: Processes that read; 0: this one; None: 0 for samples in memory, else one per core, at most 8.
        options: The others of a `Loader`. An `augmentation` is applied after `transforms`, on the device.
    """

    def __init__(
        self,
        split: AnySplit,
        *,
        transforms: Transforms = Transforms(),  # noqa: B008  (it is immutable)
        num_workers: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        if num_workers is None:
            cores = max(1, available_cores() // parallel.size())
            num_workers = min(cores, MAX_WORKERS) if isinstance(split, FileSplit) else 0
        self.transforms = transforms
        self.num_workers = min(num_workers, len(self))
        self._open()

    def _open(self) -> None:
        reader = _Reader(self.split, self.transforms, self.seed)
        self._readers = _Readers(reader, self.num_workers, pin_memory=self.device.type == "cuda")
        weakref.finalize(self, self._readers.close)

    def plain(self) -> Self:
        same = super().plain()
        same.transforms = Transforms()
        same._open()
        return same

    @property
    def num_views(self) -> int | None:
        return None if self.transforms.steps else super().num_views

    def close(self) -> None:
        """Ends the workers; a later epoch starts new ones."""
        self._readers.close()

    def _images(self, epoch: int, indices: Tensor, parts: Sequence[slice]) -> Iterator[Tensor]:
        for images in self._readers.read([(epoch, indices[part].tolist()) for part in parts]):
            if isinstance(images, InputError):
                raise images
            yield images.to(self.device, non_blocking=True)


class _Reader(Dataset[Any]):
    """What is sent to a worker, which then makes the images of a batch on request."""

    def __init__(self, split: AnySplit, transforms: Transforms, seed: int) -> None:
        self.split = split
        self.transforms = transforms
        self.seed = seed

    def __getitem__(self, request: Request) -> Tensor | InputError:
        epoch, indices = request
        images = torch.empty(len(indices), *self.split.shape, dtype=torch.uint8)
        try:
            with _own_arithmetic():
                for place, index in zip(images, indices, strict=True):
                    image = self.split.read(index, self.transforms.whole)
                    torch.default_generator.manual_seed(derive_seed(self.seed, "augment", epoch, index))
                    place.copy_(self.transforms(image))
        except InputError as error:
            return error  # raised in a worker, it would arrive with a traceback in its message
        return images


class _Readers:
    """The processes that read, or none; no part of the loader, which ends them when it is garbage itself.

    As `weakref.finalize` refers to this object, it never is garbage in a cycle. There, the collector would take the
    queues to the workers away before torch, in `__del__`, tells the workers to end and waits.
    """

    def __init__(self, reader: _Reader, num_workers: int, pin_memory: bool) -> None:
        self._reader = reader
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._requests: list[Request] = []
        self._turn = 0
        self._loader: DataLoader[Any] | None = None
        self._stream: Iterator[Tensor | InputError] | None = None
        _ALL.add(self)

    def read(self, requests: Sequence[Request]) -> Iterator[Tensor | InputError]:
        """Yields what there is for each request."""
        self._turn += 1
        turn = self._turn
        self._requests[:] = requests
        if self._loader is None:
            self._loader = self._open()
            with _signals_held():
                self._stream = iter(self._loader)
        else:
            self._stream = iter(self._loader)
        for _ in requests:
            if turn != self._turn or self._stream is None:
                raise RuntimeError("this epoch was ended by a later one; finish an epoch before the next is begun")
            yield next(self._stream)

    def _open(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = DataLoader(
            self._reader,
            sampler=self._requests,
            batch_size=None,  # a request is a batch
            num_workers=self._num_workers,
            persistent_workers=self._num_workers > 0,
            pin_memory=self._pin_memory,
            worker_init_fn=partial(_begin_worker, os.getpid()),
            generator=torch.Generator(),  # of a seed that nobody uses; it would come from the global generator
        )
        return loader

    def close(self) -> None:
        self._loader = self._stream = None


@contextmanager
def _own_arithmetic() -> Iterator[None]:
    """Leaves the generator and the number of threads as they were; in between, the last bits are those of any worker.

    A sum over an image (its contrast, say) depends on the number of threads that share it.
    """
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- the workers' lives -----------------------------------------------------------------------------------
#
# A signal to stop often goes to the whole group of processes (Ctrl-C, Slurm, timeout). The run saves and ends, and
# its workers must live until it has: torch treats one that dies as an error. They must not ignore SIGTERM for ever
# either: multiprocessing waits at exit for whom it sent one.


def _begin_worker(run: int, _: int) -> None:
    if multiprocessing.get_start_method() == "fork" and os.getppid() != run:
        os._exit(1)  # the run was killed meanwhile, and torch's watchdog would take who adopted this process for it
    warnings.simplefilter("ignore")  # Pillow's, of photographs that it then reads: again in each worker and epoch
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.alarm(GRACE)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Holds signals back while workers start: a new one has the run's handlers until `_begin_worker`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_ALL: weakref.WeakSet[_Readers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Registered after torch and multiprocessing were imported, so called before they clean up.
    for readers in list(_ALL):
        readers.close()
