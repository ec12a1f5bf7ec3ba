import numpy as np
import pytest
import torch
from sklearn.datasets import make_classification

from jcdp_diffusers import poisons
from jcdp_diffusers.data.perturbations import apply_perturbation, measured_norms
from jcdp_diffusers.poisons.lsp import LSPSettings


def test_is_the_published_construction_value_by_value():
    """Written out as loops from the description of the method, for 32 x 32 colour images of ten classes of equal size."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 3))
    images = torch.rand(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    perturbation = poisons.get("lsp")(images, torch.from_numpy(labels), seed=7).numpy()

    points, classes = make_classification(
        30, 48, n_informative=48, n_redundant=0, n_repeated=0, n_classes=10, n_clusters_per_class=1,
        class_sep=10.0, flip_y=0.0, random_state=7,
    )  # fmt: skip
    used = {label: 0 for label in range(10)}
    for image, label in enumerate(labels):
        of_class = [point for point, point_class in zip(points, classes) if point_class == label]
        point = of_class[used[label]]
        used[label] += 1
        expected = np.zeros((3, 32, 32))
        for row in range(32):
            for column in range(32):
                for channel in range(3):
                    expected[channel, row, column] = point[(row // 8 * 4 + column // 8) * 3 + channel]
        expected *= np.sqrt((6 / 255) ** 2 * 3072) / np.sqrt((expected**2).sum())
        np.testing.assert_allclose(perturbation[image], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("preset, norm", [("published", 1.3041), ("stated", 1.0)])
def test_both_norms_can_be_had_by_name(preset, norm):
    images = torch.full((10, 3, 32, 32), 0.5)
    perturbation = poisons.get("lsp")(images, torch.arange(10), preset=preset)
    assert perturbation.flatten(1).norm(dim=1).numpy() == pytest.approx(norm, rel=1e-4)
    clean = np.full((10, 32, 32, 3), 128, dtype=np.uint8)
    measured = measured_norms(clean, apply_perturbation(clean, perturbation))
    assert measured["l2_mean"] == pytest.approx(norm, rel=0.03)


def test_other_sizes_keep_the_level_and_the_grid():
    perturbation = poisons.get("lsp")(torch.rand(4, 1, 224, 224), torch.arange(4))
    assert perturbation.square().mean(dim=(1, 2, 3)).sqrt().numpy() == pytest.approx(6 / 255, rel=1e-5)
    patches = perturbation.unfold(2, 32, 32).unfold(3, 32, 32)
    assert patches.shape[2:4] == (7, 7) and torch.equal(patches.amin(dim=(4, 5)), patches.amax(dim=(4, 5)))


def test_classes_are_linearly_separable():
    from sklearn.linear_model import LogisticRegression

    labels = torch.arange(60) % 6
    perturbation = poisons.get("lsp")(torch.rand(60, 3, 16, 16), labels).flatten(1).numpy()
    model = LogisticRegression(max_iter=200).fit(100 * perturbation[:30], labels[:30])
    assert model.score(100 * perturbation[30:], labels[30:]) == 1.0


def test_size_and_classes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="images has 30 x 30 pixels.*7 x 7"):
        poisons.get("lsp")(torch.rand(2, 3, 30, 30), torch.arange(2))
    settings = LSPSettings(patch=8)
    with pytest.raises(ValueError, match=r"labels has 3 classes.*2\^1"):
        poisons.get("lsp")(torch.rand(3, 1, 8, 8), torch.arange(3), preset=settings)
