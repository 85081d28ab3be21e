"""Every notebook runs from top to bottom, through nbdev."""
import sys
from pathlib import Path
import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

NBS = Path(__file__).parents[1]/"nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(x.startswith(("_", ".")) for x in p.relative_to(NBS).parts))

@pytest.mark.parametrize("path", NOTEBOOKS, ids=[str(p.relative_to(NBS)) for p in NOTEBOOKS])
def test_notebook(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    ok, _ = run_notebook(path, skip_flags=get_config(NBS).tst_flags.split())
    assert ok, f"{path.name} failed: see the traceback above"
