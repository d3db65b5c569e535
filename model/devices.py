"""Where nets run, and in what they compute."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from model.errors import InputError, Notice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Returns the device for `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, ...

    Raises:
        InputError: The name is no device, or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("known are cpu, cuda and mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"--device {name}: cannot be used: {why}; name another, such as cpu", "usage") from None
    return device


NetT = TypeVar("NetT", bound=nn.Module)


def place(net: NetT, device: torch.device) -> NetT:
    """Moves a net to where it runs, channels last: the layout that batches have, and the fastest for convolutions."""
    return net.to(device).to(memory_format=torch.channels_last)


def device_name(device: torch.device) -> str:
    """Returns what to call a device in a record: the model of a GPU, else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_precision(name: str, device: torch.device) -> str:
    """Returns `fp32`, `bf16` or `fp16`; `auto` is bf16 where the device computes in it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Not public, so it may go: then bf16 is to be asked for by name.
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if device.type == "cpu" and capable() else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which a net runs forward; losses stay outside of it, in float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


ResultT = TypeVar("ResultT")


def compiled(function: Callable[..., ResultT]) -> Callable[..., ResultT]:
    """Returns a function that runs compiled, or, where torch cannot do that, as it is; then a warning says why."""
    run = torch.compile(function)

    def attempt(*args: Any) -> ResultT:
        nonlocal run
        try:
            return run(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = " ".join(" ".join(str(error).split("\n")[:2]).split()) or type(error).__name__
            warnings.warn(f"compile: torch.compile gave up: {why}; training goes on without it", Notice, stacklevel=2)
            run = function
            return run(*args)

    return attempt
