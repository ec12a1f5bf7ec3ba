"""The attack of adversarial training: its bound, its ascent, and the closed form for a linear victim."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jcdp_diffusers import countermeasures
from jcdp_diffusers.countermeasures.adversarial_training import AdversarialTraining
from jcdp_diffusers.victims.networks import resnet18


@pytest.fixture(scope="module")
def victim():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet18(4, width=4)


@pytest.fixture(scope="module")
def batch(photos):
    return photos.tensor(), torch.from_numpy(photos.labels)


@pytest.mark.parametrize("name, epsilon", [("at-4", 4 / 255), ("at-8", 8 / 255)])
def test_bound_and_ascent(name, epsilon, victim, batch, photos, generator):
    images, labels = batch
    (hook,) = countermeasures.get(name).prepare(photos).hooks
    attacked = hook.attack(victim, images, labels, generator)
    assert (attacked - images).abs().max() <= epsilon + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1
    victim.eval()
    before, after = (F.cross_entropy(victim(x), labels).item() for x in (images, attacked))
    noise = images + epsilon * (torch.rand(images.shape, generator=generator) * 2 - 1)
    assert after > before and after > F.cross_entropy(victim(noise.clamp(0, 1)), labels).item()


@pytest.mark.parametrize("start", ["normal", "uniform"])
def test_linear_victim_has_a_closed_form(start, generator):
    """For logits (w.x, 0) and label 1 the worst image is x + epsilon sign(w), clipped to [0, 1]."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    with torch.no_grad():
        model[1].weight[0] = torch.randn(12, generator=generator)
        model[1].weight[1] = 0
    images = torch.rand(5, 3, 2, 2, generator=generator)
    attack = AdversarialTraining(epsilon=0.1, step_size=0.03, start=start)
    attacked = attack.attack(model, images, torch.ones(5, dtype=torch.int64), generator)
    worst = (images + 0.1 * model[1].weight[0].sign().view(3, 2, 2)).clamp(0, 1)
    torch.testing.assert_close(attacked, worst)


def test_more_steps_attack_harder(victim, batch, generator):
    images, labels = batch
    losses = []
    for steps in (0, 2, 10):
        attack = AdversarialTraining(8 / 255, 2 / 255, steps=steps)
        attacked = attack.attack(victim, images, labels, torch.Generator().manual_seed(1))
        losses.append(F.cross_entropy(victim.eval()(attacked), labels).item())
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("training", [True, False])
def test_attack_leaves_the_victim_as_it_was(victim, batch, generator, training):
    victim.train(training)
    before = {name: value.clone() for name, value in victim.state_dict().items()}
    AdversarialTraining(8 / 255, 2 / 255).attack(victim, *batch, generator)
    assert victim.training == training and all(p.grad is None for p in victim.parameters())
    assert all(torch.equal(before[name], value) for name, value in victim.state_dict().items())


def test_loss_is_that_of_the_attacked_images(victim, batch):
    images, labels = batch
    hook = AdversarialTraining(8 / 255, 2 / 255)
    victim.eval()
    loss = hook.loss(victim, images, labels, torch.Generator().manual_seed(3))
    attacked = hook.attack(victim, images, labels, torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss, F.cross_entropy(victim(attacked), labels))
    loss.backward()
    assert all(p.grad is not None for p in victim.parameters())
    victim.zero_grad(set_to_none=True)


def test_labels_may_be_mixed(victim, batch, generator):
    images, labels = batch
    soft = 0.7 * F.one_hot(labels, 4) + 0.3 / 4
    assert AdversarialTraining(8 / 255, 2 / 255, steps=1).loss(victim, images, soft, generator).isfinite()
