"""Every notebook runs from top to bottom through nbdev, in a process of its own: what one imports must not help or hurt another."""
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
NBS = ROOT/"nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(x.startswith(("_", ".")) for x in p.relative_to(NBS).parts))

def run(path):
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, os.cpu_count()//2))}
    return subprocess.run([Path(sys.executable).parent/"nbdev-test", path], cwd=ROOT, capture_output=True, text=True, env=env)

@pytest.fixture(scope="module")
def runs(request):
    "The notebooks that were asked for, two at a time: much of a notebook keeps one core busy"
    asked = [i.callspec.params["path"] for i in request.session.items if i.path == Path(__file__)]
    with ThreadPoolExecutor(2) as pool:
        yield {p: pool.submit(run, p) for p in reversed(asked)} # the short ones, which come first in the book, fill the end
        pool.shutdown(cancel_futures=True)

@pytest.mark.parametrize("path", NOTEBOOKS, ids=[str(p.relative_to(NBS)) for p in NOTEBOOKS])
def test_notebook(path, runs):
    r = runs[path].result()
    assert r.returncode == 0, r.stdout + r.stderr
