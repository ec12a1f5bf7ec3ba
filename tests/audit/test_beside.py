"""The purifier's training and the purification beside victims: what is run together, and in what order."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from purifying import quick_pipe, some_images

from jcdp_diffusers.audit import beside
from jcdp_diffusers.audit.begun import begun_for, check_begun, write_begun
from jcdp_diffusers.audit.beside import Preparation, prepare_beside
from jcdp_diffusers.audit.purifier import AuditPurifier, _plan, choose_purifier
from jcdp_diffusers.audit.settings import AuditSettings
from jcdp_diffusers.data import load_images
from jcdp_diffusers.purification_config import PurificationConfig
from jcdp_diffusers.train.default_purifier import with_steps
from jcdp_diffusers.trials import measure


CONFIG = PurificationConfig(diffusion_steps=3, num_inference_steps=2)


@pytest.fixture
def used(tmp_path) -> AuditPurifier:
    quick_pipe().save_pretrained(tmp_path / "given")
    return AuditPurifier(str(tmp_path / "given"), None, CONFIG, None)


def asked_for(monkeypatch, used, tmp_path, *, trials, waiting, processes, least=4):
    """What `measure` is called with, where four images are not few."""
    calls = []
    monkeypatch.setattr(beside, "LEAST_IMAGES", least)
    monkeypatch.setattr(beside, "measure", lambda first, *_, **options: calls.append((first, options)))
    victims = [SimpleNamespace(name=str(number)) for number in range(trials)]
    options = {"waiting": waiting, "begin": list, "processes": processes, "say": len}
    prepare_beside(used, {"protected": some_images(4)}, AuditSettings(), tmp_path, victims, **options)
    return calls


@pytest.mark.parametrize(
    "processes, waiting, first, threads, workers",
    [(2, 3, 5, 1, 2), (2, 6, 6, 1, 2), (3, 3, 6, 1, 3), (4, 3, 5, 2, 3), (5, 3, 4, 2, 4)],
)
def test_half_of_the_cores_purify_and_the_last_turn_is_full(
    monkeypatch, used, tmp_path, processes, waiting, first, threads, workers
):
    ((victims, options),) = asked_for(monkeypatch, used, tmp_path, trials=6, waiting=waiting, processes=processes)
    assert [victim.name for victim in victims] == [str(number) for number in range(first)]
    (task,) = options["beside"]
    assert (task.threads, options["processes"]) == (threads, workers)


def test_one_core_or_nothing_beside_leaves_everything_to_the_stages(monkeypatch, used, tmp_path):
    assert asked_for(monkeypatch, used, tmp_path, trials=6, waiting=3, processes=1) == []
    assert asked_for(monkeypatch, used, tmp_path, trials=0, waiting=3, processes=2) == []
    assert asked_for(monkeypatch, used, tmp_path, trials=6, waiting=3, processes=2, least=5) == []
    assert asked_for(monkeypatch, used, tmp_path, trials=6, waiting=3, processes=16) == []
    (tmp_path / "purified").mkdir()
    (tmp_path / "purified/summary.json").write_text("{}")
    assert asked_for(monkeypatch, used, tmp_path, trials=6, waiting=3, processes=2) == []


def test_the_task_purifies_and_the_engine_runs_it_before_victims(used, tmp_path):
    protected, begun = some_images(4), []
    settings = AuditSettings()
    task = Preparation(used, {"protected": protected}, settings, tmp_path, lambda: begun.append(1), threads=1)
    assert not task.is_done()
    threads = torch.get_num_threads()
    measure([], tmp_path / "records.jsonl", beside=[task], progress=False)
    assert task.is_done() and begun == [1] and torch.get_num_threads() == threads
    purified = load_images(tmp_path / "purified")
    assert purified.ids == protected.ids and not np.array_equal(purified.images, protected.images)
    run = json.loads((Path(tmp_path) / "purified/run.json").read_text())
    assert run["arithmetic"]["threads"] == 1


def test_a_short_purifier_serves_audits_that_purify_in_their_own_way():
    many = some_images(4000)
    cpu = torch.device("cpu")
    short = _plan(many, AuditSettings(), cpu)
    assert short.training.max_train_steps == 500
    assert _plan(many, AuditSettings(attacks=("gray", "gray+purified")), cpu) == short
    for longer in (AuditSettings(attacks=("avatar",)), AuditSettings(preset="unconditional")):
        assert _plan(many, longer, cpu).training.trained_timesteps == (0, 200)
    assert _plan(many, AuditSettings(), torch.device("cuda")).training.max_train_steps == 20_000


def test_further_countermeasures_keep_the_purifier_that_an_audit_was_begun_with(tmp_path):
    sets = {"protected": some_images(20), "collected": some_images(4000, seed=1)}

    def chosen(folder, **settings):
        """Of an audit that is begun or resumed, whose budget has lessened the steps."""
        folder.mkdir(exist_ok=True)
        asked = AuditSettings(**settings)
        used = choose_purifier(None, sets, asked, folder, torch.device("cpu"))
        begun = begun_for(asked, sets, replace(used, plan=with_steps(used.plan, 150)))
        check_begun(folder, begun)
        write_begun(folder, begun)
        return used.plan.training.trained_timesteps

    short, long = tmp_path / "short", tmp_path / "long"
    assert chosen(short) == chosen(short, attacks=("gdmp",)) == (0, 50)
    assert chosen(long, attacks=("avatar",)) == chosen(long) == chosen(long, attacks=("diffpure",)) == (0, 200)
    with pytest.raises(
        ValueError, match="where an audit was begun whose purifier cannot do.*timesteps below 50.*Take"
    ):
        chosen(short, attacks=("avatar",))
    with pytest.raises(ValueError, match="^perceptual is None"):  # nor could another
        chosen(short, attacks=("jcdp",))
    with pytest.raises(ValueError, match="where an audit with another preset was begun"):
        chosen(short, preset=PurificationConfig(diffusion_steps=20))
