"""Export and clean leave the tree as it is, and each module imports by itself."""
import shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p.stem for p in (ROOT/"blip3o_nb").glob("*.py") if not p.stem.startswith("_"))

def run(*cmd, cwd=ROOT): return subprocess.run(cmd, cwd=cwd, capture_output=True, text=True)

def snapshot(root):
    files = [*(root/"blip3o_nb").glob("*.py"), *(root/"nbs").rglob("*.ipynb"), root/"README.md"]
    return {str(f.relative_to(root)): f.read_bytes() for f in files if ".ipynb_checkpoints" not in f.parts}

def test_export_clean_and_readme_change_nothing(tmp_path):
    copy = tmp_path/"copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "_docs", "_proc", "build", "*.egg-info"))
    for cmd in ("nbdev-export", "nbdev-clean"):
        r = run(str(Path(sys.executable).parent/cmd), cwd=copy)
        assert r.returncode == 0, r.stderr
    assert run(sys.executable, "readme.py", cwd=copy).returncode == 0
    before = snapshot(ROOT)
    changed = [f for f, b in snapshot(copy).items() if before.get(f) != b]
    assert not changed, f"run nbdev-export, nbdev-clean and readme.py, then commit: {changed}"

@pytest.fixture(scope="module")
def imports():
    "Each module in a process of its own, two at a time: an import keeps one core busy"
    alone = lambda m: run(sys.executable, "-W", "error::SyntaxWarning", "-c", f"import blip3o_nb.{m}")
    with ThreadPoolExecutor(2) as pool: return dict(zip(MODULES, pool.map(alone, MODULES)))

@pytest.mark.parametrize("module", MODULES)
def test_module_imports_alone(module, imports):
    assert imports[module].returncode == 0, imports[module].stderr
