"""Every notebook runs from top to bottom through nbdev, in a process of its own: what one imports must not
help or hurt another. The text that it shows is the text that is stored."""
from pathlib import Path
import pytest
from fresh import check_fresh

NBS = Path(__file__).parents[1]/"nbs"

def is_hidden(path):
    return any(x.startswith(("_", ".")) for x in path.relative_to(NBS).parts)

NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not is_hidden(p))

@pytest.fixture(scope="module")
def second(runs):
    runs.start()

@pytest.mark.parametrize("path", NOTEBOOKS, ids=[str(p.relative_to(NBS)) for p in NOTEBOOKS])
def test_notebook(path, runs, second):
    code, said, fresh = runs.done[path].result()
    assert code == 0, said
    check_fresh(path, fresh)
