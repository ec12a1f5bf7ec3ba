import pytest
import torch

from jcdp_diffusers import LPIPSModel
from jcdp_diffusers.guidance import earlier_chain_noise, in_window, perceptual_gradient, pixel_gradient, strength


def batch(seed, count=4, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LPIPSModel("alex")


def test_pixel_gradient_is_that_of_torchs_mean_squared_error_per_image():
    x, r = batch(0).requires_grad_(), batch(1)
    for i in range(len(x)):
        (expected,) = torch.autograd.grad(torch.nn.functional.mse_loss(x[i], r[i]), x)
        torch.testing.assert_close(pixel_gradient(x, r)[i], expected[i])


def test_perceptual_gradient_is_that_of_the_lpips_package(network):
    import lpips

    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    ours = LPIPSModel.from_lpips(reference)
    x, r = batch(0, size=64).requires_grad_(), batch(1, size=64)
    (expected,) = torch.autograd.grad(reference(x, r).sum(), x)
    # Two orders of summation in float32: lpips' own is 2e-6 away from float64.
    assert (perceptual_gradient(x, r, ours) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("trunk", "size"), [("alex", 32), ("alex", 35), ("alex", 64), ("squeeze", 32), ("squeezenet1_0", 33)]
)
def test_perceptual_gradient_is_that_of_automatic_differentiation(trunk, size):
    """
    Rearranged convolutions and the closed form against the plain distance: in float64, where only a wrong formula
    shows, and in float32, where the difference is that of rounding.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LPIPSModel(trunk, calibrated=trunk != "squeezenet1_0")

    def plain_gradient(x, r):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(network(x, r).sum(), x)[0]

    x, r = batch(0, size=size), batch(1, size=size)
    plain = plain_gradient(x, r)
    assert (perceptual_gradient(x, r, network) - plain).norm() < 5e-6 * plain.norm()
    network._matrices.clear()
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data = tensor.data.double() * (tensor.dim() > 1)  # without biases, black stays zero in every map
    x, r = x.double(), r.double()
    x[:, :, : 3 * size // 4] = network.shift  # black
    x.requires_grad_()
    maps = network.maps(x, rearranged=True)
    slopes = network.slopes([each.detach() for each in maps], network.features(r, rearranged=True))
    plain = plain_gradient(x, r)
    assert (torch.autograd.grad(maps, x, slopes)[0] - plain).norm() < 1e-12 * plain.norm()


def test_matrices_follow_the_weights(network):
    """They are kept from call to call, and made again when weights are loaded, changed or moved."""
    x, r = batch(0), batch(1)
    first = perceptual_gradient(x, r, network)
    kept = dict(network._matrices)
    assert len(kept) == 4 and torch.equal(perceptual_gradient(x, r, network), first)
    assert all(network._matrices[key][1] is kept[key][1] for key in kept)
    torch.manual_seed(1)  # other weights than the fixture's
    other = LPIPSModel("alex")
    before = perceptual_gradient(x, r, other)
    other.load_state_dict(network.state_dict())
    assert not torch.equal(before, first) and torch.equal(perceptual_gradient(x, r, other), first)
    assert not other.to("cpu")._matrices


def test_perceptual_gradient_agrees_with_finite_differences(network):
    x, r, direction = batch(0), batch(1), batch(2)
    slope = (perceptual_gradient(x, r, network) * direction).sum((1, 2, 3))
    step = 1e-3
    with torch.no_grad():
        finite = (network(x + step * direction, r) - network(x - step * direction, r)) / (2 * step)
    torch.testing.assert_close(slope, finite, rtol=0.05, atol=1e-4)


def test_an_images_gradient_does_not_depend_on_the_batch(network):
    x, r = batch(0, 16), batch(1, 16)
    together = perceptual_gradient(x, r, network)
    others = torch.cat([x[:1], batch(5, 15)]), torch.cat([r[:1], batch(6, 15)])
    assert torch.equal(perceptual_gradient(*others, network)[0], together[0])
    torch.testing.assert_close(perceptual_gradient(x[:1], r[:1], network)[0], together[0], rtol=1e-3, atol=1e-8)


def test_gradients_are_float32_whatever_comes_in(network):
    x, r = batch(0).bfloat16(), batch(1).bfloat16()
    assert pixel_gradient(x, r).dtype == torch.float32
    assert perceptual_gradient(x, r, network).dtype == torch.float32
    torch.testing.assert_close(pixel_gradient(x, r), pixel_gradient(x.float(), r.float()))


def test_gradients_vanish_at_the_reference_and_stay_finite(network):
    x = batch(0)
    for at in (x, torch.zeros_like(x)):
        assert pixel_gradient(at, at).abs().max() == 0
        assert perceptual_gradient(at, at, network).abs().max() < 1e-6


def test_works_under_no_grad_and_refuses_inference_mode(network):
    x, r = batch(0), batch(1)
    with torch.no_grad():
        assert perceptual_gradient(x, r, network).abs().max() > 0
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"which torch.inference_mode\(\) forbids"):
        perceptual_gradient(x, r, network)


def test_strength_over_time():
    assert strength("constant", 0.3) == 1
    assert strength("noise_to_signal", 0.2) == pytest.approx((0.8 / 0.2) ** 0.5)
    with pytest.raises(ValueError, match="guidance_strength is 'linear'"):
        strength("linear", 0.5)


def test_window_is_inclusive_on_both_ends():
    assert [t for t in range(25) if in_window(t, (11, 19))] == list(range(11, 20))
    assert all(in_window(t, None) for t in range(25))


def test_noise_of_the_chain_drawn_backwards_has_the_law_of_the_chain_drawn_forwards():
    """
    Variances at each level and the covariance between levels, against x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) e.
    """
    betas = torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)
    bars = (1 - betas).cumprod(0).tolist()
    levels, count = [99, 60, 59, 10, 0], 200_000
    generator = torch.Generator().manual_seed(0)
    fresh = lambda: torch.randn(count, generator=generator, dtype=torch.float64)
    noises = [fresh() * (1 - bars[99]) ** 0.5]
    for later, earlier in zip(levels, levels[1:]):
        noises.append(earlier_chain_noise(noises[-1], bars[later], bars[earlier], fresh()))
    for t, noise in zip(levels, noises):
        assert noise.var().item() == pytest.approx(1 - bars[t], rel=0.02)
    for (t, a), (s, b) in zip(zip(levels, noises), zip(levels[1:], noises[1:])):
        # forward: n_t = sqrt(bar_t / bar_s) n_s + independent, so cov(n_t, n_s) = sqrt(bar_t / bar_s) (1 - bar_s)
        assert (a * b).mean().item() == pytest.approx((bars[t] / bars[s]) ** 0.5 * (1 - bars[s]), rel=0.03)
