"""Every notebook runs from top to bottom through nbdev, in a process of its own: what one imports must not help or hurt another."""
import subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
NBS = ROOT/"nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(x.startswith(("_", ".")) for x in p.relative_to(NBS).parts))

@pytest.mark.parametrize("path", NOTEBOOKS, ids=[str(p.relative_to(NBS)) for p in NOTEBOOKS])
def test_notebook(path):
    r = subprocess.run([Path(sys.executable).parent/"nbdev-test", path], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
