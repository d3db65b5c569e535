"""Oracles: the mean of squares in numpy, the teacher's own classifier, a closed count of parameters."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from golden import batch_of
from torch import Tensor, nn

from model.engine import outputs_of, probe
from model.errors import InputError
from model.losses import LOSSES, create_objective, resolve
from model.losses.simkd import SimKDLoss, simkd_loss
from model.losses.stages import Shape
from model.nets import NETS
from model.outputs import Batch, Outputs, Probe
from model.projected import ProjectedNet, equipped
from model.teacher import FrozenTeacher

CLASSES = 5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs(maps: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(maps), CLASSES, dtype=maps.dtype), features=(maps,))


def loss_of(**options: Any) -> SimKDLoss:
    section, problems = LOSSES.resolve({"name": "simkd", **options})
    assert problems == []
    loss: SimKDLoss = LOSSES.create(section)
    return loss


def probe_of(name: str, net: nn.Module, *shapes: Shape) -> Probe:
    features = tuple(torch.empty(1, *shape, device="meta") for shape in shapes)
    return Probe(name, net, Outputs(torch.empty(1, CLASSES, device="meta"), features=features))


def tiny(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net: nn.Module = NETS.create({"name": "tiny", "width": width}, CLASSES)
    for _ in range(10):
        net(torch.randn(32, 3, 16, 16))  # statistics that are not those of a new net
    return net.eval()


def ready(**options: Any) -> tuple[SimKDLoss, nn.Module, dict[str, Any], nn.Module]:
    """Returns the loss, the equipped student, its record and the teacher."""
    student, teacher = tiny(3, seed=1), tiny(4, seed=2)
    loss = loss_of(**options)
    loss.attach(probe(student, "student", (3, 16, 16)), probe(teacher, "teacher", (3, 16, 16)))
    net, record = loss.equip(student)
    return loss, net, record, teacher


# --- the formula ------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_squared_difference_over_batch_and_map() -> None:
    student, teacher = noise(4, 6, 5, 5), noise(4, 6, 5, 5, seed=1)
    terms = loss_of()(outputs(student), outputs(teacher), batch_of(torch.arange(4)))
    assert list(terms) == ["simkd"]
    assert terms["simkd"].item() == pytest.approx(((student - teacher).numpy() ** 2).mean(), rel=1e-12)


def test_the_larger_map_is_pooled_to_the_size_of_the_smaller() -> None:
    small, large = noise(4, 6, 3, 4), noise(4, 6, 6, 8, seed=1)
    pooled = large.numpy().reshape(4, 6, 3, 2, 4, 2).mean(axis=(3, 5))
    expected = pytest.approx(((small.numpy() - pooled) ** 2).mean(), rel=1e-12)
    assert simkd_loss(small, large).item() == expected
    assert simkd_loss(large, small).item() == expected


def test_maps_of_another_number_of_channels_name_what_was_forgotten() -> None:
    with pytest.raises(ValueError, match="has 3 channels, the teacher's 6: loss 'simkd' is for the student that its"):
        loss_of()(outputs(noise(4, 3, 5, 5)), outputs(noise(4, 6, 5, 5)), batch_of(torch.arange(4)))


# --- the student with what it is given --------------------------------------------------------------------


def test_the_students_last_stage_is_the_projected_one_and_the_teachers_classifier_takes_its_mean() -> None:
    _, net, _, teacher = ready()
    images = torch.randn(4, 3, 16, 16)
    found = outputs_of(net.eval(), images, frozenset({"features", "preacts", "embedding"}))
    assert [tuple(maps.shape) for maps in found.features] == [(4, 3, 8, 8), (4, 6, 4, 4), (4, 8, 4, 4)]
    assert [tuple(maps.shape) for maps in found.preacts] == [(4, 3, 8, 8), (4, 6, 4, 4), (4, 8, 4, 4)]
    torch.testing.assert_close(found.features[-1], found.preacts[-1].relu())
    weight, bias = teacher.get_parameter("linear.weight"), teacher.get_parameter("linear.bias")
    embedding = found.features[-1].mean((2, 3))
    assert found.embedding is not None
    torch.testing.assert_close(found.embedding, embedding)
    torch.testing.assert_close(found.logits, embedding @ weight.t() + bias)
    torch.testing.assert_close(net(images), found.logits)


def test_where_the_projected_map_is_the_teachers_the_student_answers_as_the_teacher() -> None:
    _, net, _, teacher = ready()
    assert isinstance(net, ProjectedNet)
    images = torch.randn(4, 3, 16, 16)
    maps = teacher.forward_with_features(images).features[-1]  # type: ignore[operator]
    torch.testing.assert_close(net.classifier(maps.mean((2, 3))), teacher(images))


def test_it_has_the_parameters_of_student_projector_and_classifier_and_no_more() -> None:
    plain = sum(p.numel() for p in tiny(3, seed=1).parameters()) - (6 * CLASSES + CLASSES)
    for factor in (1, 2, 3, 100):
        _, net, _, _ = ready(factor=factor)
        middle = max(8 // factor, 1)
        projector = 6 * middle + 9 * middle**2 + 8 * middle + 2 * (middle + middle + 8)
        assert sum(p.numel() for p in net.parameters()) == plain + projector + 8 * CLASSES + CLASSES


def test_a_record_of_plain_values_rebuilds_the_same_net_for_the_weights_of_a_checkpoint() -> None:
    _, net, record, _ = ready(factor=4)
    images = torch.randn(4, 3, 16, 16)
    net.train()(images)  # other statistics than those of a new net
    rebuilt = equipped(NETS.create({"name": "tiny", "width": 3}, CLASSES), json.loads(json.dumps(record)))
    rebuilt.load_state_dict(net.state_dict())
    assert torch.equal(rebuilt.eval()(images), net.eval()(images))
    trained = [[name for name, p in each.named_parameters() if p.requires_grad] for each in (net, rebuilt)]
    assert trained[0] == trained[1]


def test_a_net_without_a_record_stays_as_it_is() -> None:
    net = tiny(3, seed=1)
    assert equipped(net, {}) is net


def test_training_moves_student_and_projector_and_leaves_the_classifier() -> None:
    torch.manual_seed(0)
    loss, net, _, teacher = ready()
    before = {name: value.clone() for name, value in net.named_parameters()}
    batch = Batch(torch.randn(16, 3, 16, 16), *(torch.arange(16) % CLASSES,) * 3)
    optimizer = torch.optim.Adam([*net.parameters(), *loss.parameters()], lr=0.01, weight_decay=0.1)
    frozen, values = FrozenTeacher(teacher), []
    for _ in range(60):
        answers = (outputs_of(each, batch.images, loss.needs) for each in (net.train(), frozen))
        value = loss(*answers, batch)["simkd"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.3 * values[0]
    unmoved = [name for name, value in net.named_parameters() if torch.equal(value, before[name])]
    assert unmoved == ["classifier.weight", "classifier.bias"]
    assert torch.equal(net.get_parameter("classifier.weight"), teacher.get_parameter("linear.weight"))


def test_nothing_is_shared_with_the_teacher_or_kept_by_the_loss() -> None:
    loss, net, _, teacher = ready()
    pointers = [{t.untyped_storage().data_ptr() for t in each.state_dict().values()} for each in (net, teacher)]
    assert not pointers[0] & pointers[1]
    assert list(loss.state_dict()) == []


@pytest.mark.parametrize(
    ("student", "teacher", "size"), [((3, 8, 8), (4, 4, 4), 4), ((3, 4, 4), (4, 8, 8), 4), ((3, 8, 4), (4, 4, 8), 4)]
)
def test_a_larger_map_of_the_student_is_pooled_before_it_is_projected(
    student: Shape, teacher: Shape, size: int
) -> None:
    class Conv(nn.Module):
        def __init__(self, shape: Shape) -> None:
            super().__init__()
            self.shape, self.linear = shape, nn.Linear(shape[0], CLASSES)

        def forward_with_features(self, images: Tensor) -> Outputs:
            maps = images[:, :1].expand(-1, *self.shape[:1], -1, -1)[:, :, : self.shape[1], : self.shape[2]].relu()
            return Outputs(self.linear(maps.mean((2, 3))), (maps,), (), maps.mean((2, 3)))

        def forward(self, images: Tensor) -> Tensor:
            return self.forward_with_features(images).logits

    own, other = Conv(student), Conv(teacher)
    loss = loss_of()
    loss.attach(probe(own, "student", (3, 16, 16)), probe(other, "teacher", (3, 16, 16)))
    net, _ = loss.equip(own)
    images = torch.randn(2, 3, 16, 16)
    found = net.eval().forward_with_features(images)  # type: ignore[operator]
    assert found.features[-1].shape == (2, 4, size, size)
    assert found.preacts == ()
    value = loss(found, other.forward_with_features(images), batch_of(torch.arange(2)))["simkd"]
    assert value.isfinite()


def test_it_can_be_an_objective_by_itself_and_its_gradient_reaches_the_student() -> None:
    sections, problems = resolve({"name": "simkd"})
    assert problems == []
    objective = create_objective(sections, 3)
    student, teacher = tiny(3, seed=1), tiny(4, seed=2)
    objective.attach(probe(student, "student", (3, 16, 16)), probe(teacher, "teacher", (3, 16, 16)))
    net, record = objective.equip(student)
    assert record
    images = torch.randn(4, 3, 16, 16)
    batch = Batch(images, *(torch.arange(4),) * 3)
    answers = (outputs_of(each, images, objective.needs) for each in (net, FrozenTeacher(teacher)))
    torch.stack(list(objective(*answers, batch).values())).sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


# --- teachers and options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cnn", "128x4x4"),  # as many features as channels, but of a hidden layer
        ("vgg11", "512x2x2"),  # they are those of a max-pooling
        ("studentmodel", "128x8x8"),  # flattened
    ],
)
def test_a_teacher_whose_classifier_does_not_take_the_mean_of_its_last_map_is_refused(name: str, shape: str) -> None:
    net = NETS.create({"name": name}, CLASSES)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    student = probe(tiny(3, seed=1), "small", (3, 16, 16))
    with pytest.raises(InputError) as error:
        loss_of().attach(student, probe(net, name, (3, 32, 32)))
    text = str(error.value)
    assert "must be one linear layer on the mean of the last map, and that of teacher" in text
    assert "student 'small' has " in text
    assert f"{shape}; choose other stages or other nets" in text, "the last of the teacher's maps"
    assert net.training, "it was tried on a copy"
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet20", 32), ("resnet8x4", 32), ("densenet", 32), ("wrn_16_2", 32), ("torchvision/resnet18", 64)],
)
def test_nets_that_end_in_a_mean_and_a_linear_layer_can_teach(name: str, size: int) -> None:
    teacher = NETS.create(NETS.resolve({"name": name})[0], CLASSES)
    loss = loss_of()
    loss.attach(probe(tiny(3, seed=1), "small", (3, size, size)), probe(teacher, name, (3, size, size)))
    assert loss.parts["num_classes"] == CLASSES


def test_a_convolution_that_classifies_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, CLASSES, 1))
    with pytest.raises(InputError, match=r"must be one linear layer on the mean of the last map.*teacher .* has 4x8x8"):
        loss_of().attach(probe_of("small", tiny(3, seed=1), (3, 8, 8)), probe_of("large", net, (4, 8, 8)))


def test_the_middle_of_the_projector_is_narrower_by_the_factor() -> None:
    widths = []
    for factor in (1, 2, 4):
        _, net, _, _ = ready(factor=factor)
        widths.append([m.out_channels for m in net.projector.modules() if isinstance(m, nn.Conv2d)])  # type: ignore[union-attr]
    assert widths == [[8, 8, 8], [4, 4, 8], [2, 2, 8]]


def test_the_defaults_are_those_of_the_reference_implementation() -> None:
    resolved, problems = LOSSES.resolve({"name": "simkd"})
    assert problems == []
    assert resolved["factor"] == 2
    assert LOSSES.resolve({"name": "simkd", "factor": 0})[1] == [("factor", "0 is below 1")]
    assert SimKDLoss.usual_weight == 1
    assert SimKDLoss().describe() == (
        "MSE of the last map, projected (1x1, 3x3, 1x1, channels / 2), to the teacher's, mean over the batch and the"
        " map; the classifier is the teacher's, frozen"
    )


def test_numpy_agrees_that_the_projector_is_three_convolutions() -> None:
    _, net, _, _ = ready()
    assert isinstance(net, ProjectedNet)
    maps = torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        found = net.projector.eval()(maps).numpy()
    state = {name: value.numpy() for name, value in net.projector.state_dict().items()}
    scale = np.sqrt(1 + 1e-5)  # a new batch norm in eval mode
    first = np.maximum(np.einsum("oc,nchw->nohw", state["0.weight"][:, :, 0, 0], maps.numpy()) / scale, 0)
    padded = np.pad(first, ((0, 0), (0, 0), (1, 1), (1, 1)))
    second = sum(
        np.einsum("oc,nchw->nohw", state["3.weight"][:, :, y, x], padded[:, :, y : y + 4, x : x + 4])
        for y in range(3)
        for x in range(3)
    )
    second = np.maximum(second / scale, 0)
    expected = np.einsum("oc,nchw->nohw", state["6.weight"][:, :, 0, 0], second) / scale
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
