"""Real training of tiny nets; oracles are numpy, closed forms, and the same run done in another way."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import data, engine, losses
from model.data import DATASETS
from model.data.joined import with_unlabelled
from model.devices import place
from model.engine import Learner, Totals, evaluate, train_epoch
from model.errors import DivergedError, InputError
from model.losses import LOSSES
from model.losses.base import Loss
from model.losses.kd import KDLoss
from model.losses.objective import Objective
from model.metrics import agreement
from model.nets import NETS
from model.optim import OPTIMIZERS, SCHEDULES, create_optimizer, create_schedule
from model.outputs import Batch, Outputs, outputs_of
from model.taps import set_taps, taps_of
from model.teacher import FrozenTeacher

CPU = torch.device("cpu")
CLASSES = 6  # one more than five, so that top-5 is reported
CE: dict[str, Any] = {"name": "ce"}
KD: dict[str, Any] = {"name": "kd", "alpha": 0.7, "temperature": 4.0}


@functools.cache
def splits() -> data.Data:
    """Shuffled and augmented; 540 training images in 18 steps."""
    options = {"num_classes": CLASSES, "train_size": 600, "batch_size": 30, "augmentation": "crop_flip"}
    section, problems = DATASETS.resolve({"name": "synthetic", **options})
    assert problems == []
    return data.create(section, seed=0, device=CPU)


def net_of(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return place(NETS.create({"name": "tiny", **options}, CLASSES), CPU)


def teacher_of(seed: int = 99) -> FrozenTeacher:
    return FrozenTeacher(net_of(seed, width=12))


def learner_of(
    student: nn.Module | None = None,
    loss: Loss | Objective | dict[str, Any] = CE,
    optimizer: str = "sgd",
    precision: str = "fp32",
    rate: float = 0.01,
    schedule: dict[str, Any] | None = None,
    epochs: int = 10,
    steps: int = 18,
    **options: Any,
) -> Learner:
    student = student or net_of()
    if isinstance(loss, dict):
        loss = LOSSES.create(LOSSES.resolve(loss)[0])
    section, problems = OPTIMIZERS.resolve({"name": optimizer, "learning_rate": rate, **options})
    assert problems == []
    made = create_optimizer(section, [*student.parameters(), *loss.parameters()])
    section, problems = SCHEDULES.resolve(schedule or {"name": "cosine", "per": "iteration"})
    assert problems == []
    return Learner(student, loss, made, create_schedule(section, made, epochs, steps), precision)


class ListLoader:
    """Yields given batches, the same ones in every epoch, and notes what it was asked for."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = list(batches)
        self.asked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterable[Batch]:
        self.asked.append((epoch, start))
        return iter(self.batches[start:])


def batch_of(size: int, seed: int = 0, image_size: int = 8, classes: int = CLASSES) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, image_size, image_size, generator=generator)
    labels = torch.randint(classes, (size,), generator=generator)
    return Batch(images, labels, torch.arange(size), torch.zeros(size, dtype=torch.int64))


def flat_loader(*sizes: int) -> ListLoader:
    """Batches of single pixels, for a linear net."""
    return ListLoader(batch_of(size, seed, image_size=1) for seed, size in enumerate(sizes))


def linear_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3, CLASSES))


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flattened(state: Any, path: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flattened(value, f"{path}.{key}").items()}
    if isinstance(state, (list, tuple)):
        return flattened(dict(enumerate(state)), path)
    return {path: state}


def assert_bitwise_equal(one: Any, other: Any) -> None:
    one, other = flattened(one), flattened(other)
    assert list(one) == list(other)
    for key, value in one.items():
        equal = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        assert equal, key


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(softmax(logits)[np.arange(len(labels)), labels])


class Hint(Loss):
    """Cross-entropy, and a regression of the teacher's embedding from the student's through a learnt map."""

    needs = frozenset({"logits", "embedding"})
    needs_teacher = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.adapter = nn.Linear(32, 24)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {
            "ce": F.cross_entropy(student.logits, batch.labels),
            "hint": F.mse_loss(self.adapter(student.embedding), teacher.embedding),
        }


# --- one epoch is what the textbook says ----------------------------------------------------------------------


def test_an_epoch_is_gradient_descent_on_the_mean_loss_of_each_batch() -> None:
    loader = flat_loader(4, 4, 3)
    net: Any = linear_net()
    weight, bias = (p.detach().double().numpy().copy() for p in net.parameters())
    schedule = {"name": "constant", "per": "iteration", "warmup_epochs": 1.0}  # factors 1/3, 2/3, 1
    learner = learner_of(net, rate=0.5, momentum=0.0, schedule=schedule, steps=len(loader))
    means = train_epoch(learner, loader, epoch=0, seed=0)

    losses, hits, hits5 = [], [], []
    for step, batch in enumerate(loader.batches):
        x, y = batch.images.flatten(1).double().numpy(), batch.labels.numpy()
        logits = x @ weight.T + bias
        losses += list(cross_entropies(logits, y))
        hits += list(logits.argmax(axis=1) == y)
        hits5 += list((np.argsort(-logits, axis=1)[:, :5] == y[:, None]).any(axis=1))
        error = (softmax(logits) - np.eye(CLASSES)[y]) / len(y)
        rate = 0.5 * (step + 1) / 3
        weight, bias = weight - rate * error.T @ x, bias - rate * error.sum(axis=0)
    np.testing.assert_allclose(net[1].weight.detach().numpy(), weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net[1].bias.detach().numpy(), bias, rtol=1e-5, atol=1e-6)
    # Over samples: the mean over the batches' means would weigh the samples of the short batch more.
    scores = {"accuracy": np.mean(hits), "accuracy_top5": np.mean(hits5)}
    assert means == pytest.approx({"loss": np.mean(losses), "ce": np.mean(losses), **scores}, rel=1e-6)
    assert means["loss"] != pytest.approx(np.mean([np.mean(losses[i : i + 4]) for i in (0, 4, 8)]), rel=1e-4)


@pytest.mark.parametrize("batch_size", [2, 7, 33, 1000])
def test_accuracy_is_a_count_over_the_samples_whatever_the_batches(batch_size: int) -> None:
    """Means of batch means in float32 made equal epochs differ in the ninth digit, and one of them "best"."""
    hits = torch.arange(904) % 3 == 0
    totals = Totals(CPU)
    for part in hits.split(batch_size):
        totals.add({"accuracy": part.sum()}, {}, len(part))
    assert totals.means()["accuracy"] == int(hits.sum()) / 904


def test_the_reported_loss_is_the_sum_of_its_terms() -> None:
    means = train_epoch(learner_of(loss=KD), splits().train, epoch=0, seed=0, teacher=teacher_of())
    assert list(means) == ["accuracy", "accuracy_top5", "loss", "ce", "kd"]
    assert means["loss"] == pytest.approx(means["ce"] + means["kd"], rel=1e-6)


def test_after_step_is_called_when_a_step_is_counted() -> None:
    totals, seen = Totals(CPU), []

    def after_step() -> None:
        seen.append((totals.steps, totals.samples, totals.means()["loss"]))

    loader = flat_loader(4, 4, 3)
    means = train_epoch(learner_of(linear_net()), loader, epoch=2, seed=0, totals=totals, after_step=after_step)
    assert [(steps, samples) for steps, samples, _ in seen] == [(1, 4), (2, 8), (3, 11)]
    assert seen[-1][2] == means["loss"]
    assert loader.asked == [(2, 0)]


def test_totals_are_means_over_samples_and_survive_a_file() -> None:
    totals = Totals(CPU)
    assert totals.means() == {}
    totals.add({}, {"a": torch.tensor(1.0), "b": torch.tensor(0.1)}, 3)
    saved = through_a_file(totals.state_dict())
    totals.add({}, {"a": torch.tensor(5.0), "b": torch.tensor(0.2)}, 1)
    assert totals.means() == pytest.approx({"a": 2.0, "b": 0.125}, rel=1e-7)
    restored = Totals(CPU)
    restored.load_state_dict(saved)
    restored.add({}, {"a": torch.tensor(5.0), "b": torch.tensor(0.2)}, 1)
    assert_bitwise_equal(restored.state_dict(), totals.state_dict())


def test_totals_do_not_drift_over_many_steps() -> None:
    totals = Totals(CPU)
    for _ in range(20_000):
        totals.add({}, {"a": torch.tensor(0.1)}, 128)
    assert totals.means()["a"] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


# --- who is in which mode -------------------------------------------------------------------------------------


def test_student_and_loss_are_in_train_mode_at_every_step_though_validation_ran_between() -> None:
    learner = learner_of(loss=Hint())
    teacher = teacher_of()
    modes: list[bool] = []
    for module in (*learner.student.modules(), *learner.loss.modules()):
        module.register_forward_hook(lambda module, *_: modes.append(module.training))
    for epoch in range(3):
        train_epoch(learner, splits().train, epoch=epoch, seed=0, teacher=teacher)
        assert modes
        assert all(modes), f"a module was in eval mode in epoch {epoch}"
        modes.clear()
        evaluate(learner.student, splits().val, loss=learner.loss, teacher=teacher)
        assert modes
        assert not any(modes), "a module was in train mode in validation"
        modes.clear()
        for module in (learner.student, learner.loss):  # what else may have happened in between
            module.eval()


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_evaluate_leaves_the_modes_as_they_were(mode: bool, fails: bool) -> None:
    net, loss = net_of().train(mode), LOSSES.create(CE).train(mode)

    def after_batch(*_: object) -> None:
        if fails:
            raise KeyboardInterrupt

    try:
        evaluate(net, splits().val, loss=loss, after_batch=after_batch)
    except KeyboardInterrupt:
        assert fails
    assert {module.training for module in (*net.modules(), *loss.modules())} == {mode}


def test_the_teacher_is_bitwise_the_same_after_an_epoch_and_has_no_gradient() -> None:
    teacher = teacher_of()
    teacher.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert any("running_mean" in name for name in before)
    modes = []
    for module in teacher.modules():
        module.register_forward_hook(lambda module, *_: modes.append(module.training))
    for loss in (KD, Hint()):
        train_epoch(learner_of(loss=loss), splits().train, epoch=0, seed=0, teacher=teacher)
    assert modes
    assert not any(modes)
    assert_bitwise_equal(dict(teacher.state_dict()), before)
    assert {parameter.grad for parameter in teacher.parameters()} == {None}


class ByBatch(KDLoss):
    """Wants the teacher's batch norms to normalise with each batch's own statistics."""

    teacher_statistics = "batch"


def test_batch_statistics_are_those_of_the_batch_and_leave_no_trace() -> None:
    teacher = teacher_of()
    with torch.no_grad():  # statistics that are far from any batch's
        teacher.net.bn1.running_mean.fill_(3.0)
        teacher.net.bn1.running_var.fill_(9.0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    batch = batch_of(16)
    twin = net_of(99, width=12).train()
    twin.load_state_dict(teacher.net.state_dict())
    with torch.no_grad():
        expected = twin(batch.images)
    plain = teacher(batch.images)
    with engine.batch_statistics(teacher):
        assert torch.equal(teacher(batch.images), expected)
    assert torch.equal(teacher(batch.images), plain)
    assert not torch.equal(plain, expected)
    assert_bitwise_equal(dict(teacher.state_dict()), before)


def test_a_loss_gets_batch_statistics_of_the_teacher_in_training_and_running_ones_in_validation() -> None:
    teacher = teacher_of()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    learner = learner_of(loss=ByBatch(alpha=0.5, temperature=4.0))
    modes: list[bool] = []
    teacher.net.bn1.register_forward_hook(lambda module, *_: modes.append(module.training))
    for epoch in range(2):
        train_epoch(learner, splits().train, epoch=epoch, seed=0, teacher=teacher)
        assert modes
        assert all(modes)
        modes.clear()
        evaluate(learner.student, splits().val, loss=learner.loss, teacher=teacher)
        assert modes
        assert not any(modes)
        modes.clear()
    assert_bitwise_equal(dict(teacher.state_dict()), before)
    assert not any(module.training for module in teacher.modules())


def test_batch_statistics_end_with_an_epoch_that_fails() -> None:
    teacher = teacher_of()
    learner = learner_of(loss=ByBatch(alpha=0.5, temperature=4.0))

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_epoch(learner, splits().train, epoch=0, seed=0, teacher=teacher, after_step=stop)
    assert not any(module.training for module in teacher.modules())
    assert all(module.track_running_stats for module in teacher.modules() if isinstance(module, nn.BatchNorm2d))


def test_frozen_norms_keep_their_statistics_while_the_rest_of_the_student_trains() -> None:
    learner = learner_of()
    learner.frozen_norms = [learner.student.bn1]
    before = {name: value.clone() for name, value in learner.student.state_dict().items()}
    train_epoch(learner, splits().train, epoch=0, seed=0)
    evaluate(learner.student, splits().val)
    train_epoch(learner, splits().train, epoch=1, seed=0)
    after = learner.student.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"}


def test_a_probe_has_the_shapes_of_one_image_and_leaves_the_net_alone() -> None:
    net = net_of().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    shown = engine.probe(net, "tiny", (3, 16, 16))
    assert shown.net is net
    assert [tuple(m.shape) for m in shown.outputs.features] == [(1, 16, 8, 8), (1, 32, 4, 4)]
    assert shown.outputs.logits.shape == (1, CLASSES)
    assert shown.outputs.logits.device.type == "meta"
    assert net.training
    assert_bitwise_equal(dict(net.state_dict()), before)


def test_a_probe_of_a_foreign_net_has_logits_only() -> None:
    shown = engine.probe(linear_net(), "linear", (3, 1, 1))
    assert shown.outputs.logits.shape == (1, CLASSES)
    assert shown.outputs.features == ()


def test_a_probe_gives_a_foreign_net_stages_unless_it_has_some() -> None:
    net = NETS.create({"name": "torchvision/resnet18"}, CLASSES)
    shown = engine.probe(net, "torchvision/resnet18", (3, 32, 32))
    assert taps_of(net) == ("relu", "layer1", "layer2", "layer3")
    assert [tuple(m.shape) for m in shown.outputs.features] == [
        (1, 64, 16, 16), (1, 64, 8, 8), (1, 128, 4, 4), (1, 256, 2, 2)
    ]  # fmt: skip
    assert shown.outputs.embedding is not None
    assert shown.outputs.embedding.shape == (1, 512)
    set_taps(net, ["layer3"])
    assert [tuple(m.shape) for m in engine.probe(net, "torchvision/resnet18", (3, 32, 32)).outputs.features] == [
        (1, 256, 2, 2)
    ]
    assert net.training


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_stages_that_a_net_does_not_have_are_one_line_with_the_key(role: str) -> None:
    net = net_of()
    set_taps(net, ["conv3"])
    with pytest.raises(InputError) as caught:
        engine.probe(net, "tiny", (3, 16, 16), role)
    assert str(caught.value) == f"{role}.stages: net 'tiny' has no module 'conv3'; did you mean 'conv2'?"


def test_images_that_a_net_does_not_take_are_one_line() -> None:
    cnn = NETS.create({"name": "cnn"}, CLASSES)
    with pytest.raises(InputError, match=r"net 'cnn' does not take the dataset's images of 3x16x16: .*32x32"):
        engine.probe(cnn, "cnn", (3, 16, 16))


@pytest.mark.parametrize("loss", [KD, "hint"], ids=["logits", "features"])
def test_the_teacher_sees_the_very_batch_that_the_student_sees(loss: Any) -> None:
    learner = learner_of(loss=Hint() if loss == "hint" else loss)
    teacher = teacher_of()
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, net in (("student", learner.student), ("teacher", teacher.net)):
        net.conv1.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    for epoch in range(2):
        train_epoch(learner, splits().train, epoch=epoch, seed=0, teacher=teacher)
    assert len(seen["student"]) == 2 * len(splits().train)
    assert all(torch.equal(s, t) for s, t in zip(*seen.values(), strict=True))
    # Not by chance: no batch comes twice.
    assert len({images.sum().item() for images in seen["student"]}) == len(seen["student"])


# --- randomness and resuming ----------------------------------------------------------------------------------


def trained(
    learner: Learner, *, epochs: int = 2, seed: int = 3, noise: int = 0, between: Callable[[], object] = lambda: None
) -> tuple[Learner, list[dict[str, float]]]:
    torch.manual_seed(noise)
    means = []
    for epoch in range(epochs):
        means.append(train_epoch(learner, splits().train, epoch=epoch, seed=seed))
        between()
    return learner, means


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before() -> None:
    one, means = trained(learner_of(net_of(dropout_rate=0.5)), noise=1)
    other, other_means = trained(learner_of(net_of(dropout_rate=0.5)), noise=2)
    assert means == other_means
    assert_bitwise_equal(one.state_dict(), other.state_dict())
    _, different = trained(learner_of(net_of(dropout_rate=0.5)), seed=4)
    assert different != means


def masks(*, seed: int, epoch: int, start: int = 0, noise: int = 0) -> list[Tensor]:
    """Returns which activations dropout let through at each step, for inputs that are never 0."""
    loader = ListLoader([batch_of(8)] * 4)
    net: Any = net_of(dropout_rate=0.5)
    found: list[Tensor] = []
    net.dropout.register_forward_pre_hook(lambda *_: (torch.ones(8, 32),))
    net.dropout.register_forward_hook(lambda _, __, output: found.append(output != 0))
    totals = Totals(CPU)
    totals.steps = start
    torch.manual_seed(noise)
    train_epoch(learner_of(net), loader, epoch=epoch, seed=seed, totals=totals)
    return found


def test_dropout_is_a_function_of_seed_epoch_and_step() -> None:
    reference = masks(seed=1, epoch=2)
    assert all(map(torch.equal, reference, masks(seed=1, epoch=2, noise=7)))
    assert all(map(torch.equal, reference[2:], masks(seed=1, epoch=2, start=2)))
    everything = [*reference, *masks(seed=2, epoch=1), *masks(seed=1, epoch=3), *masks(seed=1, epoch=1)]
    assert len({tuple(mask.flatten().tolist()) for mask in everything}) == len(everything)


def test_validation_does_not_change_training() -> None:
    loss = LOSSES.create(LOSSES.resolve(CE)[0])
    alone, means = trained(learner_of(net_of(dropout_rate=0.5), loss))
    learner = learner_of(net_of(dropout_rate=0.5), loss)
    watched, watched_means = trained(
        learner, between=lambda: evaluate(learner.student, splits().val, loss=learner.loss)
    )
    assert means == watched_means
    assert_bitwise_equal(alone.state_dict(), watched.state_dict())


def test_evaluate_changes_neither_weights_nor_buffers_nor_the_random_state() -> None:
    net = net_of(dropout_rate=0.5).train()
    before, random_state = through_a_file(net.state_dict()), torch.get_rng_state()
    first, second = (evaluate(net, splits().val) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_bitwise_equal(dict(net.state_dict()), dict(before))


class Stop(Exception):
    pass


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_resumed_in_mid_epoch_is_bitwise_the_uninterrupted_one(optimizer: str, precision: str) -> None:
    teacher = teacher_of()

    def begin(seed: int) -> Learner:
        return learner_of(net_of(seed, dropout_rate=0.5), KD, optimizer, precision, weight_decay=1e-3)

    def epoch(learner: Learner, number: int, **options: Any) -> dict[str, float]:
        return train_epoch(learner, splits().train, epoch=number, seed=3, teacher=teacher, **options)

    whole = begin(0)
    epoch(whole, 0)
    expected = epoch(whole, 1)

    stopped, totals, saved = begin(0), Totals(CPU), {}
    epoch(stopped, 0)

    def after_step() -> None:
        if totals.steps == 7:
            saved.update(through_a_file({"learner": stopped.state_dict(), "totals": totals.state_dict()}))
            raise Stop

    with pytest.raises(Stop):
        epoch(stopped, 1, totals=totals, after_step=after_step)

    resumed, rest = begin(1), Totals(CPU)
    resumed.load_state_dict(saved["learner"])
    rest.load_state_dict(saved["totals"])
    torch.manual_seed(12345)
    steps: list[int] = []
    assert epoch(resumed, 1, totals=rest, after_step=lambda: steps.append(rest.steps)) == expected
    assert steps == list(range(8, 19))
    assert_bitwise_equal(resumed.state_dict(), whole.state_dict())


# --- evaluate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [CLASSES, 5])
def test_evaluate_scores_like_numpy_over_samples(classes: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, classes))
    loader = ListLoader(batch_of(size, seed, image_size=1, classes=classes) for seed, size in enumerate((5, 5, 2)))
    collected = []

    def after_batch(batch: Batch, outputs: Outputs, teacher_outputs: Outputs | None) -> None:
        assert teacher_outputs is None
        collected.append((outputs.logits.double().numpy(), batch.labels.numpy()))

    found = evaluate(net, loader, after_batch=after_batch)
    logits, labels = (np.concatenate(parts) for parts in zip(*collected, strict=True))
    ranks = (logits > logits[np.arange(12), labels][:, None]).sum(axis=1)
    expected = {
        "accuracy": (ranks == 0).mean(),
        "accuracy_top5": (ranks < 5).mean(),
        "cross_entropy": cross_entropies(logits, labels).mean(),
    }
    if classes == 5:
        del expected["accuracy_top5"]  # always 1
    assert found == pytest.approx(expected, rel=1e-6)
    assert loader.asked == [(0, 0)]


def test_evaluate_with_a_loss_adds_it_and_its_terms() -> None:
    net, teacher = net_of(), teacher_of()
    found = evaluate(net, splits().val, loss=LOSSES.create(LOSSES.resolve(KD)[0]), teacher=teacher)
    assert list(found) == ["accuracy", "accuracy_top5", "cross_entropy", "loss", "ce", "kd"]
    assert found["loss"] == pytest.approx(found["ce"] + found["kd"])
    assert found["ce"] == pytest.approx(0.3 * found["cross_entropy"])
    with torch.no_grad():
        images = torch.cat([batch.images for batch in splits().val.epoch(0)])
        p_s, p_t = (softmax(n.eval()(images).double().numpy() / 4) for n in (net, teacher))
    assert found["kd"] == pytest.approx(0.7 * 16 * (p_t * np.log(p_t / p_s)).sum(axis=1).mean(), rel=1e-4)


def test_evaluate_hands_on_what_the_teacher_said() -> None:
    teacher, seen = teacher_of(), []
    evaluate(net_of(), splits().val, teacher=teacher, after_batch=lambda *given: seen.append(given))
    for batch, _, teacher_outputs in seen:
        assert teacher_outputs is not None
        assert torch.equal(teacher_outputs.logits, teacher(batch.images))


def test_a_frozen_teacher_can_be_scored_like_any_net() -> None:
    teacher = teacher_of()
    assert evaluate(teacher, splits().val) == evaluate(teacher.net, splits().val)
    assert not teacher.net.training


# --- divergence -----------------------------------------------------------------------------------------------


class Explodes(Loss):
    """Not finite in one batch of the epoch only."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        return {"good": student.logits.mean(), "bad": torch.tensor(self.value if self.calls == 2 else 0.0)}


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_was_not_finite_once_ends_the_epoch(value: float) -> None:
    with pytest.raises(DivergedError, match=r"loss, bad became not finite.*--restart") as caught:
        train_epoch(learner_of(linear_net(), Explodes(value)), flat_loader(4, 4, 4, 4), epoch=0, seed=0)
    assert caught.value.exit_status == 1
    assert "\n" not in str(caught.value)


def test_the_loss_can_be_seen_to_diverge_in_the_middle_of_an_epoch() -> None:
    totals = Totals(CPU)
    learner = learner_of(linear_net(), Explodes(float("nan")))
    with pytest.raises(DivergedError):
        train_epoch(learner, flat_loader(*[4] * 50), epoch=0, seed=0, totals=totals, after_step=totals.means)
    assert totals.steps == 2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_logits_that_are_not_finite_are_no_plausible_class(value: float) -> None:
    net: Any = linear_net()
    with torch.no_grad():
        net[1].bias[0] = value
    assert net(batch_of(4, image_size=1).images).argmax(1).tolist() == [0] * 4  # what would have been counted
    with pytest.raises(DivergedError, match="cross_entropy became not finite"):
        evaluate(net, flat_loader(4))


@pytest.mark.parametrize("where", ["student", "loss"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_not_saved(where: str, value: float) -> None:
    learner = learner_of(loss=Hint())
    learner.state_dict()
    weight = learner.student.linear.weight if where == "student" else learner.loss.adapter.weight  # type: ignore[union-attr]
    name = {"student": "linear.weight", "loss": "adapter.weight"}[where]
    with torch.no_grad():
        weight[0, 0] = value  # type: ignore[index, operator]
    with pytest.raises(DivergedError, match=f"weights of {name} are not finite"):
        learner.state_dict()


# --- losses with parameters -----------------------------------------------------------------------------------


def test_a_losss_parameters_are_trained_and_saved_and_the_students_state_stays_clean() -> None:
    teacher = teacher_of()
    learner = learner_of(loss=Hint(), optimizer="adam")
    fresh = Hint().state_dict()
    first = train_epoch(learner, splits().train, epoch=0, seed=0, teacher=teacher)
    second = train_epoch(learner, splits().train, epoch=1, seed=0, teacher=teacher)
    assert second["hint"] < first["hint"]
    assert all(not torch.equal(value, fresh[name]) for name, value in learner.loss.state_dict().items())

    state = through_a_file(learner.state_dict())
    assert list(state["state_dict"]) == list(net_of().state_dict())
    assert list(state["loss_dict"]) == ["adapter.weight", "adapter.bias"]
    other = learner_of(net_of(8), Hint(), "adam")
    other.load_state_dict(state)
    assert_bitwise_equal(other.state_dict(), learner.state_dict())
    means = (train_epoch(one, splits().train, epoch=2, seed=0, teacher=teacher) for one in (learner, other))
    assert next(means) == next(means)
    assert_bitwise_equal(other.state_dict(), learner.state_dict())


def test_a_net_is_asked_for_no_more_than_the_loss_needs() -> None:
    images = batch_of(2).images
    outputs = outputs_of(net_of().eval(), images, frozenset({"logits"}))
    assert (outputs.features, outputs.preacts, outputs.embedding) == ((), (), None)
    # So nets that return nothing but logits will do.
    assert outputs_of(linear_net(), images[:, :, :1, :1], frozenset({"logits"})).logits.shape == (2, CLASSES)
    assert outputs_of(net_of().eval(), images, frozenset({"embedding"})).embedding is not None


# --- the sum of it: does distillation distil? -----------------------------------------------------------------


class MisPaired(FrozenTeacher):
    """A teacher whose answers belong to the batch before: what a cache under shuffling once did to many."""

    def __init__(self, teacher: FrozenTeacher) -> None:
        super().__init__(teacher.net)
        self.last: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        answer = logits.roll(1, 0) if self.last is None else self.last
        self.last = logits
        return answer


@functools.cache
def perfect_teacher() -> FrozenTeacher:
    learner = learner_of(net_of(0, width=32), CE, "adam")
    for epoch in range(10):
        train_epoch(learner, splits().train, epoch=epoch, seed=0)
    return FrozenTeacher(learner.student)


def distilled(teacher: FrozenTeacher) -> dict[str, float]:
    """Returns how well a student that never saw a label does what the teacher does; `kd` as a share of the first."""
    learner = learner_of(net_of(1), {"name": "kd", "alpha": 1.0, "temperature": 4.0}, "adam")
    score = functools.partial(evaluate, learner.student, splits().val, loss=learner.loss, teacher=perfect_teacher())
    before = score()
    for epoch in range(10):
        train_epoch(learner, splits().train, epoch=epoch, seed=1, teacher=teacher)
    logits: list[tuple[Tensor, Tensor]] = []
    after = score(after_batch=lambda _, ours, theirs: logits.append((ours.logits, theirs.logits)))
    follows = agreement(*(torch.cat(parts) for parts in zip(*logits, strict=True)))
    return {**after, **follows, "kd": after["kd"] / before["kd"]}


def test_a_student_learns_everything_from_a_perfect_teacher_without_labels() -> None:
    assert evaluate(perfect_teacher(), splits().val)["accuracy"] >= 0.98
    found = distilled(perfect_teacher())
    assert found["kd"] < 0.05
    assert found["teacher_agreement"] >= 0.95
    assert found["accuracy"] >= 0.95


def test_a_mis_paired_teacher_does_not_pass_the_same_bar() -> None:
    found = distilled(MisPaired(perfect_teacher()))
    assert found["kd"] > 0.5
    assert found["teacher_agreement"] < 0.5
    assert found["accuracy"] < 0.5


# --- no waiting for the device --------------------------------------------------------------------------------

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_number_of_reads_from_the_device_does_not_grow_with_the_steps(
    optimizer: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()
    for name in READS:
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)

    def reads(steps: int) -> dict[str, int]:
        counts.clear()
        learner = learner_of(loss=KD, optimizer=optimizer, precision=precision, steps=steps)
        train_epoch(learner, ListLoader([batch_of(4)] * steps), epoch=0, seed=0, teacher=teacher)
        return dict(counts)

    teacher = teacher_of()
    few, many = reads(5), reads(50)
    assert many == few
    assert few.get("tolist", 0) >= 1, "the means are read once"


def meta_batches(number: int) -> list[Batch]:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return [Batch(meta(4, 3, 8, 8), *(meta(4, dtype=torch.int64) for _ in range(3))) for _ in range(number)]


@pytest.mark.parametrize("loss", [KD, "hint"], ids=["logits", "features"])
def test_every_step_is_done_without_knowing_a_single_value(loss: Any) -> None:
    # Tensors of the meta device have no values: whatever asks for one raises, here only the means at the end.
    loss = Hint() if loss == "hint" else LOSSES.create(LOSSES.resolve(loss)[0])
    student, teacher, loss = net_of().to("meta"), teacher_of().to("meta"), loss.to("meta")
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], 0.1, momentum=0.9, foreach=False)
    section, _ = SCHEDULES.resolve({"name": "cosine", "per": "iteration"})
    learner = Learner(student, loss, optimizer, create_schedule(section, optimizer, 1, 6))
    loader, steps = ListLoader(meta_batches(6)), []
    with pytest.raises(NotImplementedError, match="meta"):
        train_epoch(learner, loader, epoch=0, seed=0, teacher=teacher, after_step=lambda: steps.append(None))
    assert len(steps) == 6
    with pytest.raises(NotImplementedError, match="meta"):
        evaluate(student, loader, loss=loss, teacher=teacher, after_batch=lambda *_: steps.append(None))
    assert len(steps) == 12


# --- precision and device -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("training", [True, False])
def test_nets_compute_in_the_given_precision_and_losses_in_float32(
    precision: str, dtype: torch.dtype, training: bool
) -> None:
    class Spy(Hint):
        def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
            assert teacher is not None
            for outputs in (student, teacher):
                for tensor in (outputs.logits, *outputs.features, *outputs.preacts, outputs.embedding):
                    received.add(tensor.dtype)
            terms = super().forward(student, teacher, batch)
            received.update(term.dtype for term in terms.values())
            return terms

    received: set[torch.dtype] = set()
    learner, teacher = learner_of(loss=Spy(), precision=precision), teacher_of()
    teacher.precision = precision
    computed: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}
    for name, net in (("student", learner.student), ("teacher", teacher.net)):
        net.conv2.register_forward_hook(lambda _, __, output, name=name: computed[name].add(output.dtype))
    if training:
        train_epoch(learner, splits().train, epoch=0, seed=0, teacher=teacher)
    else:
        evaluate(learner.student, splits().val, precision=precision, loss=learner.loss, teacher=teacher)
    assert received == {torch.float32}
    assert computed == {"student": {dtype}, "teacher": {dtype}}
    assert {parameter.dtype for parameter in learner.student.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_about_like_full_precision(precision: str) -> None:
    def run(name: str) -> tuple[dict[str, float], dict[str, float]]:
        learner, teacher = learner_of(loss=KD, precision=name), teacher_of()
        for epoch in range(2):
            means = train_epoch(learner, splits().train, epoch=epoch, seed=0, teacher=teacher)
        return means, evaluate(learner.student, splits().val, precision=name, loss=learner.loss, teacher=teacher)

    for full, half in zip(run("fp32"), run(precision), strict=True):
        assert half == pytest.approx(full, rel=0.03, abs=0.05)
        assert half != full


def test_only_fp16_scales_its_gradients() -> None:
    assert {name: learner_of(precision=name).scaler.is_enabled() for name in ("fp32", "bf16", "fp16")} == {
        "fp32": False,
        "bf16": False,
        "fp16": True,
    }


# --- more than one loss, one view, one net --------------------------------------------------------------------


def objective_of(*sections: dict[str, Any], num_epochs: int = 10) -> Objective:
    resolved, problems = losses.resolve(list(sections))
    assert problems == []
    return losses.create_objective(resolved, num_epochs)


def test_a_weighted_sum_trains_as_the_blend_that_it_equals() -> None:
    """0.3 CE + 0.7 KD by two losses, and by kd's own alpha."""
    students = [net_of(), net_of()]
    whole = {**KD, "alpha": 1.0, "weight": 0.7}
    for student, loss in zip(students, (LOSSES.create(KD), objective_of({**CE, "weight": 0.3}, whole)), strict=True):
        train_epoch(learner_of(student, loss), splits().train, epoch=0, seed=0, teacher=teacher_of())
    for one, other in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(one, other)


def test_a_loss_of_weight_0_leaves_the_run_as_it_is_without_it_to_the_last_bit() -> None:
    students = [net_of(dropout_rate=0.3), net_of(dropout_rate=0.3)]
    for student, sections in zip(students, ([CE], [CE, {**KD, "weight": 0.0}]), strict=True):
        train_epoch(learner_of(student, objective_of(*sections)), splits().train, epoch=0, seed=0)
    assert_bitwise_equal(students[0].state_dict(), students[1].state_dict())


def test_a_loss_is_told_of_each_epoch() -> None:
    told = []

    class Listening(KDLoss):
        def on_epoch(self, epoch: int) -> None:
            told.append(epoch)

    learner = learner_of(loss=Listening(alpha=0.5, temperature=4.0))
    for epoch in (0, 1, 5):
        train_epoch(learner, splits().train, epoch=epoch, seed=0, teacher=teacher_of())
    assert told == [0, 1, 5]


def test_the_gradient_of_each_term_on_the_logits_is_measured_on_request() -> None:
    """At T the gradient of T^2 KL is T (p_s - p_t) / N, that of cross-entropy (p_s - y) / N."""
    batch = batch_of(8, image_size=1)
    learner = learner_of(linear_net(), objective_of({**CE, "weight": 2.0}, {**KD, "alpha": 1.0}), rate=1e-9)
    teacher = FrozenTeacher(linear_net(1))
    with torch.no_grad():
        own, other = (net(batch.images) for net in (learner.student, teacher))
    y = F.one_hot(batch.labels, CLASSES)
    expected = {
        "ce_gradient": 2 * (own.softmax(1) - y).norm() / 8,
        "kd_gradient": 4 * ((own / 4).softmax(1) - (other / 4).softmax(1)).norm() / 8,
    }
    loader = ListLoader([batch])
    plain = train_epoch(learner, loader, epoch=0, seed=0, teacher=teacher)
    found = train_epoch(learner, loader, epoch=0, seed=0, teacher=teacher, gradient_norms=True)
    assert set(found) - set(plain) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4)


def test_measuring_gradients_changes_no_bit_of_what_is_learnt() -> None:
    students = [net_of(), net_of()]
    for student, measured in zip(students, (False, True), strict=True):
        learner = learner_of(student, objective_of(CE, {**KD, "alpha": 1.0}))
        train_epoch(learner, splits().train, epoch=0, seed=0, teacher=teacher_of(), gradient_norms=measured)
    assert_bitwise_equal(students[0].state_dict(), students[1].state_dict())


def cohort(number: int = 2) -> Objective:
    objective = objective_of(CE, {"name": "dml", "peers": [{}] * number})
    [(_, dml)] = [part for part in objective.parts() if part[0] == "dml"]
    dml.peers.extend(net_of(10 + k) for k in range(number))
    return objective


def test_peers_learn_in_the_same_step_and_are_scored_beside_the_student() -> None:
    objective = cohort()
    before = through_a_file(objective.state_dict())
    learner = learner_of(loss=objective)
    for epoch in range(2):
        train_epoch(learner, splits().train, epoch=epoch, seed=0)
    moved = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(before)
    scores = evaluate(learner.student, splits().val, loss=objective)
    for number, peer in enumerate(objective.peers, start=1):
        assert scores[f"peer{number}_accuracy"] == evaluate(peer, splits().val)["accuracy"]
        assert not any("peer" in name for name in learner.state_dict()["state_dict"])


def test_what_peers_learn_is_checkpointed_and_goes_on_with_the_same_bits() -> None:
    straight = learner_of(loss=cohort())
    for epoch in range(2):
        train_epoch(straight, splits().train, epoch=epoch, seed=0)
    first = learner_of(loss=cohort())
    train_epoch(first, splits().train, epoch=0, seed=0)
    second = learner_of(net_of(5), cohort())
    second.load_state_dict(through_a_file(first.state_dict()))
    train_epoch(second, splits().train, epoch=1, seed=0)
    assert_bitwise_equal(straight.state_dict(), second.state_dict())


def test_unlabelled_images_teach_by_the_teacher_alone() -> None:
    """A step with them is one by hand: cross-entropy of the labelled, divergence of all."""
    labelled, other = batch_of(6, image_size=1), batch_of(10, seed=1, image_size=1)
    mixed = with_unlabelled(labelled, other)
    teacher, student, twin = FrozenTeacher(linear_net(1)), linear_net(), linear_net()
    objective = objective_of(CE, {**KD, "alpha": 1.0})
    scores = train_epoch(learner_of(student, objective), ListLoader([mixed]), epoch=0, seed=0, teacher=teacher)
    logits, targets = twin(mixed.images), teacher(mixed.images)
    p, q = (targets / 4).softmax(1), (logits / 4).log_softmax(1)
    ce = F.cross_entropy(logits[:6], labelled.labels)
    kd = 16 * (p * (p.log() - q)).sum(1).mean()
    assert scores["ce"] == pytest.approx(ce.item(), rel=1e-5)
    assert scores["kd"] == pytest.approx(kd.item(), rel=1e-5)
    assert scores["accuracy"] == (logits[:6].argmax(1) == labelled.labels).double().mean().item()
    (ce + kd).backward()
    for own, expected in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)


def test_a_second_view_is_shown_to_both_nets() -> None:
    first, second = batch_of(6, image_size=1), batch_of(6, seed=1, image_size=1)
    batch = dataclasses.replace(first, strong_images=second.images)
    seen: list[tuple[Outputs, Outputs]] = []

    class TwoViews(Loss):
        needs = frozenset({"logits", "strong_logits"})
        needs_teacher = True

        def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
            assert teacher is not None
            seen.append((student, teacher))
            return {"two": student.logits.mean() + student.strong_logits.mean()}

    student, teacher = linear_net(), FrozenTeacher(linear_net(1))
    twin = linear_net()
    train_epoch(learner_of(student, TwoViews()), ListLoader([batch]), epoch=0, seed=0, teacher=teacher)
    [outputs] = seen
    for net, found in zip((twin, teacher), outputs, strict=True):
        torch.testing.assert_close(found.logits, net(first.images))
        torch.testing.assert_close(found.strong_logits, net(second.images))
    evaluate(student, ListLoader([first]), loss=TwoViews(), teacher=teacher)
    student_outputs, teacher_outputs = seen[1]
    assert torch.equal(student_outputs.strong_logits, student_outputs.logits), "in validation there is one view"
    assert torch.equal(teacher_outputs.strong_logits, teacher_outputs.logits)
