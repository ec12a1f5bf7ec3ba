"""The audit from the command to the report, on digits of 16x16 and in smoke runs, which take seconds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from sklearn.datasets import load_digits
from tiny import tiny_unet

from jcdp_diffusers.audit.draws import separate_spreads
from jcdp_diffusers.audit.run import audit
from jcdp_diffusers.cli import main
from jcdp_diffusers.data import LabelledImages, load_images, write_dataset
from jcdp_diffusers.data.perturbations import apply_perturbation, visibility
from jcdp_diffusers.devices import cpu_threads
from jcdp_diffusers.perceptual import LPIPSModel, lpips_at_hand
from jcdp_diffusers.poisons import get
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.results import read_records
from jcdp_diffusers.train.default_purifier import plan_for
from jcdp_diffusers.train.provenance import image_digests, write_trained_on
from jcdp_diffusers.trials import results_by_trial


def digits(rows) -> LabelledImages:
    source = load_digits()
    images = (source.images * 15).astype(np.uint8)[:, :, :, None]
    images = images.repeat(2, 1).repeat(2, 2).repeat(3, 3)
    ids = tuple(f"digit-{row}" for row in range(len(images)))
    return LabelledImages(images, source.target, ids, tuple("0123456789")).subset(rows)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("audit")
    clean = digits(range(200))
    data = clean.tensor()
    noise = get("lsp")(data, torch.from_numpy(clean.labels))
    sets = {
        "clean": clean,
        "protected": clean.with_images(apply_perturbation(clean.images, noise)),
        "collected": digits(range(200, 300)),
        "test": digits(range(300, 450)),
    }
    for role, images in sets.items():
        write_dataset(folder / role, images, split="test" if role == "test" else "train")
    return {role: str(folder / role) for role in sets}


def options(folders, *roles) -> list[str]:
    return [word for role in roles for word in (f"--{role}", folders[role])]


def command(folders, output, *more, roles=("protected", "collected", "test")) -> list[str]:
    smoke = ["--protocol", "smoke", "--seeds", "1", "--processes", "1", "--device", "cpu"]
    return ["audit", *options(folders, *roles), "--output", str(output), *smoke, *more]


ATTACKS = "gray,eclipse,purified+corruption,impulse-filter+purified+corruption"


@pytest.fixture(scope="module")
def audited(folders, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("audited") / "out"
    roles = ("protected", "collected", "test", "clean")
    assert main(command(folders, output, "--countermeasures", ATTACKS, roles=roles)) == 0
    return output


def test_everything_is_there(audited, folders):
    report = json.loads((audited / "report.json").read_text())
    assert [row["row"] for row in report["rows"]] == [
        "clean",
        "protected",
        "early-stopping",
        "purified",
        "gray",
        "eclipse",
        "purified+corruption",
        "impulse-filter+purified+corruption",
    ]
    assert report["smoke"] and report["verdict"]["status"] == "smoke"
    assert "no figure means anything" in report["limits"][0]
    assert report["data"]["noise"]["linf"] > 0 and report["data"]["separation"]["collected_in_test"] == 0
    assert report["roles"] == "disjoint" and report["purifier"]["trained_here"]
    for name in ("report.html", "report.md", "pictures/images.png", "pictures/curves.png"):
        assert (audited / name).stat().st_size > 1000
    purified, protected = load_images(audited / "purified"), load_images(folders["protected"])
    assert set(purified.ids) <= set(protected.ids) and len(purified) == report["data"]["sets"]["protected"]["images"]
    # The way to repeat it is the command that was given, without what is the default anyway.
    assert report["command"].startswith("jcdp audit --protected ") and "--seeds 1" in report["command"]
    assert "--victim" not in report["command"] and f"--countermeasures {ATTACKS}" in report["command"]


def test_an_attack_on_the_purified_images_counts_purification(audited):
    report = json.loads((audited / "report.json").read_text())
    rows = {row["row"]: row for row in report["rows"]}
    assert rows["purified+corruption"]["prepare_seconds"] >= rows["purified"]["prepare_seconds"] > 0
    assert report["attacks"]["purified+corruption"]["settings"]["noise_deviation"] == 0.05
    # In a smoke run eclipse, too, purified in seconds, and the report does not say otherwise.
    assert report["attacks"]["eclipse"]["settings"]["eclipse-purifier"]["num_inference_steps"] == 2
    assert "2 UNet evaluations per image" in report["attacks"]["eclipse"]["cost"]
    assert any("where its authors train one of few images" in limit for limit in report["limits"])
    found = results_by_trial(audited / "records.jsonl", what="accuracy").values()
    trained_on = {trial["settings"]["row"]: trial["settings"]["train"]["content"] for trial in found}
    assert trained_on["purified+corruption"] == trained_on["purified"] != trained_on["eclipse"]
    assert "| trained on purified images, with corruption |" in (audited / "report.md").read_text()


def test_an_attack_may_come_before_purification(audited):
    """The audit's own purification then takes its place in the order, on images of its own."""
    row = "impulse-filter+purified+corruption"
    report = json.loads((audited / "report.json").read_text())
    settings = report["attacks"][row]["settings"]
    assert list(settings) == ["impulse-filter", "purified", "corruption"]
    assert PurificationConfig(**settings["purified"]) == PurificationConfig(
        **{name: value for name, value in report["purification"].items() if name != "evaluations_per_image"}
    )
    assert "this audit's purification" in report["attacks"][row]["source"]
    found = results_by_trial(audited / "records.jsonl", what="accuracy").values()
    (trial,) = (trial["settings"] for trial in found if trial["settings"]["row"] == row)
    assert trial["countermeasure"] == "impulse-filter+unconditional+corruption"
    assert PurificationConfig(**trial["purification"]) == PurificationConfig(**settings["purified"])
    page = (audited / "report.md").read_text()
    assert f"| protected images, with {row} |" in page
    (line,) = (line for line in page.splitlines() if line.startswith(f"| protected images, with {row} |"))
    assert "for the purifier)" in line


def test_every_figure_of_the_report_is_on_record(audited):
    report = json.loads((audited / "report.json").read_text())
    records = results_by_trial(audited / "records.jsonl", what="accuracy").values()
    on_record = {(record["settings"]["row"], record["seed"]): record["value"] for record in records}
    shown = {(row["row"], 0): row["accuracy"]["values"][0] for row in report["rows"] if row["row"] != "early-stopping"}
    assert on_record == shown
    (protected,) = (row for row in report["rows"] if row["row"] == "protected")
    (stopped,) = (row for row in report["rows"] if row["row"] == "early-stopping")
    assert stopped["accuracy"] == protected["best_accuracy"]
    assert stopped["accuracy"]["values"] == pytest.approx([max(protected["curves"][0])], abs=1e-5)
    assert "best epoch on record, chosen by the test images" in (audited / "report.md").read_text()
    assert all(record["protocol"] == "smoke" for record in records)


def test_the_same_command_measures_nothing_anew_and_a_longer_one_only_what_is_new(audited, folders, tmp_path):
    output = shutil.copytree(audited, tmp_path / "again")
    roles = ("protected", "collected", "test", "clean")
    before = (output / "records.jsonl").read_text()
    weights = (output / "purifier/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert main(command(folders, output, "--countermeasures", ATTACKS, roles=roles)) == 0
    assert (output / "records.jsonl").read_text() == before
    assert main(command(folders, output, "--countermeasures", "gray,bdr-2", roles=roles)) == 0
    new = read_records(output / "records.jsonl")[len(before.splitlines()) :]
    assert [(record["what"], record["settings"]["row"]) for record in new] == [
        ("victim", "bdr-2"),
        ("accuracy", "bdr-2"),
    ]
    assert (output / "purifier/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights


def test_an_interrupted_audit_goes_on(audited, folders, tmp_path):
    """Cut off after the first victim, and with a line that was being written."""
    output = shutil.copytree(audited, tmp_path / "cut")
    kept = (output / "records.jsonl").read_text().splitlines()[:3]
    (output / "records.jsonl").write_text("\n".join(kept) + "\n")
    shutil.rmtree(output / "purified")
    (output / "report.json").unlink()
    roles = ("protected", "collected", "test", "clean")
    assert main(command(folders, output, "--countermeasures", ATTACKS, roles=roles)) == 0
    assert (output / "records.jsonl").read_text().splitlines()[:3] == kept
    again, before = (json.loads((folder / "report.json").read_text()) for folder in (output, audited))
    assert [row["accuracy"] for row in again["rows"]] == [row["accuracy"] for row in before["rows"]]


def test_without_clean_images_and_with_a_purifier_given(folders, audited, tmp_path):
    report = audit(
        protected=folders["protected"],
        test=folders["test"],
        purifier=audited / "purifier",
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
def test_a_given_purifier_that_has_seen_what_it_must_not_is_refused(folders, audited, tmp_path, capsys, role):
    """Nobody says so on the command line: it is found in the list beside the weights."""
    purifier = shutil.copytree(audited / "purifier", tmp_path / "purifier")
    data = load_images(folders[role])
    write_trained_on(purifier, image_digests(data.images[3:5]))
    asked = command(folders, tmp_path / "out", "--purifier", str(purifier), roles=("protected", "test", "clean"))
    assert main(asked) == 1
    said = capsys.readouterr().err
    assert f"was trained on 2 of the {len(data)} {role} images, the first {data.ids[3]!r}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_several_draws_show_their_spread_beside_that_of_the_victims(folders, audited, tmp_path):
    output = tmp_path / "out"
    asked = ("--purifier", str(audited / "purifier"), "--seeds", "2", "--draws", "2", "--countermeasures", "jpeg-95")
    assert main(command(folders, output, *asked)) == 0
    report = json.loads((output / "report.json").read_text())
    first, second = (load_images(folder) for folder in (output / "purified", output / "draws/2"))
    assert first.ids == second.ids and not np.array_equal(first.images, second.images)
    records = results_by_trial(output / "records.jsonl", what="accuracy").values()
    found = {}
    for record in records:
        found.setdefault(record["settings"]["row"], {})[record["seed"]] = record["value"]
    assert {row: list(seeds) for row, seeds in found.items()} == {
        "protected": [0, 1],
        "purified": [0, 1],
        "jpeg-95": [0, 1],
        "purified, draw 2": [1000, 1001],
    }
    values = [list(found[row].values()) for row in ("purified", "purified, draw 2")]
    assert report["draws"] == {"count": 2, "values": values} | separate_spreads(values)
    (row,) = (row for row in report["rows"] if row["row"] == "purified")
    assert row["accuracy"]["values"] == sum(values, [])
    assert row["accuracy"]["std"] == report["draws"]["between_victims"]
    assert len(row["best_accuracy"]["values"]) == len(row["train_accuracy"]["values"]) == len(row["curves"]) == 4
    text = (output / "report.md").read_text()
    assert "trained on purified images, 2 draws" in text and "Purification was drawn 2 times, with 2 victims" in text
    assert "protected images, saved as JPEG of quality 95" in text and "--draws 2" in report["command"]
    # One draw less is what was there before.
    before = (output / "records.jsonl").read_text()
    asked = [*asked[:4], *asked[6:]]
    assert main(command(folders, output, *asked)) == 0
    assert (output / "records.jsonl").read_text() == before
    assert json.loads((output / "report.json").read_text())["draws"] == {"count": 1, "values": values[:1]}


@pytest.mark.parametrize("draws", ["0", "-1"])
def test_a_number_of_draws_that_there_cannot_be_is_refused(folders, tmp_path, capfd, draws):
    assert main(command(folders, tmp_path / "out", "--draws", draws)) == 1
    assert f"--draws is {draws}, but must be a whole number of at least 1" in sentence(capfd)


def test_the_report_says_where_the_protection_is_and_how_visible(audited, folders):
    data = json.loads((audited / "report.json").read_text())["data"]
    protected = load_images(audited / "purified").ids  # the few of a smoke run
    clean, poisoned = (load_images(folders[role]) for role in ("clean", "protected"))
    rows = [clean.ids.index(id_) for id_ in protected]
    assert data["visibility"] == visibility(clean.images[rows], poisoned.images[rows], perceptual=lpips_at_hand())
    assert set(data["jpeg_saves"]) == {"95", "75"} and data["jpeg_saves"]["95"]["mean"] > 0
    spectrum = data["spectrum"]
    assert spectrum["images"] == [len(rows), 100] and len(spectrum["power"]) == 3
    assert (audited / "pictures/spectrum.png").stat().st_size > 1000
    assert (audited / "pictures/native.png").stat().st_size > 500


def test_the_roles_of_the_paper_need_a_purifier_that_has_seen_test_images(folders, audited, tmp_path, capsys):
    purifier = shutil.copytree(audited / "purifier", tmp_path / "purifier")
    asked = ("--purifier", str(purifier), "--roles", "paper")
    assert main(command(folders, tmp_path / "out", *asked, roles=("protected", "test"))) == 1
    assert "was trained on none of the test images" in capsys.readouterr().err
    write_trained_on(purifier, image_digests(load_images(folders["test"]).images))
    assert main(command(folders, tmp_path / "out", *asked, roles=("protected", "test"))) == 0
    assert "test images among them" in (tmp_path / "out/report.md").read_text()


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
    LPIPSModel("vgg").save_pretrained(tmp_path / "vgg")
    config = PurificationConfig(perceptual_guidance_scale=1.0, num_rounds=2, perceptual_network="lpips-vgg")
    options = {"protocol": "smoke", "seeds": 1, "processes": 1, "device": "cpu", "say": lambda line: None}
    sources = {role: folders[role] for role in ("protected", "collected", "test")}
    report = audit(**sources, output_dir=tmp_path / "out", perceptual=tmp_path / "vgg", preset=config, **options)
    assert report["purification"]["perceptual_guidance_scale"] == 1.0
    assert report["purifier"]["perceptual"] == "lpips-vgg"
    assert ", perceptual network lpips-vgg" in (tmp_path / "out/report.md").read_text()
    assert LPIPSModel.from_pretrained(tmp_path / "out/purifier/perceptual").name == "lpips-vgg"
    with pytest.raises(ValueError, match="where an audit with another perceptual network was begun"):
        other = shutil.copytree(tmp_path / "vgg", tmp_path / "other")
        audit(**sources, output_dir=tmp_path / "out", perceptual=other, preset=config, **options)


def test_a_purifier_without_a_list_of_its_images_is_a_limit_of_the_report(folders, audited, tmp_path):
    purifier = shutil.copytree(audited / "purifier", tmp_path / "purifier")
    (purifier / "trained_on.json").unlink()
    assert main(command(folders, tmp_path / "out", "--purifier", str(purifier))) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["purifier"]["trained_on"] is None
    assert any("does not list the images that trained it" in limit for limit in report["limits"])
    assert "as far as the purifier is believed" in (tmp_path / "out/report.md").read_text()


def test_a_smoke_run_purifies_in_seconds_whatever_the_purifier_asks_for(folders, audited, tmp_path):
    purifier = shutil.copytree(audited / "purifier", tmp_path / "purifier")
    for name in ("purification_config.json", "training_record.json"):
        (purifier / name).unlink()
    assert main(command(folders, tmp_path / "out", "--purifier", str(purifier))) == 0
    purification = json.loads((tmp_path / "out/report.json").read_text())["purification"]
    assert (purification["diffusion_steps"], purification["evaluations_per_image"]) == (20, 2)
    DDPMPipeline(tiny_unet(size=16), DDPMScheduler()).save_pretrained(tmp_path / "long")
    PurificationConfig(diffusion_steps=10, num_rounds=3).save_pretrained(tmp_path / "long")
    assert main(command(folders, tmp_path / "more", "--purifier", str(tmp_path / "long"))) == 0
    purification = json.loads((tmp_path / "more/report.json").read_text())["purification"]
    assert (purification["diffusion_steps"], purification["evaluations_per_image"]) == (10, 2)


@pytest.mark.parametrize(
    "changes, begun",
    [
        (["--protocol", "fast"], "protocol 'smoke'"),
        (["--seed", "1"], "seed 0"),
        (["--preset", "unconditional"], "another preset"),
        (["--protected", "clean"], "other protected images"),
        (["--purifier", "purifier"], "a purifier of its own"),
    ],
)
def test_an_output_of_another_audit_is_refused_before_any_work(changes, begun, folders, audited, tmp_path, capfd):
    output = shutil.copytree(audited, tmp_path / "out")
    places = {"clean": folders["clean"], "purifier": str(audited / "purifier")}
    before = (output / "records.jsonl").read_text()
    assert main(command(folders, output, *(places.get(word, word) for word in changes))) == 1
    said = sentence(capfd)
    assert said == (
        f"jcdp audit: --output is {str(output)!r}, where an audit with {begun} was begun, whose purifier and "
        "purified images cannot serve this one: take another --output."
    )
    assert (output / "records.jsonl").read_text() == before


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("planted", ["report.html", "records.jsonl", "pictures", "pictures/images.png", "purified"])
def test_planted_links_are_not_written_through(planted, audited, folders, tmp_path, capfd):
    output = shutil.copytree(audited, tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    place = output / planted
    if place.is_dir():
        place.rename(elsewhere)
    else:
        elsewhere.write_text("precious")
        place.unlink()
    place.symlink_to(elsewhere)
    before = contents(tmp_path)
    assert main(command(folders, output)) == 1
    assert f"--output is {str(output)!r}, which holds the link {planted!r}" in sentence(capfd)
    assert contents(tmp_path) == before


def test_what_is_read_and_files_of_others_stay_as_they_are(audited, folders, tmp_path, capfd):
    roles = ("protected", "collected", "test", "clean")
    own = {role: str(shutil.copytree(folders[role], tmp_path / role)) for role in roles}
    before = contents(tmp_path)
    for output, said in [(own[role], f"is that of --{role}") for role in own] + [
        (f"{own['test']}/out", "lies inside that of --test"),
        (str(tmp_path), "holds that of --protected"),
        (str(audited / "purifier"), "which holds '"),
    ]:
        assert main(command(own, output, roles=roles)) == 1
        assert f"--output is {output!r}, which {said}".replace("which which", "which") in sentence(capfd)
    with pytest.raises(ValueError, match="output_dir is .* is that of purifier"):
        audit(protected="x", test="y", purifier=audited / "purifier", output_dir=audited / "purifier")
    assert contents(tmp_path) == before


def test_a_report_names_folders_by_their_last_part(audited):
    outside = str(audited.parent.parent)
    for name in ("report.html", "report.md", "report.json", "records.jsonl", "purified/README.md"):
        assert outside not in (audited / name).read_text(), name
    assert (
        "--protected protected --collected collected" in json.loads((audited / "report.json").read_text())["command"]
    )


def test_a_control_needs_the_clean_images(folders, tmp_path, capfd):
    assert main(command(folders, tmp_path / "out", "--control")) == 1
    assert "control is True, but without clean images" in sentence(capfd)


def test_a_protection_beyond_its_budget_is_marked(folders, tmp_path):
    roles = ("protected", "collected", "test", "clean")
    assert main(command(folders, tmp_path / "out", "--budget", "8", roles=roles)) == 0
    report = (tmp_path / "out/report.md").read_text()
    assert "**!** The protection changes values by up to" in report and "more than its budget of 8/255" in report
    assert "lies within 8/255 (up to 1 % of the values aside) of a collected or test image" in report
    assert "--budget 8" in report


def test_roles_of_the_paper_are_marked_everywhere(folders, tmp_path):
    output = tmp_path / "out"
    paper = {**folders, "collected": folders["test"]}
    assert main(command(paper, output, "--roles", "paper")) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["roles"] == "paper" and report["data"]["separation"]["collected_in_test"] == 150
    for name in ("report.md", "report.html"):
        assert "Roles as in the paper: the purifier has seen the test images." in (output / name).read_text()
    records = results_by_trial(output / "records.jsonl", what="accuracy").values()
    assert {record["settings"]["roles"] for record in records} == {"paper"}


def sentence(capfd) -> str:
    lines = capfd.readouterr().err.strip().splitlines()
    return lines[-1]


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
    assert code == 1 and "attacks (--countermeasures) has 'purified+eclipse', but images are purified once" in said
    code, said = refused({}, "--countermeasures", "gray+purified+purified")
    assert (
        code == 1 and "attacks (--countermeasures) has 'gray+purified+purified', but images are purified once" in said
    )
    code, said = refused({}, "--countermeasures", "purified")
    assert code == 1 and "attacks (--countermeasures) has 'purified', but that is a row of every audit" in said
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


def test_several_ways_of_learning(folders, audited, tmp_path):
    """One report has a classifier and a representation."""
    roles = ("protected", "collected", "test", "clean")
    more = ["--purifier", str(audited / "purifier"), "--method", "supervised", "simclr"]
    assert main(command(folders, tmp_path / "out", *more, roles=roles)) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    (other,) = report["others"]
    assert report["victims"]["method"] == "supervised" and other["victims"]["method"] == "simclr"
    assert [row["row"] for row in report["rows"]] == ["clean", "protected", "early-stopping", "purified"]
    assert [row["row"] for row in other["rows"]] == ["clean", "protected", "purified"]
    assert other["rows"][0]["train_accuracy"] is None and other["verdict"]["status"] == "smoke"
    learned = [100 * one["rows"][-1]["accuracy"]["mean"] for one in (report, other)]
    said = f"a classifier learns {learned[0]:.0f} %, a representation (SimCLR) learns {learned[1]:.0f} %"
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert f"From the purified images, {said}." in text and "What a representation (SimCLR) learned" in text
    settings = [one["settings"] for one in results_by_trial(tmp_path / "out/records.jsonl", what="accuracy").values()]
    assert [one.get("method") for one in settings].count("simclr") == 3 == len(settings) - 3
    assert {one["probe"]["images"] for one in settings if "probe" in one} == {
        report["data"]["sets"]["clean"]["images"]
    }


def test_fractions_and_whitening_by_collected_images(folders, audited, tmp_path):
    roles = ("protected", "collected", "test", "clean")
    more = ["--purifier", str(audited / "purifier"), "--fractions", "0.5", "1", "--victim", "convnet94"]
    assert main(command(folders, tmp_path / "out", *more, "--whitening", "collected", roles=roles)) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    half, whole = report["fractions"]
    assert (half["fraction"], whole["fraction"]) == (0.5, 1) and whole["clean_rest"] is None
    assert whole["all"]["values"] == report["rows"][1]["accuracy"]["values"]
    assert (tmp_path / "out/pictures/fractions.png").exists()
    for name in ("report.md", "report.html"):
        assert "Where a part is protected" in (tmp_path / "out" / name).read_text()
    assert "patches of 100 collected images whitened" in (tmp_path / "out/report.md").read_text()
    assert "--fractions 0.5 1.0 --protocol smoke" in report["command"]
    settings = [one["settings"] for one in results_by_trial(tmp_path / "out/records.jsonl", what="accuracy").values()]
    assert all(one["whitening"]["images"] == 100 for one in settings)
    images = {one["row"]: one["train"]["images"] for one in settings}
    assert images["50 % protected"] == images["protected"]
    assert abs(images["without the protected 50 %"] - images["protected"] / 2) <= 5  # each of ten classes is halved


@pytest.fixture
def without_labels(folders, tmp_path) -> dict[str, str]:
    bare = load_images(folders["protected"])
    write_dataset(tmp_path / "bare", LabelledImages(bare.images, None, bare.ids))
    write_dataset(tmp_path / "probe", digits(range(500, 620)))
    return {**folders, "protected": str(tmp_path / "bare"), "probe": str(tmp_path / "probe")}


def test_images_without_labels_need_a_way_of_learning_without(without_labels, audited, tmp_path, capfd):
    more = ("--purifier", str(audited / "purifier"))
    asked = command(without_labels, tmp_path / "out", *more, roles=("protected", "test"))
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


@pytest.mark.long
def test_the_purifier_is_trained_beside_victims(folders, audited, tmp_path):
    """In two processes, to the same figures; thread for thread the same purifier."""
    roles = ("protected", "collected", "test", "clean")
    asked = command(folders, tmp_path / "out", "--countermeasures", ATTACKS, roles=roles)
    asked[asked.index("--processes") + 1] = "2"
    with cpu_threads(1):
        assert main(asked) == 0
        assert main(command(folders, tmp_path / "one", "--countermeasures", ATTACKS, roles=roles)) == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "one")]
    assert [row["accuracy"] for row in reports[0]["rows"]] == [row["accuracy"] for row in reports[1]["rows"]]
    assert reports[0]["purifier"]["digest"] == reports[1]["purifier"]["digest"]


@pytest.mark.long
def test_images_without_labels_are_audited(without_labels, audited, tmp_path):
    more = ("--purifier", str(audited / "purifier"), "--method", "byol", "--probe_images", without_labels["probe"])
    assert main(command(without_labels, tmp_path / "out", *more, roles=("protected", "test"))) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["data"]["shortcut"] is None and report["victims"]["method"] == "byol"
    assert [row["row"] for row in report["rows"]] == ["protected", "purified"]
    assert "resnet18 by byol, a linear probe of 120 clean labelled images" in (tmp_path / "out/report.md").read_text()


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
    ],
)
def test_what_does_not_apply_is_refused(more, message, folders, tmp_path, capfd):
    assert main(command(folders, tmp_path / "out", *more)) == 1
    assert message in sentence(capfd)
    assert not (tmp_path / "out").exists()
