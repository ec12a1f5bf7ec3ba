import importlib
from pathlib import Path

import pytest

from jcdp_diffusers.cli import COMMANDS, Parser, ends_in_one_sentence, main, sentence


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


@pytest.mark.parametrize("words", ["poison --method lsp", "purify --purifier ~/purifier --export ~/pictures"])
def test_the_home_folder_is_known_in_every_path(words, monkeypatch, tmp_path):
    """Shells leave `~` alone in `--output=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    given = []
    monkeypatch.setattr(importlib.import_module(COMMANDS[words.split()[0]][0]), "run", given.append)
    assert main([*words.split(), "--dataset=~/clean", "--output=~/x~y"]) == 0
    paths = [value for value in vars(given[0]).values() if isinstance(value, str) and "/" in value]
    assert len(paths) >= 2 and all(path.startswith(f"{tmp_path}/") for path in paths)
    assert given[0].output == f"{tmp_path}/x~y"


def test_the_home_folder_is_known_in_lists_and_paths_of_scripts(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser()
    parser.add_argument("--several", nargs="+")
    parser.add_argument("--path", type=Path)
    parser.add_argument("--number", type=int)
    parser.add_argument("--nothing")
    args = parser.parse_args(["--several", "~/b", "c~", "--path", "~/d", "--number", "3"])
    assert vars(args) == {"several": [f"{tmp_path}/b", "c~"], "path": tmp_path / "d", "number": 3, "nothing": None}


def test_commands_and_scripts_have_the_parser_of_this_package():
    root = Path(__file__).parents[1]
    for file in (*(root / "eval").rglob("*.py"), *(root / "training").glob("*.py"), *root.glob("jcdp_diffusers/*.py")):
        assert file.name == "cli.py" or "ArgumentParser(" not in file.read_text(), file
    for file in (*(root / "eval").rglob("*.py"), *(root / "training").glob("*.py")):
        assert ".parse_args(" not in file.read_text() or "with ends_in_one_sentence(" in file.read_text(), file


@pytest.mark.parametrize("words", [["score", "--seed", "7"], ["audit", "--attack", "gray"], ["detect", "--data", "x"]])
def test_an_option_is_known_by_its_whole_name_only(words, capsys):
    """`jcdp score --seed 7` had trained seven victims."""
    needed = {"score": "--train a --test b --output c", "audit": "--protected a", "detect": "--dataset a"}
    with pytest.raises(SystemExit):
        main([*words, *needed[words[0]].split()])
    assert f"unrecognized arguments: {' '.join(words[1:])}" in capsys.readouterr().err


def test_short_options_may_still_be_joined():
    parser = Parser()
    parser.add_argument("-v", action="store_true")
    parser.add_argument("-n", type=int)
    assert vars(parser.parse_args(["-vn3"])) == {"v": True, "n": 3}


@pytest.mark.parametrize(
    "words",
    [
        "purify --purifier p --dataset d --output o --collected_split train",
        "purify --purifier p --dataset d --output o --export_format jpg",
        "poison --method lsp --dataset d --output o --export_format webp",
        "detect --dataset d --collected_split train",
        "score --train t --test t --output o --probe_split train",
        "audit --protected p --clean_split train",
        "publish dataset --source s --repo_id a/b --test_split test",
    ],
)
def test_how_to_read_or_write_what_is_not_given_is_refused(words, capsys):
    assert main(words.split()) == 1
    option, value = words.split()[-2:]
    what = option.rpartition("_")[0]
    assert (
        capsys.readouterr().err
        == f"jcdp {words.split()[0]}: {option} is {value!r}, but must be left out without {what}.\n"
    )


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    quickstart = importlib.import_module("jcdp_diffusers.quickstart")

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "run", interrupted)
    assert main(["quickstart"]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_an_interrupted_script_says_how_to_go_on(capsys):
    for go_on, said in (((), "give the same command again"), (("add --more",), "add --more")):
        with pytest.raises(SystemExit) as stopped, ends_in_one_sentence("script", *go_on):
            raise KeyboardInterrupt
        assert stopped.value.code == 130 and capsys.readouterr().err == f"script: interrupted; {said}\n"


def test_an_argument_is_called_by_its_option_where_it_has_one():
    wrong = ValueError("image_size is 33, but must be\n a multiple of 4.")
    assert sentence("jcdp x", wrong, {"image_size"}) == "jcdp x: --image_size is 33, but must be a multiple of 4."
    assert (
        sentence("jcdp x", wrong, {"image"}) == sentence("jcdp x", wrong) == f"jcdp x: {' '.join(str(wrong).split())}"
    )


def test_option_names_within_a_sentence_and_never_within_what_it_quotes():
    options = {"image_size", "output", "test"}
    wrong = ValueError(
        "test has images of 8x8: image_size and channels bring them to it, not 'image_size' or /image_size."
    )
    assert sentence("jcdp x", wrong, options) == (
        "jcdp x: --test has images of 8x8: --image_size and channels bring them to it, not 'image_size' or /image_size."
    )
    assert sentence("jcdp x", ValueError("the output_dir has no test"), options) == "jcdp x: the --output has no test"


@pytest.mark.parametrize(
    ("said", "option"),
    [("purification is given.", "preset"), ("output_dir is 'x'.", "output"), ("attacks has 'x'.", "countermeasures")],
)
def test_an_argument_is_called_by_its_option_where_that_has_another_name(said, option):
    name = said.split()[0]
    assert sentence("jcdp x", ValueError(said), {option}) == f"jcdp x: {said.replace(name, f'--{option}')}"
    assert sentence("jcdp x", ValueError(said), {"seed"}) == f"jcdp x: {said}"


def test_a_sentence_gives_no_terminal_orders():
    assert sentence("jcdp x", ValueError("a\x1b[2Jb\u202e")) == r"jcdp x: a\x1b[2Jb\u202e"
