import pytest
import torch
from torch import nn

from model.data import DATASETS, create

CPU = torch.device("cpu")


def synthetic(**options):
    section, problems = DATASETS.resolve({"name": "synthetic", **options})
    assert not problems
    return create(section, seed=0, device=CPU)


def read(**options):
    return DATASETS.create({"name": "synthetic", **options})


def test_synthetic_images_depend_on_data_seed_only():
    first = read()
    torch.manual_seed(5)
    second, other = read(), read(data_seed=1)
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.train.images, other.train.images)


def test_synthetic_images_have_the_sizes_asked_for_and_balanced_labels():
    images = read(num_classes=5, train_size=52, test_size=10, image_size=24)
    assert images.train.images.shape == (52, 3, 24, 24)
    assert images.test.images.shape == (10, 3, 24, 24)
    assert sorted(images.train.labels.bincount().tolist()) == [10, 10, 10, 11, 11]
    assert len(images.classes) == 5


def test_without_noise_all_images_of_a_class_are_alike_and_classes_differ():
    images = read(noise=0.0, train_size=40)
    patterns = {
        label: images.train.images[images.train.labels == label].unique(dim=0) for label in range(len(images.classes))
    }
    assert all(len(pattern) == 1 for pattern in patterns.values())
    assert len(torch.cat(list(patterns.values())).unique(dim=0)) == 4


@pytest.mark.parametrize("augmentation", ["none", "crop_flip"])
@pytest.mark.parametrize("data_seed", [0, 1, 2])
def test_a_small_net_learns_synthetic_images_in_a_few_epochs(augmentation, data_seed):
    data = synthetic(augmentation=augmentation, batch_size=32, data_seed=data_seed)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, data.num_classes),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for epoch in range(4):
        for batch in data.train.epoch(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(batch.images), batch.labels).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        correct = sum(int((net(batch.images).argmax(1) == batch.labels).sum()) for batch in data.test.epoch(0))
    assert correct / data.test.num_samples > 0.9
