"""What an audit tries beside its own purification, by name."""

import pytest
from digits import digits

from jcdp_diffusers.audit import audit
from jcdp_diffusers.audit.attacks import attack, in_seconds
from jcdp_diffusers.audit.purifier import AuditPurifier
from jcdp_diffusers.audit.rows import trials_of
from jcdp_diffusers.audit.settings import AuditSettings
from jcdp_diffusers.purification_config import PRESETS, PurificationConfig


ROLES = ("protected", "test", "probe", "collected")
AUDITS = PurificationConfig(diffusion_steps=40, num_inference_steps=4, num_rounds=2)


def test_a_countermeasure_by_its_name():
    one = attack("jpeg-10")
    assert one.name == one.countermeasure.name == "jpeg-10"
    assert not one.takes_purified and not one.purifies_as_the_audit
    assert one.as_done(AUDITS, smoke=False) is one.countermeasure


def test_purified_in_front_takes_the_purified_images():
    one = attack("purified+corruption")
    assert one.takes_purified and not one.purifies_as_the_audit
    assert one.countermeasure.name == "corruption" and not one.countermeasure.needs_purifier


def test_purified_behind_others_purifies_what_they_leave_as_the_audit_does():
    one = attack("impulse-filter+purified+corruption")
    assert one.purifies_as_the_audit and not one.takes_purified
    assert [part.name for part in one.countermeasure.parts] == ["impulse-filter", "unconditional", "corruption"]
    done = one.as_done(AUDITS, smoke=False)
    assert [part.name for part in done.parts] == ["impulse-filter", "purified", "corruption"]
    assert done.parts[1].settings["diffusion_steps"] == 40


def test_another_purification_keeps_its_settings_except_in_a_smoke_run():
    one = attack("avatar")
    assert one.as_done(AUDITS, smoke=False) is one.countermeasure
    assert one.countermeasure.settings["diffusion_steps"] == 100
    assert one.as_done(AUDITS, smoke=True).parts[0].settings["diffusion_steps"] == 40


@pytest.mark.parametrize(
    ("name", "whole", "others", "finetune"),
    [
        ("pretrained", "pretrained", "none", "all"),
        ("pretrained-upper", "pretrained-upper", "none", "upper"),
        ("pretrained+jpeg-10+cutout", "jpeg-10+cutout+pretrained", "jpeg-10+cutout", "all"),
        ("pretrained+purified", "purified+pretrained", "none", "all"),
        ("purified+corruption+pretrained", "purified+corruption+pretrained", "corruption", "all"),
    ],
)
def test_a_start_goes_with_any_attack_and_comes_last(name, whole, others, finetune):
    one = attack(name)
    assert (one.name, one.countermeasure.name, one.finetune) == (whole, others, finetune)
    assert one.takes_purified == ("purified" in name)
    done = one.as_done(AUDITS, smoke=False)
    assert done.name == whole and "SimCLR on the collected images" in done.source
    assert done.settings["finetune"] == finetune


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pretrained+pretrained-upper", "a victim has one start"),
        ("purified", "that is a row of every audit"),
        ("purified+purified", "images are purified once"),
        ("purified+avatar", "images are purified once"),
        ("avatar+purified", "images are purified once"),
        ("purified+no-such", "no-such"),
    ],
)
def test_names_that_are_no_attack(name, said):
    with pytest.raises(ValueError, match=said):
        attack(name)


@pytest.mark.parametrize("config", [*PRESETS.values(), AUDITS, PurificationConfig(diffusion_steps=3)])
def test_a_smoke_run_purifies_with_few_steps_and_never_more_than_asked(config):
    quick = in_seconds(config)
    assert quick.evaluations_per_image <= 2
    assert quick.diffusion_steps == min(20, config.diffusion_steps)


def test_an_attack_that_learns_from_collected_images_has_them(tmp_path):
    sets = {role: digits(40 * number, 40 * number + 40) for number, role in enumerate(ROLES)}
    asked = AuditSettings(method="simclr", protocol="smoke", attacks=("advcl", "advcl-plain"), seeds=1)
    (learner,) = asked.learners("cpu", sets["protected"].images.shape[1:])
    rows = trials_of(sets, AuditPurifier("unused", None, PurificationConfig(), None), asked, learner, tmp_path)
    assert rows["advcl"][0].collected is sets["collected"]
    assert rows["advcl-plain"][0].collected is None and rows["protected"][0].collected is None


def test_an_attack_that_learns_from_collected_images_needs_them(tmp_path):
    sets = {role: digits(40 * number, 40 * number + 40) for number, role in enumerate(ROLES)}
    given = {"protected": sets["protected"], "test": sets["test"], "probe_images": sets["probe"], "purifier": "unused"}
    with pytest.raises(ValueError, match="collected is None.*'advcl'"):
        audit(**given, method="simclr", attacks=("advcl",), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
