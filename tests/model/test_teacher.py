from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from model.errors import InputError
from model.nets import NETS
from model.outputs import Batch, outputs_of
from model.taps import set_taps, taps_of
from model.teacher import FrozenTeacher, create_teacher, fingerprint_of
from model.teacher_store import TeacherStore

OURS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
THEIRS = {"mean": [0.1, 0.2, 0.6], "std": [0.5, 0.1, 0.4]}
SECTION: dict[str, Any] = {"model_dir": "experiments/t", "mean": None, "std": None, "stages": None}
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
    teacher = create_teacher(state_of(net, **theirs), SECTION, RECORD)
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
    teacher = create_teacher(state_of(net), SECTION, RECORD)
    pixels = images()
    seen: list[Tensor] = []
    teacher.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert torch.equal(teacher(pixels), net.eval()(pixels))
    assert seen[0] is pixels


def test_the_constants_move_with_it_and_are_no_weights() -> None:
    teacher = create_teacher(state_of(net_of(), **THEIRS), SECTION, RECORD)
    assert [name for name in teacher.state_dict() if not name.startswith("net.")] == []
    assert teacher.to("meta")(images().to("meta")).device.type == "meta"


# --- from a checkpoint ----------------------------------------------------------------------------------------


def test_it_is_the_net_of_the_checkpoint() -> None:
    net = net_of()
    teacher = create_teacher(state_of(net), SECTION, RECORD)
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
        create_teacher(state_of(net_of(), **changes), SECTION, RECORD)
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
        create_teacher(state_of(net_of(), section=section), SECTION, RECORD)
    assert str(caught.value).startswith("teacher experiments/t: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("accuracy", [None, 0.75])
def test_it_knows_how_well_it_did_in_its_own_run(accuracy: float | None) -> None:
    state = state_of(net_of()) | ({} if accuracy is None else {"metrics": {"accuracy": accuracy}})
    assert create_teacher(state, SECTION, RECORD).accuracy == accuracy


@pytest.mark.parametrize(
    ("own", "given", "expected"), [(None, None, ()), (["bn1"], None, ("bn1",)), (["bn1"], ["conv2"], ("conv2",))]
)
def test_its_stages_are_those_of_its_own_run_unless_others_are_named(
    own: list[str] | None, given: list[str] | None, expected: tuple[str, ...]
) -> None:
    state = state_of(net_of(), section=RECORD["section"] | {"stages": own})
    teacher = create_teacher(state, SECTION | {"stages": given}, RECORD)
    assert taps_of(teacher.net) == expected
    features = teacher.forward_with_features(images()).features
    assert [len(features[0][0])] == {(): [8], ("bn1",): [8], ("conv2",): [16]}[expected]
    assert len(features) == (len(expected) or 2)


def test_its_fingerprint_is_that_of_options_weights_and_statistics() -> None:
    net = net_of()
    one = create_teacher(state_of(net), SECTION, RECORD).fingerprint
    assert one == create_teacher(state_of(net), SECTION, RECORD).fingerprint
    assert one == fingerprint_of(net.state_dict(), RECORD["section"])
    others = {
        fingerprint_of(net.state_dict(), RECORD["section"] | {"dropout_rate": 0.1}),
        fingerprint_of(net_of(1).state_dict(), RECORD["section"]),
    }
    for name in ("conv1.weight", "bn2.running_var", "linear.bias"):
        changed = net_of()
        changed.state_dict()[name].view(-1)[0] += 1e-6
        others.add(fingerprint_of(changed.state_dict(), RECORD["section"]))
    assert len({one, *others}) == 6


# --- fast -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [OURS, THEIRS])
def test_a_fast_copy_answers_as_the_original_does_and_leaves_it_alone(theirs: dict[str, list[float]]) -> None:
    teacher = create_teacher(state_of(net_of(), **theirs), SECTION, RECORD)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    fast = teacher.fast("fp32", frozenset({"logits", "embedding"}), (3, 16, 16))
    assert fast.num_folded == 2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert_close(fast(images()), teacher(images()), rtol=1e-4, atol=1e-5)
    ours, theirs_ = (t.forward_with_features(images()) for t in (fast, teacher))
    assert_close(ours.embedding, theirs_.embedding, rtol=1e-4, atol=1e-5)
    assert (teacher.num_folded, teacher.precision) == (0, "fp32")
    assert list(teacher.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert fast.train().training is False
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_a_fast_copy_computes_in_its_own_precision_whatever_is_around_it() -> None:
    teacher = create_teacher(state_of(net_of()), SECTION, RECORD)
    half = teacher.fast("bf16", frozenset({"logits"}), (3, 16, 16))
    assert half(images()).dtype == torch.bfloat16
    assert_close(half(images()).float(), teacher(images()), rtol=0.05, atol=0.05)
    assert teacher(images()).dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fast_copy_has_the_same_taps(precision: str) -> None:
    torch.manual_seed(0)
    net: nn.Module = NETS.create({"name": "torchvision/resnet18"}, 3)
    net(torch.randn(4, 3, 64, 64))
    set_taps(net, ["layer2.0.conv1", "layer3"])
    teacher = FrozenTeacher(net)
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    fast = teacher.fast(precision, frozenset({"logits", "features"}), (3, 64, 64))
    assert fast.num_folded == 19
    ours, theirs = (outputs_of(each, pictures, frozenset({"features"})).features for each in (fast, teacher))
    assert len(ours) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < (1e-4 if precision == "fp32" else 0.05) * other.abs().max()


# --- with a store ---------------------------------------------------------------------------------------------


class Samples:
    """A loader's facts and batches: sample `i` under view `v` is noise of its own."""

    split = object()
    seed = 3

    @staticmethod
    def batch(*pairs: tuple[int, int]) -> Batch:
        pictures = torch.stack([images(100 * sample + view)[0] for sample, view in pairs])
        samples, views = torch.tensor(pairs).unbind(1)
        return Batch(pictures.contiguous(memory_format=torch.channels_last), samples % 3, samples, views)


def stored_teacher(root: Path, needs: frozenset[str], dtype: str = "fp32", **options: Any) -> FrozenTeacher:
    teacher = create_teacher(state_of(net_of()), SECTION, RECORD)
    widths = {"logits": 3, "embedding": 16}
    widths = {field: widths[field] for field in sorted(needs)}
    store = TeacherStore.open(root, {}, num_samples=10, num_views=4, widths=widths, dtype=dtype, **options)
    teacher.stores.append((Samples.split, store))
    return teacher


LOGITS = frozenset({"logits"})


def test_only_what_was_never_asked_is_computed_in_one_forward(tmp_path: Path) -> None:
    teacher = stored_teacher(tmp_path, LOGITS)
    sizes: list[int] = []
    teacher.net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for pairs in ([(0, 0), (1, 3), (2, 1)], [(1, 3), (5, 0), (0, 0), (1, 2)], [(1, 2), (2, 1)], [(2, 1), (2, 2)]):
        batch = Samples.batch(*pairs)
        with teacher.lesson(Samples, 0, LOGITS) as ask:
            answers = ask(batch).logits
        assert_close(answers, teacher.net(batch.images), rtol=1e-5, atol=1e-6)
        sizes.pop()  # of the line above
    assert sizes == [3, 2, 1]
    assert teacher.num_computed == 6


def test_answers_belong_to_sample_and_view_in_whatever_order_they_are_asked(tmp_path: Path) -> None:
    teacher = stored_teacher(tmp_path, LOGITS)
    pairs = [(sample, view) for sample in range(10) for view in range(4)]
    with teacher.lesson(Samples, 0, LOGITS) as ask:
        given = dict(zip(pairs, ask(Samples.batch(*pairs)).logits, strict=True))
    teacher.net = nn.Identity()  # from here on the store is all there is
    for seed in range(5):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:17].tolist()
        with teacher.lesson(Samples, seed, LOGITS) as ask:
            answers = ask(Samples.batch(*(pairs[place] for place in order))).logits
        assert all(torch.equal(answer, given[pairs[place]]) for answer, place in zip(answers, order, strict=True))


@pytest.mark.parametrize(("dtype", "options"), [("fp32", {}), ("fp16", {}), ("fp16", {"top_k": 1})])
def test_what_is_computed_today_is_what_is_read_tomorrow(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    needs = frozenset({"logits", "embedding"})
    teacher = stored_teacher(tmp_path, needs, dtype, **options)
    batch = Samples.batch((0, 0), (1, 3), (2, 1))
    answers = []
    for _ in range(2):
        with teacher.lesson(Samples, 0, needs) as ask:
            answers.append(ask(batch))
    assert teacher.num_computed == 3
    assert torch.equal(answers[0].logits, answers[1].logits)
    assert torch.equal(answers[0].embedding, answers[1].embedding)
    exact = teacher.forward_with_features(batch.images)
    assert torch.equal(
        answers[0].embedding, exact.embedding.to({"fp32": torch.float32, "fp16": torch.float16}[dtype]).float()
    )


def test_fp16_changes_loss_and_gradient_by_no_more_than_its_rounding(tmp_path: Path) -> None:
    teacher = stored_teacher(tmp_path, LOGITS, "fp16")
    batch = Samples.batch(*((sample, 1) for sample in range(10)))
    teacher.net.linear.weight.data *= 30  # type: ignore[union-attr, operator]  # logits as far apart as a real one's
    with teacher.lesson(Samples, 0, LOGITS) as ask:
        stored = ask(batch).logits
    exact = teacher(batch.images)
    assert not torch.equal(stored, exact)

    def loss_and_gradient(targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.linspace(-2, 2, 30).view(10, 3).requires_grad_()
        value = 16 * F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(targets / 4, 1), reduction="batchmean")
        value.backward()
        assert logits.grad is not None
        return value.detach(), logits.grad

    for one, other in zip(loss_and_gradient(stored), loss_and_gradient(exact), strict=True):
        assert (one - other).norm() < 2**-10 * other.norm() * exact.abs().max()


def test_an_epoch_that_fails_keeps_what_was_computed(tmp_path: Path) -> None:
    teacher = stored_teacher(tmp_path, LOGITS)
    lesson = teacher.lesson(Samples, 0, LOGITS)
    lesson.__enter__()(Samples.batch((0, 0), (1, 1)))
    assert not lesson.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    with teacher.lesson(Samples, 0, LOGITS) as ask:
        ask(Samples.batch((1, 1), (0, 0)))
    assert teacher.num_computed == 2


def test_other_lists_of_samples_are_not_looked_up(tmp_path: Path) -> None:
    class Others(Samples):
        split = object()

    teacher = stored_teacher(tmp_path, LOGITS)
    for _ in range(2):
        with teacher.lesson(Others, 0, LOGITS) as ask:
            ask(Samples.batch((0, 0)))
    assert teacher.num_computed == 2
