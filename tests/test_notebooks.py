"""The notebooks in examples/ run in a fresh kernel, and are committed with their pictures."""

import base64
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra")
nbclient = pytest.importorskip("nbclient", reason="needs the notebooks extra")
pytest.importorskip("ipykernel", reason="needs the notebooks extra")

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
WITHOUT_PICTURES = {"layer"}


def test_there_are_some():
    assert len(NOTEBOOKS) >= 5


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed(name):
    """Small, run from top to bottom without warnings, and with pictures; of no one's machine."""
    path = EXAMPLES / f"{name}.ipynb"
    assert path.stat().st_size < 200_000
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    pictures = [output.data["image/png"] for output in outputs if "data" in output]
    assert bool(pictures) == (name not in WITHOUT_PICTURES)
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    text = path.read_text()
    assert not any(place in text for place in ("/home/", "/tmp/", "/root/", "/work/"))
    assert f"examples/{path.name}" in (EXAMPLES.parent / "README.md").read_text()


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.filterwarnings("default")  # those of the client, which is not what is tested
def test_it_runs(name, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", 4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}}
    )
    client.execute()  # raises what a cell raised, with the cell
