"""One run in several processes: `torchrun --standalone --nproc_per_node=N train.py ...`; alone, all here is trivial.

Every process holds all of the student, takes its share of every step's batch, and the gradients are summed: all take
the step that one process would take with the whole batch. The first process writes, the others follow.

Not `DistributedDataParallel`: after its first step it packs the gradients anew, in the order in which they arrived, and
with three or more processes the order of a sum depends on the place in the pack. So a run that was resumed would not
end with the same bits. Here the order is fixed, the student stays bare and a loss's own parameters are no special case;
what is lost is that gradients are sent while others are computed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from model.devices import choose_device
from model.errors import InputError

STRIDE = 8  # steps from one agreement with the other processes to the next: each costs a round trip
GRACE = 10  # seconds for the first process to tell of an error that all have
TIMEOUT = timedelta(days=1)  # torchrun ends all when one has ended; until then, one may prepare data for the others

T = TypeVar("T")
NetT = TypeVar("NetT", bound=nn.Module)


class PeerError(RuntimeError):
    """Another process of the run has ended."""

    exit_status = 1
    reason = "worker"


def size() -> int:
    """Returns how many processes make up this run."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Returns which of them this one is, from 0: the first, which writes."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def stride() -> int:
    """Returns at every how many steps the processes agree on what is to be done."""
    return STRIDE if size() > 1 else 1


def refuse_several(script: str) -> None:
    """Ends a script that torchrun, or whatever sets its variables, has started in several processes.

    Raises:
        InputError: It has.
    """
    if size() > 1:
        raise InputError(
            f"{script} is one process; start it without torchrun (here RANK and WORLD_SIZE are set)", "usage"
        )


@contextlib.contextmanager
def together(device: str) -> Iterator[str]:
    """Joins the processes of the run; an error that all of them meet is raised by the first alone.

    Args:
        device: As for `choose_device`.

    Yields:
        This process's own device: each takes a GPU, or all share the CPU.

    Raises:
        InputError: `device` is not there, or several processes cannot have it.
    """
    if size() == 1:
        yield device
        return
    try:
        own = _own_device(device)
        if own == "cpu":
            dist.init_process_group("gloo", timeout=TIMEOUT)
        else:
            torch.cuda.set_device(choose_device(own))
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
        yield own
    except PeerError as error:
        if rank() > 0:  # the first one says so, unless it is the one that has ended
            raise SystemExit(error.exit_status) from None
        raise
    except Exception:
        if rank() > 0:
            time.sleep(GRACE)  # if the first one has the same error, it tells of it and torchrun ends this one here
        raise
    dist.destroy_process_group()


def _own_device(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device}: {size()} processes cannot share it; name cpu or cuda", "usage")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    number = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and number >= (found := torch.cuda.device_count()):
        line = f"{os.environ['LOCAL_WORLD_SIZE']} processes on {found} GPU{'s' * (found > 1)}"
        raise InputError(f"{line}: each takes one; start fewer (--nproc_per_node), or name --device cpu", "usage")
    return f"cuda:{number}"


@contextlib.contextmanager
def _with_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's errors of this kind have no common class
        why = str(error).partition("\n")[0]
        raise PeerError(f"another process of this run has ended, see what it said; here: {why}") from None


# --- agreements: small values, on the CPU -------------------------------------------------------------------


def maximum(*values: int) -> list[int]:
    """Returns the greatest of each value over the processes."""
    if size() == 1:
        return list(values)
    shared = torch.tensor(values)
    with _with_peers():
        dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def total(values: Tensor) -> Tensor:
    """Returns the sum of `values` over the processes."""
    if size() == 1:
        return values
    shared = values.cpu()
    with _with_peers():
        dist.all_reduce(shared)
    return shared.to(values.device)


def gather(value: T) -> list[T]:
    """Returns each process's value, in order; plain types, and tensors on the CPU."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with _with_peers():
        dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """Returns the first process's value; plain types, and tensors on the CPU."""
    if size() == 1:
        return value
    shared = [value]
    with _with_peers():
        dist.broadcast_object_list(shared, src=0)
    return shared[0]


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Lets the others begin when the first process is done: what it has downloaded or cached, they find."""
    if rank() > 0:
        maximum(0)
    yield
    if rank() == 0:
        maximum(0)


@contextlib.contextmanager
def fenced() -> Iterator[None]:
    """Lets no process begin before all are here, and none go on before all are done."""
    maximum(0)
    yield
    maximum(0)


# --- the step -----------------------------------------------------------------------------------------------


def sum_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Replaces each gradient by its sum over the processes, whose losses are weighted by their shares of the batch."""
    if size() == 1:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    packed = torch.cat([gradient.flatten() for gradient in gradients])
    with _with_peers():
        dist.all_reduce(packed)
    _unpack(packed, gradients)


def align(*modules: nn.Module) -> None:
    """Gives every process the weights and buffers of the first.

    The weights are the same already; statistics of batch norms are those of each process's own samples.
    """
    if size() == 1:
        return
    values = [value for module in modules for value in module.state_dict().values()]
    for dtype in dict.fromkeys(value.dtype for value in values):
        same = [value for value in values if value.dtype == dtype]
        packed = torch.cat([value.flatten() for value in same])
        with _with_peers():
            dist.broadcast(packed, src=0)
        _unpack(packed, same)


def _unpack(packed: Tensor, values: list[Tensor]) -> None:
    for value, part in zip(values, packed.split([value.numel() for value in values]), strict=True):
        value.copy_(part.view(value.shape))


def synchronised(net: NetT, device: torch.device) -> NetT:
    """Lets a net's batch norms normalise with the whole step's batch, as in one process; only CUDA can do that."""
    if size() == 1 or device.type != "cuda":
        return net
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


def remarks(device: torch.device, modules: Sequence[nn.Module], frozen_norms: Sequence[nn.Module]) -> list[str]:
    """Returns what makes several processes differ from one, for the log."""
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if size() == 1 or device.type == "cuda" or len(norms) == len(frozen_norms):
        return []
    return [f"batch norms: each of the {size()} processes normalises with its own part of a batch; on CUDA with all"]
