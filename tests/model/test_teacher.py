from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from model.errors import InputError
from model.nets import NETS
from model.teacher import FrozenTeacher, create_teacher

OURS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
THEIRS = {"mean": [0.1, 0.2, 0.6], "std": [0.5, 0.1, 0.4]}
RECORD: dict[str, Any] = {
    "section": {"name": "tiny", "width": 8, "dropout_rate": 0.5},
    "num_classes": 3,
    "classes": ["cat", "dog", "eel"],
    "shape": [3, 16, 16],
    **OURS,
}


def net_of(seed: int = 0) -> nn.Module:
    """Returns a net whose running statistics are not those of a new one."""
    torch.manual_seed(seed)
    net: nn.Module = NETS.create(RECORD["section"], 3)
    with torch.no_grad():
        for _ in range(3):
            net(images() + 1)
    return net


def images(seed: int = 0) -> Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def state_of(net: nn.Module, **changes: Any) -> dict[str, Any]:
    return {"net": RECORD | changes, "state_dict": net.state_dict()}


def normalised(pixels: Tensor, constants: dict[str, list[float]]) -> Tensor:
    mean, std = (torch.tensor(constants[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


# --- frozen ---------------------------------------------------------------------------------------------------


def test_it_stays_in_eval_mode_whatever_is_asked_of_it() -> None:
    teacher = FrozenTeacher(net_of().train())
    around = nn.Sequential(teacher)
    for ask in (lambda: None, teacher.train, around.train, lambda: teacher.train(True), lambda: around.train(True)):
        ask()
        assert {module.training for module in teacher.modules()} == {False}
    assert teacher.train() is teacher


def test_its_answers_do_not_change_and_nor_does_it() -> None:
    teacher = FrozenTeacher(net_of()).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    first = teacher(images())
    teacher(images(1))
    assert torch.equal(teacher(images()), first)  # neither dropout nor drifting statistics
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_it_has_nothing_to_train_and_builds_no_graph() -> None:
    teacher: Any = FrozenTeacher(net_of())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pictures = images().requires_grad_()
    outputs = teacher.forward_with_features(pictures)
    for tensor in (teacher(pictures), outputs.logits, *outputs.features, *outputs.preacts, outputs.embedding):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None


def test_its_answers_can_be_targets_in_a_backward() -> None:
    # Tensors of inference_mode cannot: "Inference tensors cannot be saved for backward".
    teacher, student = FrozenTeacher(net_of()), net_of(1)
    ours, theirs = student.forward_with_features(images()), teacher.forward_with_features(images())  # type: ignore[operator]
    loss = F.mse_loss(ours.embedding * theirs.embedding, theirs.embedding)
    for logits in (theirs.logits, teacher(images())):
        loss = loss + F.mse_loss(ours.logits, logits)
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


# --- its own view of the images -------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [OURS, THEIRS, OURS | {"mean": THEIRS["mean"]}, OURS | {"std": THEIRS["std"]}])
def test_it_sees_the_images_under_its_own_normalisation(theirs: dict[str, list[float]]) -> None:
    net = net_of()
    teacher = create_teacher(state_of(net, **theirs), "t", RECORD)
    pixels = images()
    seen: list[Tensor] = []
    teacher.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = teacher(normalised(pixels, OURS))
    assert_close(seen[0], normalised(pixels, theirs), rtol=1e-5, atol=1e-5)
    expected: Any = net.eval().forward_with_features(normalised(pixels, theirs))  # type: ignore[operator]
    found = teacher.forward_with_features(normalised(pixels, OURS))
    for one, other in ((logits, expected.logits), (found.logits, expected.logits)):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert_close(found.embedding, expected.embedding, rtol=1e-4, atol=1e-5)


def test_with_the_same_constants_the_images_are_not_touched() -> None:
    net = net_of()
    teacher = create_teacher(state_of(net), "t", RECORD)
    pixels = images()
    seen: list[Tensor] = []
    teacher.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert torch.equal(teacher(pixels), net.eval()(pixels))
    assert seen[0] is pixels


def test_the_constants_move_with_it_and_are_no_weights() -> None:
    teacher = create_teacher(state_of(net_of(), **THEIRS), "t", RECORD)
    assert [name for name in teacher.state_dict() if not name.startswith("net.")] == []
    assert teacher.to("meta")(images().to("meta")).device.type == "meta"


# --- from a checkpoint ----------------------------------------------------------------------------------------


def test_it_is_the_net_of_the_checkpoint() -> None:
    net = net_of()
    teacher = create_teacher(state_of(net), "t", RECORD)
    assert list(teacher.net.state_dict()) == list(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in teacher.net.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_classes": 4, "classes": ["cat", "dog", "eel", "fly"]}, ["4 classes", "student has 3"]),
        ({"classes": ["cat", "eel", "dog"]}, ["another order", "'eel'", "'dog'"]),
        ({"classes": ["cat", "dog", "emu"]}, ["differ", "'emu'", "'eel'"]),
        ({"shape": [3, 32, 32]}, ["[3, 32, 32]", "[3, 16, 16]", "same image size"]),
        ({"shape": [1, 16, 16]}, ["[1, 16, 16]", "[3, 16, 16]"]),
    ],
)
def test_a_teacher_of_other_data_is_refused_with_both_sides_named(changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        create_teacher(state_of(net_of(), **changes), "teacher experiments/t", RECORD)
    message = str(caught.value)
    assert message.startswith("teacher experiments/t: ")
    assert "\n" not in message
    assert [part for part in said if part not in message] == []
    assert (caught.value.reason, caught.value.exit_status) == ("teacher", 2)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "tinny"}, "did you mean 'tiny'"),
        ({"name": "tiny", "depth": 3}, "depth: unknown option"),
        ({"name": "tiny", "width": 9, "dropout_rate": 0.0}, "weights do not fit"),
    ],
)
def test_a_checkpoint_that_is_not_to_be_built_is_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        create_teacher(state_of(net_of(), section=section), "teacher experiments/t", RECORD)
    assert str(caught.value).startswith("teacher experiments/t: ")
    assert "\n" not in str(caught.value)
