import numpy as np
import torch
from scipy.signal import correlate2d

from jcdp_diffusers import poisons
from jcdp_diffusers.poisons import cuda


def test_is_a_blur_by_class_scaled_to_its_largest_value(data):
    perturbation = poisons.get("cuda")(data.tensor(), torch.from_numpy(data.labels), seed=5)
    kernels = cuda.kernels(4, cuda.CUDASettings(), seed=5).double().numpy()
    for image, label, change in zip(data.images / 255, data.labels, perturbation.numpy(), strict=True):
        blurred = np.stack([correlate2d(image[:, :, channel], kernels[label], mode="same") for channel in range(3)])
        np.testing.assert_allclose(change, blurred / blurred.max() - image.transpose(2, 0, 1), atol=1e-5)


def test_kernels_are_those_of_the_released_program():
    """One entry is 1, the others come from U(0, 0.3); the order of the draws is the program's."""
    kernels = cuda.kernels(10, cuda.CUDASettings(), seed=0).numpy()
    assert ((kernels == 1).sum(axis=(1, 2)) == 1).all() and (kernels[kernels != 1] < 0.3).all()
    draw = np.random.RandomState(0)
    first = draw.uniform(low=0, high=0.3, size=(3, 1, 3, 3))[0, 0]
    first[draw.randint(3), draw.randint(3)] = 1.0
    np.testing.assert_allclose(kernels[0], first, rtol=1e-6)


def test_a_black_image_stays_black():
    perturbation = poisons.get("cuda")(torch.zeros(2, 3, 8, 8), torch.arange(2))
    assert not perturbation.any()
