import json

import pytest

from jcdp_diffusers.train.checkpoints import find_checkpoint, list_checkpoints, remove_leftovers, save_checkpoint


def save(folder, step, content="x", **options):
    def state(path):
        (path / "state").write_text(content)

    return save_checkpoint(
        folder, step, state, {"step": step}, is_main_process=True, wait_for_everyone=lambda: None, **options
    )


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path):
    for step in (5, 100, 20):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert find_checkpoint(tmp_path, "checkpoint-20").name == "checkpoint-20"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-5")).name == "checkpoint-5"
    assert json.loads((tmp_path / "checkpoint-20" / "progress.json").read_text()) == {"step": 20}


def test_a_checkpoint_of_another_folder_is_not_taken_for_one_of_its_name_here(tmp_path, monkeypatch):
    for name in ("here", "there"):
        save(tmp_path / name, 2)
    with pytest.raises(ValueError, match="resume_from_checkpoint is .*there.*'checkpoint-2'"):
        find_checkpoint(tmp_path / "here", str(tmp_path / "there/checkpoint-2"))
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("here", "here/checkpoint-2").resolve() == tmp_path / "here/checkpoint-2"


def test_no_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path / "nowhere", "latest") is None
    with pytest.raises(ValueError, match="resume_from_checkpoint is 'checkpoint-3',.*no checkpoint"):
        find_checkpoint(tmp_path, "checkpoint-3")
    save(tmp_path, 4)
    with pytest.raises(ValueError, match="resume_from_checkpoint is 'checkpoint-3',.*'checkpoint-4'"):
        find_checkpoint(tmp_path, "checkpoint-3")


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_the_checkpoint_that_was_written_is_kept_where_an_earlier_run_went_further(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step, "earlier")
    for step, kept in ((3, {3, 6}), (4, {4, 6}), (6, {4, 6}), (7, {6, 7})):
        save(tmp_path, step, "now", total_limit=2)
        assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{number}" for number in kept}
        assert (tmp_path / f"checkpoint-{step}" / "state").read_text() == "now"


def test_a_write_that_was_cut_short_leaves_no_checkpoint(tmp_path):
    save(tmp_path, 1)

    def killed(path):
        (path / "state").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, killed, {}, is_main_process=True, wait_for_everyone=lambda: None)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
    assert (tmp_path / ".checkpoint-2.partial").is_dir()
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_leftovers_of_writing_and_deleting_go(tmp_path):
    for name in (".checkpoint-3.partial", ".checkpoint-1.removed"):
        (tmp_path / name).mkdir()
    save(tmp_path, 2)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_step_may_be_passed_again(tmp_path):
    save(tmp_path, 2, "first")
    save(tmp_path, 2, "second")
    assert (tmp_path / "checkpoint-2" / "state").read_text() == "second"


def test_processes_that_are_not_the_main_one_write_nothing(tmp_path):
    saved, waited = [], []
    save_checkpoint(
        tmp_path, 7, saved.append, {}, is_main_process=False, wait_for_everyone=lambda: waited.append("here")
    )
    assert saved == [] and len(waited) == 2 and list_checkpoints(tmp_path) == []
