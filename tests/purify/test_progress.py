"""What a bar shows of images whose ids are somebody else's."""

from jcdp_diffusers import engines
from jcdp_diffusers.purify import progress


def test_no_terminal_obeys_an_id(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with progress.Progress(4, 0) as bar:
        bar.at("photo\x1b[2J", 3, 7)
        bar.at("alone\x1b[2J", 1, 1)
        bar.add(1, 1)
    engines.say("shard 1 failed: photo\x1b[2J")
    said = capsys.readouterr().err
    assert "\x1b" not in said and "photo\\x1b[2J: square 3 of 7" in said and "alone" not in said
    assert "1/4" in said and "1 rejected" in said and "failed: photo\\x1b[2J" in said
