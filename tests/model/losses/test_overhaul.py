"""Oracles: values of the reference implementation, the paper's formulas in numpy, integrals, the engine's teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from golden import GOLDEN, check_golden, student_maps, teacher_maps
from torch import Tensor, nn

from model.engine import Learner, evaluate, outputs_of, probe, train_epoch
from model.errors import InputError
from model.losses import LOSSES
from model.losses.ce import CELoss
from model.losses.objective import Objective
from model.losses.overhaul import OverhaulLoss, margins, partial_l2
from model.nets import NETS
from model.optim import SCHEDULES, create_schedule
from model.outputs import Batch, Outputs, Probe
from model.teacher import FrozenTeacher

CLASSES, SHAPE = 5, (3, 16, 16)


def golden_maps() -> tuple[Tensor, Tensor, Tensor]:
    return student_maps(6), teacher_maps(6), torch.linspace(-1, -0.1, 6, dtype=torch.float64)


# --- margins -----------------------------------------------------------------------------------------------


def margin_of(weight: float, bias: float, dtype: torch.dtype = torch.float64) -> float:
    return margins(torch.tensor([weight], dtype=dtype), torch.tensor([bias], dtype=dtype)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("weight", "bias", "margin"),
    [(1, 0, -0.797885), (1, 1, -0.525135), (1, -1, -1.287600), (0.5, 0.25, -0.320539), (1, 4, -3)],
)
def test_margins_have_known_values(weight: float, bias: float, margin: float, dtype: torch.dtype) -> None:
    assert margin_of(weight, bias, dtype) == pytest.approx(margin, abs=2e-6)
    assert margin_of(-weight, bias, dtype) == margin_of(weight, bias, dtype)


@pytest.mark.parametrize(("weight", "bias"), [(1, 0.0), (1.3, -2.0), (0.2, 0.5), (-2.0, 3.0), (0.01, -5.0)])
def test_a_margin_is_the_mean_of_the_negative_part_of_the_distribution(weight: float, bias: float) -> None:
    x = np.linspace(bias - 12 * abs(weight), min(0.0, bias + 12 * abs(weight)), 200_001)
    density = np.exp(-(((x - bias) / weight) ** 2) / 2)
    assert margin_of(weight, bias) == pytest.approx(np.trapezoid(x * density, x) / np.trapezoid(density, x), rel=1e-6)


def test_a_channel_of_which_less_than_a_thousandth_is_negative_has_three_deviations() -> None:
    # The 0.1 % quantile of a normal distribution is at -3.0902.
    assert margin_of(2.0, 2 * 3.0903) == -6
    assert -6 < margin_of(2.0, 2 * 3.0901) < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_margins_are_finite_for_channels_that_are_constant_or_far_from_0(dtype: torch.dtype) -> None:
    assert [margin_of(0, bias, dtype) for bias in (-2.0, 0.0, 2.0)] == [-2, 0, 0]
    assert margin_of(1, -1e4, dtype) == -1e4
    assert margin_of(1e-30, -3.0, dtype) == -3
    assert margin_of(1, 1e30, dtype) == -3
    assert margin_of(1e-30, 1e30, dtype) == pytest.approx(0, abs=1e-29)


# --- the distance ------------------------------------------------------------------------------------------


def test_the_distance_is_the_reference_implementations() -> None:
    student, teacher, margin = golden_maps()
    check_golden("OFD_feat_loss", partial_l2(student, teacher, margin), student)


def test_known_distances_of_single_responses() -> None:
    student = torch.tensor([-2, -0.5, 0.3, 1, -0.2, 0.5], dtype=torch.float64)
    teacher = torch.tensor([-1.5, -1.5, -0.4, 2, -0.1, 0.7], dtype=torch.float64)
    margin = torch.tensor([-0.8], dtype=torch.float64)
    each = zip(student.view(6, 1, 1, 1, 1), teacher.view(6, 1, 1, 1, 1), strict=True)
    singles = [partial_l2(own, other, margin).item() for own, other in each]
    assert singles == pytest.approx([0, 0.09, 0.49, 1, 0, 0.04], abs=1e-12)
    assert partial_l2(student.view(1, 1, 2, 3), teacher.view(1, 1, 2, 3), margin).item() == pytest.approx(1.62)


def test_the_distance_is_the_papers_case_by_case() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    margin = -torch.rand(4, dtype=torch.float64, generator=generator)
    total = 0.0
    for n, c, y, x in np.ndindex(3, 4, 5, 6):
        target = max(teacher[n, c, y, x].item(), margin[c].item())
        own = student[n, c, y, x].item()
        total += 0 if own <= target <= 0 else (own - target) ** 2
    assert partial_l2(student, teacher, margin).item() == pytest.approx(total / 3, rel=1e-12)


def test_at_the_target_distance_and_gradient_are_0() -> None:
    _, teacher, margin = golden_maps()
    student = torch.maximum(teacher, margin.view(1, -1, 1, 1)).requires_grad_()
    distance = partial_l2(student, teacher, margin)
    assert distance.item() == 0
    assert (torch.autograd.grad(distance, student)[0] == 0).all()


def test_a_batch_repeated_twice_has_the_same_distance() -> None:
    student, teacher, margin = golden_maps()
    twice = partial_l2(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1), margin)
    assert twice.item() == pytest.approx(GOLDEN["OFD_feat_loss"]["loss"], rel=1e-12)


def test_no_map_is_spread_over_others() -> None:
    student, teacher, margin = golden_maps()
    for wrong in (teacher[:1], teacher[:, :1], teacher[..., :1]):
        with pytest.raises(ValueError, match=r"student maps \(8, 6, 6, 6\), teacher maps"):
            partial_l2(student, wrong, margin)


# --- the objective -----------------------------------------------------------------------------------------


def net_of(name: str = "tiny", **options: Any) -> nn.Module:
    net: nn.Module = NETS.create({"name": name, **options}, CLASSES)
    return net


def trained_net(seed: int, width: int = 8) -> nn.Module:
    """Returns a tiny net whose batch norms are no longer as they began."""
    torch.manual_seed(seed)
    net = net_of(width=width)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.2, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    return net


def loss_of(**options: Any) -> OverhaulLoss:
    section, problems = LOSSES.resolve({"name": "overhaul", **options})
    assert problems == []
    return LOSSES.create(section)


def attached(student: nn.Module, teacher: nn.Module, **options: Any) -> OverhaulLoss:
    loss = loss_of(**options)
    loss.attach(probe(student, "small", SHAPE), probe(teacher, "large", SHAPE))
    return loss


def batch_of(size: int, seed: int = 0) -> Batch:
    labels = torch.arange(size) % CLASSES
    images = torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return Batch(images, labels, labels, torch.zeros_like(labels))


def test_the_total_halves_the_weight_of_each_stage_towards_the_first() -> None:
    torch.manual_seed(3)
    student_shapes = [(3, 8, 8), (4, 4, 4), (5, 2, 2)]
    teacher_shapes = [(9, 8, 8), (6, 8, 8), (7, 4, 4), (8, 2, 2)]  # the first is not the last of its size
    student, teacher = (
        Outputs(
            torch.randn(4, CLASSES, dtype=torch.float64),
            preacts=tuple(torch.randn(4, *shape, dtype=torch.float64) for shape in shapes),
        )
        for shapes in (student_shapes, teacher_shapes)
    )
    teacher_net = nn.Module()
    norms = [nn.BatchNorm2d(shape[0]) for shape in teacher_shapes]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.2, 1.5)
        nn.init.normal_(norm.bias)
    teacher_net.stage_norms = nn.ModuleList(norms)
    loss = loss_of()
    loss.attach(Probe("small", nn.Identity(), student), Probe("large", teacher_net, teacher))
    loss.double().eval()

    expected = 0.0
    for level, (own, other, norm) in enumerate(zip(student.preacts, teacher.preacts[1:], norms[1:], strict=True)):
        kernel = loss.state_dict()[f"connectors.{level}.conv.weight"].numpy()[:, :, 0, 0]
        # Of a new batch norm mean and variance are 0 and 1.
        maps = np.einsum("oc,nchw->nohw", kernel, own.numpy()) / np.sqrt(1 + 1e-5)
        margin = margins(norm.weight.detach(), norm.bias.detach()).double().numpy().reshape(1, -1, 1, 1)
        target = np.maximum(other.numpy(), margin)
        skipped = (maps <= target) & (target <= 0)
        expected += ((maps - target) ** 2 * ~skipped).sum() / 2 ** (3 - 1 - level) / 4
    terms = loss(student, teacher, batch_of(4))
    assert list(terms) == ["overhaul"]
    assert terms["overhaul"].item() == pytest.approx(expected, rel=1e-12)


def test_connectors_fit_the_channels_and_begin_as_in_the_paper() -> None:
    student, teacher = net_of(width=64), trained_net(1, width=128)
    torch.manual_seed(0)
    loss = attached(student, teacher)
    for level, (own, other) in enumerate([(64, 128), (128, 256)]):
        weight = loss.state_dict()[f"connectors.{level}.conv.weight"]
        assert weight.shape == (other, own, 1, 1)
        assert weight.std().item() == pytest.approx((2 / other) ** 0.5, rel=0.05)
        assert weight.mean().item() == pytest.approx(0, abs=0.005)
    names = {name for name, _ in loss.named_parameters()}
    parts = ("conv.weight", "norm.weight", "norm.bias")
    assert names == {f"connectors.{level}.{part}" for level in (0, 1) for part in parts}


def test_margins_are_those_of_the_teachers_batch_norms_and_are_saved() -> None:
    teacher: Any = trained_net(1)
    loss = attached(net_of(), teacher)
    for level, norm in enumerate((teacher.bn1, teacher.bn2)):
        expected = [margin_of(w, b) for w, b in zip(norm.weight.tolist(), norm.bias.tolist(), strict=True)]
        assert loss.state_dict()[f"connectors.{level}.margin"].tolist() == pytest.approx(expected, rel=1e-4)


def test_each_stage_has_the_margins_of_the_teachers_stage_that_it_meets() -> None:
    teacher: Any = trained_net(1)
    loss = attached(net_of(), teacher, student_stages=[2], teacher_stages=[2])
    (connector,) = loss.connectors
    assert torch.equal(connector.margin, margins(teacher.bn2.weight, teacher.bn2.bias))  # type: ignore[arg-type]


def test_resnet152_meets_efficientnet_b0_at_its_four_sizes() -> None:
    with torch.device("meta"):
        student, teacher = net_of("efficientnet_b0_cifar"), net_of("resnet152")
        loss = loss_of()
        loss.attach(probe(student, "small", (3, 32, 32)), probe(teacher, "large", (3, 32, 32)))
    shapes = [tuple(value.shape[:2]) for name, value in loss.state_dict().items() if name.endswith("conv.weight")]
    assert shapes == [(256, 16), (512, 24), (1024, 40), (2048, 112)]
    assert "student stages [1, 2, 3, 5] to teacher stages [1, 2, 3, 4]" in loss.describe()


def test_the_maps_of_the_stages_that_are_named_are_read() -> None:
    student, teacher = trained_net(1), trained_net(2)
    loss = attached(student, teacher, student_stages=[2], teacher_stages=[2]).eval()
    batch = batch_of(4)
    with torch.no_grad():
        own, other = (outputs_of(net.eval(), batch.images, loss.needs) for net in (student, teacher))
        (connector,) = loss.connectors
        expected = connector(own.preacts[1], other.preacts[1])
        assert loss(own, other, batch)["overhaul"].item() == pytest.approx(expected.item(), rel=1e-6)


# --- what is refused ---------------------------------------------------------------------------------------

HAVE = "; student 'small' has 8x8x8, 16x4x4, teacher 'large' has 8x8x8, 16x4x4; choose other stages or other nets"


class WithoutNorms(nn.Module):
    """A net whose maps come from no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net_of(width=8)

    def forward_with_features(self, images: Tensor) -> Outputs:
        outputs: Outputs = self.net.forward_with_features(images)  # type: ignore[operator]
        return outputs


class WithTanh(WithoutNorms):
    activation = staticmethod(torch.tanh)

    @property
    def stage_norms(self) -> tuple[nn.Module, ...]:
        return self.net.bn1, self.net.bn2  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("teacher", "options", "problem"),
    [
        (WithoutNorms, {}, "the teacher has no batch norm in front of each stage's last activation"),
        (WithTanh, {}, "the last activation of the teacher's stages is not a ReLU"),
        (
            None,
            {"student_stages": [1], "teacher_stages": [2]},
            "the maps of student stage 1 are larger than those of teacher stage 2",
        ),
        (None, {"student_stages": [3], "teacher_stages": [2]}, "student 'small' has no stage 3"),
    ],
)
def test_nets_that_do_not_fit_are_refused_in_one_sentence_with_their_shapes(
    teacher: type[nn.Module] | None, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError) as error:
        attached(net_of(width=8), teacher() if teacher else net_of(width=8), **options)
    assert str(error.value) == f"loss 'overhaul' reads the stages' preacts: {problem}{HAVE}"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"student_stages": [1, 2], "teacher_stages": [2]}, "student_stages [1, 2] and teacher_stages [2] are not of"),
        ({"teacher_stages": [2]}, "student_stages null and teacher_stages [2] are not of one length"),
    ],
)
def test_lists_of_stages_of_different_lengths_are_refused_before_there_are_nets(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError) as error:
        LOSSES.create({"name": "overhaul", **options})
    assert str(error.value).startswith(problem)


def test_a_net_without_maps_is_refused() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, CLASSES))
    with pytest.raises(InputError, match="student 'small' does not give them; student 'small' has none, teacher"):
        attached(plain, net_of())


def test_nets_without_a_common_size_are_refused() -> None:
    with pytest.raises(InputError, match="they have no height and width in common; student 'small' has 16x8x8"):
        loss_of().attach(probe(net_of(), "small", SHAPE), probe(net_of(), "large", (3, 60, 60)))


@pytest.mark.parametrize(
    ("option", "value", "where", "problem"),
    [
        ("teacher_statistics", "train", "teacher_statistics", "'train' is not one of 'batch' or 'running'"),
        ("student_stages", [0], "student_stages.0", "0 is below 1"),
        ("student_stages", 1, "student_stages", "expected a list, got 1"),
        ("teacher_stages", [], "teacher_stages", "[] has fewer than 1 elements"),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: object, where: str, problem: str) -> None:
    ((key, text),) = LOSSES.resolve({"name": "overhaul", option: value})[1]
    assert key == where
    assert problem in text


def test_the_defaults_are_the_authors_for_small_images() -> None:
    resolved, _ = LOSSES.resolve({"name": "overhaul"})
    assert resolved == {
        "name": "overhaul",
        "teacher_statistics": "batch",
        "student_stages": None,
        "teacher_stages": None,
        "weight": None,
    }
    loss = attached(net_of(), net_of())
    assert loss.usual_weight == 1e-3
    assert loss.describe() == (
        "partial L2 of student stages [1, 2] to teacher stages [1, 2] (the last x 1, each one before it x 1/2 of the"
        " next), summed over a map, mean over the batch; in training the teacher's batch norms have batch statistics"
    )


# --- in the engine -----------------------------------------------------------------------------------------


class Batches:
    """The same batches in every epoch."""

    def __init__(self, *seeds: int) -> None:
        self.batches = [batch_of(20, seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterable[Batch]:
        return self.batches[start:]


def objective_of(student: nn.Module, teacher: nn.Module, weight: float | None = None, **options: Any) -> Objective:
    losses = {"ce": CELoss(), "overhaul": attached(student, teacher, **options)}
    return Objective(losses, {"ce": None, "overhaul": weight}, 8)


def learner_of(teacher: nn.Module, **options: Any) -> Learner:
    torch.manual_seed(0)
    student = net_of(width=4)
    loss = objective_of(student, teacher, **options)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.02, momentum=0.9)
    section, _ = SCHEDULES.resolve({"name": "constant"})
    return Learner(student, loss, optimizer, create_schedule(section, optimizer, 10, 3))


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_the_teacher_normalises_as_asked_in_training_and_is_bitwise_the_same_afterwards(statistics: str) -> None:
    teacher = FrozenTeacher(trained_net(7))
    norm: Any = teacher.net.bn2
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert any("running_var" in name for name in before)
    seen: list[Tensor] = []
    learner = learner_of(teacher.net, teacher_statistics=statistics)
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    train_epoch(learner, Batches(0, 1, 2), epoch=0, seed=0, teacher=teacher)
    assert len(seen) == 3
    for maps in seen:  # normalised with the batch's own statistics, a channel's mean is its bias
        centred = torch.allclose(maps.mean((0, 2, 3)), norm.bias, atol=1e-5)
        assert centred == (statistics == "batch")

    seen.clear()
    evaluate(learner.student, Batches(0), loss=learner.loss, teacher=teacher)
    assert len(seen) == 1
    assert not torch.allclose(seen[0].mean((0, 2, 3)), norm.bias, atol=1e-5), "validation has running statistics"
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    assert all(module.track_running_stats for module in teacher.modules() if isinstance(module, nn.BatchNorm2d))
    assert {parameter.grad for parameter in teacher.parameters()} == {None}


def test_training_lowers_the_distance_and_trains_the_connectors() -> None:
    teacher = FrozenTeacher(trained_net(7))
    learner = learner_of(teacher.net, weight=0.01)
    before = {name: value.clone() for name, value in learner.loss.state_dict().items()}
    means = [train_epoch(learner, Batches(0, 1, 2), epoch=epoch, seed=0, teacher=teacher) for epoch in range(8)]
    assert means[-1]["overhaul"] < 0.7 * means[0]["overhaul"]
    after = learner.loss.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in after if not name.endswith("margin")}


def test_a_checkpoint_is_restored_after_attaching() -> None:
    teacher = FrozenTeacher(trained_net(7))
    learner = learner_of(teacher.net)
    train_epoch(learner, Batches(0, 1), epoch=0, seed=0, teacher=teacher)
    state = learner.loss.state_dict()
    other = objective_of(learner.student, trained_net(8))
    other.load_state_dict(state)
    scores = [evaluate(learner.student, Batches(5), loss=loss, teacher=teacher) for loss in (learner.loss, other)]
    assert scores[0] == scores[1], "margins and connectors are those of the checkpoint"
