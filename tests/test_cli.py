import importlib

import pytest

from jcdp_diffusers.cli import COMMANDS, main, sentence


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_module_and_a_help_page(command, capsys):
    assert callable(importlib.import_module(COMMANDS[command][0]).run)
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and f"jcdp {command}" in capsys.readouterr().out


def test_a_failure_is_one_sentence_and_exit_code_1(capsys, tmp_path):
    assert main(["quickstart", "--preset", "cifar10-mini", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("jcdp quickstart: --data is None, but must be") and error.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["bake"], ["quickstart", "--preset", "mnist"]])
def test_wrong_usage_is_exit_code_2(words):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    quickstart = importlib.import_module("jcdp_diffusers.quickstart")

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "run", interrupted)
    assert main(["quickstart"]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_an_argument_is_called_by_its_option_where_it_has_one():
    wrong = ValueError("image_size is 33, but must be\n a multiple of 4.")
    assert sentence("jcdp x", wrong, {"image_size"}) == "jcdp x: --image_size is 33, but must be a multiple of 4."
    assert (
        sentence("jcdp x", wrong, {"image"}) == sentence("jcdp x", wrong) == f"jcdp x: {' '.join(str(wrong).split())}"
    )
