"""The notebook runs from its first cell to its last, with few training steps."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def test_no_outputs_are_stored():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count]


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "doctor" not in cell.source]
    (setup,) = (cell for cell in notebook.cells if "SHARE = 1.0" in cell.source)
    setup.source = setup.source.replace("SHARE = 1.0", "SHARE = 0.01")
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()
    printed = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    ]
    (line,) = (line for text in printed for line in text.splitlines() if "logits differ" in line)
    assert float(line.split()[-1]) == 0
    assert (tmp_path / "runs/quickstart/eval/niah_recall_64.png").is_file()
