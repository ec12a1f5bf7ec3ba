"""The purifier of an audit: one that is given, with what it lists of its images, or one that is trained here."""

import json
import shutil

import pytest
import torch
from audit_runs import command, digits

from jcdp_diffusers.audit.run import audit
from jcdp_diffusers.cli import main
from jcdp_diffusers.data import load_images
from jcdp_diffusers.perceptual import LPIPSModel
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.train.default_purifier import plan_for
from jcdp_diffusers.train.provenance import image_digests, write_trained_on


pytestmark = pytest.mark.usefixtures("without_drawing")  # of all but the session's audit


def test_without_clean_images_and_with_a_purifier_given(folders, purifier, tmp_path):
    report = audit(
        protected=folders["protected"],
        test=folders["test"],
        purifier=purifier,
        output_dir=tmp_path / "out",
        protocol="smoke",
        seeds=1,
        processes=1,
        device="cpu",
        preset=plan_for(digits(range(5)), torch.device("cpu"), True).purification,
        say=lambda line: None,
    )
    assert [row["row"] for row in report["rows"]] == ["protected", "early-stopping", "purified"]
    assert report["verdict"]["regained_share"] is None and report["data"]["noise"] is None
    limits = " ".join(report["limits"])
    assert "No clean originals were given" in limits
    collected = len(load_images(folders["collected"]))
    said = f"trained on {collected} images, by its own list, and on no protected or test image"
    assert said in (tmp_path / "out/report.md").read_text()
    assert f"none of the test images, by the list of {collected} images" in limits
    assert not report["purifier"]["trained_here"] and report["purifier"]["trained_on"] == collected


@pytest.mark.parametrize("role", ["protected", "test", "clean"])
def test_a_given_purifier_that_has_seen_what_it_must_not_is_refused(folders, purifier, tmp_path, capsys, role):
    """Nobody says so on the command line: it is found in the list beside the weights."""
    purifier = shutil.copytree(purifier, tmp_path / "purifier")
    data = load_images(folders[role])
    write_trained_on(purifier, image_digests(data.images[3:5]))
    asked = command(folders, tmp_path / "out", "--purifier", str(purifier), roles=("protected", "test", "clean"))
    assert main(asked) == 1
    said = capsys.readouterr().err
    assert f"was trained on 2 of the {len(data)} {role} images, the first {data.ids[3]!r}" in said
    assert not (tmp_path / "out").exists()


def purification(folder) -> tuple[int, int]:
    """Diffusion steps and evaluations per image, as the report has them."""
    said = json.loads((folder / "report.json").read_text())["purification"]
    return said["diffusion_steps"], said["evaluations_per_image"]


def test_the_roles_of_the_paper_need_a_purifier_that_has_seen_test_images(folders, purifier, tmp_path, capsys):
    purifier = shutil.copytree(purifier, tmp_path / "purifier")
    PurificationConfig(diffusion_steps=10, num_rounds=3).save_pretrained(purifier)
    asked = ("--purifier", str(purifier), "--roles", "paper")
    assert main(command(folders, tmp_path / "out", *asked, roles=("protected", "test"))) == 1
    assert "was trained on none of the test images" in capsys.readouterr().err
    write_trained_on(purifier, image_digests(load_images(folders["test"]).images))
    assert main(command(folders, tmp_path / "out", *asked, roles=("protected", "test"))) == 0
    assert "test images among them" in (tmp_path / "out/report.md").read_text()
    assert purification(tmp_path / "out") == (10, 2)  # a smoke run purifies in seconds, whatever is asked for


def test_a_purifier_that_says_nothing_of_itself(folders, purifier, tmp_path):
    """Its list of images is missed in the report, and a smoke run purifies in seconds all the same."""
    purifier = shutil.copytree(purifier, tmp_path / "purifier")
    for name in ("trained_on.json", "purification_config.json", "training_record.json"):
        (purifier / name).unlink()
    assert main(command(folders, tmp_path / "out", "--purifier", str(purifier))) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["purifier"]["trained_on"] is None
    assert any("does not list the images that trained it" in limit for limit in report["limits"])
    assert "as far as the purifier is believed" in (tmp_path / "out/report.md").read_text()
    assert purification(tmp_path / "out") == (20, 2)


def test_a_guide_that_needs_a_network_is_refused_before_anything_is_trained(folders, tmp_path, capsys):
    asked = command(folders, tmp_path / "out", "--countermeasures", "jcdp")
    asked[asked.index("smoke")] = "digits"
    assert main(asked) == 1
    assert "--perceptual is None, but must be 'lpips-alex'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(command(folders, tmp_path / "out", "--perceptual", "nowhere")) == 1
    assert "perceptual is 'nowhere', but must be one of alex, vgg, squeeze, a folder" in capsys.readouterr().err
    assert main(command(folders, tmp_path / "out", "--perceptual", "alex", "--purifier", "some/where")) == 1
    assert "perceptual is 'alex', but goes with a purifier that is trained here" in capsys.readouterr().err


def test_a_purifier_trained_here_gets_the_perceptual_network(folders, tmp_path):
    network = LPIPSModel("alex")
    network.save_pretrained(tmp_path / "alex")
    config = PurificationConfig(perceptual_guidance_scale=1.0, num_rounds=2, perceptual_network="lpips-alex")
    options = {"protocol": "smoke", "seeds": 1, "processes": 1, "device": "cpu", "say": lambda line: None}
    sources = {role: load_images(folders[role]) for role in ("protected", "collected", "test")}
    # Of 32x32 pixels, which the network needs.
    sources = {role: data.with_images(data.images.repeat(2, 1).repeat(2, 2)) for role, data in sources.items()}
    report = audit(**sources, output_dir=tmp_path / "out", perceptual=tmp_path / "alex", preset=config, **options)
    assert report["purification"]["perceptual_guidance_scale"] == 1.0
    assert report["purifier"]["perceptual"] == "lpips-alex"
    assert ", perceptual network lpips-alex" in (tmp_path / "out/report.md").read_text()
    kept = LPIPSModel.from_pretrained(tmp_path / "out/purifier/perceptual").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match="where an audit with another perceptual network was begun"):
        other = (tmp_path / "alex").rename(tmp_path / "other")
        audit(**sources, output_dir=tmp_path / "out", perceptual=other, preset=config, **options)
