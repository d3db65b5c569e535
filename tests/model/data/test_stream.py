import contextlib
import dataclasses
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from torchvision.transforms import v2

from model.data import stream
from model.data.augmentations import Canvas, Transforms, create, resolve
from model.data.images import FileSplit, Split
from model.data.loader import BatchLoader
from model.data.stream import StreamLoader, available_cores
from model.data.views import Augmentation, apply_views, draw_views
from model.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
STRONG = ["random_resized_crop", "horizontal_flip", "rand_augment", "color_jitter", "random_erasing"]
FIELDS = ("images", "labels", "indices", "views")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> FileSplit:
    """41 photographs of many sizes."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    names = [f"{i:02}.png" for i in range(41)]
    for name in names:
        height, width = generator.integers(20, 60, 2)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, compress_level=0)
    sizes = torch.tensor([(folder / name).stat().st_size for name in names])
    return FileSplit(str(folder), np.array([n.encode() for n in names]), sizes, torch.arange(41) % 3, 16, 20)


@pytest.fixture
def memory() -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (41, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(41) % 3)


def transforms_of(*augmentation) -> Transforms:
    sections, problems = resolve(augmentation)
    assert not problems
    return create(sections, Canvas((3, 16, 16), MEAN))


def loader_of(split, *augmentation, num_workers: int = 0, **options) -> StreamLoader:
    options = {"batch_size": 8, "mean": MEAN, "std": STD, "device": CPU, "seed": 5, "shuffle": True, **options}
    return StreamLoader(split, transforms=transforms_of(*augmentation), num_workers=num_workers, **options)


def joined(batches, field: str = "images") -> torch.Tensor:
    return torch.cat([getattr(batch, field) for batch in batches])


def assert_same(batches, others) -> None:
    for one, other in zip(batches, others, strict=True):
        for field in FIELDS:
            assert torch.equal(getattr(one, field), getattr(other, field)), field


def normalised(images: torch.Tensor) -> np.ndarray:
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.numpy().astype(np.float64) / 255 - mean) / std


# --- what it yields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_any_number_of_workers_yields_the_same_bits(kind, request):
    split = request.getfixturevalue(kind)
    alone, two, three = (loader_of(split, *STRONG, num_workers=n) for n in (0, 2, 3))
    for epoch in (0, 1):
        expected = list(alone.epoch(epoch))
        assert_same(two.epoch(epoch), expected)
        assert_same(three.epoch(epoch), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 6])
def test_starting_at_a_step_yields_exactly_the_tail_of_the_epoch(files, num_workers, start):
    loader = loader_of(files, *STRONG, num_workers=num_workers)
    assert_same(loader.epoch(3, start), list(loader_of(files, *STRONG).epoch(3))[start:])


def test_the_steps_before_the_start_are_not_read(files, monkeypatch):
    read = []
    monkeypatch.setattr(FileSplit, "read", lambda self, index, whole: read.append(index) or torch.zeros(3, 16, 16))
    batches = list(loader_of(files, "horizontal_flip").epoch(0, start=3))
    assert read == joined(batches, "indices").tolist()
    assert len(read) == 41 - 3 * 8


def test_nothing_is_read_and_nobody_is_started_where_an_epoch_is_done_already(files):
    loader = loader_of(files, num_workers=2)
    assert list(loader.epoch(0, start=len(loader))) == []
    assert not multiprocessing.active_children()


def test_a_samples_image_depends_on_seed_and_epoch_only(files):
    def images_by_index(epoch: int = 1, **options) -> dict[int, torch.Tensor]:
        batches = list(loader_of(files, *STRONG, **options).epoch(epoch))
        return dict(zip(joined(batches, "indices").tolist(), joined(batches), strict=True))

    reference = images_by_index()
    for options in ({"batch_size": 3}, {"shuffle": False}, {"indices": torch.tensor([40, 2, 30])}):
        for index, image in images_by_index(**options).items():
            assert torch.equal(image, reference[index])
    for other in (images_by_index(epoch=2), images_by_index(seed=6)):
        assert sum(torch.equal(image, reference[index]) for index, image in other.items()) < 3
    assert len({image.numpy().tobytes() for image in reference.values()}) == 41


def test_neighbouring_samples_draw_independently(memory):
    same = Split(memory.images[:1].expand(41, -1, -1, -1), memory.labels)
    batches = loader_of(same, {"name": "horizontal_flip", "probability": 0.4}, shuffle=False).epoch(0)
    flipped = (joined(batches) != loader_of(same).plain().epoch(0).__next__().images[0]).flatten(1).any(1)
    assert 8 < int(flipped.sum()) < 26


def test_transforms_are_applied_in_their_order_to_what_the_split_reads(files):
    (batch,) = loader_of(files, *STRONG, batch_size=100, shuffle=False).epoch(2)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for index, image in enumerate(batch.images):
        whole = Image.open(f"{files.folder}/{index:02}.png")
        torch.manual_seed(stream.derive_seed(5, "augment", 2, index))
        shown = transforms_of(*STRONG)(torch.from_numpy(np.array(whole)).permute(2, 0, 1))
        np.testing.assert_allclose(image.numpy(), normalised(shown[None])[0], atol=1e-5)
    assert torch.equal(batch.labels, files.labels)
    assert torch.equal(batch.views, torch.full((41,), -1))


def evaluation_view(path: str) -> torch.Tensor:
    view = v2.Compose([v2.Resize(20), v2.CenterCrop(16)])  # of a Pillow image: its resize and crop
    return torch.from_numpy(np.array(view(Image.open(path)))).permute(2, 0, 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_plain_images_are_pillows_resize_and_centre_crop_in_their_natural_order(files, num_workers):
    loader = loader_of(files, *STRONG, num_workers=num_workers, indices=torch.tensor([7, 3, 40])).plain()
    (batch,) = loader.epoch(9)
    assert batch.indices.tolist() == [7, 3, 40]
    assert batch.views.tolist() == [0, 0, 0]
    shown = torch.stack([evaluation_view(f"{files.folder}/{index:02}.png") for index in (7, 3, 40)])
    np.testing.assert_allclose(batch.images.numpy(), normalised(shown), atol=1e-5)


def test_without_random_resized_crop_transforms_see_the_evaluation_view(files):
    (batch,) = loader_of(files, {"name": "horizontal_flip", "probability": 1.0}, batch_size=41, shuffle=False).epoch(0)
    shown = torch.stack([evaluation_view(f"{files.folder}/{index:02}.png").flip(2) for index in range(41)])
    np.testing.assert_allclose(batch.images.numpy(), normalised(shown), atol=1e-5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_numbered_views_of_files_are_those_of_a_loader_of_the_same_images_in_memory(files, num_workers):
    family = Augmentation(pad=2, horizontal=True)
    decoded = Split(torch.stack([files.read(index, whole=False) for index in range(41)]), files.labels)
    options = {"batch_size": 8, "mean": MEAN, "std": STD, "seed": 5, "device": CPU, "shuffle": True}
    from_memory = BatchLoader(decoded, augmentation=family, **options)
    from_files = StreamLoader(files, augmentation=family, num_workers=num_workers, **options)
    assert from_files.num_views == from_memory.num_views == 50
    assert_same(from_files.epoch(1), from_memory.epoch(1))
    assert_same(from_files.plain().epoch(1), from_memory.plain().epoch(1))
    (batch,) = StreamLoader(files, augmentation=family, **{**options, "batch_size": 41, "shuffle": False}).epoch(1)
    assert torch.equal(batch.views, draw_views(5, 1, torch.arange(41), 50))
    np.testing.assert_allclose(batch.images, normalised(apply_views(decoded.images, batch.views, family)), atol=1e-5)


def test_a_last_batch_of_one_sample_is_joined_to_the_batch_before_it(files):
    assert [len(batch.labels) for batch in loader_of(files, batch_size=8).epoch(0)] == [8, 8, 8, 8, 9]
    assert [len(batch.labels) for batch in loader_of(files, batch_size=13).epoch(0)] == [13, 13, 13, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_main_processs_generators_and_threads_are_left_alone(files, num_workers):
    torch.set_num_threads(2)
    try:
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        loader = loader_of(files, *STRONG, num_workers=num_workers)
        for epoch in (0, 1):
            for _ in loader.epoch(epoch):
                assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


class Threads:
    """A transform that shows how many threads compute it."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return torch.full((3, 16, 16), torch.get_num_threads(), dtype=torch.uint8)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_transforms_are_computed_by_one_thread_so_that_sums_have_the_same_bits_everywhere(memory, num_workers):
    torch.set_num_threads(2)
    try:
        options = {"batch_size": 41, "mean": (0, 0, 0), "std": (1 / 255,) * 3, "device": CPU}
        (batch,) = StreamLoader(memory, transforms=Transforms((Threads(),)), num_workers=num_workers, **options).epoch(
            0
        )
        torch.testing.assert_close(batch.images.unique(), torch.ones(1))
    finally:
        torch.set_num_threads(1)


def test_what_a_worker_is_sent_can_be_sent_to_a_process_that_shares_nothing(files):
    reader = stream._Reader(files, transforms_of(*STRONG), seed=5)
    images = reader[(1, [4, 2])]
    assert images.dtype == torch.uint8
    assert torch.equal(pickle.loads(pickle.dumps(reader))[(1, [4, 2])], images)


def test_the_number_of_workers_fits_cores_and_batches(files, memory):
    def workers(split, **options) -> int:
        return loader_of(split, **{"num_workers": None, "batch_size": 2, **options}).num_workers

    assert workers(files) == min(available_cores(), 8)
    assert workers(memory) == 0
    assert workers(files, num_workers=9, batch_size=15) == 3
    assert 1 <= available_cores() <= os.cpu_count()


# --- the workers' lives -----------------------------------------------------------------------------------


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


def test_workers_stay_from_epoch_to_epoch_and_end_with_the_loader(files):
    loader = loader_of(files, *STRONG, num_workers=2)
    list(loader.epoch(0))
    first = children()
    assert len(first) == 2
    list(loader.epoch(1))
    assert children() == first
    del loader
    assert not children()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_may_be_abandoned_half_way(files, num_workers):
    loader = loader_of(files, *STRONG, num_workers=num_workers)
    epoch = loader.epoch(0)
    next(epoch)
    assert_same(loader.epoch(1), loader_of(files, *STRONG).epoch(1))
    with pytest.raises(RuntimeError, match="ended by a later one"):
        next(epoch)
    epoch = loader.epoch(2)
    next(epoch)
    del epoch, loader
    gc.collect()
    assert not children()


def test_workers_end_at_once_with_a_loader_that_is_garbage_in_a_cycle(files):
    loader = loader_of(files, *STRONG, num_workers=2)
    cycle = [loader, loader.epoch(0)]
    cycle.append(cycle)
    next(cycle[1])
    del loader, cycle
    began = time.monotonic()
    gc.collect()
    assert not children()
    assert time.monotonic() - began < 4  # torch alone takes 5 s for each worker


def test_a_closed_loader_starts_new_workers(files):
    loader = loader_of(files, num_workers=2)
    epoch = loader.epoch(0)
    next(epoch)
    loader.close()
    assert not children()
    with pytest.raises(RuntimeError, match="ended by"):
        next(epoch)
    assert_same(loader.epoch(0), loader_of(files).epoch(0))


def test_a_plain_loader_and_its_original_do_not_disturb_each_other(files):
    loader = loader_of(files, *STRONG, num_workers=2)
    both = zip(loader.epoch(0), loader.plain().epoch(0), strict=True)
    augmented, plain = zip(*both, strict=True)
    assert_same(augmented, loader_of(files, *STRONG).epoch(0))
    assert_same(plain, loader_of(files).plain().epoch(0))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_file_is_one_line_with_its_path(files, tmp_path, num_workers, damage):
    folder = shutil.copytree(files.folder, tmp_path / "copy")
    bad = folder / "07.png"
    bad.write_bytes(bad.read_bytes()[:300]) if damage == "cut" else bad.unlink()
    loader = loader_of(dataclasses.replace(files, folder=str(folder)), *STRONG, num_workers=num_workers)
    with pytest.raises(InputError) as caught:
        list(loader.epoch(0))
    assert str(caught.value).startswith(f"{bad} is not a readable image (")
    assert "\n" not in str(caught.value)
    assert caught.value.reason == "data"
    Image.new("RGB", (20, 20)).save(bad)  # the loader is as good as new
    assert len(list(loader.epoch(0))) == len(loader)


@pytest.mark.parametrize("number", stream.SIGNALS, ids=lambda number: number.name)
def test_workers_outlive_a_signal_that_the_run_wants_to_save_after(files, number):
    loader = loader_of(files, *STRONG, num_workers=2)
    epoch = loader.epoch(0)
    batches = [next(epoch)]
    for pid in children():
        os.kill(pid, number)
    assert_same([*batches, *epoch], loader_of(files, *STRONG).epoch(0))


FIRST_IN_A_CHILD: list[Callable[[], None]] = []
os.register_at_fork(after_in_child=lambda: [act() for act in FIRST_IN_A_CHILD])


@pytest.mark.parametrize("number", stream.SIGNALS, ids=lambda number: number.name)
def test_workers_outlive_a_signal_that_comes_while_they_start(files, number):
    loader = loader_of(files, *STRONG, num_workers=2)
    FIRST_IN_A_CHILD.append(lambda: os.kill(os.getpid(), number))
    try:
        batches = list(loader.epoch(0))
    finally:
        FIRST_IN_A_CHILD.clear()
    assert len(children()) == 2
    assert_same(batches, loader_of(files, *STRONG).epoch(0))


def test_a_worker_that_was_told_to_end_does_so_after_a_while_even_if_nobody_ends_it(files, monkeypatch):
    monkeypatch.setattr(stream, "GRACE", 1)
    loader = loader_of(files, num_workers=1)
    next(loader.epoch(0))
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    with contextlib.suppress(RuntimeError):  # torch's, if it is the first to see the worker dead
        worker.join(10)
    worker.join(10)
    assert worker.exitcode == -signal.SIGALRM


MIDDLE_OF_AN_EPOCH = """
import weakref
class Early: pass
early = Early()
weakref.finalize(early, int)  # as some library may do before torch is imported: it decides the order of cleaning up

import multiprocessing, pathlib, pickle, signal, sys, time, torch
from model.data.stream import StreamLoader

split = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
options = {"batch_size": 4, "mean": (0, 0, 0), "std": (1, 1, 1), "device": torch.device("cpu")}
loader = StreamLoader(split, num_workers=2, **options)
stopped = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: stopped.append(1))
epoch = loader.epoch(0)
next(epoch)
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
"""


def begin(split: FileSplit, folder: Path, then: str) -> subprocess.Popen[str]:
    """Starts a process, with a group of its own, that has two workers and is in the middle of an epoch."""
    (folder / "split").write_bytes(pickle.dumps(split))
    code = MIDDLE_OF_AN_EPOCH + textwrap.dedent(then)
    command = [sys.executable, "-W", "error", "-c", code, str(folder / "split")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_the_run_quietly_and_at_once_after_it_has_saved(files, tmp_path, number):
    save = """
        while not stopped:
            time.sleep(0.01)
        for _ in range(3):
            next(epoch)
        print("saved", flush=True)
        sys.exit(7)
    """
    with begin(files, tmp_path, save) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        os.killpg(process.pid, number)
        began = time.monotonic()
        out, err = process.communicate(timeout=180)
    assert (out, err, process.returncode) == ("saved\n", "", 7)
    assert len(pids) == 2
    assert not any(map(alive, pids))
    assert time.monotonic() - began < 5  # nobody waited for a worker that had been told to end


def test_a_worker_whose_run_is_gone_before_it_begins_ends_at_once():
    for run, exitcode in ((os.getpid(), 0), (os.getpid() + 1, 1)):
        worker = multiprocessing.get_context("fork").Process(target=stream._begin_worker, args=(run, 0))
        worker.start()
        worker.join(10)
        assert worker.exitcode == exitcode


@pytest.mark.slow
def test_workers_end_when_the_run_is_killed(files, tmp_path):
    with begin(files, tmp_path, "time.sleep(100)") as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert all(map(alive, pids))
        process.kill()
        limit = time.monotonic() + 120
        while any(map(alive, pids)):
            assert time.monotonic() < limit
            time.sleep(0.1)
