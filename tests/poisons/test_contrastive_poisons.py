"""CP and TUE: what is theirs alone, against plain loops and scikit-learn."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import davies_bouldin_score
from torch.nn import functional as F

from jcdp_diffusers import poisons, saved_state
from jcdp_diffusers.devices import seeded
from jcdp_diffusers.poisons import checkpoint, cp, encoder, tue
from jcdp_diffusers.poisons.cp import CPSettings
from jcdp_diffusers.poisons.encoder import Encoder
from jcdp_diffusers.poisons.protect import protect_dataset
from jcdp_diffusers.victims import contrastive
from jcdp_diffusers.victims.networks import resnet18


CPU = torch.device("cpu")
FRAMEWORKS = ("simclr", "moco-v2", "byol")


def preset(name, framework):
    return name if framework == "simclr" else f"{name}-{framework}"


# -------------------------------------------------------------------------------------------------------------- numbers


def test_published_numbers_are_the_programs():
    rates = {"simclr": 0.5, "moco-v2": 0.3, "byol": 1.0}
    for framework, rate in rates.items():
        class_wise, sample_wise = (
            poisons.settings(name, preset("published", framework).removeprefix("published-"))
            for name in ("cp-c", "cp-s")
        )
        assert sample_wise.start == class_wise
        assert (class_wise.framework, class_wise.learning_rate, class_wise.batch_size) == (framework, rate, 512)
        assert (class_wise.rounds, class_wise.model_steps, class_wise.noise_batches) == (1000, 20, 20)
        assert (class_wise.steps, class_wise.step, class_wise.epsilon) == (1, 0.8, 8)
        assert class_wise.through_targets == (framework != "simclr") and not class_wise.follow_noise_steps
        assert encoder.batches_per_round(50_000, class_wise) == (20, 20)
        assert encoder.batches_per_round(50_000, sample_wise) == (97, 98)
        code = poisons.settings("cp-s", preset("code", framework))
        assert encoder.batches_per_round(50_000, code) == (97, 97)
        assert code.follow_noise_steps == (framework != "simclr")
    sample_wise = {name: poisons.settings("cp-s", name) for name in ("published", "moco-v2", "byol")}
    assert [(s.steps, round(s.step, 2), s.rounds, s.planned_rounds) for s in sample_wise.values()] == [
        (5, 0.8, 160, 200),
        (5, 0.8, 200, 200),
        (1, 0.16, 200, 200),
    ]
    assert poisons.settings("cp-c", "code-byol").key_momentum == pytest.approx(0.998001)


def test_changed_numbers_reach_the_start_of_sample_wise_noise():
    poison = poisons.get("cp-s")
    changed = poison.changed("cpu-moco-v2", {"epsilon": 4.0, "batch_size": 64, "queue": 512, "surrogate": "vgg16"})
    for one in (changed, changed.start):
        assert (one.epsilon, one.batch_size, one.queue, one.surrogate) == (4.0, 64, 512, "vgg16")
    start = poison.settings("cpu").start
    changed = poison.changed("cpu", {"rounds": 3, "steps": 2, "step": 1.0})
    assert (changed.rounds, changed.steps, changed.step, changed.start) == (3, 2, 1.0, start)
    changed = poison.changed("cpu", {"start.rounds": 5, "width": 8, "start.width": 4})
    assert (changed.rounds, changed.start.rounds, changed.width, changed.start.width) == (15, 5, 8, 4)
    with pytest.raises(ValueError, match="start.epsilon is 9"):
        poison.changed("cpu", {"start.epsilon": 9.0})
    with pytest.raises(ValueError, match="--set has 'start.pace'.*start.rounds"):
        poison.changed("cpu", {"start.pace": 1}, name="--set")


def test_learning_rate_falls_by_half_a_cosine_once_a_round():
    settings = poisons.settings("cp-c")
    assert settings.learning_rate_in(999) == pytest.approx(0.5e-3)
    assert settings.learning_rate_in(499) == pytest.approx(0.5 * 0.5005)
    assert settings.learning_rate_in(0) == pytest.approx(0.5 * (0.001 + 0.999 * (1 + math.cos(math.pi / 1000)) / 2))
    assert poisons.settings("tue").learning_rate_in(0) == poisons.settings("tue").learning_rate_in(39) == 1e-3


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda: CPSettings(framework="swav"), "framework is 'swav', .* simclr, moco-v2, byol"),
        (lambda: CPSettings(surrogate="alexnet"), "surrogate is 'alexnet', .* resnet18"),
        (lambda: CPSettings(rounds=0), "rounds is 0, .* at least 1"),
        (lambda: CPSettings(steps=-1), "steps is -1, .* at least 1"),
        (lambda: CPSettings(model_steps=-1), "model_steps is -1, .* at least 0"),
        (lambda: CPSettings(noise_batches=0), "noise_batches is 0, .* at least 1"),
        (lambda: CPSettings(learning_rate=math.nan), "learning_rate is nan, .* above 0"),
        (lambda: CPSettings(step=0.0), "step is 0.0, .* above 0"),
        (lambda: CPSettings(temperature=0.0), "temperature is 0.0, .* above 0"),
        (
            lambda: replace(poisons.settings("cp-c", "byol"), key_momentum=2.0),
            "key_momentum is 2.0, .* within 0 and 1",
        ),
        (lambda: tue.TUESettings(csd_weight=-1.0), "csd_weight is -1.0, .* at least 0"),
        (lambda: CPSettings(framework="byol"), "key_momentum is None, .* 'byol'"),
        (lambda: CPSettings(optimizer="lars"), "optimizer is 'lars', .* sgd, adam"),
        (lambda: CPSettings(through_targets=True), "through_targets is True, .* 'simclr'"),
        (lambda: CPSettings(follow_noise_steps=True), "follow_noise_steps is True, .* 'simclr'"),
        (lambda: CPSettings(rounds=1001), "rounds is 1001, .* 1000"),
        (lambda: cp.CPSampleSettings(epsilon=4.0), "start.epsilon is 8.0, .* 4.0"),
    ],
)
def test_numbers_that_do_not_suit_each_other(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        change()


def test_tues_program_for_moco_leaves_out_images_that_do_not_fill_a_batch():
    published, code = poisons.settings("tue", "moco-v2"), poisons.settings("tue", "code-moco-v2")
    assert code == replace(published, spread_gradient=False, drop_last=True)


@pytest.mark.parametrize("name", ["cp-c", "cp-s", "tue"])
def test_an_encoder_that_does_not_converge_gives_no_noise(name, images, labels):
    settings = replace(poisons.settings(name, "smoke"), learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="surrogate's loss became nan: .* learning_rate"):
        poisons.get(name)(images, labels, preset=settings)


@pytest.mark.parametrize("name", ["cp-c", "cp-s", "tue"])
def test_sets_that_are_too_small_are_refused(name, images, labels):
    with pytest.raises(ValueError, match="images holds 19 images, .* 20, the batch_size"):
        poisons.get(name)(images[:19], labels[:19], preset="smoke")
    with pytest.raises(ValueError, match="images holds 39 images, .* 40, the queue"):
        poisons.get(name)(images[:39], labels[:39], preset="smoke-moco-v2")
    with pytest.raises(ValueError, match="images are 7x16, .* at least 8x8"):
        poisons.get(name)(images[:, :, :7], labels, preset="smoke")


def test_one_class_has_no_separability(images, labels):
    with pytest.raises(ValueError, match="labels holds 1 class, .* 2 for tue"):
        poisons.get("tue")(images, torch.zeros_like(labels), preset="smoke")


# ---------------------------------------------------------------------------------------------------------- plain loops


class MirroredInTurns:
    """Views without chance: the image, its mirror image, the image, ..."""

    def __init__(self, size, **options):
        self.calls = 0

    def __call__(self, images, generator):
        self.calls += 1
        return images if self.calls % 2 else images.flip(-1)


def nt_xent_in_words(first, second, temperature):
    """Of two views: for each, minus the log of its partner's share among all others."""
    views = F.normalize(torch.cat([first, second]), dim=1)
    similar = (views @ views.T / temperature).exp()
    count = len(first)
    losses = []
    for row in range(2 * count):
        others = [similar[row, other] for other in range(2 * count) if other != row]
        losses.append(-(similar[row, (row + count) % (2 * count)] / torch.stack(others).sum()).log())
    return torch.stack(losses).mean()


class PlainFramework:
    """A framework in the words of its paper, over the networks of an objective that is never asked for a loss."""

    def __init__(self, settings, channels, size):
        self.settings = settings
        with seeded(0):
            network = resnet18(1, in_channels=channels, width=settings.width)
            parts = contrastive.METHODS[settings.framework](network, settings.recipe(), size)
        self.parts = parts
        self.queue = list(getattr(parts, "queue", []))
        self.leaders = [network, parts.head if hasattr(parts, "head") else parts.projector]
        self.followers = list(getattr(parts, "followers", []))
        self.weights = [weight for weight in parts.parameters() if weight.requires_grad]
        self.speed = [torch.zeros_like(weight) for weight in self.weights]

    def loss(self, images):
        first, second = images, images.flip(-1)
        network, head = self.leaders
        if self.settings.framework == "simclr":
            projections = head(network.features(torch.cat([first, second])))
            return nt_xent_in_words(*projections.chunk(2), 0.5) * self.settings.loss_factor
        if self.settings.framework == "moco-v2":
            keys = F.normalize(self.followed(second), dim=1)
            self.keys = keys.detach()
            queries = F.normalize(head(network.features(first)), dim=1)
            logits = (
                torch.cat([(queries * keys).sum(1, keepdim=True), queries @ torch.stack(self.queue).T], dim=1) / 0.2
            )
            return -logits.log_softmax(dim=1)[:, 0].mean() * self.settings.loss_factor
        predicted = [self.parts.predictor(head(network.features(view))) for view in (first, second)]
        followed = [self.followed(view) for view in (second, first)]
        cosines = [(F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).mean() for a, b in zip(predicted, followed)]
        return -(cosines[0] + cosines[1]) / 2

    def followed(self, view):
        network, head = self.followers
        return head(network.features(view))

    def follow(self):
        momentum = self.settings.key_momentum
        with torch.no_grad():
            for follower, leader in zip(self.followers, self.leaders):
                for mine, other in zip(follower.parameters(), leader.parameters()):
                    mine.copy_(momentum * mine + (1 - momentum) * other)
        if self.queue:
            self.queue = self.queue[len(self.keys) :] + list(self.keys)

    def train(self, images, learning_rate):
        self.parts.train()
        loss = self.loss(images)
        gradients = torch.autograd.grad(loss, self.weights, allow_unused=True)
        with torch.no_grad():
            for weight, speed, gradient in zip(self.weights, self.speed, gradients):
                if gradient is not None:
                    speed.mul_(0.9).add_(gradient + 1e-4 * weight)
                    weight.sub_(learning_rate * speed)
        self.follow()


@pytest.mark.parametrize(
    "framework, follow",
    [("simclr", False), ("moco-v2", False), ("moco-v2", True), ("byol", False), ("byol", True)],
)
def test_noise_takes_the_steps_of_a_plain_loop(framework, follow, images, labels, monkeypatch):
    """Class-wise, in batches of all images in their order, without chance in the views."""
    monkeypatch.setattr(contrastive, "Views", MirroredInTurns)
    monkeypatch.setattr(encoder, "shuffled", lambda count, draw: torch.arange(count))
    images, labels = images[:12], labels[:12]
    changes = {"batch_size": 12, "rounds": 2, "planned_rounds": 4, "steps": 2, "step": 2.0}
    changes |= {"queue": 12, "key_momentum": 0.5} if framework == "moco-v2" else {}
    changes |= {"key_momentum": 0.5} if framework == "byol" else {}
    settings = replace(poisons.settings("cp-c", preset("smoke", framework)), follow_noise_steps=follow, **changes)
    noise = poisons.get("cp-c")(images, labels, preset=settings, seed=0)

    plain = PlainFramework(settings, 3, (16, 16))
    pattern = 8 / 255 * (2 * torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1)
    for number in range(2):
        plain.train((images + pattern[labels]).clamp(0, 1), settings.learning_rate_in(number))
        plain.parts.eval()
        for _ in range(2):
            moved = pattern.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(plain.loss((images + moved[labels]).clamp(0, 1)), moved)
            pattern = (pattern - 2 / 255 * gradient.sign()).clamp(-8 / 255, 8 / 255)
            if follow:
                plain.follow()
    close = (noise - pattern[labels]).abs() < 1e-6
    # Rounding changes a few signs, and a training step amplifies that. Any wrong number leaves less than 0.83.
    assert close.float().mean() > 0.87


def separability_in_loops(noise, labels):
    """CSD as its formula says, in NumPy: the mean over pairs of classes."""
    groups = [noise[labels == label] for label in sorted(set(labels.tolist()))]
    centres = [group.mean(axis=0) for group in groups]
    spreads = [np.mean([np.linalg.norm(row - centre) for row in group]) for group, centre in zip(groups, centres)]
    pairs = [(one, two) for one in range(len(groups)) for two in range(len(groups)) if one != two]
    terms = [
        (spreads[one] + spreads[two] + 1e-5) / (np.linalg.norm(centres[one] - centres[two]) + 1e-5)
        for one, two in pairs
    ]
    return np.mean(terms)


def test_separability_equals_its_formula_in_loops():
    draw = np.random.default_rng(0)
    noise, labels = draw.normal(size=(30, 2, 4, 4)), np.array([0, 2, 5] * 10)
    found = tue.separability(torch.from_numpy(noise), torch.from_numpy(labels))
    assert found.item() == pytest.approx(separability_in_loops(noise.reshape(30, -1), labels))


def test_separability_of_two_classes_is_the_index_of_davies_and_bouldin():
    draw = np.random.default_rng(1)
    labels = np.arange(40) % 2
    noise = draw.normal(size=(40, 12)) + 3 * labels[:, None]
    found = tue.separability(torch.from_numpy(noise), torch.from_numpy(labels))
    assert found.item() == pytest.approx(davies_bouldin_score(noise, labels), rel=1e-4)


def test_separability_at_its_edges():
    """One class, equal noise, one image of a class: all finite, with a finite gradient."""
    for labels in ([0, 0, 0], [0, 1, 1], [0, 1, 2]):
        for noise in (torch.zeros(3, 4), torch.arange(12.0).reshape(3, 4)):
            noise.requires_grad_()
            (gradient,) = torch.autograd.grad(tue.separability(noise, torch.tensor(labels)), noise)
            assert gradient.isfinite().all()
    assert tue.separability(torch.ones(3, 4), torch.tensor([1, 1, 1])) == 0


@pytest.mark.parametrize("spread_gradient", [True, False])
def test_separability_alone_takes_the_steps_of_a_plain_loop(spread_gradient, images, labels):
    """Without the contrastive loss; gradients by hand, of the distances and, where asked for, of the spreads."""
    images, labels = images[:20], labels[:20] % 2
    changes = {"rounds": 1, "steps": 3, "step": 1.0, "model_steps": 0, "contrastive_weight": 0.0, "batch_size": 20}
    settings = replace(poisons.settings("tue", "smoke"), spread_gradient=spread_gradient, **changes)
    noise = poisons.get("tue")(images, labels, preset=settings, seed=0)

    start = 8 / 255 * (2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1)
    clean, rows = images.flatten(1).double(), [torch.where(labels == label)[0] for label in (0, 1)]
    expected = start.flatten(1).double()
    for _ in range(3):
        centres = [expected[part].mean(dim=0) for part in rows]
        away = [expected[part] - centre for part, centre in zip(rows, centres)]
        spreads = [part.norm(dim=1).mean() for part in away]
        apart = centres[0] - centres[1]
        distance = apart.norm()
        gradient = torch.empty_like(expected)
        for sign, part, offsets in zip((1, -1), rows, away):
            towards = -(sum(spreads) + 1e-5) / (distance + 1e-5) ** 2 * sign * apart / distance / len(part)
            unit = offsets / offsets.norm(dim=1, keepdim=True)
            spread = (unit - unit.mean(dim=0)) / len(part) / (distance + 1e-5)
            gradient[part] = towards + spread if spread_gradient else towards.expand_as(offsets)
        valid = (clean + expected).clamp(0, 1) - clean
        expected = (valid - gradient.sign() / 255).clamp(-8 / 255, 8 / 255)
    close = (noise.flatten(1).double() - expected).abs() < 1e-6
    assert close.float().mean() > 0.99


# -------------------------------------------------------------------------------------------------- what the noise does


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_noise_lowers_the_loss_of_its_encoder(framework, images, monkeypatch):
    """Without chance in the views."""
    monkeypatch.setattr(contrastive, "Views", MirroredInTurns)
    settings = replace(poisons.settings("cp-s", preset("smoke", framework)), steps=8, step=1.0)
    made, images = Encoder(settings, images, 0, CPU), images[:20]
    for _ in range(10):
        made.train_step(images, settings.learning_rate)
    noise = cp.lower(made, images, torch.zeros_like(images), torch.arange(20), torch.arange(20))
    assert 0.9 * 8 / 255 < noise.abs().max() <= 8 / 255 + 1e-7
    below, clean, above = (made.loss((images + sign * noise).clamp(0, 1)).item() for sign in (1, 0, -1))
    assert below < clean < above


def test_noise_of_a_class_is_one_pattern_and_others_start_from_it(images, labels):
    settings = poisons.settings("cp-s", "smoke")
    start = poisons.get("cp-c")(images, labels, preset=settings.start)
    assert torch.equal(start, start[labels])  # the first four images are of the four classes
    unmoved = poisons.get("cp-s")(images, labels, preset=replace(settings, step=1e-30))
    torch.testing.assert_close(unmoved, start, rtol=0, atol=1e-20)
    noise = poisons.get("cp-s")(images, labels, preset=replace(settings, steps=1, noise_batches=None))
    assert (noise != start).flatten(1).any(dim=1).all()


def test_noise_of_tue_is_easier_to_tell_apart_than_chance(images, labels):
    settings = replace(poisons.settings("tue", "smoke"), batch_size=40, steps=10, step=1.0)
    noise = poisons.get("tue")(images, labels, preset=settings)
    start = 2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1
    assert tue.separability(noise, labels) < 0.7 * tue.separability(start, labels)


def test_second_networks_follow_the_noise_in_the_released_program_alone(images):
    for name, moves in (("smoke-moco-v2", False), ("smoke-moco-v2", True)):
        settings = replace(poisons.settings("cp-s", name), follow_noise_steps=moves, steps=3)
        made = Encoder(settings, images, 0, CPU)
        made.train_step(images[:20], settings.learning_rate)
        weight, queue = made.objective.followers[0].conv1.weight.clone(), made.objective.queue.clone()
        cp.lower(made, images[:20], torch.zeros_like(images[:20]), torch.arange(20), torch.arange(20))
        assert made.objective.position == (20 * (1 + 3 * moves)) % 40
        assert torch.equal(made.objective.queue, queue) != moves
        assert torch.equal(made.objective.followers[0].conv1.weight, weight) != moves


def test_training_walks_through_all_images_and_noise_through_all_of_a_pass(images, labels, monkeypatch):
    """Five batches of eight: training goes on where it stopped; each round's noise begins a new pass."""
    trained, lowered = [], []
    row_of = {tuple(image.flatten()[:64].tolist()): row for row, image in enumerate(images)}

    def rows(batch):
        return [row_of[tuple(image.flatten()[:64].tolist())] for image in batch]

    monkeypatch.setattr(Encoder, "train_step", lambda self, batch, rate: trained.append(rows(batch)) or 0.0)

    def lower(encoder, clean, noise, which, numbers):
        assert rows(clean) == numbers.tolist()
        lowered.append(numbers.tolist())
        return noise

    settings = replace(poisons.settings("cp-c", "smoke"), batch_size=8, rounds=2, model_steps=3, noise_batches=2)
    kept = checkpoint.Checkpoint(None, "cp-c", settings, 0, images, labels)
    options = {"kept": kept, "seed": 0, "device": CPU, "name": "cp-c", "progress": False}
    encoder.in_turns(images, torch.zeros_like(images), torch.arange(40), settings, lower, **options)
    assert sorted(sum(trained[:5], [])) == list(range(40)) and len(trained) == 6
    first, second = (sum(part, []) for part in (lowered[:2], lowered[2:]))
    assert len(set(first)) == len(set(second)) == 16 and first != second


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_last_batch_of_one_image(framework, images, labels):
    settings = replace(poisons.settings("cp-s", preset("smoke", framework)), noise_batches=None)
    settings = replace(settings, batch_size=13, queue=settings.queue and 13)
    noise = poisons.get("cp-s")(images, labels, preset=settings)
    assert encoder.batches_per_round(40, settings) == (1, 4) and noise.isfinite().all()


class Interrupted(Exception):
    """Stands for a kill right after a state was saved."""


@pytest.mark.parametrize("name, framework", [("cp-s", "moco-v2"), ("cp-c", "byol"), ("tue", "moco-v2")])
def test_every_framework_goes_on_where_it_was_cut_off(name, framework, images, labels, tmp_path, monkeypatch):
    """With the released program's side effects, which change the second network at every step."""
    settings = poisons.settings(name, preset("smoke", framework))
    settings = replace(settings, follow_noise_steps=True, drop_last=True)
    whole = poisons.get(name)(images, labels, preset=settings)
    save = checkpoint.Checkpoint.save

    def save_and_stop(self, state):
        save(self, state)
        raise Interrupted

    monkeypatch.setattr(saved_state, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(checkpoint.Checkpoint, "save", save_and_stop)
    cuts = 0
    while True:
        try:
            resumed = poisons.get(name)(images, labels, preset=settings, checkpoint_dir=tmp_path)
        except Interrupted:
            cuts += 1
        else:
            break
    assert cuts >= 3 and torch.equal(resumed, whole)


def test_a_network_that_whitens_and_one_that_drops_out_serve_as_well(images):
    for name, width in (("convnet94", 8), ("mobilenet_v2", 2)):
        settings = replace(poisons.settings("cp-c", "smoke"), surrogate=name, width=width)
        losses = []
        for _ in range(2):
            made = Encoder(settings, images, 0, CPU)
            losses.append([made.train_step(images[:20], 0.1) for _ in range(2)])
        assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_card_shows_the_published_numbers_of_the_framework(data, tmp_path):
    protect_dataset(data, tmp_path, method="cp-s", preset="smoke-byol")
    card = (tmp_path / "README.md").read_text()
    assert "| `learning_rate` | 0.04 (published: 1.0) |" in card and "| `framework` | byol |" in card
    assert "| `start.rounds` | 2 (published: 1000) |" in card and "| `rounds` | 1 (published: 200) |" in card
