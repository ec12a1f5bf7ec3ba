"""
Learning without labels: two views of an image are told to have one representation.

SimCLR (Chen et al., ICML 2020) tells an image's two views from the views of all others in the batch. MoCo v2 (Chen et
al., 2020) tells them from the keys of earlier batches, made by a second network that follows the first. BYOL (Grill et
al., NeurIPS 2020) predicts what a second network makes of the other view. Each works over any network that has
`features(images)` and `num_features`; heads, losses and numbers are those of contrastive poisoning's repository (ICLR
2023), whose victims they are.

Views are made on the batch by kornia, on the images' device, and are differentiable. Images stay in [0, 1], as for
supervised victims. Images of one channel have neither saturation nor hue: of the colour operations, brightness and
contrast are left.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from ..devices import drawn_from
from .recipes import ContrastiveRecipe
from .training import Hooks, Objective, autocast, network_input


SMALLEST_SIDE = 8


class Views:
    """
    Random views of each image of a batch, by SimCLR's recipe for small images.

    A view is a crop of `min_scale` to 1 of the area, resized to the whole size, mirrored with probability 1/2, with
    changed brightness, contrast, saturation and hue (0.4, 0.4, 0.4, 0.1) with probability 0.8, and grey with
    probability 0.2. There is no blur.

    Args:
        size (`tuple` of `int`): Height and width of the images, at least 8 each.
        min_scale (`float`, defaults to 0.2): Smallest fraction of the area.
        flip (`bool`, defaults to `True`): Whether images are mirrored.
        colour (`bool`, defaults to `True`): Whether colours change.

    Raises:
        ValueError: If the images are too small to be cropped.
    """

    def __init__(self, size: tuple[int, int], *, min_scale: float = 0.2, flip: bool = True, colour: bool = True):
        import kornia.augmentation as K

        check_size(size)
        # Cutting by resampling treats the batch as a whole; by slices, kornia would take image after image.
        steps = [K.RandomResizedCrop(tuple(size), scale=(min_scale, 1.0), cropping_mode="resample")]
        if flip:
            steps.append(K.RandomHorizontalFlip())
        if colour:
            steps += [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
        self.transform = nn.Sequential(*steps)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """
        One view of each image.

        Args:
            images (`torch.Tensor`): float (B, C, H, W) in [0, 1].
            generator (`torch.Generator`): On the images' device.

        Returns:
            `torch.Tensor`: (B, C, H, W) in [0, 1], channels last.
        """
        channels = images.shape[1]
        # A warp's grid is computed in matrix products, which would be off by pixels in bfloat16.
        with drawn_from(generator), torch.autocast(images.device.type, enabled=False):
            views = self.transform(images.expand(-1, 3, -1, -1) if channels == 1 else images)
        return views[:, :channels].contiguous(memory_format=torch.channels_last)


def check_size(size: tuple[int, int]) -> None:
    """
    Refuse images, of a height and a width in pixels, of which no views can be made.

    Raises:
        ValueError: If they are too small to be cropped.
    """
    if min(size) < SMALLEST_SIDE:
        raise ValueError(
            f"images are {size[0]}x{size[1]}, but must be at least {SMALLEST_SIDE}x{SMALLEST_SIDE} for views."
        )


class Contrastive(Objective):
    """
    What the three methods share.

    Args:
        network (`nn.Module`): Has `features(images)`, (B, num_features), and `num_features`.
        recipe ([`ContrastiveRecipe`]): Of its method.
        size (`tuple` of `int`): Height and width of the images.
        hooks ([`Hooks`], *optional*): Countermeasures while training.

    Attributes:
        through_targets (`bool`): Whether the loss has a gradient for the view that the second network sees, as poisons
            need it. Victims learn without it; weights of the second network never have one.

    Raises:
        ValueError: If the images are too small, or a hook replaces a cross-entropy.
    """

    through_targets = False

    def __init__(
        self, network: nn.Module, recipe: ContrastiveRecipe, size: tuple[int, int], hooks: Hooks | None = None
    ):
        super().__init__()
        self.hooks = Hooks() if hooks is None else hooks
        replacing = self.hooks.replacing_loss
        if replacing is not None and not hasattr(replacing, "contrastive_loss"):
            raise ValueError(
                f"hooks holds a {type(replacing).__name__}, but must hold none that replaces the cross-entropy for "
                f"method {recipe.method!r}, which has no labels."
            )
        self.network = network
        self.recipe = recipe
        self.views = Views(size, min_scale=recipe.min_scale, flip=recipe.flip)
        # What such a hook trains beside the network is trained, and kept, with it.
        self.of_hook = replacing.own_modules(self) if hasattr(replacing, "own_modules") else None

    def view(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One view of each image (B, C, H, W), float in [0, 1], changed by the hooks."""
        return self.hooks.before_forward(self.views(images, generator), None)[0]

    def between(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, between two views (B, C, H, W) of the same images."""
        raise NotImplementedError

    def loss(self, images: torch.Tensor, labels: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        images = network_input(images)
        if self.hooks.replacing_loss is not None:
            return self.hooks.replacing_loss.contrastive_loss(self, images, labels, generator)
        return self.between(self.view(images, generator), self.view(images, generator))

    def autocast(self, device: torch.device) -> torch.autocast:
        return autocast(self.recipe.bfloat16, device)

    def target_gradient(self) -> torch.set_grad_enabled:
        """The context in which the second network runs."""
        return torch.set_grad_enabled(self.through_targets and torch.is_grad_enabled())


class SimCLR(Contrastive):
    """Two views of an image are alike, and unlike all other views of the batch; see [`Contrastive`]."""

    def __init__(
        self, network: nn.Module, recipe: ContrastiveRecipe, size: tuple[int, int], hooks: Hooks | None = None
    ):
        super().__init__(network, recipe, size, hooks)
        self.head = projection_head(network.num_features)

    def between(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        with self.autocast(first.device):
            # Both views in one batch, so that batch normalisation sees all of them, as in the paper.
            projections = self.head(self.network.features(torch.cat([first, second])))
        loss = nt_xent(*projections.float().chunk(2), self.recipe.temperature)
        return self.recipe.loss_factor * loss


class MoCo(Contrastive):
    """
    A view is like its key, and unlike the keys of earlier batches; see [`Contrastive`].

    Keys enter the queue, and the key network follows, once per step of the optimizer. Batches are not shuffled: that
    is for batch normalisation over several devices.
    """

    def __init__(
        self, network: nn.Module, recipe: ContrastiveRecipe, size: tuple[int, int], hooks: Hooks | None = None
    ):
        super().__init__(network, recipe, size, hooks)
        self.head = projection_head(network.num_features)
        self.followers = _followers(network, self.head)
        self.register_buffer("queue", F.normalize(torch.randn(recipe.queue, self.head[-1].out_features), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.new_keys = None

    def keys(self, images: torch.Tensor) -> torch.Tensor:
        """Keys (B, dimensions) of a view (B, C, H, W); see `through_targets`."""
        network, head = self.followers
        with self.target_gradient(), self.autocast(images.device):
            return F.normalize(head(network.features(images)).float(), dim=1)

    def between(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        with self.autocast(first.device):
            queries = self.head(self.network.features(first))
        keys = self.keys(second)
        self.new_keys = keys.detach()
        loss = info_nce(queries.float(), keys, self.queue.clone(), self.recipe.temperature)
        return self.recipe.loss_factor * loss

    @torch.no_grad()
    def after_step(self) -> None:
        rows = (self.position + torch.arange(len(self.new_keys), device=self.queue.device)) % len(self.queue)
        self.queue[rows] = self.new_keys
        self.position.add_(len(self.new_keys)).remainder_(len(self.queue))
        _follow(self.followers, (self.network, self.head), self.recipe.key_momentum)


class BYOL(Contrastive):
    """
    From one view, predict what a following network makes of the other, both ways; see [`Contrastive`].

    Heads are 512-4096-256 and 256-4096-256 for 512 features, in proportion for others, with batch normalisation.
    """

    def __init__(
        self, network: nn.Module, recipe: ContrastiveRecipe, size: tuple[int, int], hooks: Hooks | None = None
    ):
        super().__init__(network, recipe, size, hooks)
        features = network.num_features
        hidden, out = 8 * features, max(features // 2, 1)
        self.projector, self.predictor = _mlp(features, hidden, out), _mlp(out, hidden, out)
        self.followers = _followers(network, self.projector)

    def targets(self, images: torch.Tensor) -> torch.Tensor:
        """What the following network makes of a view (B, C, H, W): (B, dimensions); see `through_targets`."""
        network, projector = self.followers
        with self.target_gradient(), self.autocast(images.device):
            return projector(network.features(images)).float()

    def between(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        with self.autocast(first.device):
            predictions = [self.predictor(self.projector(self.network.features(view))) for view in (first, second)]
        targets = [self.targets(view) for view in (second, first)]
        losses = [negative_cosine(mine.float(), other) for mine, other in zip(predictions, targets)]
        return self.recipe.loss_factor * (losses[0] + losses[1]) / 2

    @torch.no_grad()
    def after_step(self) -> None:
        _follow(self.followers, (self.network, self.projector), self.recipe.key_momentum)


METHODS = {"simclr": SimCLR, "moco-v2": MoCo, "byol": BYOL}


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Normalised temperature-scaled cross-entropy (Chen et al., ICML 2020): which of the 2B - 1 others is an image's
    view?

    Args:
        first, second (`torch.Tensor`): float (B, D), projections of two views in the same order, of any length.
        temperature (`float`): Above 0.

    Returns:
        `torch.Tensor`: The mean over all 2B views, a scalar.
    """
    projections = F.normalize(torch.cat([first, second]), dim=1)
    count = len(projections)
    logits = projections @ projections.T / temperature
    logits = logits.masked_fill(torch.eye(count, dtype=torch.bool, device=logits.device), float("-inf"))
    partners = torch.arange(count, device=logits.device).roll(count // 2)
    return F.cross_entropy(logits, partners)


def info_nce(queries: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    MoCo's loss: which of its own key and the keys of the queue is a query's?

    Args:
        queries (`torch.Tensor`): float (B, D), of any length.
        keys (`torch.Tensor`): float (B, D), of length 1.
        queue (`torch.Tensor`): float (K, D), of length 1.
        temperature (`float`): Above 0.

    Returns:
        `torch.Tensor`: The mean over the queries, a scalar.
    """
    queries = F.normalize(queries, dim=1)
    own = (queries * keys).sum(dim=1, keepdim=True)
    logits = torch.cat([own, queries @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def negative_cosine(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """BYOL's loss up to a constant: minus the cosine of two float (B, D), averaged over rows, in [-1, 1]."""
    return -F.cosine_similarity(predictions, targets, dim=1).mean()


def projection_head(features: int) -> nn.Sequential:
    """The head of SimCLR and MoCo v2: two layers without batch normalisation, to 128 dimensions."""
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, 128))


def _mlp(features: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
    )


def _followers(*leaders: nn.Module) -> nn.ModuleList:
    """Copies that no optimizer changes."""
    return nn.ModuleList(copy.deepcopy(leader).requires_grad_(False) for leader in leaders)


def _follow(followers: nn.ModuleList, leaders: tuple[nn.Module, ...], momentum: float) -> None:
    """Each weight keeps `momentum` of itself and takes the rest from its leader."""
    for follower, leader in zip(followers, leaders, strict=True):
        for mine, theirs in zip(follower.parameters(), leader.parameters(), strict=True):
            mine.lerp_(theirs, 1 - momentum)
