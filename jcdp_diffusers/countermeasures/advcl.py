"""
AdvCL: adversarial contrastive learning (Fan et al., NeurIPS 2021; LijieFan/AdvCL), for SimCLR.

A step has four views of each image instead of two: two as usual, one adversarial and one of high frequencies alone.
All are to have one representation, unlike those of other images. The adversarial view lies within a bound of the
image, cropped and mirrored as for learning with labels, and raises that loss. A second adversarial view raises the
error on pseudo-labels: clusters, by k-means at several numbers, of features of another network. Ordinary views,
adversarial views and those with pseudo-labels each have batch normalisation of their own. The network that is
evaluated has that of adversarial views, as in the program.

The program's pseudo-labels come from clean CIFAR-10, which an attacker does not have. Those of `advcl` come from a
network that learned by SimCLR from the collected images: k-means of its features of the training images.
`advcl-plain` has no pseudo-labels, and needs no collected images.

Its loss is multiplied by temperature / 0.07 (`BASE_TEMPERATURE`), whatever the recipe says for SimCLR alone.

Ours: the head is the victim's own, without batch normalisation. Views that an attack does not change go through the
network once per step, not once per step of the attack.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .. import victims
from ..data import LabelledImages
from ..victims import evaluation
from ..victims.checkpoints import digest, kept_seconds
from ..victims.contrastive import Contrastive, SimCLR
from ..victims.recipes import ContrastiveRecipe, get_recipe
from ..victims.supervised import random_crop_flip
from ..victims.training import reproducible, train
from . import Context, Countermeasure


SOURCE = "AdvCL (Fan et al., NeurIPS 2021; LijieFan/AdvCL)"
# Of the program's `SupConLoss`. The recipe `cp` has a quarter of the factor, for processes that this program does not
# have.
BASE_TEMPERATURE = 0.07
# What has batch normalisation beside the network's own, which is that of adversarial views.
ORDINARY, LABELLED = "ordinary", "labelled"


@dataclass(frozen=True)
class AdvCLSettings:
    """
    Numbers of AdvCL.

    Args:
        epsilon (`float`): Largest change of a value by an attack, images in [0, 1].
        step_size (`float`): Length of a step along the gradient's sign.
        steps (`int`): Of an attack.
        radius (`float`): Frequencies below it are missing in the view of high frequencies, as a fraction of the
            image's height: 8 of 32.
        crop_padding (`float`): Of the crop that is attacked, likewise: 4 of 32.
        label_weight (`float`): Of the cross-entropy with pseudo-labels.
        clusters (`tuple` of `int`): Numbers of clusters, each with a linear layer; empty for no pseudo-labels.
        victim (`str`): The network whose features are clustered.
        recipe (`str` or [`ContrastiveRecipe`]): How it learns, of method `"simclr"`.
    """

    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 5
    radius: float = 0.25
    crop_padding: float = 0.125
    label_weight: float = 0.2
    clusters: tuple[int, ...] = (2, 10, 50, 100, 500)
    victim: str = "resnet18"
    recipe: str | ContrastiveRecipe = "mini"


SETTINGS = {"advcl": AdvCLSettings(), "advcl-plain": AdvCLSettings(clusters=())}
SMOKE_SETTINGS = {"advcl": AdvCLSettings(steps=2, clusters=(2, 5), recipe="smoke")}


class AdvCL:
    """
    A hook that takes the place of SimCLR's loss.

    Args:
        settings ([`AdvCLSettings`]): Of the method.
        targets (`torch.Tensor`, *optional*): Pseudo-labels of the training images, int64 (N, number of clusterings).
        seconds_before (`float`, *optional*, defaults to 0): What earlier calls took for them.
    """

    def __init__(self, settings: AdvCLSettings, targets: torch.Tensor | None = None, seconds_before: float = 0.0):
        self.settings = settings
        self.targets = targets
        self.seconds_before = seconds_before

    def own_modules(self, objective: Contrastive) -> nn.Module:
        """
        What is trained beside the objective's network and head, and kept with them.

        Raises:
            ValueError: If the objective is not SimCLR's.
        """
        if not isinstance(objective, SimCLR):
            raise ValueError(f"method is {objective.recipe.method!r}, but must be 'simclr' for AdvCL.")
        return Branches(objective.network, () if self.targets is None else self.settings.clusters)

    def contrastive_loss(
        self,
        objective: SimCLR,
        images: torch.Tensor,
        targets: torch.Tensor | None,
        generator: torch.Generator,
    ) -> torch.Tensor:
        branches, own, recipe = objective.of_hook, objective.hooks.generator, objective.recipe
        settings = self.settings
        ordinary = [objective.view(images, generator) for _ in range(2)]
        padding = round(settings.crop_padding * images.shape[2])
        plain = random_crop_flip(images, own, crop_padding=padding, flip=recipe.flip)
        # Hooks change the image that two of the four views are made of as they change the other two.
        plain, _ = objective.hooks.before_forward(plain, None)
        with branches.instead(objective.network, ORDINARY):
            known = [project(objective, view) for view in (*ordinary, high_frequencies(plain, settings.radius))]

        fixed = [view.detach() for view in known]

        def contrast(moved: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
            loss = multi_view_loss([project(objective, moved), *others], recipe.temperature)
            return recipe.temperature / BASE_TEMPERATURE * loss

        moved = attack(lambda batch: contrast(batch, fixed), plain, settings, own)
        loss = contrast(moved, known)
        if targets is not None:
            with branches.instead(objective.network, LABELLED):

                def error(batch: torch.Tensor) -> torch.Tensor:
                    with objective.autocast(batch.device):
                        features = objective.network.features(batch).float()
                    errors = [F.cross_entropy(head(features), one) for head, one in zip(branches.heads, targets.T)]
                    return sum(errors) / len(errors)

                moved = attack(error, plain, settings, own)
                loss = loss + settings.label_weight * error(moved)
        return loss


class Branches(nn.Module):
    """
    Batch normalisation and linear layers that a network has beside its own.

    Args:
        network (`nn.Module`): Its layers of batch normalisation are copied.
        clusters (`tuple` of `int`): Sizes of the linear layers, which read its features.
    """

    def __init__(self, network: nn.Module, clusters: tuple[int, ...]):
        super().__init__()
        names = (ORDINARY, LABELLED) if clusters else (ORDINARY,)
        norms = [norm for _, _, norm in _norms(network)]
        self.norms = nn.ModuleDict({name: nn.ModuleList(copy.deepcopy(norm) for norm in norms) for name in names})
        self.heads = nn.ModuleList(nn.Linear(network.num_features, count) for count in clusters)

    @contextmanager
    def instead(self, network: nn.Module, branch: str) -> Iterator[None]:
        """Inside the block the network has the batch normalisation of a branch."""
        places = _norms(network)
        for (parent, name, _), norm in zip(places, self.norms[branch], strict=True):
            setattr(parent, name, norm)
        try:
            yield
        finally:
            for parent, name, norm in places:
                setattr(parent, name, norm)


def _norms(network: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Layers of batch normalisation, in order: the module that has it, under which name, and itself."""
    children = [(parent, name, child) for parent in network.modules() for name, child in parent.named_children()]
    return [place for place in children if isinstance(place[2], _BatchNorm)]


def project(objective: SimCLR, views: torch.Tensor) -> torch.Tensor:
    """What the loss compares: float32 (B, dimensions) of views (B, C, H, W)."""
    with objective.autocast(views.device):
        return objective.head(objective.network.features(views)).float()


def multi_view_loss(projections: Sequence[torch.Tensor], temperature: float) -> torch.Tensor:
    """
    SimCLR's loss for any number of views: which of all others are an image's other views?

    For each view, the mean of the cross-entropies with the image's other views; of two views, that is SimCLR's own.

    Args:
        projections (`Sequence`): float (B, D) for each view, of any length, in the same order.
        temperature (`float`): Above 0.

    Returns:
        `torch.Tensor`: The mean over all views of all images, a scalar.
    """
    views, images = len(projections), len(projections[0])
    joined = F.normalize(torch.cat(list(projections)), dim=1)
    logits = joined @ joined.T / temperature
    itself = torch.eye(len(joined), dtype=torch.bool, device=joined.device)
    likelihoods = logits.masked_fill(itself, float("-inf")).log_softmax(dim=1)
    image = torch.arange(images, device=joined.device).repeat(views)
    partners = (image[:, None] == image) & ~itself
    return -likelihoods[partners].mean()


def high_frequencies(images: torch.Tensor, radius: float) -> torch.Tensor:
    """
    Images without their low frequencies, and so without their mean: values of both signs.

    Args:
        images (`torch.Tensor`): float (B, C, H, W).
        radius (`float`): Frequencies nearer to zero than that fraction of the height are missing, in steps of one
            period per image.
    """
    height, width = images.shape[2:]
    rows, columns = (torch.fft.fftfreq(size, 1 / size, device=images.device) for size in (height, width))
    high = (rows[:, None].square() + columns.square()).sqrt() >= radius * height
    return torch.fft.ifft2(torch.fft.fft2(images) * high).real.contiguous(memory_format=torch.channels_last)


def attack(
    loss: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    settings: AdvCLSettings,
    generator: torch.Generator,
) -> torch.Tensor:
    """
    Images within the bound of the given ones, and within [0, 1], with a higher loss: sign ascent from a random start.

    Args:
        loss (`Callable`): From images (B, C, H, W) to a scalar.
        images (`torch.Tensor`): float (B, C, H, W) in [0, 1].
        settings ([`AdvCLSettings`]): Bound and steps.
        generator (`torch.Generator`): Of the start.
    """
    low, high = (images - settings.epsilon).clamp(min=0), (images + settings.epsilon).clamp(max=1)
    noise = torch.rand(images.shape, generator=generator, device=images.device).mul(2).sub(1)
    moved = images + settings.epsilon * noise
    for _ in range(settings.steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(moved), moved)
        moved = torch.clamp(moved.detach() + settings.step_size * gradient.sign(), low, high)
    return moved.contiguous(memory_format=torch.channels_last)


def pseudo_labels(data: LabelledImages, settings: AdvCLSettings, context: Context) -> tuple[torch.Tensor, float]:
    """
    Clusters of the training images, by features of a network that learned from the collected ones.

    Args:
        data (`LabelledImages`): Training images.
        settings ([`AdvCLSettings`]): Numbers of clusters, and the network.
        context ([`Context`]): Has the collected images.

    Returns:
        `tuple`: `torch.Tensor`, int64 (N, number of clusterings); and the seconds that earlier calls trained the
        network, whose training is kept.

    Raises:
        ValueError: If there are fewer images than clusters.
    """
    check_images(data, settings)
    recipe = get_recipe(settings.recipe, "simclr").for_images(len(context.collected))
    collected, images = (_tensor(one) for one in (context.collected, data))
    with reproducible(context.seed, torch.device(context.device)):
        options = {"in_channels": images.shape[1], "width": recipe.width, "image_size": min(collected.shape[2:])}
        network = victims.build(settings.victim, 1, **options)
        objective = SimCLR(network, recipe, tuple(collected.shape[2:]))
    with context.place_for_work(f"advcl-features-{digest(collected)[:16]}-{context.seed}") as folder:
        seconds_before = kept_seconds(folder)
        options = {"recipe": recipe, "seed": context.seed, "device": context.device, "checkpoint_dir": folder}
        train(objective, collected, None, **options)
    features = evaluation.features(network, images, bfloat16=recipe.bfloat16)
    features = F.normalize(features, dim=1).cpu().numpy()
    labels = [KMeans(count, random_state=context.seed).fit(features).labels_ for count in settings.clusters]
    return torch.stack([torch.from_numpy(one).long() for one in labels], dim=1), seconds_before


def check_images(data: LabelledImages, settings: AdvCLSettings) -> None:
    """Refuse training images of which there are fewer than clusters."""
    if len(data) < max(settings.clusters, default=0):
        raise ValueError(
            f"data has {len(data)} images, but must have at least {max(settings.clusters)} for the pseudo-labels of "
            "advcl; advcl-plain has none."
        )


def _tensor(data: LabelledImages) -> torch.Tensor:
    """uint8 (N, C, H, W)."""
    return torch.from_numpy(data.images.copy()).permute(0, 3, 1, 2)


def _advcl(name: str, cost: str, settings: Mapping[str, AdvCLSettings] = SETTINGS, **declared) -> Countermeasure:
    def function(data: LabelledImages, context: Context) -> AdvCL:
        own = settings[name]
        return AdvCL(own, *pseudo_labels(data, own, context)) if own.clusters else AdvCL(own)

    clusters, recipe = settings[name].clusters, get_recipe(settings[name].recipe, "simclr")
    return Countermeasure(
        name,
        "hook",
        SOURCE,
        cost,
        function,
        asdict(settings[name]),
        least_collected=recipe.batch_size if clusters else 0,
        suits=("contrastive",),
        method="simclr",
        replaces_loss=True,
        check=lambda data: check_images(data, settings[name]),
        **declared,
    )


_COST = "about 15 passes forward and backward per step instead of two, and SimCLR on collected images"

COUNTERMEASURES = (
    _advcl("advcl", _COST, smoke=_advcl("advcl", _COST, SMOKE_SETTINGS)),
    _advcl("advcl-plain", "about nine passes forward and backward per step instead of two"),
)
