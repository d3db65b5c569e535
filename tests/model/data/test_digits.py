import numpy as np
import torch
from sklearn.datasets import load_digits

from model.data import DATASETS


def test_digits_have_the_shape_of_cifar_and_a_balanced_test_fifth():
    images = DATASETS.create({"name": "digits"})
    assert images.train.images.shape == (1438, 3, 32, 32)
    assert images.test.images.shape == (359, 3, 32, 32)
    assert images.classes == tuple("0123456789")
    assert images.augmentation == "crop"
    everyone = np.bincount(load_digits().target)
    test = images.test.labels.bincount()
    assert (images.train.labels.bincount() + test).tolist() == everyone.tolist()
    assert test.tolist() == [round(count / 5) for count in everyone.tolist()]


def test_digits_are_the_same_every_time():
    first, second = (DATASETS.create({"name": "digits"}) for _ in range(2))
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, second.test.images)


def test_digits_are_the_bilinear_enlargement_of_scikit_learns_images():
    # Each of the 32 pixels of a row lies between two of the 8: pixel i at (i + 0.5) / 4 - 0.5, clamped to the edge.
    weights = np.zeros((32, 8))
    for i in range(32):
        place = min(max((i + 0.5) / 4 - 0.5, 0), 7)
        low = min(int(place), 6)
        weights[i, low], weights[i, low + 1] = 1 - (place - low), place - low
    expected = np.rint(weights @ load_digits().images @ weights.T * 255 / 16).astype(np.uint8)
    images = DATASETS.create({"name": "digits"})
    found = torch.cat([images.train.images, images.test.images]).numpy()
    assert (found == found[:, :1]).all()  # three equal channels
    assert sorted(image.tobytes() for image in found[:, 0]) == sorted(image.tobytes() for image in expected)


def test_digits_constants_are_those_of_the_training_images():
    images = DATASETS.create({"name": "digits"})
    pixels = images.train.images.double() / 255
    np.testing.assert_allclose(images.mean, pixels.mean((0, 2, 3)))
    np.testing.assert_allclose(images.std, pixels.std((0, 2, 3), correction=0))
