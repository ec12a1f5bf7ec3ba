import dataclasses
import json
import math
import re
import shutil
import threading
from importlib import metadata

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker, on_main_process
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_unet
from training_runs import HELD_OUT, IMAGES, make_images, record, same, train, weights

from jcdp_diffusers import JointConditionalPurificationPipeline, PurificationConfig
from jcdp_diffusers.acceleration import place
from jcdp_diffusers.data import open_dataset
from jcdp_diffusers.noise import coloured
from jcdp_diffusers.train import loop
from jcdp_diffusers.train.denoising import TIMESTEP_SAMPLINGS, held_out_losses
from jcdp_diffusers.train.images import ImageFiles
from jcdp_diffusers.train.loop import TrainingConfig, train_purifier
from jcdp_diffusers.train.provenance import trained_on
from jcdp_diffusers.train.record import ema_horizon


# -------------------------------------------------------------------------------------------------- what comes out


def test_output_is_a_plain_ddpm_repository(tmp_path):
    scheduler = DDPMScheduler(50, beta_schedule="squaredcos_cap_v2", variance_type="fixed_large", clip_sample=False)
    folder = train(tmp_path, scheduler=scheduler, trained_timesteps=(0, 20))
    assert {path.name for path in folder.glob("[!.]*")} == {
        "model_index.json", "unet", "scheduler", "purification_config.json", "training_record.json", "trained_on.json",
        "README.md",
    }  # fmt: skip
    pipe = DDPMPipeline.from_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDPMScheduler"]
    for name in ("num_train_timesteps", "beta_schedule", "variance_type", "clip_sample"):
        assert pipe.scheduler.config[name] == scheduler.config[name]
    assert pipe.unet.config.sample_size == 8
    assert PurificationConfig.from_pretrained(folder).trained_timesteps == (0, 20)
    purifier = JointConditionalPurificationPipeline.from_pretrained(folder)
    purified = purifier(IMAGES.tensor()[:2], seed=0, ids=["a", "b"], output_type="pt").images
    assert purified.shape == (2, 3, 8, 8)


def test_the_colour_of_the_noise_is_learned_and_written_down(tmp_path, monkeypatch):
    drawn = []
    add_noise = DDPMScheduler.add_noise

    def remember(self, clean, noise, timesteps):
        drawn.append(noise)
        return add_noise(self, clean, noise, timesteps)

    monkeypatch.setattr(DDPMScheduler, "add_noise", remember)
    start = tiny_unet(size=8)
    white, red = (
        train(tmp_path / str(corner), held_out=HELD_OUT, noise_corner=corner, train_batch_size=8, validation_steps=9)
        for corner in (0.0, 3.0)
    )
    drawn[:] = [noise for noise in drawn if len(noise) == 8]  # the held-out images are ten
    assert len(drawn) == 8
    for one, other in zip(drawn[:4], drawn[4:]):
        assert torch.equal(coloured(one, 3.0), other)
    assert not same(weights(white), weights(red))
    assert [PurificationConfig.from_pretrained(folder).noise_corner for folder in (white, red)] == [0.0, 3.0]
    for folder, corner in ((white, 0.0), (red, 3.0)):
        held_out = held_out_losses(
            start, DDPMScheduler(), HELD_OUT.images, timesteps=(0, 1000), noise_corner=corner
        ).mean()
        assert record(folder)["validation"][0]["loss"] == pytest.approx(held_out.item(), rel=1e-5)
    pipe = JointConditionalPurificationPipeline.from_pretrained(red)
    assert pipe.resolve_config("tuned").noise_corner == 3.0
    facts = TrainingConfig(noise_corner=3.0, trained_timesteps=(0, 20)).facts_of_the_network()
    assert facts == {"noise_corner": 3.0, "trained_timesteps": (0, 20)}
    # Per image, so another size would be another colour per pixel.
    with pytest.raises(ValueError, match="images are 16x16, .*8x8"):
        pipe(torch.rand(1, 3, 16, 16), seed=0, ids=["a"])
    assert JointConditionalPurificationPipeline.from_pretrained(white)(torch.rand(1, 3, 16, 16), seed=0, ids=["a"])
    assert "| noise | white |" in (white / "README.md").read_text()
    card = (red / "README.md").read_text()
    assert "| noise | power spectrum 1 + (3 / f)^2, f in cycles per image |" in card
    assert "does not generate images" in card and "corner frequency 3.0 cycles per image" in card
    assert "does not generate images" not in (white / "README.md").read_text()


def test_the_network_handed_in_holds_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "jcdp_diffusers.train.config.has_bfloat16", lambda device: True
    )  # imitated where it is not: this network is small
    unet = tiny_unet(size=8)
    folder = train(tmp_path, unet, mixed_precision="bf16")
    assert same(dict(unet.state_dict()), weights(folder))
    assert unet.purification_config == PurificationConfig.from_pretrained(folder)
    assert unet.conv_in.weight.is_contiguous() and not unet.training
    assert unet(torch.zeros(1, 3, 8, 8), 3).sample.dtype == torch.float32


@pytest.mark.parametrize(
    ("prediction_type", "mixed_precision"),
    [("epsilon", "no"), ("epsilon", "bf16"), ("epsilon", "fp16"), ("v_prediction", "no"), ("sample", "no")],
)
def test_training_lowers_the_held_out_loss(tmp_path, monkeypatch, prediction_type, mixed_precision):
    monkeypatch.setattr("jcdp_diffusers.train.config.has_bfloat16", lambda device: True)
    folder = train(
        tmp_path,
        scheduler=DDPMScheduler(prediction_type=prediction_type),
        held_out=HELD_OUT,
        max_train_steps=12,
        train_batch_size=16,
        learning_rate=1e-2,
        ema_max_decay=0.5,
        validation_steps=6,
        mixed_precision=mixed_precision,
    )
    losses = [entry["loss"] for entry in record(folder)["validation"]]
    assert [entry["step"] for entry in record(folder)["validation"]] == [0, 6, 12]
    assert losses[2] < 0.9 * losses[0]


def test_fine_tuning_starts_from_the_weights_given(tmp_path):
    start = tiny_unet(size=8, seed=5)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    folder = train(tmp_path, start, learning_rate=1e-6)
    assert same(weights(folder), before, atol=1e-4) and not same(weights(folder), before)


def test_the_record_says_what_was_done(tmp_path):
    entry = record(train(tmp_path, held_out=HELD_OUT, gradient_accumulation_steps=2, trained_timesteps=(0, 30)))
    assert (entry["steps"], entry["total_batch_size"], entry["processes"]) == (4, 8, 1)
    assert entry["trained_timesteps"] == [0, 30] and entry["num_train_timesteps"] == 1000
    assert entry["data"] == {"num_images": 24, "num_validation_images": 10}
    assert entry["parameters"] == tiny_unet().num_parameters()
    assert [point["step"] for point in entry["history"]] == [1, 2, 3, 4]
    assert entry["validation"][-1]["timesteps"] == [0, 30]
    assert entry["packages"]["torch"] == metadata.version("torch")
    assert entry["images_per_second"] > 0 and entry["device"] == "cpu"


def test_pictures_of_denoising_and_samples(tmp_path):
    part = train(tmp_path / "a", held_out=HELD_OUT, num_grid_images=3, trained_timesteps=(0, 9), validation_steps=2)
    assert sorted(path.name for path in (part / "grids").iterdir()) == [
        f"denoising-000000{step}.png" for step in (0, 2, 4)
    ]
    scheduler = DDPMScheduler(9)  # samples take as many steps
    whole = train(tmp_path / "b", held_out=HELD_OUT, num_grid_images=3, max_train_steps=1, scheduler=scheduler)
    assert "samples-0000001.png" in {path.name for path in (whole / "grids").iterdir()}


def test_bar_shows_loss_throughput_and_remaining_time(tmp_path, capsys):
    config = TrainingConfig(max_train_steps=3, train_batch_size=4, logging_steps=1, checkpointing_steps=None, cpu=True)
    train_purifier(IMAGES, unet=tiny_unet(size=8), scheduler=DDPMScheduler(), output_dir=tmp_path, config=config)
    bar = capsys.readouterr().err
    assert re.search(r"train: 100%.* 3/3 \[\d\d:\d\d<\d\d:\d\d, .*step/s, loss=\d\.\d{4}, images/s=\d+\]", bar)


class Listener(GeneralTracker):
    name, requires_logging_directory = "listener", False

    def __init__(self):
        super().__init__()
        self.entries, self.lock = [], threading.Lock()  # which, like an open file, cannot be copied

    @property
    def tracker(self):
        return self.entries

    @on_main_process
    def store_init_configuration(self, values):
        self.entries.append(("settings", values))

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.entries.append((step, values))


def test_trackers_hear_loss_learning_rate_and_held_out_loss(tmp_path):
    listener = Listener()
    train(tmp_path, held_out=HELD_OUT, report_to=listener, max_train_steps=2)
    assert listener.entries[0][1]["learning_rate"] == "0.0002"
    heard = {(step, name) for step, values in listener.entries[1:] for name in values}
    assert heard == {(0, "held_out_loss"), (2, "held_out_loss")} | {
        (step, name) for step in (1, 2) for name in ("loss", "learning_rate", "gradient_norm")
    }


# --------------------------------------------------------------------------------------- averaging and validation


def test_averaged_weights_follow_the_formula(tmp_path):
    """Against the recursion e_n = d_n e_(n-1) + (1 - d_n) w_n, from the weights that checkpoints kept of each step."""
    folder = train(tmp_path, checkpointing_steps=1, checkpoints_total_limit=None, learning_rate=1e-2)
    steps = [load_file(folder / f"checkpoint-{step}" / "unet.safetensors") for step in (1, 2, 3, 4)]
    average = steps[0]
    for n, current in enumerate(steps[1:], start=1):
        decay = min(0.9999, 1 - (1 + n) ** -0.75)
        average = {name: decay * average[name] + (1 - decay) * current[name] for name in average}
    assert same(weights(folder), average, atol=1e-6)
    for other in (steps[-1], dict(tiny_unet(size=8).state_dict())):
        assert not same(weights(folder), other, atol=1e-4)


def test_a_short_fine_tune_forgets_its_start():
    """Without a warm-up, a decay of 0.9999 would keep 90 % of the start after 1,000 steps."""
    assert 0.9999**1000 > 0.9
    defaults = TrainingConfig()
    ema = EMAModel(
        [torch.zeros(1, requires_grad=True)],
        decay=defaults.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=defaults.ema_inv_gamma,
        power=defaults.ema_power,
    )
    horizon = ema_horizon(ema, 1000)
    assert horizon["weight_of_start"] < 1e-6 and 100 < horizon["mean_age"] < 200


def test_horizon_is_that_of_the_average():
    """A weight that is 1 at the first step and 0 after it keeps the share that the horizon says."""
    parameter = torch.nn.Parameter(torch.ones(1))
    ema = EMAModel([parameter], decay=0.9, use_ema_warmup=True, power=0.75)
    for step in range(12):
        parameter.data.fill_(float(step == 0))
        ema.step([parameter])
    assert ema.shadow_params[0].item() == pytest.approx(ema_horizon(ema, 12)["weight_of_start"], rel=1e-5)


def test_validation_changes_nothing(tmp_path):
    changes = {"learning_rate": 1e-2, "max_train_steps": 3, "scheduler": DDPMScheduler(8)}  # samples take 8 steps
    plain = train(tmp_path / "a", **changes)
    watched = train(tmp_path / "b", held_out=HELD_OUT, validation_steps=1, num_grid_images=2, **changes)
    assert len(list((watched / "grids").glob("samples-*"))) > 1
    assert same(weights(plain), weights(watched))


# -------------------------------------------------------------------------------------------------- determinism


def test_global_random_states_stay_as_they_are(tmp_path):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(tmp_path / "a", UNet2DModel(**tiny_unet(size=8).config | {"dropout": 0.3}))
    torch_state = torch.get_rng_state()
    assert np.array_equal(np.random.get_state()[1], states[1])
    torch.manual_seed(0)
    train(tmp_path / "b", tiny_unet(size=8))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(after, torch.get_rng_state())
    torch.set_rng_state(torch_state)


def test_seed_decides_everything(tmp_path):
    runs = [weights(train(tmp_path / str(i), seed=seed)) for i, seed in enumerate((0, 0, 1))]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def dropping_unet():
    unet = tiny_unet(size=8)
    dropping = UNet2DModel(**dict(unet.config) | {"dropout": 0.3})
    dropping.load_state_dict(unet.state_dict())
    return dropping


@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])  # fp16 has a loss scale to go on with
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(tmp_path, mixed_precision):
    """Bit for bit, with dropout, flips, averaging, a schedule and a loss history that spans the interruption."""
    settings = dict(
        max_train_steps=7, checkpointing_steps=3, random_flip=True, lr_scheduler="cosine", lr_warmup_steps=2,
        logging_steps=2, validation_steps=2, held_out=HELD_OUT, mixed_precision=mixed_precision,
    )  # fmt: skip
    whole = train(tmp_path / "whole", dropping_unet(), **settings)
    train(tmp_path / "cut", dropping_unet(), **settings, checkpoints_total_limit=None)
    for step in (6, 7):
        (tmp_path / "cut" / f"checkpoint-{step}").rename(tmp_path / f"gone-{step}")
    resumed = train(tmp_path / "cut", dropping_unet(), **settings, resume_from_checkpoint="latest")
    assert same(weights(resumed), weights(whole))
    for name in ("history", "validation", "steps", "ema"):
        assert record(resumed)[name] == record(whole)[name]
    last = [load_file(folder / "checkpoint-7" / "unet.safetensors") for folder in (whole, resumed)]
    assert same(*last)


def test_a_resumed_run_may_divide_the_batch_otherwise(tmp_path):
    """The checkpoint lies at an odd number of micro-batches, so a count that went on would be out of step."""
    settings = dict(max_train_steps=6, checkpointing_steps=3, learning_rate=1e-2)
    whole = train(tmp_path / "whole", train_batch_size=8, **settings)
    train(tmp_path / "cut", train_batch_size=8, **settings | {"max_train_steps": 3})
    divided = dict(train_batch_size=4, gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    resumed = train(tmp_path / "cut", **settings, **divided)
    assert same(weights(resumed), weights(whole), atol=1e-4)
    for one, two in zip(record(resumed)["history"], record(whole)["history"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-3)


def test_a_run_can_be_made_longer(tmp_path):
    whole = train(tmp_path / "whole", max_train_steps=4, checkpointing_steps=10)
    train(tmp_path / "grown", max_train_steps=2, checkpointing_steps=10)
    grown = train(tmp_path / "grown", max_train_steps=4, checkpointing_steps=10, resume_from_checkpoint="latest")
    assert same(weights(grown), weights(whole))


def test_micro_batches_add_up_to_the_same_total_batch(tmp_path):
    """One step on 8 images, or on 4 and 4, or on 2 four times: the loss is the same and the weights are, to rounding."""
    runs = [
        train(tmp_path / str(k), train_batch_size=8 // k, gradient_accumulation_steps=k, max_train_steps=3)
        for k in (1, 2, 4)
    ]
    for other in runs[1:]:
        assert same(weights(other), weights(runs[0]), atol=2e-5)
        for one, two in zip(record(runs[0])["history"], record(other)["history"]):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_learning_rate_follows_optimiser_steps(tmp_path, accumulation):
    folder = train(
        tmp_path,
        max_train_steps=8,
        train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        lr_scheduler="linear",
        lr_warmup_steps=2,
        learning_rate=0.1,
        max_grad_norm=1e-6,
    )
    rates = [point["learning_rate"] for point in record(folder)["history"]]
    assert rates == pytest.approx([0.1 * min(step / 2, (8 - step) / 6) for step in range(8)])


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    plain = train(tmp_path / "a")
    frugal = train(tmp_path / "b", gradient_checkpointing=True)
    assert same(weights(plain), weights(frugal), atol=1e-6)


# -------------------------------------------------------------------------------------------------------- options


def test_flips_only_when_asked(tmp_path):
    symmetric = IMAGES.with_images(np.maximum(IMAGES.images, IMAGES.images[:, :, ::-1]))
    assert not TrainingConfig().random_flip
    for images, differs in ((symmetric, False), (IMAGES, True)):
        runs = [
            weights(train(tmp_path / f"{differs}-{flip}", images=images, random_flip=flip)) for flip in (False, True)
        ]
        assert same(*runs) != differs


def test_gradients_are_clipped(tmp_path):
    norms = [point["gradient_norm"] for point in record(train(tmp_path / "a"))["history"]]
    clipped = train(tmp_path / "b", max_grad_norm=min(norms) / 1000, adam_epsilon=1.0, learning_rate=1.0)
    free = train(tmp_path / "c", max_grad_norm=1e9, adam_epsilon=1.0, learning_rate=1.0)
    start = tiny_unet(size=8).state_dict()

    def moved(folder):
        return sum((tensor - start[name]).square().sum().item() for name, tensor in weights(folder).items()) ** 0.5

    assert moved(clipped) < moved(free) / 100


def test_min_snr_weights_enter_the_loss(tmp_path):
    losses = [record(train(tmp_path / str(gamma), snr_gamma=gamma))["history"] for gamma in (None, 1e9, 0.1)]
    assert losses[0][0]["loss"] == pytest.approx(losses[1][0]["loss"])
    assert losses[2][0]["loss"] < losses[0][0]["loss"]


@pytest.mark.parametrize("sampling", TIMESTEP_SAMPLINGS)
@pytest.mark.parametrize("end", [1, 8])
def test_only_the_trained_range_is_visited(tmp_path, sampling, end):
    """And all of it: 96 draws from 8 timesteps miss one of them with a probability below 1 in 40,000."""
    visited, unet = [], tiny_unet(size=8)
    unet.register_forward_pre_hook(lambda module, inputs: visited.extend(inputs[1].tolist()))
    train(tmp_path, unet, train_batch_size=24, trained_timesteps=(0, end), timestep_sampling=sampling)
    assert len(visited) == 96 and set(visited) == set(range(end))


class Unlabelled:
    """Images whose labels cannot be read."""

    images = IMAGES.images

    def __len__(self):
        return len(self.images)

    @property
    def labels(self):
        raise AssertionError("labels were read")


def test_labels_are_never_read(tmp_path):
    assert same(weights(train(tmp_path / "a", images=Unlabelled())), weights(train(tmp_path / "b")))


def test_greyscale(tmp_path):
    unet = tiny_unet(channels=1, size=8)
    assert DDPMPipeline.from_pretrained(train(tmp_path, unet, make_images(channels=1))).unet.config.in_channels == 1


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_train_steps": 0}, "max_train_steps is 0,"),
        ({"checkpointing_steps": 0}, "checkpointing_steps is 0,"),
        ({"learning_rate": math.nan}, "learning_rate is nan,"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps is -1,"),
        ({"num_grid_images": -1}, "num_grid_images is -1,"),
        ({"lr_scheduler": "sine"}, r"lr_scheduler is 'sine',"),
        ({"noise_corner": -1.0}, "noise_corner is -1.0,"),
        ({"noise_corner": "8"}, "noise_corner is '8',"),
        ({"noise_corner": True}, "noise_corner is True,"),
        ({"noise_corner": 1e20}, r"noise_corner is 1e\+20,"),
        ({"trained_timesteps": (5, 30)}, r"trained_timesteps is \(5, 30\),"),
        ({"snr_gamma": -1.0}, "snr_gamma is -1.0,"),
        ({"ema_max_decay": 1.0}, r"ema_max_decay is 1.0,"),
        ({"adam_beta2": 1.5}, r"adam_beta2 is 1.5,"),
        ({"adam_weight_decay": -1.0}, r"adam_weight_decay is -1.0,"),
        ({"adam_epsilon": float("nan")}, r"adam_epsilon is nan,"),
        ({"seed": -1}, r"seed is -1,"),
        ({"mixed_precision": "fp8"}, r"mixed_precision is 'fp8',"),
        ({"timestep_sampling": "all"}, "timestep_sampling is 'all',"),
    ],
)
def test_settings_are_checked(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainingConfig(**settings)


@pytest.mark.parametrize(("instructions", "precision"), [(True, "bf16"), (False, "no")])
def test_auto_is_what_the_device_computes_in(tmp_path, monkeypatch, instructions, precision):
    monkeypatch.setattr("jcdp_diffusers.train.config.has_bfloat16", lambda device: instructions)
    folder = train(tmp_path, max_train_steps=1, mixed_precision="auto")
    assert record(folder)["settings"]["mixed_precision"] == precision


def test_imitated_bfloat16_is_refused_before_anything_happens(tmp_path, monkeypatch):
    monkeypatch.setattr("jcdp_diffusers.train.config.has_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match="mixed_precision is 'bf16', but cpu would only imitate it.*'auto'"):
        train(tmp_path / "out", mixed_precision="bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["trained_timesteps", "validation_timesteps"])
@pytest.mark.parametrize("bad", [(0, 0), (-1, 5), (0, 1001)])
def test_ranges_of_timesteps_are_checked_before_anything_happens(tmp_path, name, bad):
    with pytest.raises(ValueError, match=rf"{name} is \({bad[0]}, {bad[1]}\).* 0 and 1000"):
        train(tmp_path / "out", held_out=HELD_OUT, **{name: bad})
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_together(tmp_path):
    with pytest.raises(ValueError, match="images .*1 channel.*3"):
        train(tmp_path, images=make_images(channels=1))
    with pytest.raises(ValueError, match="images are 6x6,.* 4 "):
        channels = dict(block_out_channels=(8, 16, 16), norm_num_groups=4)
        types = dict(down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3)
        train(tmp_path, UNet2DModel(sample_size=8, **channels, **types), make_images(size=6))
    with pytest.raises(ValueError, match="unet .*6 channels"):
        train(tmp_path, UNet2DModel(**dict(tiny_unet().config) | {"out_channels": 6}))
    with pytest.raises(ValueError, match="unet is conditioned on classes,"):
        train(tmp_path, UNet2DModel(**dict(tiny_unet().config) | {"num_class_embeds": 10}))
    with pytest.raises(ValueError, match="prediction_type is None"):
        train(tmp_path, scheduler=FlowMatchEulerDiscreteScheduler())
    placed = place(JointConditionalPurificationPipeline(tiny_unet(size=8), DDPMScheduler()), "cpu").unet
    with pytest.raises(ValueError, match="unet has been placed for purification"):
        train(tmp_path, placed)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("max_train_steps", 4.0, "a whole number"),
        ("seed", True, "a whole number"),
        ("lr_warmup_steps", True, "a whole number"),
        ("checkpointing_steps", 1.5, "a whole number"),
        ("max_train_steps", "4", "a whole number"),
        ("max_train_steps", None, "a whole number"),
        ("trained_timesteps", 5, "two whole numbers"),
        ("trained_timesteps", (0, 5.0), "two whole numbers"),
        ("learning_rate", "1e-3", "a number"),
        ("learning_rate", np.float32(1e-3), "a number"),
        ("random_flip", 1, "True or False"),
    ],
)
def test_values_of_another_type_are_refused_before_the_training(name, value, wanted):
    """JSON, in which the record is written at the end, has none of them."""
    with pytest.raises(ValueError, match=f"{name} is .* must be {wanted}"):
        TrainingConfig(**{name: value})


def test_the_number_of_micro_batches_is_that_of_the_settings(tmp_path, monkeypatch):
    """Accelerate would take that of its variable."""
    settings = {"gradient_accumulation_steps": 2, "train_batch_size": 2}
    expected = weights(train(tmp_path / "plain", **settings))
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        assert same(weights(train(tmp_path / steps, **settings)), expected)


def test_a_network_of_which_a_part_is_frozen_goes_on(tmp_path):
    def network():
        unet = tiny_unet(size=8)
        unet.down_blocks.requires_grad_(False)
        return unet

    whole = weights(train(tmp_path / "whole", network()))
    train(tmp_path / "cut", network(), checkpointing_steps=2, max_train_steps=2)
    again = train(tmp_path / "cut", network(), resume_from_checkpoint="latest")
    assert same(weights(again), whole)
    start = tiny_unet(size=8).state_dict()
    assert all(torch.equal(whole[name], start[name]) for name in start if name.startswith("down_blocks"))


def test_a_folder_with_another_run_is_refused(tmp_path):
    train(tmp_path, checkpointing_steps=2)
    with pytest.raises(ValueError, match="output_dir is .*checkpoint-4.*resume_from_checkpoint='latest'"):
        train(tmp_path)
    for settings, sentence in (
        ({"seed": 1}, "seed is 1,.*checkpoint-4.* 0"),
        ({"train_batch_size": 8}, "total_batch_size is 8,.*checkpoint-4.* 4"),
        ({"images": make_images(seed=3)}, "images is .*checkpoint-4"),
        ({"max_train_steps": 3}, "max_train_steps is 3,.*checkpoint-4.* 4"),
        ({"resume_from_checkpoint": "checkpoint-1"}, "resume_from_checkpoint is 'checkpoint-1',"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train(tmp_path, **{"resume_from_checkpoint": "latest"} | settings)


def test_what_is_somebody_elses_is_not_written_over(tmp_path):
    mine = tmp_path / "own/README.md"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ValueError, match="own', whose README.md is no purifier's"):
        train(tmp_path / "own")
    assert mine.read_text() == "mine" and len(list((tmp_path / "own").glob("[!.]*"))) == 1


def test_a_pipeline_of_somebody_else_is_not_replaced(tmp_path):
    JointConditionalPurificationPipeline(tiny_unet(size=8), DDPMScheduler()).save_pretrained(tmp_path)
    before = weights(tmp_path)
    for wanted in (None, "latest"):
        with pytest.raises(ValueError, match=r"output_dir is .*model_index\.json"):
            train(tmp_path, seed=1, resume_from_checkpoint=wanted)
    assert same(weights(tmp_path), before)


def test_a_run_from_another_base_is_refused(tmp_path):
    """Or the record would name a base that the weights do not have, and the list of images would not be whole."""
    base = train(tmp_path / "base", images=make_images(seed=3))
    settings = {"checkpointing_steps": 2, "max_train_steps": 2}
    train(tmp_path / "out", base_model=str(base), **settings)
    for other, said in ((None, "base_model is None"), ("somebody/else", "base_model is 'somebody/else'")):
        with pytest.raises(ValueError, match=f"{said}.*checkpoint-2 was trained with 'base'"):
            train(tmp_path / "out", base_model=other, resume_from_checkpoint="latest")
    shutil.rmtree(base)
    train(tmp_path / "base")
    with pytest.raises(ValueError, match="base_images is"):
        train(tmp_path / "out", base_model=str(base), resume_from_checkpoint="latest")


def test_a_finished_purifier_is_not_replaced(tmp_path):
    before = weights(train(tmp_path))
    for wanted in (None, "latest"):
        with pytest.raises(ValueError, match=r"output_dir is .*training_record\.json"):
            train(tmp_path, seed=1, resume_from_checkpoint=wanted)
    assert same(weights(tmp_path), before)


@pytest.mark.parametrize("checkpoints", [None, 2])
@pytest.mark.parametrize("writes", ["default_settings", "write_trained_on", "write_card"])
def test_a_run_that_is_killed_as_it_finishes_leaves_no_purifier_and_is_finished_by_the_same_command(
    tmp_path, monkeypatch, writes, checkpoints
):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    settings = {"noise_corner": 4.0, "trained_timesteps": (0, 20), "resume_from_checkpoint": "latest"}
    settings |= {"checkpointing_steps": checkpoints}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, writes, killed)
        train(tmp_path / "cut", **settings)
    with pytest.raises(OSError, match=r"cut', but must hold a model_index\.json"):
        JointConditionalPurificationPipeline.from_pretrained(tmp_path / "cut")
    whole, cut = train(tmp_path / "whole", **settings), train(tmp_path / "cut", **settings)
    assert same(weights(cut), weights(whole))
    pipe = JointConditionalPurificationPipeline.from_pretrained(cut)
    assert (pipe.purification_config.noise_corner, pipe.purification_config.trained_timesteps) == (4.0, (0, 20))
    assert record(cut)["steps"] == 4 and len(trained_on(cut)) == 24


def test_a_run_that_is_gone_on_with_is_no_purifier_until_it_has_finished_again(tmp_path, monkeypatch):
    """Its settings would be those of other weights."""

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    train(tmp_path, checkpointing_steps=2)
    monkeypatch.setattr(loop, "default_settings", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, checkpointing_steps=2, max_train_steps=6, resume_from_checkpoint="latest")
    assert not (tmp_path / "model_index.json").exists()


def test_a_folder_in_which_another_training_is_at_work_is_refused(tmp_path):
    def another():
        with pytest.raises(ValueError, match="output_dir is .*, but another command is at work there.*wait"):
            train(tmp_path, checkpointing_steps=1, resume_from_checkpoint="latest")
        return True

    options = {"unet": tiny_unet(size=8), "scheduler": DDPMScheduler(), "progress": False}
    config = TrainingConfig(max_train_steps=4, train_batch_size=4, cpu=True, num_grid_images=0)
    train_purifier(IMAGES, output_dir=tmp_path, config=config, stop=another, **options)
    assert record(tmp_path)["steps"] == 1


def test_a_run_on_other_files_is_refused(tmp_path):
    """Images that are decoded when they are needed are told apart by name and size, not by their number alone."""
    for i, pixels in enumerate(IMAGES.images):
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    files = ImageFiles(open_dataset(folder), resolution=8)
    train(tmp_path / "out", images=files, max_train_steps=1, checkpointing_steps=1)
    folder = folder.rename(tmp_path / "moved")
    again = dict(max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="latest")
    train(tmp_path / "out", images=ImageFiles(open_dataset(folder), resolution=8), **again)
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes() + b" ")
    with pytest.raises(ValueError, match="images is '24 images, .*checkpoint-2"):
        train(tmp_path / "out", images=ImageFiles(open_dataset(folder), resolution=8), **again)


def test_a_tracker_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report_to is 'comet_ml',"):
        train(tmp_path, report_to="comet_ml")


def test_a_diverging_run_stops(tmp_path):
    with pytest.raises(FloatingPointError, match=r"learning_rate.*1e\+30"):
        train(tmp_path, learning_rate=1e30, max_train_steps=10)
    assert not (tmp_path / "model_index.json").exists()


def test_every_setting_has_an_option_with_help():
    import argparse

    parser = argparse.ArgumentParser()
    TrainingConfig.add_arguments(parser)
    assert TrainingConfig.from_arguments(parser.parse_args([])) == TrainingConfig()
    arguments = ["--trained_timesteps", "0", "20", "--mixed_precision", "bf16", "--random_flip", "--snr_gamma", "5"]
    config = TrainingConfig.from_arguments(parser.parse_args(arguments + ["--resume_from_checkpoint", "latest"]))
    assert config == TrainingConfig(
        trained_timesteps=(0, 20),
        mixed_precision="bf16",
        random_flip=True,
        snr_gamma=5,
        resume_from_checkpoint="latest",
    )
    helps = {action.dest: action.help for action in parser._actions}
    assert all(len(helps[field.name]) > 8 for field in dataclasses.fields(TrainingConfig))
