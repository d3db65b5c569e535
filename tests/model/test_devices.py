"""Devices that are there and that are not; what a net computes in."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from model import data, devices
from model.data import DATASETS
from model.devices import choose_device, choose_precision, compiled, device_name, place
from model.errors import InputError
from model.nets import NETS
from model.outputs import outputs_of

CPU = torch.device("cpu")
LOGITS = frozenset({"logits"})


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_precision_that_is_named_is_used(name: str) -> None:
    assert choose_precision(name, CPU) == name
    assert choose_precision(name, torch.device("cuda")) == name


@pytest.mark.parametrize(("capable", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_bf16_where_the_hardware_has_it(
    capable: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: capable)
    assert choose_precision("auto", CPU) == expected
    # Emulated bf16 would be slower than fp32.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: capable or including_emulation
    )
    assert choose_precision("auto", torch.device("cuda")) == expected
    assert choose_precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "hpu", "", "cpu0"])
def test_a_device_that_cannot_be_used_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match=f"^--device {name}: cannot be used: .*name another, such as cpu$") as caught:
        choose_device(name)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_fastest_device_there_is(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(devices.torch, "empty", lambda *_, **__: None)  # the trial of a device that is not here
    assert choose_device("auto").type == expected


def test_the_cpu_can_be_chosen_and_has_a_name() -> None:
    assert choose_device("cpu") == CPU
    assert device_name(CPU) == "cpu"


def test_a_placed_net_is_channels_last_like_its_batches() -> None:
    net = place(nn.Conv2d(3, 4, 3), CPU)
    assert net.weight.is_contiguous(memory_format=torch.channels_last)
    section, _ = DATASETS.resolve({"name": "synthetic", "num_classes": 2, "train_size": 40, "batch_size": 30})
    batch = next(iter(data.create(section, seed=0, device=CPU).train.epoch(0)))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


# --- compiled -------------------------------------------------------------------------------------------------


def test_what_cannot_be_compiled_runs_as_it_is_and_says_why_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[None] = []

    def no_compiler(*_: object) -> int:
        attempts.append(None)
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda _: no_compiler)
    double = compiled(lambda value: 2 * value)
    with pytest.warns(UserWarning, match=r"^compile: torch\.compile gave up: .*; training goes on without it$"):
        assert double(3) == 6
    assert double(4) == 8
    assert len(attempts) == 1


def test_an_error_of_the_function_itself_is_not_taken_for_one_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    with pytest.raises(ZeroDivisionError):
        compiled(lambda value: value // 0)(3)


@pytest.mark.slow  # the compiler takes half a minute
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(600)
def test_a_compiled_net_makes_the_outputs_and_gradients_of_the_net() -> None:
    torch.manual_seed(0)
    net, images = NETS.create({"name": "tiny", "width": 8, "dropout_rate": 0.0}, 4), torch.rand(6, 3, 16, 16)
    plain = outputs_of(net, images, LOGITS).logits
    plain.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    found = compiled(functools.partial(outputs_of, net))(images, LOGITS).logits
    found.square().sum().backward()
    assert_close(found, plain, rtol=1e-4, atol=1e-5)
    for name, parameter in net.named_parameters():
        assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)
