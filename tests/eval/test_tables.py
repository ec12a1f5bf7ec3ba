"""Tables: what is on record, what is printed elsewhere, and nothing between the two."""

import json
import sys

import pytest

from eval import tables
from eval.measured import PUBLISHED, Measured, spread
from eval.tables import grid_table, paper_tables, poison_table, probe_table, roles_table, transfer_table


RECIPE = {"name": "mini", "epochs": 15, "smoke": False, "batch_size": 32}
TEST = {"images": 5000, "shape": [32, 32, 3], "content": "test"}
PURIFIES = ("jcdp", "unconditional", "avatar")


def records(poison, column, values, *, seconds=(0.0, 10.0), images=10_000, details=(), device="cpu", **settings):
    """Of seeds 0 and on, as `jcdp_diffusers.trials` and `eval.benchmark` write them."""
    settings = (
        {
            "trial": "x",
            "grid": "mini",
            "dataset": "cifar10",
            "collected": "cifar10",
            "poison": poison,
            "column": column,
            "victim": "resnet18",
            "width": 16,
            "recipe": RECIPE,
            "countermeasure": column,
            "train": {"images": images, "content": poison},
            "test": TEST,
        }
        | ({} if poison == "none" else {"poison_preset": "cpu", "poison_seed": 0, "poison_settings": {"epsilon": 8}})
        | ({"roles": "disjoint", "purifier": "digest", "purification": None} if column in PURIFIES else {})
        | settings
    )
    prepare, train = seconds
    value_of_victim = {"prepare_seconds": prepare, "train_seconds": train, "train_accuracy": 1.0, "threads": 1}
    for seed, value in enumerate(values):
        common = {"seed": seed, "settings": settings, "device": device}
        yield {"what": "victim", "value": value_of_victim | dict(details)} | common
        yield {"what": "accuracy", "value": value} | common


def cell_of(table: str, row: str, column: str) -> str:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return next(line for line in lines if line[0] == row)[lines[0].index(column)]


def test_every_cell_that_is_not_measured_says_so():
    tables = paper_tables(Measured([]))
    assert list(tables)[:3] == ["Table 1, cifar10", "Table 1, cifar100", "Table 1, svhn"]
    for number in (1, 2, 3, 5, 6):
        assert any(title.startswith(f"Table {number}, ") for title in tables)
    for title, table in tables.items():
        for line in table.splitlines()[2:]:
            figures = [cell for cell in line.split("|") if "/" in cell and "UEraser" not in cell]
            assert figures and all(cell.strip().startswith("n.m. / ") for cell in figures), (title, line)
    assert cell_of(tables["Table 1, cifar10"], "JCDP", "LSP") == "n.m. / 92.4"
    assert cell_of(tables["APBench, cifar10"], "UEraser-Max", "LSP") == "n.m. / 92.83"
    assert cell_of(tables["APBench, cifar10"], "Gaussian filter", "LSP") == "n.m. / 18.61"
    assert cell_of(tables["APBench, svhn"], "JPEG-10", "REMN") == "n.m. / 90.58"
    assert cell_of(tables["BridgePure's re-runs, cifar10"], "JCDP", "OPS") == "n.m. / 58.6"
    assert cell_of(tables["BridgePure's re-runs, cifar10"], "D-VAE", "OPS") == "n.m. / 89.48"
    assert cell_of(tables["BridgePure's re-runs, cifar100"], "clean images", "AR") == "n.m. / 74.27"
    assert cell_of(tables["Table 1, cifar10"], "AVATAR", "EMN(C)") == "n.m. / -"


def test_ours_stand_beside_theirs():
    measured = Measured(
        [
            *records("lsp", "jcdp", [0.70, 0.72, 0.71]),
            *records("lsp", "none", [0.25]),
            *records("lsp", "gray", [0.60]),
            *records("lsp", "jpeg-10", [0.65]),
            *records("emn", "jcdp", [0.5], collected="cifar100"),
            *records("none", "none", [0.76, 0.78]),
        ]
    )
    tables = paper_tables(measured)
    assert cell_of(tables["Table 1, cifar10"], "JCDP", "LSP") == "71.0 ± 1.0 / 92.4"
    assert cell_of(tables["Table 1, cifar10"], "clean images", "EMN") == "77.0 ± 1.4 / 95.3"
    rows = [line.split("|")[1:5] for line in tables["Table 5, purifier trained on other data"].splitlines()[2:]]
    by_row = {(row[0].strip(), row[1].strip()): [cell.strip() for cell in row[2:]] for row in rows}
    assert by_row["cifar10", "no purifier"] == ["n.m. / 21.2", "25.0 / 15.0"]
    assert by_row["cifar10", "cifar100"] == ["50.0 / 92.1", "n.m. / 89.1"]
    assert cell_of(tables["Table 1, cifar10"], "JCDP", "EMN") == "n.m. / 93.1"  # another purifier's is not ours
    # The best of three needs three.
    assert cell_of(tables["Table 1, cifar10"], "ISS (best of three)", "LSP") == "n.m. / 82.5"
    whole = Measured(
        [*records("lsp", "gray", [0.6]), *records("lsp", "jpeg-10", [0.65]), *records("lsp", "bdr-2", [0.4])]
    )
    assert cell_of(paper_tables(whole)["Table 1, cifar10"], "ISS (best of three)", "LSP") == "65.0 / 82.5"


def test_ablation_by_origin_and_steps_of_the_purifier():
    kinds = [
        {"purifier_origin": "scratch", "purifier_steps": 80_000, "purifier": "a"},
        {"purifier_origin": "fine-tuned", "purifier_steps": 1000, "purifier": "b"},
    ]
    # A grid says of all its cells what its purifier is; the vanilla cells of two grids are the same nevertheless.
    vanilla = [
        record for kind in kinds for record in records("emn", "none", [0.2], purifier_origin=kind["purifier_origin"])
    ]
    measured = Measured(
        [*records("emn", "unconditional", [0.5], **kinds[0]), *records("emn", "unconditional", [0.6], **kinds[1])]
        + vanilla
    )
    assert measured.accuracies("cifar10", "emn", "none") == [20.0]
    table = paper_tables(measured)["Table 6, EMN"]
    assert [line.split("|")[4].strip() for line in table.splitlines()[2:]] == [
        "50.0 / 90.6",
        "60.0 / 91.4",
        "n.m. / 91.9",
        "n.m. / 93.1",
    ]
    with pytest.raises(ValueError, match="with purifier_origin 'scratch' and 'fine-tuned'"):
        grid_table(measured, "cifar10")


def test_roles_smoke_runs_and_victims_are_never_mixed():
    both = [
        *records("lsp", "jcdp", [0.7], roles="disjoint"),
        *records("lsp", "jcdp", [0.9], roles="paper"),
        *records("lsp", "none", [0.2]),
        *records("lsp", "gray", [0.3], victim="vgg16"),
        *records("lsp", "cutout", [0.1], recipe=RECIPE | {"smoke": True}),
    ]
    for roles, figure in (("disjoint", "70.0"), ("paper", "90.0")):
        table = grid_table(Measured(both, roles=roles), "cifar10")
        assert cell_of(table, "JCDP", "LSP") == figure and cell_of(table, "vanilla", "LSP") == "20.0"
        assert "gray" not in table and "Cutout" not in table


def without_labels(method, poison, column, values, *, details=(), **settings):
    recipe = RECIPE | {"epochs": 100, "method": method}
    settings = {"method": method, "recipe": recipe, "probe": {"images": 9}} | settings
    return records(poison, column, values, details={"train_accuracy": None} | dict(details), **settings)


def test_ways_of_learning_are_never_mixed():
    both = [
        *records("lsp", "none", [0.2]),
        *without_labels("simclr", "lsp", "none", [0.6]),
        *without_labels("byol", "lsp", "gray", [0.5]),
    ]
    for method, figure in (("supervised", "20.0"), ("simclr", "60.0")):
        measured = Measured(both, method=method)
        assert cell_of(grid_table(measured, "cifar10"), "vanilla", "LSP") == figure
        assert ("SimCLR" in measured.scales[0]) == (method == "simclr")
    assert "gray" not in grid_table(Measured(both, method="simclr"), "cifar10")
    with pytest.raises(ValueError, match="probe.images 9 and 8"):
        Measured([*both, *without_labels("simclr", "lsp", "none", [0.6], probe={"images": 8})], method="simclr")
    with pytest.raises(ValueError, match="whitening.images None and 7"):
        Measured([*both, *records("lsp", "gray", [0.6], whitening={"images": 7})])


def test_a_row_for_each_way_of_learning(monkeypatch, tmp_path):
    found = [
        *records("cp-s", "none", [0.7]),
        *records("none", "none", [0.8]),
        *without_labels("simclr", "cp-s", "none", [0.4, 0.5], poison_settings={"framework": "simclr"}),
        *without_labels("simclr", "cp-s", "jcdp", [0.6], poison_settings={"framework": "simclr"}),
        *without_labels("simclr", "none", "none", [0.65]),
        *without_labels("byol", "cp-s", "none", [0.5], poison_settings={"framework": "simclr"}),
        *without_labels("byol", "lsp", "gray", [0.3]),
    ]
    text = run(monkeypatch, tmp_path, found, "methods")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert rows[0] == ["trained on", "learned by", "clean", "vanilla", "gray", "JCDP"]
    assert [[row[0].upper(), *row[1:]] for row in rows[2:]] == [
        ["CP-S", "supervised", "80.0", "70.0", "n.m.", "n.m."],
        ["CP-S", "SimCLR", "65.0 / 90.4", "45.0 ± 7.1 / 44.9", "n.m. / -", "60.0 / 86.6"],
        ["CP-S", "BYOL", "n.m.", "50.0", "n.m.", "n.m."],  # made against SimCLR, which the paper's figure is not
        ["LSP", "BYOL", "n.m.", "n.m.", "30.0", "n.m."],
    ]
    assert text.count("MoCo") == 0 and "resnet18 of width 16 by SimCLR with a linear probe" in text
    with pytest.raises(SystemExit, match="no accuracy of a grid there has a method without labels"):
        run(monkeypatch, tmp_path, found[:4], "methods")
    assert "| vanilla | 65.0 | 45.0 ± 7.1 |" in run(monkeypatch, tmp_path, found, "grid", "--method", "simclr")


def test_a_poison_without_a_vanilla_cell_is_known_by_another(monkeypatch, tmp_path):
    against = {"poison_settings": {"framework": "simclr"}}
    found = [
        *without_labels("moco-v2", "cp-s", "unconditional", [0.5], **against),
        *without_labels("simclr", "cp-s", "unconditional", [0.6], **against),
        *without_labels("simclr", "cp-s", "jcdp", [0.7], **against),
    ]
    lines = run(monkeypatch, tmp_path, found, "methods").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines if line.startswith("| CP-S")]
    assert cells == [
        ["SimCLR", "n.m. / 90.4", "70.0 / 86.6", "60.0 / 86.6"],  # purified without a guide, as in the next test
        ["MoCo v2", "n.m.", "n.m.", "50.0"],  # made against SimCLR, which the paper's figure is not
    ]
    by_method = {"moco-v2": Measured(found, method="moco-v2")}
    assert "| CP-S | SimCLR | 50.0 |" in transfer_table(by_method, "cifar10", {("cp-s", "unconditional"): "CP-S"})
    norms = {"l2_mean": 1.5, "linf": 8}
    table = poison_table(Measured(records("lsp", "gray", [0.5], poison_norms=norms, poison_seconds=7.0)), "cifar10")
    assert table.splitlines()[-1] == "| LSP | n.m. | n.m. | n.m. | 1.50 | 8 | 7 |"


def test_what_is_learned_without_labels_stands_beside_the_papers_probe():
    found = [
        *without_labels("simclr", "none", "none", [0.6], details={"knn_accuracy": 0.55}),
        *without_labels("simclr", "cp-s", "none", [0.4, 0.5], details={"knn_accuracy": 0.35}),
        *records("cp-s", "none", [0.8]),  # of a classifier
    ]
    rows = {
        ("none", "none"): "clean",
        ("none", "unconditional"): "clean, purified",
        ("cp-s", "none"): "CP-S",
        ("cp-s", "unconditional"): "CP-S, purified",
        ("lsp", "none"): "LSP",
    }
    table = probe_table(Measured(found, method="simclr"), "cifar10", rows)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert cells == [
        ["clean", "60.0", "55.0", "90.4"],
        ["clean, purified", "n.m.", "n.m.", "-"],
        ["CP-S", "45.0 ± 7.1", "35.0 ± 0.0", "44.9"],
        ["CP-S, purified", "n.m.", "n.m.", "86.6"],  # the paper's, by JCDP
        ["LSP", "n.m.", "n.m.", "-"],
    ]


def test_a_poison_meets_the_way_of_learning_that_it_was_not_made_against():
    found = [
        *without_labels("simclr", "none", "none", [0.6]),
        *without_labels("simclr", "cp-s", "none", [0.4], poison_settings={"framework": "byol"}),
        *records("cp-s", "none", [0.7], poison_settings={"framework": "byol"}),
        *records("lsp", "none", [0.2]),
        *records("lsp", "gray", [0.9]),
    ]
    by_method = {method: Measured(found, method=method) for method in ("supervised", "simclr")}
    names = {"none": "clean images", "lsp": "LSP", "cp-s": "CP-S", "cp-c": "CP-C", "emn": "EMN", "uc": "UC"}
    trained_on = {(name, "none"): title for name, title in names.items()} | {("lsp", "gray"): "LSP, grey"}
    table = transfer_table(by_method, "cifar10", trained_on)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0] == ["trained on", "made against", "supervised", "SimCLR"]
    assert cells[2:] == [
        ["clean images", "", "n.m.", "60.0"],
        ["LSP", "no network", "20.0", "n.m."],
        ["CP-S", "BYOL", "70.0", "40.0"],
        ["CP-C", "n.m.", "n.m.", "n.m."],  # its records would say against which
        ["EMN", "a classifier", "n.m.", "n.m."],
        ["UC", "a pretrained network", "n.m.", "n.m."],
        ["LSP, grey", "no network", "90.0", "n.m."],
    ]


def test_a_table_for_each_set_that_purifiers_were_trained_on():
    here, there = records("lsp", "jcdp", [0.7]), records("lsp", "jcdp", [0.5], collected="cifar100", purifier="c")
    vanilla = records("lsp", "none", [0.2])
    text = grid_table(Measured([*there, *vanilla, *here]), "cifar10")
    own, other = text.split("Purifier trained on ")[1:]
    assert own.startswith("cifar10:") and other.startswith("cifar100:")
    for part, figure in ((own, "70.0"), (other, "50.0")):
        table = part.partition("\n\n")[2]
        assert cell_of(table, "JCDP", "LSP") == figure and cell_of(table, "vanilla", "LSP") == "20.0"
    alone = grid_table(Measured(records("lsp", "jcdp", [0.5], collected="cifar100")), "cifar10")
    assert "Purifier trained on cifar100:" in alone and "| JCDP | 50.0 |" in alone


def test_costs_are_beside_the_figures():
    measured = Measured(
        [
            *records("lsp", "jcdp", [0.7], seconds=(12.0, 10.0)),
            *records("lsp", "at-8", [0.6], seconds=(0.0, 88.0)),
            *records("lsp", "ueraser", [0.6], seconds=(0.0, 44.0)),
            # Not measured with the baselines: counts in the mean, not in the shares.
            *records("emn", "jcdp", [0.7], seconds=(12.0, 30.0)),
            # On another device, in another precision: shares with nothing.
            *records("lsp", "gray", [0.5], seconds=(0.0, 1.0), device="cuda (NVIDIA H100)"),
            *records("lsp", "mixup", [0.5], details={"precision": "float32"}),
        ]
    )
    table = grid_table(measured, "cifar10")
    assert cell_of(table, "JCDP", "seconds before training") == "12.0 (cpu, unknown precision)"
    assert cell_of(table, "JCDP", "seconds of training") == "20.0 (cpu, unknown precision)"
    assert cell_of(table, "gray", "seconds of training") == "1.0 (cuda (NVIDIA H100), unknown precision)"
    assert cell_of(table, "Mixup", "seconds of training") == "10.0 (cpu, float32)"
    assert cell_of(table, "JCDP", "of adversarial training's") == "25 %"
    assert cell_of(table, "JCDP", "of UEraser's") == "50 %"
    assert cell_of(table, "adversarial training", "of adversarial training's") == "100 %"
    for row in ("gray", "Mixup"):
        assert cell_of(table, row, "of adversarial training's") == cell_of(table, row, "of UEraser's") == "n.m."


@pytest.mark.parametrize(
    ("other", "several"),
    [
        ({"device": "cuda (NVIDIA H100)"}, "devices"),
        ({"details": {"precision": "float32"}}, "precisions"),
        ({"details": {"precision": "float32", "threads": 2}}, "numbers of threads and precisions"),
    ],
)
def test_seconds_of_several_devices_or_precisions_have_no_mean(other, several):
    mixed = [*records("lsp", "gray", [0.5]), *records("emn", "gray", [0.5], **other)]
    table = grid_table(Measured([*mixed, *records("lsp", "mixup", [0.5], **other)]), "cifar10")
    assert cell_of(table, "gray", "seconds of training") == f"several {several}"
    assert cell_of(table, "Mixup", "seconds of training") == "10.0"  # no other row has seconds to compare


def test_what_other_roles_have_is_named(monkeypatch, tmp_path):
    found = [*records("lsp", "none", [0.2]), *records("lsp", "jcdp", [0.7], roles="unknown")]
    hint = "Left out is what has roles unknown: --roles unknown shows it."
    for kind in ("grid", "poisons", "paper"):
        assert hint in run(monkeypatch, tmp_path, found, kind)
    assert "Left out" not in run(monkeypatch, tmp_path, found, "grid", "--roles", "unknown")


def test_figures_of_two_devices_or_precisions_are_no_one_mean():
    one = list(records("lsp", "gray", [0.5, 0.6]))
    for other in ({"device": "cuda (NVIDIA H100)"}, {"details": {"precision": "float32"}}):
        mixed = [*one[:2], *list(records("lsp", "gray", [0.5, 0.6], **other))[2:]]
        with pytest.raises(ValueError, match="'gray' against 'lsp' on cifar10"):
            Measured(mixed)


def test_figures_of_two_precisions_of_purification_are_no_one_mean():
    def mixed(*precisions):
        found = []
        for seed, precision in enumerate(precisions):
            details = {} if precision == "unknown" else {"purified_in": precision}
            found += list(records("lsp", "jcdp", [0.5] * len(precisions), details=details))[2 * seed : 2 * seed + 2]
        return found

    with pytest.raises(ValueError, match="'jcdp' against 'lsp' on cifar10 with purified_in 'bfloat16' and 'float32'"):
        Measured(mixed("bfloat16", "unknown", "float32"))
    for known in ("float32", None, "unknown"):  # of images that were not kept, and of older records, nobody knows
        assert Measured(mixed("float32", known)).accuracies("cifar10", "lsp", "jcdp") == [50.0, 50.0]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"images": 5000}, r"train\.images 10000 and 5000"),
        ({"test": TEST | {"content": "validation"}}, r"test\.content 'test' and 'validation'"),
        ({"width": 64}, "width 16 and 64"),
        ({"recipe": RECIPE | {"batch_size": 128}}, r"recipe\.batch_size 32 and 128"),
    ],
)
def test_two_scales_do_not_fit_one_table(change, name):
    # The very same cell, so that a table which lets one record replace the other would never see it.
    for column in ("none", "gray"):
        with pytest.raises(ValueError, match=f"records hold cifar10 with {name}, .*give the records of one"):
            Measured([*records("lsp", "none", [0.2]), *records("lsp", column, [0.3], **change)])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"purification": {"diffusion_steps": 30}}, r"purification\.diffusion_steps None and 30"),
        ({"purifier": "other"}, "purifier 'digest' and 'other'"),
        ({"countermeasure": "jcdp-code"}, "countermeasure 'jcdp' and 'jcdp-code'"),
        ({"draws": 4}, "draws None and 4"),
        ({"poison_settings": {"epsilon": 16}}, r"poison_settings\.epsilon 8 and 16"),
        ({"train": {"images": 10_000, "content": "made otherwise"}}, r"train\.content 'lsp' and 'made otherwise'"),
    ],
)
def test_two_experiments_do_not_fit_one_cell(change, name):
    both = [*records("lsp", "jcdp", [0.7]), *records("lsp", "jcdp", [0.6, 0.5], **change)]
    with pytest.raises(ValueError, match=f"'lsp'.* on cifar10 with {name}, .*give the records of one"):
        Measured(both)


def test_an_error_names_the_grids_where_they_differ():
    both = [*records("lsp", "none", [0.2]), *records("lsp", "none", [0.3], images=5000, grid="small")]
    with pytest.raises(ValueError, match=r"10000 \(grid mini\) and 5000 \(grid small\)"):
        Measured(both)


def test_a_poison_of_another_preset_has_rows_and_columns_of_its_own():
    wide = {"poison_preset": "cpu-wide", "train": {"images": 10_000, "content": "wide"}}
    both = Measured(
        [
            *records("remn", "none", [0.36, 0.37]),
            *records("remn", "none", [0.4], **wide),
            *records("remn-control", "none", [0.7], **wide | {"train": {"images": 10_000, "content": "noise"}}),
            *records("lsp", "none", [0.2]),
        ]
    )
    table = poison_table(both, "cifar10")
    assert cell_of(table, "REMN (cpu)", "test accuracy") == "36.5 ± 0.7"
    assert cell_of(table, "REMN (cpu-wide)", "test accuracy") == "40.0"
    assert cell_of(table, "REMN (cpu-wide)", "noise of the same size: test accuracy") == "70.0"
    assert cell_of(table, "LSP", "test accuracy") == "20.0"
    assert cell_of(grid_table(both, "cifar10"), "vanilla", "REMN (cpu-wide)") == "40.0"
    with pytest.raises(ValueError, match="'none' against 'remn' on cifar10 with poison_preset 'cpu' and 'cpu-wide'"):
        paper_tables(both)


def test_the_table_of_poisons_has_no_training_accuracy_where_no_labels_were_learned():
    both = [*without_labels("simclr", "lsp", "none", [0.6]), *records("lsp", "none", [0.2])]
    table, supervised = (poison_table(Measured(both, method=method), "cifar10") for method in ("simclr", "supervised"))
    assert cell_of(table, "LSP", "test accuracy") == "60.0" and "training accuracy" not in table
    assert cell_of(supervised, "LSP", "training accuracy") == "100.0"


def test_a_cell_that_was_measured_twice_counts_once():
    again = records("lsp", "none", [0.3], trial="y", grid="again", poison_seconds=7.0)
    measured = Measured([*records("lsp", "none", [0.2]), *again])
    assert measured.accuracies("cifar10", "lsp", "none") == [30.0]


def test_what_the_leak_is_worth():
    both = [
        *records("lsp", "jcdp", [0.70, 0.71, 0.10]),
        *records("lsp", "jcdp", [0.72, 0.74], roles="paper", purifier="of the test images"),
        *records("emn", "jcdp", [0.5], roles="paper", purifier="of the test images"),
        *records("emn", "none", [0.2]),
    ]
    table = roles_table(Measured(both), Measured(both, roles="paper"), "cifar10")
    assert table.splitlines()[2:] == ["| LSP | JCDP | 70.5 ± 0.7 | 73.0 ± 1.4 | 2.5 ± 0.7 |"]
    changed = [*records("lsp", "jcdp", [0.7]), *records("lsp", "jcdp", [0.7], roles="paper", purification={"a": 1})]
    with pytest.raises(ValueError, match="under both roles with purification.a None and 1"):
        roles_table(Measured(changed), Measured(changed, roles="paper"), "cifar10")


@pytest.mark.parametrize(
    "column, facts",
    [
        ("pretrained", lambda content: {"init_from": {"finetune": "all", "pretraining": {"collected": content}}}),
        ("paired", lambda content: {"pairs": {"originals": content}}),
        ("advcl", lambda content: {"collected_images": content}),
    ],
)
def test_whatever_learned_from_collected_images_has_roles(column, facts):
    honest, leaked = facts({"content": "collected"}), facts({"content": "test"}) | {"roles": "paper"}
    both = [
        *records("lsp", "none", [0.2]),
        *records("lsp", column, [0.5, 0.6], **honest),
        *records("lsp", column, [0.8], **leaked),
    ]
    disjoint, paper = Measured(both), Measured(both, roles="paper")
    assert disjoint.accuracies("cifar10", "lsp", column) == [50.0, 60.0]
    assert paper.accuracies("cifar10", "lsp", column) == [80.0]
    assert Measured(both[:-2], roles="paper").accuracies("cifar10", "lsp", column) == []
    (row,) = roles_table(disjoint, paper, "cifar10").splitlines()[2:]
    assert row.endswith("| 50.0 | 80.0 | 30.0 |")


def test_a_start_that_was_fine_tuned_otherwise_is_another_cell():
    start = {"init_from": {"finetune": "all", "pretraining": {"collected": 1}}}
    other = {"init_from": {"finetune": "upper", "pretraining": {"collected": 2}}, "roles": "paper"}
    both = [*records("lsp", "pretrained", [0.5], **start), *records("lsp", "pretrained", [0.8], **other)]
    with pytest.raises(ValueError, match="under both roles with init_from.finetune 'all' and 'upper'"):
        roles_table(Measured(both), Measured(both, roles="paper"), "cifar10")


def run(monkeypatch, tmp_path, found, *options) -> str:
    """What the command writes."""
    path, output = tmp_path / "records.jsonl", tmp_path / "table.md"
    path.write_text("\n".join(map(json.dumps, found)))
    kind, *others = options
    monkeypatch.setattr(sys, "argv", ["tables", kind, "--records", str(path), "--output", str(output), *others])
    tables.main()
    return output.read_text()


def test_one_table_by_its_name(monkeypatch, tmp_path):
    found = [*records("lsp", "none", [0.2])]
    text = run(monkeypatch, tmp_path, found, "paper", "--table", "Table 1")
    assert text.count("### ") == 3 and "### Table 1, svhn" in text
    assert run(monkeypatch, tmp_path, found, "paper", "--table", "APBench, cifar10").count("### ") == 1
    for name in ("1", "cifar10", "Table"):
        with pytest.raises(SystemExit, match=f"tables: table is '{name}'.*Table 1; Table 1, cifar10;"):
            run(monkeypatch, tmp_path, found, "paper", "--table", name)


def test_the_command_for_both_roles(monkeypatch, tmp_path):
    found = [*records("lsp", "jcdp", [0.7]), *records("lsp", "jcdp", [0.8], roles="paper", purifier="p")]
    assert "| LSP | JCDP | 70.0 | 80.0 | 10.0 |" in run(monkeypatch, tmp_path, found, "roles")
    with pytest.raises(SystemExit, match="no cell there is measured under both roles"):
        run(monkeypatch, tmp_path, found[:2], "roles")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, found, "roles", "--roles", "paper")


def test_one_grid_protocol_or_choice_of_columns(monkeypatch, tmp_path):
    found = [
        record | {"protocol": protocol, "settings": record["settings"] | {"grid": grid}}
        for protocol, grid, column in (("mini", "one", "gray"), ("mini", "two", "mixup"), ("iss", "two", "cutmix"))
        for record in records("lsp", column, [0.5])
    ]
    for options, rows in (
        ((), ["gray", "Mixup", "CutMix"]),
        (("--grid", "two"), ["Mixup", "CutMix"]),
        (("--grid", "two", "--protocol", "mini"), ["Mixup"]),
        (("--columns", "cutmix", "gray"), ["gray", "CutMix"]),
        (("--poisons", "lsp"), ["gray", "Mixup", "CutMix"]),
    ):
        table = run(monkeypatch, tmp_path, found, "grid", *options).splitlines()
        assert [line.split("|")[1].strip() for line in table if line.startswith("| ")][2:] == rows, options
    for option, name, known in (
        ("grid", "three", "one, two"),
        ("protocol", "fast", "mini, iss"),
        ("poisons", "emn", "lsp"),
        ("columns", "jcdp", "gray, mixup, cutmix"),
    ):
        with pytest.raises(SystemExit, match=f"tables: {option} is '{name}'.*{known}"):
            run(monkeypatch, tmp_path, found, "grid", f"--{option}", name)


def test_the_command_refuses_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tables", "grid", "--records", "nofile.jsonl"])
    with pytest.raises(SystemExit, match="tables: records is 'nofile.jsonl'.*No such file"):
        tables.main()
    with pytest.raises(SystemExit, match="no accuracy of a grid there has the victim 'vgg16'"):
        run(monkeypatch, tmp_path, records("lsp", "none", [0.2]), "grid", "--victim", "vgg16")
    others = [{"what": "accuracy", "value": 1}, {"what": "accuracy", "value": 1, "settings": {"column": "none"}}]
    with pytest.raises(SystemExit, match="no accuracy of a grid there has the victim 'resnet18'"):
        run(monkeypatch, tmp_path, others, "grid")
    with pytest.raises(SystemExit, match="grid is 'g', but the records have none"):
        run(monkeypatch, tmp_path, others, "grid", "--grid", "g")
    with pytest.raises(SystemExit, match="tables: records hold cifar10 with train.images"):
        both = [*records("lsp", "none", [0.2]), *records("lsp", "none", [0.2], images=5)]
        run(monkeypatch, tmp_path, both, "poisons")


def test_spread():
    assert spread([]) == "n.m." and spread([71.04]) == "71.0" and spread([70.0, 72.0]) == "71.0 ± 1.4"


def test_published_figures_are_percentages_by_names_of_ours():
    from jcdp_diffusers import countermeasures, poisons
    from jcdp_diffusers.victims import METHODS

    others = ("iss", "gaussian-filter", "d-vae", "bridgepure-0.5k", "bridgepure-4k")

    def check(figures):
        for column, row in figures.items():
            assert column in others or countermeasures.get(column)
            for poison, value in row.items():
                assert (poison == "none" or poison in poisons.NAMES) and 0 < value < 100

    for name in ("jcdp_table_1", "bridgepure"):
        for entry in PUBLISHED[name].values():
            check(entry["figures"])
    for entry in PUBLISHED["jcdp_table_4"].values():
        for figures in (*entry["figures"].values(), {"none": entry["clean"]}):
            for column, row in figures.items():
                assert column == "advcl" or countermeasures.get(column)
                assert set(row) <= set(METHODS) and all(0 < value < 100 for value in row.values())
    for name in ("jcdp_table_2", "jcdp_table_3", "apbench"):
        for figures in PUBLISHED[name].values():
            check(figures)
