"""Tables: what is on record, what is printed elsewhere, and nothing between the two."""

import pytest

from eval.tables import PUBLISHED, Measured, grid_table, paper_tables, spread


RECIPE = {"name": "mini", "epochs": 15, "smoke": False}


def records(poison, column, values, *, seconds=(0.0, 10.0), images=10_000, **settings):
    settings = {
        "cell": "x",
        "dataset": "cifar10",
        "collected": "cifar10",
        "poison": poison,
        "column": column,
        "victim": "resnet18",
        "width": 16,
        "recipe": RECIPE,
        "train": {"images": images},
    } | settings
    prepare, train = seconds
    for seed, value in enumerate(values):
        details = {"prepare_seconds": prepare, "train_seconds": train}
        yield {"what": "victim", "value": details, "seed": seed, "settings": settings}
        yield {"what": "accuracy", "value": value, "seed": seed, "settings": settings}


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
    assert cell_of(tables["BridgePure's re-runs, cifar10"], "JCDP", "OPS") == "n.m. / 58.6"
    assert cell_of(tables["Table 1, cifar10"], "AVATAR", "EMN(C)") == "n.m. / -"


def test_ours_stand_beside_theirs():
    measured = Measured(
        [
            *records("lsp", "jcdp", [0.70, 0.72, 0.71]),
            *records("lsp", "gray", [0.60]),
            *records("lsp", "jpeg-10", [0.65]),
            *records("emn", "jcdp", [0.5], collected="cifar100"),
            *records("none", "none", [0.76, 0.78]),
        ]
    )
    tables = paper_tables(measured)
    assert cell_of(tables["Table 1, cifar10"], "JCDP", "LSP") == "71.0 ± 1.0 / 92.4"
    assert cell_of(tables["Table 1, cifar10"], "clean images", "EMN") == "77.0 ± 1.4 / 95.3"
    assert cell_of(tables["Table 5, purifier trained on other data"], "cifar10", "EMN") == "50.0 / 92.1"
    assert cell_of(tables["Table 1, cifar10"], "JCDP", "EMN") == "n.m. / 93.1"  # another purifier's is not ours
    # The best of three needs three.
    assert cell_of(tables["Table 1, cifar10"], "ISS (best of three)", "LSP") == "n.m. / 82.5"
    whole = Measured(
        [*records("lsp", "gray", [0.6]), *records("lsp", "jpeg-10", [0.65]), *records("lsp", "bdr-2", [0.4])]
    )
    assert cell_of(paper_tables(whole)["Table 1, cifar10"], "ISS (best of three)", "LSP") == "65.0 / 82.5"


def test_ablation_by_origin_and_steps_of_the_purifier():
    kind = {"purifier_origin": "fine-tuned", "purifier_steps": 1000}
    table = paper_tables(Measured(records("emn", "unconditional", [0.6], **kind)))["Table 6, EMN"]
    assert [line.split("|")[4].strip() for line in table.splitlines()[2:]] == [
        "n.m. / 90.6",
        "60.0 / 91.4",
        "n.m. / 91.9",
        "n.m. / 93.1",
    ]


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


def test_costs_are_beside_the_figures():
    table = grid_table(
        Measured(
            [
                *records("lsp", "jcdp", [0.7], seconds=(12.0, 10.0)),
                *records("lsp", "at-8", [0.6], seconds=(0.0, 88.0)),
            ]
        ),
        "cifar10",
    )
    assert cell_of(table, "JCDP", "seconds before training") == "12.0"
    assert cell_of(table, "JCDP", "of adversarial training's") == "25 %"
    assert cell_of(table, "adversarial training", "of adversarial training's") == "100 %"


def test_two_scales_do_not_fit_one_table():
    with pytest.raises(ValueError, match="records hold cifar10 at several scales .*5000 training images.*one grid"):
        Measured([*records("lsp", "none", [0.2]), *records("lsp", "gray", [0.3], images=5000)])


def test_a_cell_that_was_measured_twice_counts_once():
    measured = Measured([*records("lsp", "none", [0.2]), *records("lsp", "none", [0.3])])
    assert measured.accuracies("cifar10", "lsp", "none") == [30.0]


def test_spread():
    assert spread([]) == "n.m." and spread([71.04]) == "71.0" and spread([70.0, 72.0]) == "71.0 ± 1.4"


def test_published_figures_are_percentages_by_names_of_ours():
    from jcdp_diffusers import countermeasures, poisons

    def check(figures):
        for column, row in figures.items():
            assert column == "iss" or countermeasures.get(column)
            for poison, value in row.items():
                assert (poison == "none" or poison in poisons.NAMES) and 0 < value < 100

    for entry in PUBLISHED["jcdp_table_1"].values():
        check(entry["figures"])
    for name in ("jcdp_table_2", "jcdp_table_3", "apbench", "bridgepure"):
        for figures in PUBLISHED[name].values():
            check(figures)
