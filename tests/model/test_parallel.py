"""Several processes as one run. The oracle is one process, or numpy; the processes are real, and talk over gloo."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, Ended, Make, Script, read_journal, snapshot
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

import train
from checkpoint import load_checkpoint
from experiment import read_status
from model import data, parallel
from model.data import DATASETS
from model.engine import Learner, Totals, evaluate, train_epoch
from model.errors import InputError
from model.losses.base import Loss
from model.optim import SCHEDULES, create_schedule
from model.outputs import Batch, Outputs
from process import run_main

CPU = torch.device("cpu")
KD = {"name": "kd", "alpha": 0.9, "temperature": 4.0}
# 187 less 20 for validation: 5 steps of 32, and 7 samples that two processes share as 3 and 4
UNEVEN = {"train_size": 187, "batch_size": 32}

# A server that has imported all forks the processes: that takes no time, and it has run no backward pass before.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "tensorboardX", "torch._dynamo"])


def _process(rank: int, size: int, port: int, task: bytes, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    function, args = pickle.loads(task)
    try:
        answers.put((rank, pickle.dumps(function(*args)), ""))
    except BaseException:
        answers.put((rank, b"", traceback.format_exc()))


def in_processes(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Returns what a function returns in each of several processes of one run."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun holds it
    answers = SERVER.Queue()
    task = pickle.dumps((function, args))  # multiprocessing itself would share the memory of tensors, which then goes
    started = [SERVER.Process(target=_process, args=(rank, size, store.port, task, answers)) for rank in range(size)]
    for process in started:
        process.start()
    try:
        found = sorted((answers.get(timeout=180) for _ in started), key=lambda answer: answer[0])
    finally:
        for process in started:
            process.join(5)
            process.kill()
    assert not any(error for *_, error in found), "\n".join(error for *_, error in found)
    return [pickle.loads(answer) for _, answer, _ in found]


def _train(arguments: list[str], stop_at: tuple[int, int, int]) -> Ended:
    rank, number, step = stop_at
    if parallel.rank() == rank and step:
        shown, train_epoch = [0], train.train_epoch

        def counting(*args: Any, after_step: Callable[[], None], **options: Any) -> dict[str, float]:
            def after() -> None:
                shown[0] += 1
                if shown[0] == step:
                    signal.raise_signal(number)
                after_step()

            return train_epoch(*args, after_step=after, **options)

        train.train_epoch = counting
    sys.argv = ["train.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            run_main(train.main)
        except SystemExit as ended:
            return Ended(int(ended.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("run_main returned")


def train_in(size: int, *arguments: Any, stop_at: tuple[int, int, int] = (0, 0, 0)) -> list[Ended]:
    """Runs train.py in several processes; `stop_at`: which of them gets which signal at which of its steps."""
    return in_processes(size, _train, [*map(str, arguments)], stop_at)


def weights_of(path: Path) -> dict[str, Tensor]:
    state = load_checkpoint(path)[0]
    return {**state["state_dict"], **{f"loss.{key}": value for key, value in state["loss_dict"].items()}}


def assert_same_run(one: Path, other: Path) -> None:
    """Asserts that two directories hold bitwise the same result."""
    first, second = (load_checkpoint(folder / "last.pth.tar")[0] for folder in (one, other))
    for key in ("state_dict", "loss_dict"):
        assert first[key].keys() == second[key].keys()
        assert all(torch.equal(value, second[key][name]) for name, value in first[key].items())
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


# --- alone ----------------------------------------------------------------------------------------------------


def test_alone_nothing_is_joined_and_nothing_is_changed() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    with parallel.together("cuda:7") as device, parallel.fenced(), parallel.first_goes_first():
        assert device == "cuda:7"
        assert (parallel.rank(), parallel.size(), parallel.stride()) == (0, 1, 1)
        assert parallel.maximum(3, 0) == [3, 0]
        assert parallel.from_first("a") == "a"
        assert parallel.gather("a") == ["a"]
        parallel.sum_gradients(optimizer)
        parallel.align(nn.Linear(1, 1))
    assert not dist.is_initialized()


# --- who gets what --------------------------------------------------------------------------------------------


@pytest.fixture
def of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the third of four."""
    for key, value in {"RANK": 2, "LOCAL_RANK": 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(key, str(value))


@pytest.mark.usefixtures("of_four")
@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [("auto", 4, "cuda:2"), ("cuda", 4, "cuda:2"), ("cuda", 0, "cuda:2"), ("auto", 0, "cpu"), ("cpu", 4, "cpu")],
)
def test_each_process_takes_its_own_gpu_or_all_share_the_cpu(
    name: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert parallel._own_device(name) == expected


@pytest.mark.usefixtures("of_four")
@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("cuda:1", 4, "^--device cuda:1: 4 processes cannot share it; name cpu or cuda$"),
        ("mps", 0, "^--device mps: 4 processes"),
        ("auto", 2, r"^4 processes on 2 GPUs: each takes one; start fewer \(--nproc_per_node\), or name --device cpu$"),
    ],
)
def test_a_device_that_several_processes_cannot_have_is_one_line(
    name: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=message):
        parallel._own_device(name)


@pytest.mark.usefixtures("of_four")
def test_on_cuda_batch_norms_become_synchronised_and_keep_their_weights_and_what_is_frozen() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net[1].requires_grad_(False)
    weights = net.state_dict()
    assert parallel.synchronised(net, CPU) is net
    assert parallel.remarks(CPU, [net], []) != []
    assert parallel.remarks(CPU, [net], [net[1]]) == []
    synchronised = parallel.synchronised(net, torch.device("cuda"))
    assert isinstance(synchronised[1], nn.SyncBatchNorm)
    assert not any(parameter.requires_grad for parameter in synchronised[1].parameters())
    assert synchronised.state_dict().keys() == weights.keys()
    assert parallel.remarks(torch.device("cuda"), [synchronised], []) == []


def _exchange() -> dict[str, Any]:
    with parallel.together("cpu") as device:
        rank = parallel.rank()
        a, b, unused = (nn.Parameter(torch.full(shape, float(rank))) for shape in ((2, 3, 2, 2), (5,), (4,)))
        a.data = a.data.to(memory_format=torch.channels_last)
        a.grad = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last) * (rank + 1)
        b.grad = torch.full((5,), float(10**rank))
        parallel.sum_gradients(torch.optim.SGD([{"params": [a, unused]}, {"params": [b]}], lr=1.0))
        torch.manual_seed(rank)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        net[1].num_batches_tracked += rank
        parallel.align(net)
        return {
            "device": device,
            "maximum": parallel.maximum(rank, -rank),
            "total": parallel.total(torch.tensor([1.0, float(rank)], dtype=torch.float64)),
            "gather": parallel.gather({"rank": rank}),
            "from_first": parallel.from_first(f"of {rank}"),
            "gradients": (a.grad, b.grad, unused.grad),
            "weights": net.state_dict(),
        }


def test_what_processes_exchange_is_what_numpy_would_make_of_it() -> None:
    answers = in_processes(3, _exchange)
    torch.manual_seed(0)
    weights = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    for answer in answers:
        assert answer["device"] == "cpu"
        assert answer["maximum"] == [2, 0]
        assert answer["total"].tolist() == [3.0, 3.0]
        assert answer["gather"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert answer["from_first"] == "of 0"
        a, b, unused = answer["gradients"]
        assert torch.equal(a, 6 * torch.arange(24.0).view(2, 3, 2, 2))
        assert torch.equal(b, torch.full((5,), 111.0))
        assert unused is None
        assert all(torch.equal(value, weights[key]) for key, value in answer["weights"].items())


def _take_turns(folder: Path) -> list[int]:
    def present() -> int:
        return len(list(folder.iterdir()))

    with parallel.together("cpu"):
        rank = parallel.rank()
        seen = []
        with parallel.first_goes_first():
            if rank == 0:
                time.sleep(0.3)
            seen.append(present())
            (folder / f"begun_{rank}").touch()
        time.sleep(0.2 * rank)
        (folder / f"before_{rank}").touch()
        with parallel.fenced():
            seen.append(len(list(folder.glob("before_*"))))
            time.sleep(0.2 * rank)
            (folder / f"within_{rank}").touch()
        seen.append(len(list(folder.glob("within_*"))))
        return seen


def test_the_first_goes_first_and_a_fence_keeps_all_on_one_side(tmp_path: Path) -> None:
    first, *others = in_processes(3, _take_turns, tmp_path)
    assert first == [0, 3, 3]
    for before, *fenced in others:
        assert before > 0
        assert fenced == [3, 3]


def _fail(who: int) -> tuple[str, str, float]:
    parallel.GRACE = 1
    begun = time.monotonic()
    try:
        with parallel.together("cpu"):
            if parallel.rank() == who:
                raise InputError("mine")
            parallel.maximum(0)
    except (InputError, parallel.PeerError, SystemExit) as error:
        return type(error).__name__, str(error), time.monotonic() - begun
    raise AssertionError("no error")


def test_who_fails_says_so_and_the_first_says_that_another_has_failed() -> None:
    (first, why, _), (other, own, seconds) = in_processes(2, _fail, 1)
    assert (first, other, own) == ("PeerError", "InputError", "mine")
    assert why.startswith("another process of this run has ended, see what it said; here: ")
    assert seconds > 1  # the first one's error would have come meanwhile, and torchrun ended this one
    first, other = in_processes(2, _fail, 0)
    assert first[:2] == ("InputError", "mine")
    assert other[:2] == ("SystemExit", "1")


# --- sums -----------------------------------------------------------------------------------------------------


def _totals(before: dict[str, Any] | None = None) -> tuple[dict[str, float], Any, Any]:
    with parallel.together("cpu"):
        rank, whole, cut = parallel.rank(), Totals(CPU), Totals(CPU)
        if before is not None:
            whole.load_state_dict(before)
            return whole.of_all().means(), whole.samples, whole.steps
        generator = torch.Generator().manual_seed(rank)
        for step in range(500):
            loss = 10 * torch.rand((), generator=generator) ** 4  # of many magnitudes: the order of a sum is seen
            for totals in (whole, cut):
                totals.add({"accuracy": torch.tensor(rank)}, {"loss": loss}, 16 * (rank + 1))
            if step in (100, 333):
                state = cut.state_dict()
                cut = Totals(CPU)
                cut.load_state_dict(state)
        return whole.of_all().means(), cut.of_all().means(), whole.state_dict()


def test_sums_are_those_of_all_samples_and_the_same_bits_after_a_restart() -> None:
    expected = 0.0
    for rank in range(3):
        generator = torch.Generator().manual_seed(rank)
        expected += sum(16 * (rank + 1) * float(10 * torch.rand((), generator=generator) ** 4) for _ in range(500))
    for means, after_restarts, state in in_processes(3, _totals):
        assert means == pytest.approx({"accuracy": 3 / 96, "loss": expected / (500 * 96)}, rel=1e-12)
        assert after_restarts == means
        assert state["samples"].tolist() == [8000, 16000, 24000]


def test_sums_of_another_number_of_processes_are_restored_as_a_whole() -> None:
    [(means, _, state), *_] = in_processes(3, _totals)
    alone = Totals(CPU)
    alone.load_state_dict(state)
    assert (alone.samples, alone.steps, alone.means()) == (48000, 500, pytest.approx(means))
    assert in_processes(2, _totals, state) == [(pytest.approx(means), 48000, 500), (pytest.approx(means), 0, 500)]
    alone.load_state_dict({"sums": {"loss": torch.tensor(6.0)}, "samples": 3, "steps": 1})  # as once they were saved
    assert alone.means() == {"loss": 2.0}


# --- an epoch in several processes is an epoch in one -----------------------------------------------------------


class Hint(Loss):
    """Cross-entropy, and a regression through a map that the loss itself learns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.adapter = nn.Linear(4, 2)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        hint = F.mse_loss(self.adapter(student.logits), batch.images.mean((2, 3))[:, :2])
        return {"ce": F.cross_entropy(student.logits, batch.labels), "hint": hint}


def _epochs(parts: int) -> dict[str, Any]:
    with parallel.together("cpu") if parts > 1 else contextlib.nullcontext():
        section, _ = DATASETS.resolve({"name": "synthetic", "augmentation": "crop_flip", **UNEVEN})
        splits = data.create(section, seed=0, device=CPU)
        splits.share(parallel.rank(), parallel.size())
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
        net(torch.zeros(1, 3, 16, 16))
        loss = Hint()
        optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=0.05, momentum=0.9)
        schedule = create_schedule(SCHEDULES.resolve({"name": "constant"})[0], optimizer, 2, len(splits.train))
        learner = Learner(net, loss, optimizer, schedule)
        seeds: list[int] = []
        means = [
            train_epoch(
                *(learner, splits.train), epoch=epoch, seed=0, after_step=lambda: seeds.append(torch.initial_seed())
            )
            for epoch in range(2)
        ]
        loaders = splits.train, splits.train, splits.val
        seen = [[batch.indices for batch in loader.epoch(epoch)] for epoch, loader in enumerate(loaders)]
        val = evaluate(net, splits.val, loss=loss)
        weights = {**net.state_dict(), **{f"loss.{key}": value for key, value in loss.state_dict().items()}}
        return {"means": means, "val": val, "weights": weights, "seen": seen, "seeds": seeds}


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_train_as_one_does(size: int) -> None:
    one, several = _epochs(1), in_processes(size, _epochs, size)
    for each in several:
        for found, expected in zip([*each["means"], each["val"]], [*one["means"], one["val"]], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        for key, value in each["weights"].items():
            torch.testing.assert_close(value, one["weights"][key], rtol=1e-5, atol=1e-6)
            assert torch.equal(value, several[0]["weights"][key])  # bitwise, or they would drift apart
    for epoch, steps in enumerate(one["seen"]):  # each step's samples are those of one process, and all are shown once
        for expected, *parts in zip(steps, *(each["seen"][epoch] for each in several), strict=True):
            assert torch.equal(torch.cat(parts), expected)
        assert len(torch.cat(steps).unique()) == sum(map(len, steps))
    assert len({seed for each in several for seed in each["seeds"]}) == size * len(one["seeds"])


# --- train.py -------------------------------------------------------------------------------------------------


def test_a_distilled_student_is_that_of_one_process_and_only_the_first_writes(
    script: Script, make_experiment: Make
) -> None:
    teacher = make_experiment("teacher", num_epochs=1)
    assert script(train, "--model_dir", teacher).status == 0
    student = {"width": 4, "freeze_bn": True, "init_from": str(teacher), "dropout_rate": 0.0}
    changes = {"teacher": str(teacher), "loss": KD, "student": student, "dataset": UNEVEN}
    one, two = make_experiment("one", **changes), make_experiment("two", **changes)
    assert script(train, "--model_dir", one).status == 0
    first, other = train_in(2, "--model_dir", two)
    assert (first.status, first.err) == (0, "")
    assert other == Ended(0, "", "")
    assert "processes 2" in first.out
    for record, expected in zip(read_journal(two), read_journal(one), strict=True):
        assert record["train"] == pytest.approx(expected["train"], abs=1e-5)
        assert record["val"] == pytest.approx(expected["val"], abs=1e-5)
    expected_weights = weights_of(one / "last.pth.tar")
    for key, value in weights_of(two / "last.pth.tar").items():
        torch.testing.assert_close(value, expected_weights[key], rtol=1e-5, atol=1e-5)
    assert {path.name.partition(".")[0] for path in two.iterdir()} == {p.name.partition(".")[0] for p in one.iterdir()}
    assert len(list(two.glob("events.*"))) == 1
    run = json.loads((two / "run.json").read_text())
    assert [attempt["processes"] for attempt in run["attempts"]] == [2]
    assert (two / "train.log").read_text().count(" Epoch ") == 2
    before = snapshot(two)
    first, other = train_in(2, "--model_dir", two)
    assert "Nothing to do" in first.out
    assert other == Ended(0, "", "")
    assert snapshot(two) == before


NOISY = {
    "dataset": {"train_size": 300, "batch_size": 16},  # 17 steps: two agreements an epoch
    "student": {"width": 4, "dropout_rate": 0.3},
    "loss": [{"name": "ce"}, {"name": "fitnets", "weight": 1.0}],
}


@pytest.mark.parametrize(
    ("size", "rank", "number"),
    [
        (2, 1, signal.SIGTERM),
        pytest.param(2, 0, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(3, 2, signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_stops_all_at_one_step_and_the_run_resumes_bitwise(
    make_experiment: Make, script: Script, size: int, rank: int, number: signal.Signals
) -> None:
    teacher = make_experiment("teacher", num_epochs=1)
    assert script(train, "--model_dir", teacher).status == 0
    whole, cut = (make_experiment(name, teacher=str(teacher), **NOISY) for name in ("whole", "cut"))
    assert {ended.status for ended in train_in(size, "--model_dir", whole)} == {0}
    first, *others = train_in(size, "--model_dir", cut, stop_at=(rank, number, 20))
    status = {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, 75)
    assert first.status == status
    assert f"stopped by {number.name} in epoch 2/2 after step 8" in first.err  # 20 less 17, and the next of 8
    assert first.err.count("\n") == 1
    assert others == [Ended(status, "", "")] * (size - 1)
    assert read_status(cut) == "interrupted"
    state = load_checkpoint(cut / "last.pth.tar")[0]
    assert (state["epoch"], state["step"], state["processes"]) == (1, 8, size)
    first, *_ = train_in(size, "--model_dir", cut)
    assert "going on after epoch 1, step 8" in first.out
    assert first.err == ""
    assert_same_run(whole, cut)
    assert len(json.loads((cut / "run.json").read_text())["attempts"]) == 2


def test_one_process_goes_on_where_two_have_stopped(make_experiment: Make, script: Script) -> None:
    folder = make_experiment(dataset=NOISY["dataset"])
    train_in(2, "--model_dir", folder, stop_at=(0, signal.SIGTERM, 10))
    ended = script(train, "--model_dir", folder)
    assert ended.status == 0, ended
    assert "the last bits will differ from those of an uninterrupted run: processes 2 -> 1" in ended.err
    assert [record["epoch"] for record in read_journal(folder)] == [1, 2]


def test_teacher_and_student_and_a_teacher_that_is_not_trained_are_made_in_one_go(make_experiment: Make) -> None:
    """Without epochs, with a teacher to train first, and only checked: all processes decide alike."""
    teacher = make_experiment("teacher", num_epochs=0)
    student = make_experiment("student", num_epochs=1, teacher=str(teacher), loss=KD)
    first, other = train_in(2, "--model_dir", student, "--train_teacher")
    assert first.status == 0, first
    assert other == Ended(0, "", "")
    assert "no epochs to train: kept as it begins" in first.out
    assert [read_status(folder) for folder in (teacher, student)] == ["completed"] * 2
    first, other = train_in(2, "--model_dir", student, teacher, "--check")
    assert first == Ended(0, "2 of 2 params.json pass the check\n", "")
    assert other == Ended(0, "", "")


def test_steps_that_are_too_small_to_share_are_refused(script: Script, make_experiment: Make, tmp_path: Path) -> None:
    section, _ = DATASETS.resolve({"name": "synthetic", "train_size": 60, "batch_size": 7})
    splits = data.create(section, seed=0, device=CPU)
    message = "^steps of at most 7 samples for 4 processes: each needs two; start fewer, or raise dataset.batch_size$"
    with pytest.raises(InputError, match=message):
        splits.share(1, 4)
    splits.share(0, 3)


# --- under torchrun -------------------------------------------------------------------------------------------


def torchrun(size: int, *arguments: Any) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    return [*launch, str(ROOT / "train.py"), *map(str, arguments)]


def own_lines(text: str) -> list[str]:
    """Returns the lines that are not torchrun's own."""
    return [line for line in text.splitlines() if "kdlab" in line or "params.json" in line]


def test_a_wrong_params_json_ends_with_one_line(make_experiment: Make) -> None:
    folder = make_experiment(num_epochs=-1)
    ended = subprocess.run(torchrun(2, "--model_dir", folder), capture_output=True, text=True, timeout=180)
    assert ended.returncode == 1  # torchrun's own, whatever ours are; it reports ours
    assert own_lines(ended.stderr) == [f"{folder}/params.json: num_epochs: -1 is below 0"]
    assert "exitcode  : 2" in ended.stderr
    assert "Traceback" not in ended.stderr.partition("elastic")[0]


@pytest.mark.slow
def test_torchrun_passes_a_signal_on_and_the_same_command_ends_with_the_same_bits(make_experiment: Make) -> None:
    changes = {**NOISY, "loss": {"name": "ce"}, "num_epochs": 15}
    whole, cut = (make_experiment(name, **changes) for name in ("whole", "cut"))
    subprocess.run(torchrun(2, "--model_dir", whole), capture_output=True, check=True, timeout=120)
    with subprocess.Popen(torchrun(2, "--model_dir", cut), stderr=subprocess.PIPE, text=True) as process:
        while len(read_journal(cut)) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=180)
    assert err.count("stopped by SIGTERM") == 1
    assert read_status(cut) == "interrupted"
    assert len(read_journal(cut)) < 15
    subprocess.run(torchrun(2, "--model_dir", cut), capture_output=True, check=True, timeout=120)
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_a_directory_in_use_ends_all_processes_with_one_line(make_experiment: Make) -> None:
    folder = make_experiment(num_epochs=1)
    with train.Experiment(folder)._acquire():
        ended = subprocess.run(torchrun(2, "--model_dir", folder), capture_output=True, text=True, timeout=180)
    assert ended.stderr.count(f"{folder} is in use by") == 1
    assert "exitcode  : 75" in ended.stderr
    assert not (folder / "run.json").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_which_resumes_bitwise(make_experiment: Make) -> None:
    changes = {**NOISY, "loss": {"name": "ce"}, "num_epochs": 15}
    whole, cut = (make_experiment(name, **changes) for name in ("whole", "cut"))
    subprocess.run(torchrun(2, "--model_dir", whole), capture_output=True, check=True, timeout=120)
    with subprocess.Popen(torchrun(2, "--model_dir", cut), stderr=subprocess.PIPE, text=True) as process:
        while len(read_journal(cut)) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        writer = json.loads((cut / "run.json").read_text())["attempts"][0]["pid"]
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        [follower] = [pid for pid in map(int, children) if pid != writer]
        os.kill(follower, signal.SIGKILL)
        _, err = process.communicate(timeout=180)
    told = err.count("another process of this run has ended, see what it said")
    run = json.loads((cut / "run.json").read_text())
    # torchrun ends the others as soon as it sees that one has gone: that may be before they see it.
    assert (run["status"], run["reason"], told) in (("failed", "worker", 1), ("interrupted", "signal", 0))
    subprocess.run(torchrun(2, "--model_dir", cut), capture_output=True, check=True, timeout=120)
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_divergence_is_told_once(make_experiment: Make) -> None:
    optimizer = {"name": "sgd", "learning_rate": 1000, "weight_decay": 10}
    folder = make_experiment(optimizer=optimizer, num_epochs=50)
    ended = subprocess.run(torchrun(2, "--model_dir", folder), capture_output=True, text=True, timeout=180)
    assert ended.stderr.count("not finite") == 1
    assert json.loads((folder / "run.json").read_text())["reason"] == "diverged"
