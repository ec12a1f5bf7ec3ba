"""What cannot be audited ends in one sentence, before anything costly."""

import dataclasses

import pytest
import torch
from audit_runs import command, digits, sentence
from diffusers import DDPMPipeline, DDPMScheduler
from tiny import tiny_unet

from jcdp_diffusers.audit import command as audit_command
from jcdp_diffusers.audit.run import audit
from jcdp_diffusers.cli import main
from jcdp_diffusers.data import LabelledImages, load_images, write_dataset
from jcdp_diffusers.train.default_purifier import plan_for


def test_columns_are_asked_of_roles_whose_labels_are_used(folders, tmp_path, monkeypatch, capfd):
    seen = []
    monkeypatch.setattr(audit_command, "audit", lambda **options: seen.append(options["load_options"]))
    more = ("--label_column", "label", "--image_column", "image")
    assert main(command(folders, tmp_path / "out", *more)) == 0
    write_dataset(tmp_path / "plain", dataclasses.replace(load_images(folders["collected"]), labels=None))
    folders = folders | {"collected": str(tmp_path / "plain"), "protected": str(tmp_path / "plain")}
    assert main(command(folders, tmp_path / "out", *more, "--method", "simclr")) == 0
    for role in ("collected", "protected"):
        assert [options[role].get("label_column") for options in seen] == ["label", None]
    assert all(options["test"]["label_column"] == "label" for options in seen)
    assert main(command(folders | {"collected": "nowhere"}, tmp_path / "out", *more)) == 1
    assert sentence(capfd).startswith("jcdp audit: collected: ")


@pytest.mark.parametrize("draws", ["0", "-1"])
def test_a_number_of_draws_that_there_cannot_be_is_refused(folders, tmp_path, capfd, draws):
    assert main(command(folders, tmp_path / "out", "--draws", draws)) == 1
    assert f"--draws is {draws}, but must be a whole number of at least 1" in sentence(capfd)


def test_a_control_needs_the_clean_images(folders, tmp_path, capfd):
    assert main(command(folders, tmp_path / "out", "--control")) == 1
    assert "control is True, but without clean images" in sentence(capfd)


def test_what_cannot_be_audited_ends_in_one_sentence(folders, tmp_path, capfd):
    def refused(changes, *more):
        code = main(command({**folders, **changes}, tmp_path / "out", *more))
        return code, sentence(capfd)

    clean = load_images(folders["clean"])
    protected, test = load_images(folders["protected"]), load_images(folders["test"])

    write_dataset(tmp_path / "slipped", clean.subset(range(50)), split="train")
    code, said = refused({"collected": str(tmp_path / "slipped")})
    assert code == 1 and "protected and collected have 50 ids in common, the first 'digit-0'" in said

    write_dataset(tmp_path / "no_nine", protected.subset(protected.labels != 9))
    code, said = refused({"protected": str(tmp_path / "no_nine")})
    assert code == 1 and "protected has no image of class '9', but every one of the 10 classes needs some" in said

    names = tuple(f"digit {label}" for label in range(10))
    other = LabelledImages(test.images, test.labels, test.ids, names)
    write_dataset(tmp_path / "other", other)
    code, said = refused({"test": str(tmp_path / "other")})
    assert code == 1 and "protected has no image of class 'digit 0'" in said

    broken = tmp_path / "broken" / "3"
    broken.mkdir(parents=True)
    (broken / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    code, said = refused({"protected": str(tmp_path / "broken")})
    assert (
        code == 1 and "protected has 1 image(s) that cannot be used, the first '3/a.png': not a readable image" in said
    )

    code, said = refused({}, "--channels", "1")
    assert code == 1 and "protected has 200 image(s) that cannot be used, the first 'digit-0': colour" in said

    code, said = refused({"collected": str(tmp_path / "nowhere")})
    assert code == 1 and said.startswith("jcdp audit: collected: ") and "nowhere" in said

    DDPMPipeline(tiny_unet(size=32), DDPMScheduler()).save_pretrained(tmp_path / "large")
    code, said = refused({}, "--purifier", str(tmp_path / "large"))
    assert code == 1 and "purifier was trained on 32x32 pixels, but these images have 16x16" in said
    DDPMPipeline(tiny_unet(channels=1, size=16), DDPMScheduler()).save_pretrained(tmp_path / "grey")
    code, said = refused({}, "--purifier", str(tmp_path / "grey"))
    assert code == 1 and "purifier takes images of 1 channels, but these have 3" in said

    code, said = refused({}, "--countermeasures", "gray,magic")
    assert code == 1 and "'magic'" in said
    code, said = refused({}, "--countermeasures", "purified+eclipse")
    assert code == 1 and "--countermeasures has 'purified+eclipse', but images are purified once" in said
    code, said = refused({}, "--countermeasures", "gray+purified+purified")
    assert code == 1 and "--countermeasures has 'gray+purified+purified', but images are purified once" in said
    code, said = refused({}, "--countermeasures", "purified")
    assert code == 1 and "--countermeasures has 'purified', but that is a row of every audit" in said
    code, said = refused({}, "--countermeasures", "gray,at-8+ueraser-max")
    assert code == 1 and "'at-8+ueraser-max'" in said and "at-8 and ueraser-max" in said
    code, said = refused({}, "--preset", "best")
    assert code == 1 and "preset is 'best', but must be one of" in said
    code, said = refused({}, "--budget", "300")
    assert code == 1 and "--budget is 300, but must lie within 0 and 255, in 1/255" in said
    code, said = refused({}, "--seeds", "0")
    assert code == 1 and "at least one victim" in said
    assert not (tmp_path / "out" / "purifier").exists()  # all of it before anything costly


def test_arguments_that_do_not_fit(folders):
    with pytest.raises(ValueError, match="roles is 'paper'"):
        audit(protected=folders["protected"], test=folders["test"], roles="paper")
    with pytest.raises(ValueError, match="plan has the network 'tiny32'"):
        audit(
            protected=folders["protected"],
            test=folders["test"],
            purifier="x",
            plan=plan_for(digits(range(5)), torch.device("cpu"), smoke=True),
        )
    with pytest.raises(ValueError, match="protocol is 'quick'"):
        audit(protected=folders["protected"], test=folders["test"], purifier="x", protocol="quick")


def test_images_without_labels_need_a_way_of_learning_without(without_labels, purifier, tmp_path, capfd):
    asked = command(without_labels, tmp_path / "out", "--purifier", purifier, roles=("protected", "test"))
    for more, message in (
        ((), "protected has no labels, but must have one per image for method 'supervised': simclr"),
        (("--method", "byol"), "--probe_images is None, but must be clean labelled images for method 'byol'"),
        (
            ("--method", "byol", "--probe_images", without_labels["test"]),
            "--probe_images has 150 images that are test",
        ),
        (("--probe_images", without_labels["probe"]), "must be None for method 'supervised'"),
        (("--method", "byol", "--probe_images", without_labels["protected"]), "--probe_images has no labels"),
    ):
        assert main([*asked, *more]) == 1
        assert message in sentence(capfd)


@pytest.mark.parametrize(
    "more, message",
    [
        (("--fractions", "0.5", "1.2"), "--fractions is [0.5, 1.2], but 1.2 must be above 0 and at most 1"),
        (("--fractions", "0"), "0.0 must be above 0 and at most 1"),
        (("--fractions", "0.5"), "--fractions is [0.5], but without clean images"),
        (("--method", "simclr", "simclr"), "--method is ['simclr', 'simclr'], but must be one or several of"),
        (
            ("--method", "supervised", "simclr", "--countermeasures", "mixup"),
            "'mixup', but mixup does not go with method 'simclr'",
        ),
        (
            ("--method", "supervised", "simclr", "--protocol", "iss"),
            "--protocol is 'iss', but must be one of cp, fast",
        ),
        (("--whitening", "collected"), "--whitening is 'collected', but must be 'training' for victim 'resnet18'"),
        (("--processes", "0"), "--processes is 0, but must be at least 1"),
        (("--device", "cuda:99"), "--device is 'cuda:99', but must be one that torch finds on this machine: cpu"),
        (("--device", "banana"), "--device is 'banana', but must be one that torch finds"),
        (("--width", "0"), "--width is 0, but must be a positive integer for resnet18"),
        (("--victim", "densenet121", "--width", "5"), "--width is 5, but must be a positive multiple of 2"),
        (("--seed", "-1"), "--seed is -1, but must be a whole number in [0, 2**32)"),
        (("--budget_minutes", "nan"), "--budget_minutes is nan, but must be above 0"),
    ],
)
def test_what_does_not_apply_is_refused(more, message, folders, tmp_path, capfd):
    assert main(command(folders, tmp_path / "out", *more)) == 1
    assert message in sentence(capfd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (("--method", "moco-v2", "--protocol", "mini"), "has 200 images, but must have at least 1024, the queue"),
        (
            ("--method", "simclr", "--protocol", "mini", "--countermeasures", "advcl"),
            "images, but must have at least 500 for the pseudo-labels",
        ),
    ],
)
def test_too_few_images_are_refused_before_a_purifier_is_trained(more, message, folders, tmp_path, capfd):
    roles = ("protected", "collected", "test", "clean")
    assert main(command(folders, tmp_path / "out", *more, roles=roles)) == 1
    assert message in sentence(capfd)
    assert not (tmp_path / "out").exists()
