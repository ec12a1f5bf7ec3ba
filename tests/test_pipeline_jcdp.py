import copy
import dataclasses
import functools
import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image
from tiny import tiny_unet

from jcdp_diffusers import (
    PRESETS,
    GuidedDDIMScheduler,
    GuidedDDPMScheduler,
    JointConditionalPurificationPipeline,
    LPIPSModel,
    PurificationConfig,
    pipeline_jcdp,
)
from jcdp_diffusers.noise import coloured, image_keys, normal_noise, times_covariance


Pipeline = JointConditionalPurificationPipeline
GUIDED = dict(diffusion_steps=4, num_rounds=2, pixel_guidance_scale=2000.0, perceptual_guidance_scale=50.0)


def photos(count, size=32, channels=3):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LPIPSModel("alex")


@pytest.fixture
def pipe(network):
    return quiet(Pipeline(tiny_unet(), DDPMScheduler(variance_type="fixed_large"), network))


@pytest.fixture
def plain():
    return quiet(Pipeline(tiny_unet(), DDPMScheduler(variance_type="fixed_large")))


@pytest.fixture
def small_micro_batches(monkeypatch):
    """Of four images: a micro-batch is filled up, and most tests have an image or two."""
    monkeypatch.setitem(pipeline_jcdp.MICRO_BATCH, "cpu", 4)


@pytest.mark.parametrize(
    ("device_type", "size", "expected"),
    [("cpu", (32, 32), 16), ("cpu", (256, 256), 16), ("cuda", (32, 32), 256), ("cuda", (28, 28), 334),
     ("cuda", (256, 256), 4), ("cuda", (1024, 1024), 1)],
)  # fmt: skip
def test_micro_batches_of_larger_images_are_smaller_on_a_gpu(device_type, size, expected):
    assert pipeline_jcdp.usual_micro_batch(device_type, *size) == expected


@pytest.mark.usefixtures("small_micro_batches")
class TestRepository:
    def test_a_plain_ddpm_folder_is_a_purifier(self, ddpm_folder):
        pipe = quiet(Pipeline.from_pretrained(ddpm_folder))
        assert type(pipe.scheduler) is GuidedDDPMScheduler and pipe.scheduler.config.variance_type == "fixed_large"
        assert pipe.perceptual is None and pipe.purification_config is None
        assert pipe(photos(1), diffusion_steps=2, seed=0).images[0].size == (32, 32)

    def test_plain_diffusers_loads_what_is_saved(self, pipe, tmp_path):
        pipe.purification_config = PurificationConfig(diffusion_steps=30, trained_timesteps=(0, 200))
        pipe.save_pretrained(tmp_path)
        for cls in (DDPMPipeline, DiffusionPipeline):
            loaded = cls.from_pretrained(tmp_path)
            assert type(loaded) is DDPMPipeline and type(loaded.scheduler) is DDPMScheduler
            assert loaded.scheduler.config.variance_type == "fixed_large"
            for name, value in pipe.unet.state_dict().items():
                assert torch.equal(loaded.unet.state_dict()[name], value)
        ours = quiet(Pipeline.from_pretrained(tmp_path))
        assert ours.purification_config == pipe.purification_config and ours.perceptual.name == "lpips-alex"
        settings = GUIDED | dict(seed=1, output_type="pt")
        assert torch.equal(ours(photos(2), **settings).images, pipe(photos(2), **settings).images)

    def test_optional_components_may_be_absent_or_replaced(self, pipe, plain, network, tmp_path):
        plain.save_pretrained(tmp_path / "plain")
        assert not (tmp_path / "plain" / "perceptual").exists()
        assert Pipeline.from_pretrained(tmp_path / "plain", perceptual=network).perceptual is network
        pipe.save_pretrained(tmp_path / "with")
        assert Pipeline.from_pretrained(tmp_path / "with", perceptual=None).perceptual is None
        plain.save_pretrained(tmp_path / "with")  # and does not keep the former one's network
        assert Pipeline.from_pretrained(tmp_path / "with").perceptual is None

    def test_from_pipe_shares_the_components(self, ddpm_folder, network, tmp_path):
        plain = DDPMPipeline.from_pretrained(ddpm_folder)
        pipe = Pipeline.from_pipe(plain, perceptual=network)
        assert pipe.unet is plain.unet and pipe.perceptual is network and pipe.purification_config is None
        pipe.purification_config = PurificationConfig(diffusion_steps=7)
        assert Pipeline.from_pipe(pipe).purification_config.diffusion_steps == 7
        pipe.save_pretrained(tmp_path)  # a purifier that plain diffusers has opened is still that purifier
        assert Pipeline.from_pipe(DDPMPipeline.from_pretrained(tmp_path)).purification_config.diffusion_steps == 7
        assert Pipeline.from_pipe(plain.to(torch.bfloat16)).unet.dtype == plain.unet.dtype == torch.bfloat16
        for name in ("dtype", "torch_dtype"):
            assert Pipeline.from_pipe(plain, **{name: torch.float32}).unet.dtype == torch.float32
            plain.to(torch.bfloat16)

    def test_what_the_network_was_trained_on_comes_along_with_it(self, plain, tmp_path, monkeypatch):
        config = PurificationConfig(noise_corner=8.0, trained_timesteps=(0, 50), diffusion_steps=20)
        plain.purification_config = config
        plain.save_pretrained(tmp_path / "purifier")
        ddim = DDIMPipeline(plain.unet, DDIMScheduler())
        monkeypatch.chdir(tmp_path)
        loaded, early = (DDPMPipeline.from_pretrained("purifier") for _ in range(2))
        made = [
            Pipeline(**plain.components),
            Pipeline(ddim.unet, ddim.scheduler),
            Pipeline(loaded.unet, DDPMScheduler()),
        ]
        assert [pipe.purification_config for pipe in made] == [config] * 3
        monkeypatch.chdir("/")
        assert Pipeline.from_pipe(loaded).purification_config == config
        with pytest.warns(UserWarning, match="'purifier/unet', which is no folder here"):
            Pipeline.from_pipe(early)

    @pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
    def test_a_schedule_that_ends_in_pure_noise_is_used_before_its_end(self, sampler):
        scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
        pipe = Pipeline(tiny_unet(size=8), scheduler)
        options = {"num_inference_steps": 2, "sampler": sampler, "seed": 0}
        assert pipe(torch.rand(1, 3, 8, 8), diffusion_steps=999, **options).images
        with pytest.raises(ValueError, match="diffusion_steps is 1000, but must be fewer"):
            pipe(torch.rand(1, 3, 8, 8), diffusion_steps=1000, **options)
        higher = PurificationConfig(diffusion_steps=999, start_one_level_higher=True)
        with pytest.raises(ValueError, match="diffusion_steps is 999, but must be fewer"):
            pipe(torch.rand(1, 3, 8, 8), preset=higher, **options)

    def test_a_schedule_given_by_position_is_kept(self, tmp_path):
        """diffusers' own from_config(scheduler.config) would turn 50 timesteps back into 1,000."""
        pipe = Pipeline(tiny_unet(), DDPMScheduler(50, 0.001))
        pipe.save_pretrained(tmp_path)
        for scheduler in (
            pipe.scheduler,
            pipe.prepare_scheduler(PurificationConfig(diffusion_steps=5)),
            DDPMPipeline.from_pretrained(tmp_path).scheduler,
        ):
            assert (scheduler.config.num_train_timesteps, scheduler.config.beta_start) == (50, 0.001)

    def test_a_folder_that_is_no_pipeline_is_refused(self, tmp_path):
        tiny_unet().save_pretrained(tmp_path)
        with pytest.raises(OSError, match="purifier is '.*'.*model_index.json"):
            Pipeline.from_pretrained(tmp_path)
        for name in (tmp_path / "absent", "absent"):
            with pytest.raises(OSError, match="purifier is '.*absent'"):
                Pipeline.from_pretrained(name)
        with pytest.raises(OSError, match="purifier is 'my/absent'.*Error"):
            Pipeline.from_pretrained("my/absent", local_files_only=True)


class TestSameBits:
    @pytest.mark.parametrize("corner", [0.0, 8.0])
    def test_alone_in_seven_in_twenty_and_permuted(self, pipe, corner):
        """Twenty are a whole micro-batch and a part of one."""
        pipe.purification_config = PurificationConfig(noise_corner=corner)
        images, ids = photos(20), [f"image {i}" for i in range(20)]
        settings = GUIDED | dict(diffusion_steps=3)
        run = lambda rows: pipe(images[rows], ids=[ids[i] for i in rows], seed=3, output_type="pt", **settings).images
        everything = run(list(range(20)))
        assert torch.equal(run([5])[0], everything[5])
        assert torch.equal(run(list(range(12, 19))), everything[12:19])
        order = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
        assert torch.equal(run(order), everything[order])

    @pytest.mark.parametrize("threads", [2, 3])
    def test_with_more_threads_too(self, plain, threads):
        images, ids = photos(20), [str(i) for i in range(20)]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            settings = dict(diffusion_steps=2, seed=0, output_type="pt")
            everything = plain(images, ids=ids, **settings).images
            assert torch.equal(plain(images[17:18], ids=ids[17:18], **settings).images[0], everything[17])
            assert torch.equal(plain(images.flip(0), ids=ids[::-1], **settings).images.flip(0), everything)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)

    def test_another_micro_batch_size_stays_within_a_hundredth_of_a_level(self, pipe):
        run = lambda size: pipe(photos(5), micro_batch_size=size, seed=0, output_type="pt", **GUIDED).images
        assert (run(2) - run(16)).abs().max() < 0.01 / 255

    @pytest.mark.parametrize("shard_size", ["10GB", "100KB"])
    def test_weights_from_files_are_those_in_memory(self, pipe, shard_size, tmp_path):
        """Also one image at a time, for which torch takes other kernels where weights lie unaligned."""
        pipe.save_pretrained(tmp_path, max_shard_size=shard_size)
        settings = dict(micro_batch_size=1, seed=0, output_type="pt", **GUIDED)
        expected = pipe(photos(2), **settings).images
        plain = DDPMPipeline.from_pretrained(tmp_path)
        for loaded in (Pipeline.from_pretrained(tmp_path), Pipeline.from_pipe(plain, perceptual=pipe.perceptual)):
            assert torch.equal(loaded(photos(2), **settings).images, expected)

    def test_without_ids_the_content_is_the_id(self, plain):
        images, settings = photos(3), dict(diffusion_steps=2, seed=0, output_type="pt")
        together = plain(images, **settings)
        assert torch.equal(plain(images[2:], **settings).images[0], together.images[2])
        again = plain(images, ids=together.ids, seed=together.seed, diffusion_steps=2, output_type="pt")
        assert torch.equal(again.images, together.images)

    def test_a_seed_is_drawn_and_returned(self, plain):
        out = plain(photos(1), diffusion_steps=2, output_type="pt")
        assert plain(photos(1), diffusion_steps=2, output_type="pt").seed != out.seed
        assert torch.equal(plain(photos(1), diffusion_steps=2, seed=out.seed, output_type="pt").images, out.images)

    def test_one_generator_per_image_makes_the_batch_irrelevant(self, plain):
        generators = lambda rows: [torch.Generator().manual_seed(i) for i in rows]
        settings = dict(diffusion_steps=3, output_type="pt")
        everything = plain(photos(20), generator=generators(range(20)), **settings)
        alone = plain(photos(20)[17:18], generator=generators([17]), **settings)
        assert torch.equal(alone.images[0], everything.images[17]) and everything.seed is None
        single = lambda: plain(photos(3), generator=torch.Generator().manual_seed(0), **settings).images
        assert torch.equal(single(), single())

    def test_no_global_random_state_is_touched(self, pipe):
        before = torch.get_rng_state()
        pipe(photos(2), seed=0, **GUIDED)
        pipe(photos(2), **GUIDED)
        assert torch.equal(torch.get_rng_state(), before)


class ZeroUNet(torch.nn.Module):
    """Predicts no noise at all, so that every step is a formula; built on a real configuration."""

    def __init__(self):
        super().__init__()
        self.config, self.dtype, self.device = tiny_unet().config, torch.float32, torch.device("cpu")

    def forward(self, sample, timestep, return_dict=True):
        return (torch.zeros_like(sample),)


class WavyUNet(ZeroUNet):
    """Predicts a closed form of the sample."""

    def forward(self, sample, timestep, return_dict=True):
        return (0.2 * torch.sin(3 * sample),)


def published_loop(images, steps, rounds, scale, slope):
    """
    Guided diffusion as OpenAI's code has it, for seed 9 and ids a, b, c and so on, in float64.

    Args:
        images: float tensor in [0, 1].
        steps, rounds: each round starts at abar[steps] and denoises from t = steps - 1.
        scale: of the guide, times sqrt((1 - abar_t) / abar_t).
        slope: from x_t, the reference at t and t to the gradient of the distance, per image.
    """
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    variance = np.append(beta[1] * (1 - bar[0]) / (1 - bar[1]), beta[1:])
    keys = image_keys(9, list("abcd")[: len(images)])
    protected = 2 * images.double().numpy() - 1
    x = protected
    for turn in range(rounds):
        noise = lambda step, use: (
            normal_noise(keys, (3, 32, 32), round_index=turn, step_index=step, use=use).double().numpy()
        )
        x = math.sqrt(bar[steps]) * x + math.sqrt(1 - bar[steps]) * noise(0, "start")
        for index, t in enumerate(range(steps - 1, -1, -1)):
            previous = bar[t - 1] if t else 1.0
            original = np.clip((x - math.sqrt(1 - bar[t]) * 0.2 * np.sin(3 * x)) / math.sqrt(bar[t]), -1, 1)
            mean = beta[t] * math.sqrt(previous) / (1 - bar[t]) * original
            mean += (1 - previous) * math.sqrt(1 - beta[t]) / (1 - bar[t]) * x
            r = math.sqrt(bar[t]) * protected + math.sqrt(1 - bar[t]) * noise(index, "reference")
            x = mean - variance[t] * scale * math.sqrt((1 - bar[t]) / bar[t]) * slope(x, r, t)
            if t:
                x = x + math.sqrt(variance[t]) * noise(index, "variance")
    return torch.from_numpy(np.clip(x / 2 + 0.5, 0, 1)).float()


@pytest.mark.usefixtures("small_micro_batches")
class TestMethod:
    @pytest.mark.parametrize("corner", [0.0, 8.0])
    def test_without_guides_it_is_plain_ddpm_from_the_noised_image(self, plain, corner):
        """Against diffusers' own scheduler, its add_noise and the same noise, of the colour that the network knows."""
        images, steps = photos(16), 10
        plain.purification_config = PurificationConfig(noise_corner=corner)
        result = plain(images, ids=list(map(str, range(16))), seed=0, diffusion_steps=steps, output_type="pt").images
        keys = image_keys(0, list(map(str, range(16))))
        noise = lambda step, use: coloured(
            normal_noise(keys, (3, 32, 32), round_index=0, step_index=step, use=use), corner
        )
        scheduler = DDPMScheduler(variance_type="fixed_large")
        scheduler.alphas = 1 - scheduler.betas.double()  # in float32 its coefficients have four digits at small t
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
        x = scheduler.add_noise(2 * images - 1, noise(0, "start"), torch.tensor([steps - 1]))
        with torch.no_grad():
            for index, t in enumerate(reversed(range(steps))):
                x = scheduler.step(
                    plain.unet(x, t).sample, t, x, generator=torch.Generator().manual_seed(t)
                ).prev_sample
                if t > 0:  # diffusers draws the noise itself: swap its for ours
                    own = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
                    x = x + scheduler._get_variance(t).sqrt() * (noise(index, "variance") - own)
        torch.testing.assert_close(result, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-6)

    def test_code_is_the_authors_loop(self):
        """
        The formulas of the released code in plain NumPy float64 and the lpips package, the off-by-one included: start
        at abar[20], denoise 19..0; pixel guide at 19..11 and perceptual at 10..0 with scale K g(t) on the batch mean
        of 500; fresh reference noise at every step; sigma^2 = beta_t, and 5.4532e-5 at t = 0; clamp x_0.
        """
        import lpips

        with torch.random.fork_rng():
            torch.manual_seed(0)
            distance = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        with torch.no_grad():  # features of a random trunk are close together: the guide would be lost in rounding
            for head in distance.lins:
                head.model[-1].weight *= 1000
        # fixed_small: the preset brings its own variance
        pipe = quiet(Pipeline(WavyUNet(), DDPMScheduler(), LPIPSModel.from_lpips(distance)))
        distance = copy.deepcopy(distance).double()
        images, options = photos(2), dict(seed=9, ids=list("ab"), micro_batch_size=2, output_type="pt")
        result = pipe(images, preset="code", **options).images
        assert pipe.scheduler.config.variance_type == "fixed_small"

        def slope(x, r, t):
            if t > 10:
                return 2 * (x - r) / x[0].size
            leaf = torch.tensor(x, requires_grad=True)
            return torch.autograd.grad(distance(leaf, torch.tensor(r)).sum(), leaf)[0].numpy()

        k_over_batch = 1 / ((8 * 2 / 255) / 3 / 70000) / 500
        expected = published_loop(images, 20, 4, k_over_batch, slope)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)

        for change in (
            dict(perceptual_guidance_scale=PRESETS["code"].perceptual_guidance_scale / 2),
            dict(pixel_guidance_scale=PRESETS["code"].pixel_guidance_scale * 2),
            dict(final_variance_factor=1.0),
            dict(pixel_guidance_window=(10, 19), perceptual_guidance_window=(0, 9)),
        ):
            other = pipe(images, preset=dataclasses.replace(PRESETS["code"], **change), **options).images
            assert (other - expected).abs().max() > 1e-4, change  # or this test would not see it

    def test_gdmp_is_its_authors_loop(self):
        """
        GuidedDiffusionPur in plain NumPy float64: four times from abar[36], denoise 35..0 with the pixel guide at
        every step, scale 60000 on the batch mean of 100; the rest as in the code that was made from it.
        """
        pipe = quiet(Pipeline(WavyUNet(), DDPMScheduler(variance_type="fixed_large")))
        images, options = photos(4), dict(seed=9, ids=list("abcd"), output_type="pt")
        result = pipe(images, preset="gdmp", **options).images
        k_over_batch = 1 / ((8 * 2 / 255) / 3 / 60000) / 100
        expected = published_loop(images, 36, 4, k_over_batch, lambda x, r, t: 2 * (x - r) / x[0].size)
        torch.testing.assert_close(result, expected, rtol=0, atol=3e-6)
        # The factor acts at t = 0 alone, where the guide is weak.
        for change, least in ((dict(start_one_level_higher=False), 1e-2), (dict(final_variance_factor=1.0), 1e-5)):
            other = pipe(images, preset=dataclasses.replace(PRESETS["gdmp"], **change), **options).images
            assert (other - expected).abs().max() > least, change

    @pytest.mark.parametrize(("preset", "level"), [("code", 20), ("paper", 19), ("gdmp", 36), ("unconditional", 99)])
    def test_where_each_preset_starts(self, preset, level):
        """
        `code` and `gdmp` start one level above the first timestep. A grey image (0) and start noise 1 make x the level.
        """
        pipe = quiet(Pipeline(ZeroUNet(), DDPMScheduler(variance_type="fixed_large")))
        pipe.prepare_noise = lambda *a: (
            lambda rows, r, s, use: torch.full((4, 3, 32, 32), 1.0 if use == "start" else 0.0)
        )
        seen = {}

        def remember(pipe, step, timestep, tensors):
            seen[timestep] = tensors["sample"][0, 0, 0, 0].item()

        settings = dict(preset=preset, num_rounds=1, pixel_guidance_scale=0.0, perceptual_guidance_scale=0.0)
        pipe(photos(1) * 0 + 0.5, seed=0, callback_on_step_end=remember, **settings)
        first = PRESETS[preset].diffusion_steps - 1
        timesteps = list(seen)
        assert timesteps[0] == first and len(seen) == PRESETS[preset].evaluations_per_round[0]
        beta = np.linspace(1e-4, 0.02, 1000)
        bar = np.cumprod(1 - beta)
        x, previous = math.sqrt(1 - bar[level]), bar[timesteps[1]]
        alpha = bar[first] / previous  # of the stride
        mean = (1 - alpha) * math.sqrt(previous) / (1 - bar[first]) * x / math.sqrt(bar[first])
        mean += (1 - previous) * math.sqrt(alpha) / (1 - bar[first]) * x
        assert seen[first] == pytest.approx(mean, rel=1e-5)

    def test_the_reference_of_paper_starts_as_the_sample_itself(self, network):
        """
        Algorithm 1: in the first round the reference chain is the chain that made x_Tp, so the first gradient is zero.
        """
        guided = quiet(Pipeline(ZeroUNet(), DDPMScheduler(variance_type="fixed_large"), network))
        run = lambda scale: (
            guided(photos(2), diffusion_steps=1, pixel_guidance_scale=scale, seed=0, output_type="pt").images
        )
        assert torch.equal(run(0.0), run(1e6))

    def test_a_guide_pulls_towards_the_protected_image(self, pipe):
        images = photos(4)
        settings = dict(diffusion_steps=20, num_inference_steps=20, seed=0, output_type="pt")
        distance = lambda **scales: (pipe(images, **settings, **scales).images - images).square().mean().item()
        free = distance()
        assert distance(pixel_guidance_scale=50_000.0) < 0.9 * free
        perceived = lambda **scales: pipe.perceptual(
            2 * pipe(images, **settings, **scales).images - 1, 2 * images - 1
        ).mean()
        assert perceived(perceptual_guidance_scale=5000.0) < 0.95 * perceived()

    @pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
    @pytest.mark.parametrize("guide", ["pixel", "perceptual"])
    def test_each_guides_gradient_is_multiplied_by_the_covariance(self, pipe, monkeypatch, sampler, guide):
        given, multiplied = [], []

        def remembering(step):
            @functools.wraps(step)
            def remember(self, *arguments, **named):
                given.append(named["gradient"])
                return step(self, *arguments, **named)

            return remember

        def multiply(gradient, corner):
            multiplied.append(times_covariance(gradient, corner))
            return multiplied[-1]

        for kind in (GuidedDDPMScheduler, GuidedDDIMScheduler):
            monkeypatch.setattr(kind, "step", remembering(kind.step))
        monkeypatch.setattr(pipeline_jcdp, "times_covariance", multiply)
        pipe.purification_config = PurificationConfig(noise_corner=8.0)
        scale = {f"{guide}_guidance_scale": 5.0}
        pipe(photos(1), diffusion_steps=5, num_inference_steps=2, sampler=sampler, seed=0, ids=["a"], **scale)
        assert len(given) == len(multiplied) > 0
        assert all(one is other for one, other in zip(given, multiplied)) and any(one.any() for one in given)

    def test_a_guide_shifts_by_the_covariance_of_coloured_noise(self):
        """Two steps from the same state, the pixel guide on and off: the means differ by sigma^2 Sigma times it."""
        guided = quiet(Pipeline(ZeroUNet(), DDPMScheduler(variance_type="fixed_large", clip_sample=False)))
        guided.purification_config = PurificationConfig(noise_corner=8.0, reference="fresh")
        images, seen = photos(2), {}

        def purify(scale):
            def remember(_, index, timestep, tensors):
                seen[scale, index] = tensors["sample"]

            settings = dict(diffusion_steps=3, seed=0, ids=["a", "b"], callback_on_step_end=remember)
            guided(images, pixel_guidance_scale=scale, **settings)

        purify(0.0)
        purify(900.0)
        keys = image_keys(0, ["a", "b"])
        draw = lambda use: coloured(normal_noise(keys, (3, 32, 32), round_index=0, step_index=0, use=use), 8.0)
        bar = DDPMScheduler().alphas_cumprod[2]
        start, reference = (
            (2 * images - 1) * bar**0.5 + (1 - bar) ** 0.5 * draw(use) for use in ("start", "reference")
        )
        gradient = -900.0 * 2 * (start - reference) / (3 * 32 * 32)
        expected = DDPMScheduler(variance_type="fixed_large")._get_variance(2) * times_covariance(gradient, 8.0)
        torch.testing.assert_close(seen[900.0, 0] - seen[0.0, 0], expected, rtol=1e-3, atol=1e-6)

    def test_coloured_noise_needs_to_know_the_size_that_was_trained(self, plain):
        plain.purification_config = PurificationConfig(noise_corner=8.0)
        plain.unet.register_to_config(sample_size=None)
        with pytest.raises(ValueError, match=r"images are 32x32.*noise_corner \(8 .*sample_size \(None\)"):
            plain(photos(1), seed=0)

    def test_a_generator_gives_coloured_noise_too(self, plain):
        plain.purification_config = PurificationConfig(noise_corner=8.0)
        draw = plain.prepare_noise((16, 3, 32, 32), 16, None, None, torch.Generator().manual_seed(0), "cpu", 8.0)
        white = torch.randn((16, 3, 32, 32), generator=torch.Generator().manual_seed(0))
        assert torch.equal(draw(slice(0, 16), 0, 0, "start"), coloured(white, 8.0))

    def test_a_scale_of_zero_costs_nothing(self, plain):
        """No reference noise is drawn, and the perceptual network is not even needed."""
        drawn = []
        prepare = plain.prepare_noise
        plain.prepare_noise = lambda *a: (
            lambda draw: lambda rows, r, s, use: drawn.append(use) or draw(rows, r, s, use)
        )(prepare(*a))
        plain(photos(1), preset="paper", num_rounds=1, pixel_guidance_scale=0, perceptual_guidance_scale=0, seed=0)
        assert drawn.count("start") == 1 and drawn.count("variance") == 19 and "reference" not in drawn
        drawn.clear()
        plain(photos(1), diffusion_steps=5, pixel_guidance_scale=1.0, pixel_guidance_window=(1, 2), seed=0)
        assert drawn.count("reference") == 2

    def test_respaced_steps_begin_at_the_start_level(self, plain):
        seen = []
        plain(
            photos(1),
            diffusion_steps=100,
            num_inference_steps=5,
            seed=0,
            callback_on_step_end=lambda pipe, step, t, tensors: seen.append(t),
        )
        assert seen == [99, 79, 59, 39, 19]

    def test_each_round_may_have_its_own_number_of_evaluations(self, plain, capsys):
        seen = []
        look = lambda pipe, step, t, tensors: seen.append((step, t))
        settings = dict(diffusion_steps=8, seed=0, ids=["a"], output_type="pt")
        plain.set_progress_bar_config(disable=False)
        plain(photos(1), num_rounds=3, num_inference_steps=(1, 2, 4), callback_on_step_end=look, **settings)
        assert seen == list(enumerate([7, 7, 3, 7, 5, 3, 1])) and "7/7" in capsys.readouterr().err
        several = plain(photos(1), num_rounds=2, num_inference_steps=(4, 4), **settings).images
        assert torch.equal(several, plain(photos(1), num_rounds=2, num_inference_steps=4, **settings).images)
        assert not torch.equal(several, plain(photos(1), num_rounds=2, num_inference_steps=[2, 4], **settings).images)

    def test_leaving_steps_out_keeps_the_noise_at_its_level(self):
        """
        With the exact noise predictor of a constant image, x_9 holds noise of the level of t = 9 when steps are left
        out, too; with the larger variance it holds more than the network was told.
        """

        class Exact(ZeroUNet):
            def forward(self, sample, timestep, return_dict=True):
                bar = DDPMScheduler().alphas_cumprod[int(timestep[0])]
                return ((sample - bar.sqrt() * 0.2) / (1 - bar).sqrt(),)

        pipe = quiet(Pipeline(Exact(), DDPMScheduler(variance_type="fixed_large")))
        assert pipe.resolve_config(num_inference_steps=10).variance_type == "fixed_small"
        assert pipe.resolve_config(num_inference_steps=100).variance_type is None
        seen = {}

        def remember(pipe, step, timestep, tensors):
            seen[timestep] = tensors["sample"].std().item()

        settings = dict(diffusion_steps=100, num_inference_steps=10, seed=0, callback_on_step_end=remember)
        pipe(photos(4) * 0 + 0.6, **settings)
        level = (1 - DDPMScheduler().alphas_cumprod[9].item()) ** 0.5
        assert seen[19] == pytest.approx(level, rel=0.03)
        assert seen[9] == pytest.approx(0, abs=1e-6)  # the last step goes to x_0, without noise
        pipe(photos(4) * 0 + 0.6, variance_type="fixed_large", **settings)
        assert seen[19] > 1.3 * level

    def test_ddim_draws_noise_for_the_start_alone(self, plain, monkeypatch):
        uses = []
        draw = plain.normal_noise
        monkeypatch.setattr(
            plain,
            "normal_noise",
            lambda *args, **options: (uses.append(options["use"]), draw(*args, **options))[1],
        )
        settings = dict(diffusion_steps=20, num_inference_steps=4, sampler="ddim", ids=["a", "b"], output_type="pt")
        first = plain(photos(2), seed=0, **settings).images
        assert uses == ["start"]
        assert torch.equal(first, plain(photos(2), seed=0, **settings).images)
        assert not torch.equal(first, plain(photos(2), seed=1, **settings).images)
        stochastic = plain(photos(2), seed=0, **settings | {"sampler": "ddpm"}).images
        assert not torch.equal(first, stochastic)

    def test_a_guide_that_could_not_act_is_refused(self, pipe):
        alone = dict(diffusion_steps=20, num_inference_steps=1, pixel_guidance_scale=10.0)
        with pytest.raises(ValueError, match="num_inference_steps is 1 and diffusion_steps 20"):
            pipe.resolve_config(**alone)
        with pytest.raises(ValueError, match="diffusion_steps 1,.* 2 "):
            pipe.resolve_config(diffusion_steps=1, pixel_guidance_scale=10.0, variance_type="fixed_small")
        pipe.resolve_config(diffusion_steps=1, pixel_guidance_scale=10.0, variance_type="fixed_large")
        pipe.resolve_config(**alone | dict(num_inference_steps=2))
        pipe.resolve_config(**alone | dict(sampler="ddim"))
        pipe.resolve_config(**alone | dict(pixel_guidance_scale=0.0))

    def test_ddim_is_guided_too(self, pipe):
        settings = GUIDED | dict(seed=0, ids=["a", "b"], output_type="pt", sampler="ddim")
        guided = pipe(photos(2), **settings).images
        alone = pipe(photos(2), **settings | dict(pixel_guidance_scale=0.0, perceptual_guidance_scale=0.0)).images
        assert not torch.equal(guided, alone)

    def test_float32_state_around_a_bfloat16_unet(self, pipe):
        settings = GUIDED | dict(diffusion_steps=3, micro_batch_size=2, seed=0, output_type="pt")
        exact = pipe(photos(2), **settings).images
        pipe.to(torch.bfloat16)
        assert pipe.unet.dtype == torch.bfloat16 and pipe.perceptual.dtype == torch.float32
        half = pipe(photos(2), **settings).images
        assert half.dtype == torch.float32 and 0 < (half - exact).abs().max() < 0.05


@pytest.mark.usefixtures("small_micro_batches")
class TestCall:
    @pytest.mark.parametrize("kind", ["pil", "one pil", "np", "pt"])
    def test_inputs_and_outputs(self, plain, kind):
        tensor = (photos(2) * 255).round() / 255
        arrays = tensor.permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray((a * 255).round().astype(np.uint8)) for a in arrays]
        images = {"pil": pictures, "one pil": pictures[0], "np": arrays, "pt": tensor}[kind]
        count = 1 if kind == "one pil" else 2
        settings = dict(diffusion_steps=2, seed=0, ids=["a", "b"][:count])
        out = {o: plain(images, output_type=o, **settings).images for o in ("pil", "np", "pt")}
        expected = plain(tensor[:count], output_type="pt", **settings).images
        torch.testing.assert_close(out["pt"], expected, rtol=0, atol=1e-6)
        assert out["np"].shape == (count, 32, 32, 3) and out["np"].dtype == np.float32
        assert np.array_equal(out["np"].transpose(0, 3, 1, 2), out["pt"].numpy())
        assert np.array_equal(np.stack(out["pil"]), (out["np"] * 255).round().astype(np.uint8))
        assert 0 <= out["pt"].min() and out["pt"].max() <= 1

    def test_grey_images(self):
        pipe = quiet(Pipeline(tiny_unet(1, 16), DDPMScheduler()))
        out = pipe([Image.new("L", (16, 16), 128)], diffusion_steps=2, seed=0)
        assert out.images[0].mode == "L"
        assert pipe(photos(2, 16, 1), diffusion_steps=2, seed=0, output_type="pt").images.shape == (2, 1, 16, 16)

    def test_tuple_output(self, plain):
        settings = dict(diffusion_steps=2, seed=0, output_type="pt")
        assert torch.equal(plain(photos(1), return_dict=False, **settings)[0], plain(photos(1), **settings).images)

    def test_callback_sees_and_may_replace_the_sample(self, plain):
        seen = []

        def halve(pipe, step, timestep, tensors):
            seen.append((step, timestep, tuple(tensors["sample"].shape)))
            return {"sample": tensors["sample"] * 0} if timestep == 0 else None

        out = plain(
            photos(2), diffusion_steps=2, num_rounds=2, seed=0, output_type="pt", callback_on_step_end=halve
        ).images
        assert seen == [(i, t, (2, 3, 32, 32)) for i, t in enumerate([1, 0, 1, 0])]
        assert torch.equal(out, torch.full_like(out, 0.5))

    def test_settings_are_looked_up_from_near_to_far(self, pipe):
        # Where steps are left out, the variance is the posterior's own.
        assert pipe.resolve_config() == dataclasses.replace(PRESETS["unconditional"], variance_type="fixed_small")
        pipe.purification_config = PurificationConfig(diffusion_steps=30, trained_timesteps=(0, 50))
        assert pipe.resolve_config().diffusion_steps == 30
        assert pipe.resolve_config("paper").diffusion_steps == 20
        assert pipe.resolve_config("paper", diffusion_steps=25).diffusion_steps == 25
        assert pipe.resolve_config("paper").trained_timesteps == (0, 50)
        # The colour of the noise is a fact of the network: no preset and no settings change it.
        pipe.purification_config = PurificationConfig(noise_corner=8.0)
        assert pipe.resolve_config("paper").noise_corner == 8.0
        assert pipe.resolve_config(PurificationConfig(diffusion_steps=9)).noise_corner == 8.0
        assert pipe.resolve_config(noise_corner=8.0).noise_corner == 8.0
        for asked in ({"noise_corner": 3.0}, {"noise_corner": 0.0}, {"preset": PurificationConfig(noise_corner=3.0)}):
            with pytest.raises(ValueError, match="noise_corner is [03].0, but must be 8.0"):
                pipe.resolve_config(**asked)
        pipe.purification_config = PurificationConfig()
        with pytest.raises(ValueError, match="noise_corner is 3.0, but must be 0.0"):
            pipe.resolve_config(PurificationConfig(noise_corner=3.0))
        pipe.purification_config = None
        assert pipe.resolve_config("paper").noise_corner == 0.0
        assert pipe.resolve_config(PurificationConfig(diffusion_steps=9, num_rounds=3)).num_rounds == 3
        defaults = {p.default for n, p in inspect.signature(pipe.__call__).parameters.items() if n.endswith("scale")}
        assert defaults == {None}

    def test_a_t_p_that_the_network_was_not_trained_on_is_refused(self, pipe):
        pipe.purification_config = PurificationConfig(diffusion_steps=30, trained_timesteps=(0, 50))
        message = "diffusion_steps is 51, but must be at most 50"
        with pytest.raises(ValueError, match=message):
            pipe(photos(1), diffusion_steps=51)
        pipe(photos(1), diffusion_steps=50, num_inference_steps=1)
        with pytest.raises(ValueError, match="diffusion_steps is 50.*49"):  # code starts one level higher
            pipe(photos(1), preset="code", diffusion_steps=50)
        with pytest.raises(ValueError, match="diffusion_steps is 1001.*1000"):
            Pipeline(tiny_unet(), DDPMScheduler())(photos(1), diffusion_steps=1001, num_inference_steps=1)
        for short in (DDPMScheduler(40), DDPMScheduler(trained_betas=[0.01] * 40)):
            with pytest.raises(ValueError, match="diffusion_steps is 45.* 40"):
                Pipeline.from_pipe(pipe, scheduler=short)(photos(1), diffusion_steps=45)

    def test_a_perceptual_scale_needs_the_network_it_was_tuned_for(self, plain):
        with pytest.raises(ValueError, match="perceptual is None.*'lpips-alex'.*300"):
            plain(photos(1), preset="paper")
        squeeze = quiet(Pipeline(plain.unet, plain.scheduler, LPIPSModel("squeezenet1_0", calibrated=False)))
        with pytest.raises(ValueError, match="perceptual is 'features-squeezenet1_0'.*'lpips-alex'"):
            squeeze(photos(1), preset="code")
        squeeze(photos(1), preset="paper", num_rounds=1, num_inference_steps=2, perceptual_guidance_scale=1.0)

    @pytest.mark.parametrize(
        ("images", "kwargs", "message"),
        [
            (
                (photos(1) * 255).to(torch.uint8),
                {},
                r"images is of type torch.uint8, but must be a float type in \[0, 1\]",
            ),
            (np.zeros((1, 32, 32, 3), np.uint8), {}, "images is of type uint8, but must be a float type"),
            (photos(1, channels=1), {}, "images has 1 channels, but must have 3"),
            (np.zeros((1, 32, 32, 4), np.float32), {}, "images has 4 channels, but must have 3"),
            (photos(1, 33), {}, "images are 33x33, but must have .* multiples of 2"),
            (photos(1) * float("nan"), {}, "images has NaN values, but every value must be a number in"),
            (photos(1) * 2 - 1, {}, r"images has values from -0.99\d* to 0.99\d*, but must lie in \[0, 1\]"),
            (photos(1) * 255, {}, r"images has values from 0.0\d* to 25\d.\d*, but must lie in \[0, 1\]"),
            (photos(1)[0], {}, r"images has shape \(3, 32, 32\), but must have four non-empty dimensions"),
            (photos(0), {}, r"images has shape \(0, 3, 32, 32\), but must have four non-empty dimensions"),
            ([], {}, "images is an empty list, but must hold"),
            (
                [Image.new("CMYK", (32, 32))],
                {},
                "images has a PIL image of mode 'CMYK', but must have mode 'RGB'",
            ),
            ([Image.new("I;16", (32, 32))], {}, "images has a PIL image of mode 'I;16'"),
            ([Image.new("RGB", (32, 32)), Image.new("RGB", (32, 34))], {}, "images has sizes .*32, 34.* one size"),
            (photos(2), dict(ids=["a"], seed=0), "ids has 1 entries, but must have .* 2 images"),
            (
                photos(2),
                dict(ids=["a", "a"], seed=0),
                "ids has 'a' for two different images",
            ),
            (photos(1), dict(micro_batch_size=0), "micro_batch_size is 0, but must be at least 1"),
            (photos(2), dict(generator=[torch.Generator()]), "generator has 1 entries, but must have .* 2 images"),
            (photos(1), dict(generator=torch.Generator(), seed=0), "generator is given together with seed or ids"),
            (photos(1), dict(seed=-1), r"seed is -1, but must be a whole number in \[0, 2\*\*64\)"),
            (photos(1), dict(output_type="jpg"), "output_type is 'jpg', but must be 'pil', 'np' or 'pt'"),
            (photos(1), dict(preset="best"), "preset is 'best', but must be one of"),
            (
                photos(1),
                dict(callback_on_step_end_tensor_inputs=["latents"]),
                "callback_on_step_end_tensor_inputs has 'latents'",
            ),
        ],
    )
    def test_bad_input_gets_one_sentence(self, plain, images, kwargs, message):
        with pytest.raises(ValueError, match=message) as caught:
            plain(images, **kwargs)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("images", ["a path", [np.zeros((32, 32, 3))]])
    def test_other_types_are_refused(self, plain, images):
        with pytest.raises(TypeError, match="images is a"):
            plain(images)

    def test_a_scheduler_without_guidance_is_refused(self, plain):
        plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
        with pytest.raises(ValueError, match="scheduler is a DDIMScheduler.*GuidedDDPMScheduler"):
            plain(photos(1))

    def test_a_scheduler_that_would_decide_the_sampler_is_refused(self, plain):
        plain.scheduler = GuidedDDIMScheduler.from_config(plain.scheduler.config)
        with pytest.raises(ValueError, match="scheduler is a GuidedDDIMScheduler.*sampler='ddim'"):
            plain(photos(1))

    @pytest.mark.parametrize(
        ("settings", "visited"),
        [
            (dict(diffusion_steps=20, num_inference_steps=2, pixel_guidance_window=(11, 12)), "19"),
            # At t = 4 the posterior's variance is zero: nothing is left of the window.
            (dict(diffusion_steps=20, num_inference_steps=4, pixel_guidance_window=(0, 4)), "19, 14, 9"),
            (dict(diffusion_steps=5, pixel_guidance_window=(200, 300)), "4, 3, 2, 1, 0"),
            (dict(diffusion_steps=9, num_inference_steps=(9, 3), num_rounds=2, pixel_guidance_window=(3, 4)), "8, 5"),
        ],
    )
    def test_a_guide_that_would_never_act_is_refused(self, plain, settings, visited):
        with pytest.raises(ValueError, match=f"pixel_guidance_window is .*these are {visited}\\."):
            plain.resolve_config(pixel_guidance_scale=1.0, **settings)
        plain.resolve_config(**settings)  # without the guide its window does not matter
        in_reach = {**settings, "pixel_guidance_window": (5, 19) if "num_rounds" in settings else (3, 19)}
        plain.resolve_config(pixel_guidance_scale=1.0, **in_reach)

    def test_the_last_step_counts_where_it_has_a_variance(self, plain):
        settings = dict(diffusion_steps=20, num_inference_steps=4, pixel_guidance_window=(0, 4))
        for last in (dict(variance_type="fixed_large"), dict(sampler="ddim")):
            unguided, guided = (
                plain(photos(1), seed=0, output_type="pt", pixel_guidance_scale=scale, **settings, **last).images
                for scale in (0.0, 100.0)
            )
            assert not torch.equal(unguided, guided)

    def test_a_variance_that_the_repository_asks_for_is_taken(self, plain):
        plain.purification_config = PurificationConfig(num_inference_steps=10, variance_type="fixed_large")
        assert plain.resolve_config().variance_type == "fixed_large"
        assert plain.resolve_config("tuned").variance_type == "fixed_small"
        plain.purification_config = PurificationConfig(num_inference_steps=10)
        assert plain.resolve_config().variance_type == "fixed_small"

    def test_ids_without_an_order_are_refused(self, plain):
        with pytest.raises(TypeError, match="ids is .*must be a list of strings"):
            plain(photos(2), ids={"a", "b"}, seed=0)

    def test_a_broken_network_is_reported(self, plain):
        with torch.no_grad():
            next(plain.unet.parameters()).fill_(float("nan"))
        with pytest.raises(ValueError, match="unet of type torch.float32 returned values that are not finite"):
            plain(photos(1), diffusion_steps=2)

    def test_ids_that_were_made_can_be_given_back(self, plain):
        """Equal images have equal content and so equal ids."""
        images, settings = photos(1).repeat(2, 1, 1, 1), dict(diffusion_steps=2, output_type="pt")
        out = plain(images, seed=2**64 - 1, **settings)
        assert out.ids[0] == out.ids[1]
        assert torch.equal(plain(images, ids=out.ids, seed=out.seed, **settings).images, out.images)
        odd = plain(photos(1), ids=["\udc80"], seed=np.int64(3), **settings).images
        assert torch.equal(plain(photos(1), ids=["\udc80"], seed=3, **settings).images, odd)

    def test_what_cannot_work_is_refused_before_the_first_step(self, network):
        calls = []
        pipe = quiet(Pipeline(tiny_unet(size=16), DDPMScheduler(), network))
        pipe.unet.register_forward_hook(lambda *a: calls.append(1))
        with pytest.raises(ValueError, match="images are 16x16.*31x31"):
            pipe(photos(1, 16), preset="code")
        pipe = quiet(Pipeline(tiny_unet(), DDPMScheduler(variance_type="learned_range")))
        pipe.unet.register_forward_hook(lambda *a: calls.append(1))
        with pytest.raises(ValueError, match="variance_type is 'learned_range' in the scheduler"):
            pipe(photos(1), num_inference_steps=100)  # with steps left out the posterior's variance is taken
        with pytest.raises(ValueError, match="unet takes 4 channels.*1 or 3"):
            Pipeline(tiny_unet(4), DDPMScheduler())(torch.rand(1, 4, 32, 32))
        pipe = quiet(Pipeline(tiny_unet(), DDPMScheduler()))
        pipe.purification_config = PurificationConfig(diffusion_steps=60, trained_timesteps=(50, 100))
        with pytest.raises(ValueError, match=r"trained_timesteps is \(50, 100\).* 0"):
            pipe(photos(1))
        assert not calls

    def test_one_evaluation_ends_without_noise(self):
        """With the exact predictor a single evaluation from T_p is the image itself, whatever the variance."""

        class Exact(ZeroUNet):
            def forward(self, sample, timestep, return_dict=True):
                bar = DDPMScheduler().alphas_cumprod[int(timestep[0])]
                return ((sample - bar.sqrt() * 0.2) / (1 - bar).sqrt(),)

        pipe = quiet(Pipeline(Exact(), DDPMScheduler()))
        for variance_type in ("fixed_small", "fixed_large"):
            settings = dict(diffusion_steps=100, num_inference_steps=1, variance_type=variance_type, seed=0)
            out = pipe(photos(1) * 0 + 0.6, output_type="pt", **settings).images
            torch.testing.assert_close(out, torch.full_like(out, 0.6), rtol=0, atol=1e-4)

    def test_a_smaller_t_p_takes_an_inherited_number_of_evaluations_with_it(self, plain):
        plain.purification_config = PurificationConfig(diffusion_steps=60, num_inference_steps=6)
        assert plain.resolve_config(diffusion_steps=5).num_inference_steps == 5
        assert plain.resolve_config(diffusion_steps=7).num_inference_steps == 6
        several = PurificationConfig(diffusion_steps=60, num_rounds=2, num_inference_steps=(3, 60))
        assert plain.resolve_config(several, diffusion_steps=20).num_inference_steps == (3, 20)
        with pytest.raises(ValueError, match="but must be one number, or one for each of the 3 rounds"):
            plain.resolve_config(several, num_rounds=3)
        assert plain.resolve_config("gdmp", num_inference_steps=5).variance_type == "fixed_small"
        assert plain.resolve_config("gdmp", num_inference_steps=(5, 36, 36, 36)).variance_type == "fixed_small"
        assert (
            plain.resolve_config("gdmp", num_inference_steps=5, variance_type="fixed_large").variance_type
            == "fixed_large"
        )

    def test_the_callbacks_samples_are_its_own(self, plain):
        seen = []
        plain(photos(1), diffusion_steps=3, seed=0, callback_on_step_end=lambda p, i, t, k: seen.append(k["sample"]))
        assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])

    def test_the_registered_scheduler_is_left_as_it_was(self, plain):
        before = dict(plain.scheduler.config), plain.scheduler.timesteps.clone()
        plain(photos(1), preset="gdmp", num_rounds=1, seed=0)
        assert dict(plain.scheduler.config) == before[0] and torch.equal(plain.scheduler.timesteps, before[1])

    def test_progress_counts_every_unet_call(self, plain, capsys):
        calls = []
        plain.unet.register_forward_hook(lambda *a: calls.append(1))
        plain.set_progress_bar_config(disable=False)
        plain(photos(6), diffusion_steps=3, num_rounds=2, seed=0)
        assert len(calls) == 2 * 3 * 2 and "12/12" in capsys.readouterr().err


def test_nearly_equal_images_without_ids_share_the_id_that_is_made_for_them(plain):
    images = (photos(1) * 255).round() / 255
    both = plain(torch.cat([images, images + 1e-6]).clamp(0, 1), seed=0, diffusion_steps=2, output_type="pt")
    assert both.ids[0] == both.ids[1]


def test_a_tuple_of_pictures_is_a_list(plain):
    pictures = [Image.fromarray(image) for image in (photos(2) * 255).byte().permute(0, 2, 3, 1).numpy()]
    options = dict(seed=0, diffusion_steps=2, output_type="pt")
    assert torch.equal(plain(tuple(pictures), **options).images, plain(pictures, **options).images)


def test_dropout_is_off_while_purifying_and_on_again_after(plain):
    plain.unet.train()
    for module in plain.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    options = dict(seed=0, diffusion_steps=3, output_type="pt")
    assert torch.equal(plain(photos(2), **options).images, plain(photos(2), **options).images)
    assert plain.unet.training
    with pytest.raises(RuntimeError, match="stop"):
        plain(photos(2), **options, callback_on_step_end=lambda *a: (_ for _ in ()).throw(RuntimeError("stop")))
    assert plain.unet.training


def test_a_callback_gets_what_it_asks_for_and_returns_nothing_else(plain):
    seen = []
    options = dict(seed=0, diffusion_steps=2, callback_on_step_end_tensor_inputs=())
    plain(photos(1), **options, callback_on_step_end=lambda pipe, step, t, given: seen.append(given))
    assert seen == [{}, {}]
    with pytest.raises(ValueError, match="callback_on_step_end returned 'latents'"):
        plain(photos(1), seed=0, diffusion_steps=2, callback_on_step_end=lambda *a: {"latents": 1})


def test_settings_of_a_former_purifier_do_not_stay(plain, tmp_path):
    plain.purification_config = PurificationConfig(diffusion_steps=5, trained_timesteps=(0, 10))
    plain.save_pretrained(tmp_path)
    plain.purification_config = None
    plain.save_pretrained(tmp_path)
    assert Pipeline.from_pretrained(tmp_path).purification_config is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seed=1.0), "seed is 1.0, but must be a whole number"),
        (dict(micro_batch_size=2.5), "micro_batch_size is 2.5, but must be at least 1, a whole number"),
        (dict(diffusion_steps="2"), "diffusion_steps is '2', but must be at least 1, a whole number"),
        (dict(diffusion_steps=20.5), "diffusion_steps is 20.5, but must be at least 1, a whole number"),
        (dict(num_rounds=1.5), "num_rounds is 1.5, but must be at least 1, a whole number"),
        (dict(generator=0), "generator is 0, but must be a torch.Generator or a list, one per image"),
        (dict(generator=[0]), r"generator is \[0\], but must be a torch.Generator"),
        (dict(ids="ab"), "ids is 'ab', but must be a list of strings, one per image"),
        (dict(ids=[1]), r"ids is \[1\], but must be a list of strings, one per image"),
        (dict(ids=5), "ids is 5, but must be a list of strings, one per image"),
    ],
)
def test_arguments_of_another_type_are_refused_in_a_sentence(plain, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plain(photos(1), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out_channels=6), "unet gives 6 channels for 3, but must give as many as it takes"),
        (dict(num_class_embeds=10), "unet is conditioned on classes, but must be unconditional"),
    ],
)
def test_networks_that_predict_something_else_are_refused(change, message):
    config = {name: value for name, value in tiny_unet().config.items() if not name.startswith("_")}
    unet = UNet2DModel(**config | change)
    with pytest.raises(ValueError, match=message):
        quiet(Pipeline(unet, DDPMScheduler(variance_type="fixed_large")))(photos(1), seed=0, diffusion_steps=2)


def test_the_way_to_a_missing_network_is_one_that_works(plain):
    for wanted, way, option in (
        ("features-squeezenet1_0", r"from_trunk_file\(PATH\)", "PATH"),
        ("lpips-vgg", r"from_lpips\('vgg'\)", "vgg"),
    ):
        config = PurificationConfig(perceptual_guidance_scale=1.0, perceptual_network=wanted)
        with pytest.raises(
            ValueError, match=f"perceptual is None.*'{wanted}'.*LPIPSModel.{way}.*--perceptual {option} "
        ):
            plain(photos(1), preset=config)


def test_the_example_of_the_docstring_runs(ddpm_folder, tmp_path, monkeypatch):
    assert pipeline_jcdp.EXAMPLE_DOC_STRING in Pipeline.__call__.__doc__
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 40), (200, 30, 90)).save("protected.png")
    lines = [line.strip() for line in pipeline_jcdp.EXAMPLE_DOC_STRING.splitlines()]
    code = "\n".join(line.removeprefix(">>> ") for line in lines if line.startswith(">>>"))
    assert "google/ddpm-cifar10-32" in code
    found = {}
    exec(code.replace("google/ddpm-cifar10-32", str(ddpm_folder)), found)
    assert Image.open("purified.png").size == (32, 32) and found["closer"].size == (32, 32)


def picture(mode, alpha=255):
    """A coloured picture in a mode that holds it without loss; grey modes hold a grey one."""
    draw = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    colour = Image.fromarray(draw // 64 * 64)
    grey = Image.fromarray(draw[..., 0])
    if mode == "P":
        return colour.quantize(64)
    if mode == "1":
        return grey.convert("1")
    if mode == "RGB with a transparent colour":
        colour.info["transparency"] = (1, 2, 3)  # which no pixel has
        return colour
    base = grey if mode in ("L", "LA") else colour
    if "A" in mode:
        base.putalpha(alpha)
    return base


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "RGB with a transparent colour"])
def test_pictures_that_lose_nothing_as_rgb_are_taken(plain, mode):
    given = picture(mode)
    options = dict(seed=0, ids=["a"], diffusion_steps=2, output_type="pt")
    expected = plain([given.convert("RGB")], **options).images
    assert torch.equal(plain([given], **options).images, expected)
    assert torch.equal(plain([given, picture("RGB")], **options | {"ids": ["a", "b"]}).images[:1], expected)


def test_pictures_that_lose_nothing_as_grey_are_taken():
    grey = quiet(Pipeline(tiny_unet(1), DDPMScheduler()))
    options = dict(seed=0, ids=["a"], diffusion_steps=2, output_type="pt")
    for mode in ("LA", "1"):
        given = picture(mode)
        assert torch.equal(grey([given], **options).images, grey([given.convert("L")], **options).images)
    with pytest.raises(ValueError, match="images has a PIL image of mode 'RGBA'.*'L'"):
        grey([picture("RGBA")])


def test_pictures_that_would_lose_something_are_refused(plain):
    corner = picture("RGBA")
    corner.putpixel((0, 0), (1, 2, 3, 254))
    glass = picture("P")
    glass.info["transparency"] = glass.getpixel((5, 5))
    for given, mode in ((picture("RGBA", 0), "RGBA"), (picture("LA", 128), "LA"), (corner, "RGBA"), (glass, "P")):
        with pytest.raises(ValueError, match=f"images has a PIL image of mode '{mode}' with transparency"):
            plain([given], seed=0, diffusion_steps=2)
    with pytest.raises(ValueError, match="images has a PIL image of mode 'F'.*'RGB'"):
        plain([Image.new("F", (32, 32))])


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "bfloat16", "numpy float32", "numpy float16"])
def test_what_rounding_leaves_outside_the_unit_range_is_taken(plain, kind):
    options = dict(seed=0, ids=["a"], diffusion_steps=2, output_type="pt")
    images = photos(1)
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    name = kind.split()[-1]
    inside = images.to(getattr(torch, name))
    outside = inside.clone()
    outside[0, 0, 0, :2] += torch.tensor([-1.0, 1.0]).to(inside) * max(2.0**-22, torch.finfo(inside.dtype).eps)
    assert outside.min() < 0 and outside.max() > 1
    if "numpy" in kind:
        inside, outside = (each.permute(0, 2, 3, 1).numpy() for each in (inside, outside))
    assert np.array_equal(plain(outside, **options).images, plain(inside, **options).images)


@pytest.mark.parametrize("off", [-2e-5, 2e-5])
def test_what_rounding_cannot_leave_is_refused_with_its_value(plain, off):
    images = photos(1).clamp(0.1, 0.9)
    images[0, 0, 0, 0] = off if off < 0 else 1 + off
    with pytest.raises(ValueError, match=r"images has values from (-2e-05 to 0\.9|0\.1 to 1\.00002)"):
        plain(images)
