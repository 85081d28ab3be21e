"""Export and clean leave the tree as it is, and each module imports by itself."""
import subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p.stem for p in (ROOT/"blip3o_nb").glob("*.py") if not p.stem.startswith("_"))

def run(*cmd, **kw): return subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True, **kw)

def snapshot():
    files = [*(ROOT/"blip3o_nb").glob("*.py"), *(ROOT/"nbs").rglob("*.ipynb"), ROOT/"README.md"]
    return {f: f.read_bytes() for f in files if ".ipynb_checkpoints" not in f.parts}

def test_export_clean_and_readme_change_nothing():
    before = snapshot()
    for cmd in ("nbdev-export", "nbdev-clean"):
        r = run(str(Path(sys.executable).parent/cmd))
        assert r.returncode == 0, r.stderr
    assert run(sys.executable, "readme.py").returncode == 0
    changed = [str(f.relative_to(ROOT)) for f, b in snapshot().items() if before.get(f) != b]
    assert not changed, f"run nbdev-export, nbdev-clean and readme.py, then commit: {changed}"

@pytest.fixture(scope="module")
def imports():
    "Each module in a process of its own, two at a time: an import keeps one core busy"
    alone = lambda m: run(sys.executable, "-W", "error::SyntaxWarning", "-c", f"import blip3o_nb.{m}")
    with ThreadPoolExecutor(2) as pool: return dict(zip(MODULES, pool.map(alone, MODULES)))

@pytest.mark.parametrize("module", MODULES)
def test_module_imports_alone(module, imports):
    assert imports[module].returncode == 0, imports[module].stderr
