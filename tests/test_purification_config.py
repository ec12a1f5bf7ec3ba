import dataclasses
import json

import pytest

from jcdp_diffusers import PRESETS, PurificationConfig
from jcdp_diffusers.purification_config import adaptive_settings, default_settings
from jcdp_diffusers.spectrum import ProtectionTable


TABLE = ProtectionTable(((1.0,),), ((5.0, 5.0, 5.0),), ((9e9, 9e9, 9e9),))


@pytest.mark.parametrize("name", PRESETS)
def test_save_load_gives_the_same_settings(name, tmp_path):
    PRESETS[name].save_pretrained(tmp_path / "new")
    assert PurificationConfig.from_pretrained(tmp_path / "new") == PRESETS[name]


def test_a_number_of_evaluations_for_each_round(tmp_path):
    early = PurificationConfig(diffusion_steps=20, num_rounds=3, num_inference_steps=[2, 2, 20])
    assert early.num_inference_steps == early.evaluations_per_round == (2, 2, 20)
    assert early.evaluations_per_image == 24
    early.save_pretrained(tmp_path)
    assert PurificationConfig.from_pretrained(tmp_path) == early
    same = PurificationConfig(diffusion_steps=20, num_rounds=3, num_inference_steps=5)
    assert same.evaluations_per_round == (5, 5, 5) and same.evaluations_per_image == 15
    assert PRESETS["code"].evaluations_per_round == (20, 20, 20, 20)


def test_a_protections_spectrum_is_part_of_the_file(tmp_path):
    fitted = PurificationConfig(protection_guidance_scale=0.5, protection=TABLE)
    fitted.save_pretrained(tmp_path)
    assert PurificationConfig.from_pretrained(tmp_path) == fitted
    path = tmp_path / "purification_config.json"
    path.write_text(path.read_text().replace("5.0", "-5.0"))
    with pytest.raises(ValueError, match="protection cannot be used: power is -5"):
        PurificationConfig.from_pretrained(tmp_path)


def test_adaptive_settings_cover_what_the_protection_hides():
    """Images much stronger than the protection, which is white: nine tenths of its power is the noise to reach."""
    bars = [1 - 0.001 * (t + 1) for t in range(200)]
    found = adaptive_settings(TABLE, bars, scale=0.01)
    assert found.protection == TABLE and found.protection_guidance_scale == 0.01 and found.num_inference_steps == 10
    noise = [(1 - bar) / bar * 127.5**2 for bar in bars]
    wanted = 0.9 * 5.0 / 0.01
    assert noise[found.diffusion_steps - 1] >= wanted > noise[found.diffusion_steps - 2]
    assert adaptive_settings(TABLE, bars, scale=1.0).diffusion_steps == 1
    with pytest.warns(UserWarning, match="diffusion_steps is 4, the last timestep .* covers 1% of"):
        found = adaptive_settings(TABLE, bars[:4], scale=0.001)
    assert found.diffusion_steps == found.num_inference_steps == 4  # the network knows no more


def test_adaptive_settings_know_the_colour_of_the_noise():
    """At 4x4, a protection of 1 cycle per image alone: there, coloured noise is 1 + corner^2 times as strong."""
    low = ProtectionTable(((1.0,),), ((0.0, 5.0, 0.0),), ((9e9, 9e9, 9e9),))
    bars = [1 - 0.0005 * (t + 1) for t in range(400)]
    for corner in (0.0, 2.0):
        # The bin of 1 has the four coefficients at a distance of 1, and those at sqrt(2), where noise is weaker.
        strength = [(1 - bar) / bar * 127.5**2 for bar in bars]
        covered = [
            sum(min(500.0, noise * (1 + corner**2 / square)) for square in (1, 1, 1, 1, 2, 2, 2, 2)) / 4000
            for noise in strength
        ]
        wanted = 1 + next(step for step, share in enumerate(covered) if share >= 0.9)
        found = adaptive_settings(low, bars, noise_corner=corner, scale=0.01)
        assert found.diffusion_steps == wanted


def test_the_adaptive_preset_cannot_be_used_without_images():
    with pytest.raises(ValueError, match="preset is 'adaptive'"):
        PurificationConfig.resolve("adaptive")


def test_a_folder_without_the_file_has_no_settings(tmp_path):
    assert PurificationConfig.from_pretrained(tmp_path) is None


def test_constants_of_the_authors_code():
    """Against the figures worked out from the released configuration: bsize 500, ptb 8, guide_scale 70000."""
    code = PRESETS["code"]
    assert code.pixel_guidance_scale == code.perceptual_guidance_scale == 6693.75
    # closed form of the pixel shift: 2 * scale / 3072 = 4.357910 per unit of sigma^2 g(t) (x - r)
    assert 2 * code.pixel_guidance_scale / 3072 == pytest.approx(4.357910, abs=1e-6)
    assert 2 * PRESETS["gdmp"].pixel_guidance_scale / 3072 == pytest.approx(18.68, abs=0.01)
    assert 1.0e-4 * code.final_variance_factor == pytest.approx(5.4532e-5, rel=1e-4)
    assert code.pixel_guidance_window == (11, 19) and code.perceptual_guidance_window == (0, 10)
    assert code.evaluations_per_image == 80


def test_the_default_has_a_tenth_of_its_steps_and_fits_every_network():
    usual = PRESETS["unconditional"]
    assert (usual.diffusion_steps, usual.evaluations_per_image) == (100, 10)
    assert default_settings(1000) == usual
    assert default_settings(50) == dataclasses.replace(usual, diffusion_steps=50)
    facts = {"trained_timesteps": (0, 5), "noise_corner": 8.0}
    assert default_settings(5, **facts) == PurificationConfig(diffusion_steps=5, num_inference_steps=5, **facts)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("change", [{}, {"num_inference_steps": 5}, {"diffusion_steps": 10}])
def test_a_preset_means_the_same_by_its_name_as_an_object_and_as_the_repositorys(name, change):
    by_name = PurificationConfig.resolve(name, **change)
    assert by_name == PurificationConfig.resolve(PRESETS[name], **change)
    assert by_name == PurificationConfig.resolve(repository=PRESETS[name], **change)
    assert by_name.variance_type == "fixed_small" or not by_name.leaves_out_steps


def test_a_variance_type_belongs_to_the_steps_that_it_was_chosen_for():
    every = PurificationConfig(variance_type="fixed_large")
    fewer = PurificationConfig(num_inference_steps=10, variance_type="fixed_large")
    assert every.changed(num_rounds=2).variance_type == "fixed_large"
    assert every.changed(num_inference_steps=10).variance_type is None
    assert every.changed(num_inference_steps=10, variance_type="fixed_large") == fewer
    assert fewer.changed(num_inference_steps=5).variance_type == "fixed_large"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(diffusion_steps=0), "diffusion_steps is 0, but must be at least 1"),
        (dict(final_variance_factor=float("nan")), "final_variance_factor is nan, but must be a finite number"),
        (dict(start_one_level_higher="no"), "start_one_level_higher is 'no', but must be True or False"),
        (dict(trained_timesteps=(0, 0)), r"trained_timesteps is \(0, 0\), but must hold one timestep at least"),
        (dict(num_inference_steps="2"), "num_inference_steps is '2', but must be a whole number, a tuple"),
        (dict(num_rounds=0), "num_rounds is 0, but must be at least 1"),
        (
            dict(num_inference_steps=101),
            r"num_inference_steps is 101, but must lie between 1 and diffusion_steps \(100\)",
        ),
        (dict(num_inference_steps=0), "num_inference_steps is 0, but must lie between 1"),
        (
            dict(num_inference_steps=(5, 5), num_rounds=3),
            r"num_inference_steps is \(5, 5\), but must be one number, or one for each of the 3 rounds",
        ),
        (
            dict(num_inference_steps=()),
            r"num_inference_steps is \(\), but must be one number, or one for each of the 1",
        ),
        (
            dict(num_inference_steps=(5, 0), num_rounds=2),
            r"num_inference_steps is \(5, 0\), but must lie between 1 and diffusion_steps \(100\)",
        ),
        (dict(feature_reuse=0), "feature_reuse is 0, but must be at least 1"),
        (dict(pixel_guidance_scale=-1), "pixel_guidance_scale is -1, but must be a finite number of at least 0"),
        (
            dict(perceptual_guidance_scale=float("nan")),
            "perceptual_guidance_scale is nan, but must be a finite number",
        ),
        (dict(guidance_strength="loud"), "guidance_strength is 'loud', but must be one of"),
        (dict(reference="none"), "reference is 'none', but must be one of"),
        (dict(variance_type="learned"), "variance_type is 'learned', but must be one of"),
        (dict(pixel_guidance_window=(5, 3)), r"pixel_guidance_window is \(5, 3\), but must be two timesteps"),
        (dict(protection_guidance_scale=0.5), "protection_guidance_scale is 0.5 and protection is None"),
        (dict(protection=TABLE), "protection_guidance_scale is 0 and protection is a table"),
        (dict(protection_guidance_scale=1, protection=[1.0]), r"protection is \(1.0,\)"),
        (dict(protection_guidance_scale=1, protection={"axes": [[1.0]]}), "protection cannot be used: "),
        (dict(trained_timesteps=(0,)), r"trained_timesteps is \(0,\), but must be two timesteps"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PurificationConfig(**settings)


def test_an_argument_that_is_no_setting_is_refused():
    with pytest.raises(TypeError, match="pixel_guidance_scal is no setting.*must be pixel_guidance_scale\\."):
        PurificationConfig.resolve(pixel_guidance_scal=1)
    with pytest.raises(TypeError, match="zzz is no setting.*diffusion_steps or num_inference_steps or "):
        PurificationConfig.resolve("tuned", zzz=None)


@pytest.mark.parametrize(("name", "value"), [("trained_timesteps", (0, 5)), ("noise_corner", 2.0)])
def test_what_the_network_was_trained_on_cannot_be_asked_for(name, value):
    for trained in (None, PurificationConfig(trained_timesteps=(0, 200), noise_corner=8.0)):
        with pytest.raises(ValueError, match=f"{name} is .*, but must be .*, as this purifier was trained"):
            PurificationConfig.resolve("tuned", repository=trained, **{name: value})
    same = PurificationConfig(**{name: value})
    assert PurificationConfig.resolve("tuned", repository=same, **{name: value}).diffusion_steps == 30


def test_an_unknown_field_in_the_file_is_refused(tmp_path):
    path = PurificationConfig().save_pretrained(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"strenght": 1}))
    with pytest.raises(ValueError, match="holds 'strenght', which is no field of PurificationConfig"):
        PurificationConfig.from_pretrained(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "purification_config.json").write_text('{"diffusion_steps": 5')
    with pytest.raises(ValueError, match="purification_config.json is no JSON"):
        PurificationConfig.from_pretrained(tmp_path)
