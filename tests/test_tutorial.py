"""The tutorial is run as a reader runs it, with smaller numbers."""

import os
from pathlib import Path

import nbformat
import pytest


NOTEBOOK = Path(__file__).parents[1] / "docs/tutorial.ipynb"
SMALL = 'sizes = (60, 40, 60)\nsteps = 3\nrecipe, seeds = "smoke", 2\nfolder = "tutorial"'


def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs():
    for cell in notebook().cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)
    assert NOTEBOOK.stat().st_size < 20_000


@pytest.mark.long
def test_it_runs_from_installation_to_verdict(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    book = notebook()
    (settings,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    names = [line.split("=")[0] for line in settings.source.splitlines()]
    assert names == [line.split("=")[0] for line in SMALL.splitlines()]
    settings.source = SMALL
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    said = [
        output.text for cell in book.cells if cell.cell_type == "code" for output in cell.outputs if "text" in output
    ]
    assert any("nothing follows" in text for text in said), said  # the verdict's sentence
    pictures = [cell for cell in book.cells if cell.cell_type == "code" and "image/png" in str(cell.outputs)]
    assert len(pictures) == 3
    assert (tmp_path / "tutorial/report/report.html").stat().st_size > 1000
