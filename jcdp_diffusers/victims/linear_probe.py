"""
What a representation is worth: a linear classifier on a frozen network's features, and nearest neighbours.

Probes:

- `"cp"`: that of contrastive poisoning's repository (ICLR 2023). 100 epochs of SGD on randomly cropped and mirrored
  images.
- `"fast"`: ours. Multinomial logistic regression on the features of the images as they are, by L-BFGS to its minimum,
  in seconds. It has no epochs, so it has no best one.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from . import evaluation
from .contrastive import Views
from .networks import last_layer
from .recipes import Recipe
from .training import Objective, autocast, network_input, train


PROBES = ("cp", "fast")
CP = Recipe(
    "cp-probe",
    epochs=100,
    batch_size=512,
    learning_rate=1.0,
    schedule="steps",
    milestones=(60, 75, 90),
    gamma=0.2,
    weight_decay=0.0,
    crop_padding=0,
)
CP_MIN_SCALE = 0.2
INVERSE_PENALTY = 1.0  # C of scikit-learn's LogisticRegression, for features of standard deviation 1
NEIGHBOURS, KNN_TEMPERATURE = 200, 0.1


def fit_probe(
    network: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    test_images: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    probe: str = "fast",
    bfloat16: bool = False,
    seed: int = 0,
    progress: Callable[[dict[str, float]], None] | None = None,
    checkpoint_dir: str | Path | None = None,
) -> float | None:
    """
    Fit the last layer of a network to labelled images; the rest stays as it is, in eval mode.

    Args:
        network (`nn.Module`): One of `networks`, whose last layer is replaced in place.
        images (`torch.Tensor`): uint8 (N, C, H, W), on the network's device.
        labels (`torch.Tensor`): int64 (N,), likewise.
        test_images, test_labels (`torch.Tensor`): Likewise, for the best epoch alone.
        probe (`str`, defaults to `"fast"`): One of `PROBES`.
        bfloat16 (`bool`, defaults to `False`): Whether features are computed in bfloat16.
        seed (`int`, defaults to 0): Of the order, the crops and the flips of `"cp"`.
        progress (`Callable`, *optional*): Called after each epoch of `"cp"`.
        checkpoint_dir (`str` or `Path`, *optional*): Folder in which `"cp"` is kept after each epoch.

    Returns:
        `float`, *optional*: The highest test accuracy after any epoch; None for a probe without epochs.

    Raises:
        ValueError: If there is no such probe, or the labels have one class only.
    """
    if probe not in PROBES:
        raise ValueError(f"probe is {probe!r}, but must be one of {', '.join(PROBES)}.")
    if len(labels.unique()) < 2:
        raise ValueError(
            f"probe images have labels of class {labels[0].item()} alone, but must have those of at least 2 classes."
        )
    head = last_layer(network.eval())
    if probe == "fast":
        features = evaluation.features(network, images, bfloat16=bfloat16)
        weight, bias = logistic_regression(features, labels, head.out_features)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        return None
    test_features = evaluation.features(network, test_images, bfloat16=bfloat16)
    head.requires_grad_(True)  # a network may train its last layer without a bias, a probe has one
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    objective = ProbeByGradient(network, head, tuple(images.shape[2:]), bfloat16)

    def evaluate(epoch: int) -> dict[str, float]:
        with torch.no_grad():
            right = head(test_features).argmax(dim=1) == test_labels
        return {"test_accuracy": right.float().mean().item()}

    history = train(
        objective,
        images,
        labels,
        recipe=CP,
        seed=seed,
        device=images.device,
        evaluate=evaluate,
        evaluated=(test_features, test_labels),  # which tell one frozen network from another
        progress=progress,
        checkpoint_dir=checkpoint_dir,
    )
    return max(entry["test_accuracy"] for entry in history)


class ProbeByGradient(Objective):
    """
    Cross-entropy of a linear layer on features of randomly cropped and mirrored images.

    Args:
        network (`nn.Module`): In eval mode. It is no part of what is trained.
        head (`nn.Linear`): What is trained.
        size (`tuple` of `int`): Height and width of the images.
        bfloat16 (`bool`): Whether features are computed in bfloat16.
    """

    def __init__(self, network: nn.Module, head: nn.Linear, size: tuple[int, int], bfloat16: bool):
        super().__init__()
        self.features = network.features  # a function, so the network stays out of parameters() and train()
        self.head = head
        self.views = Views(size, min_scale=CP_MIN_SCALE, colour=False)
        self.bfloat16 = bfloat16

    def loss(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with torch.no_grad(), autocast(self.bfloat16, images.device):
            features = self.features(self.views(network_input(images), generator))
        return F.cross_entropy(self.head(features.float()), labels)


def logistic_regression(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Multinomial logistic regression, with an L2 penalty on weights for features of mean 0 and standard deviation 1.

    Args:
        features (`torch.Tensor`): float (N, F).
        labels (`torch.Tensor`): int64 (N,).
        num_classes (`int`): Rows of the result.

    Returns:
        `tuple` of `torch.Tensor`: float32 weight (num_classes, F) and bias (num_classes,), for the features as given.
    """
    features = features.double()
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    features = (features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device).requires_grad_()
    bias = torch.zeros(num_classes, dtype=torch.float64, device=features.device).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = weight.square().sum() / (2 * INVERSE_PENALTY * len(features))
        loss = F.cross_entropy(features @ weight.T + bias, labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = weight.detach() / std
    return weight.float(), (bias.detach() - weight @ mean).float()


def knn_accuracy(
    features: torch.Tensor, labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor
) -> float:
    """
    Accuracy of a vote of the 200 nearest images, weighted by exp(cosine / 0.1) (Wu et al., CVPR 2018).

    Where there are fewer images than that, all of them vote.

    Args:
        features (`torch.Tensor`), labels (`torch.Tensor`): float (N, F) and int64 (N,) of images that vote.
        test_features (`torch.Tensor`), test_labels (`torch.Tensor`): float (M, F) and int64 (M,).

    Returns:
        `float`: The fraction of the M that is called right, in [0, 1].
    """
    features = F.normalize(features, dim=1)
    count = min(NEIGHBOURS, len(features))
    right = 0
    for batch, wanted in zip(test_features.split(1000), test_labels.split(1000)):
        cosine, index = (F.normalize(batch, dim=1) @ features.T).topk(count, dim=1)
        votes = torch.zeros(len(batch), int(labels.max()) + 1, device=features.device)
        votes.scatter_add_(1, labels[index], (cosine / KNN_TEMPERATURE).exp())
        right += (votes.argmax(dim=1) == wanted).sum().item()
    return right / len(test_labels)
