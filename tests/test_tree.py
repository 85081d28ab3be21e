"""Export and clean leave the tree as it is, and each module imports by itself."""
import os, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import LIBRARIES
from long import FIRST, LONG

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT/"blip3o_nb"
MODULES = sorted(".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")
                 if not p.stem.startswith("_"))

def run(*cmd, cwd=ROOT, **env): return subprocess.run(cmd, cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})

def snapshot(root):
    files = [*(root/"blip3o_nb").rglob("*.py"), *(root/"nbs").rglob("*.ipynb"), root/"README.md"]
    return {str(f.relative_to(root)): f.read_bytes() for f in files if ".ipynb_checkpoints" not in f.parts}

def ignored(folder, names):
    "What a copy of the tree does without"
    at_root = {".git", ".venv", "runs", "_docs", "_proc", "build"} if Path(folder) == ROOT else set()
    return {n for n in names if n in at_root or n.endswith(".egg-info")}

def test_export_clean_and_readme_change_nothing(tmp_path):
    copy = tmp_path/"copy"
    shutil.copytree(ROOT, copy, ignore=ignored)
    for cmd in ("nbdev-export", "nbdev-clean"):
        r = run(str(Path(sys.executable).parent/cmd), cwd=copy)
        assert r.returncode == 0, r.stderr
    assert run(sys.executable, "readme.py", cwd=copy).returncode == 0
    before = snapshot(ROOT)
    changed = [f for f, b in snapshot(copy).items() if before.get(f) != b]
    assert not changed, f"run nbdev-export, nbdev-clean and readme.py, then commit: {changed}"

IMPORTS = f"""
import importlib, os, sys, traceback
import {LIBRARIES}
for module in sys.argv[1:]:
    if not (pid := os.fork()):
        try: importlib.import_module(f"blip3o_nb.{{module}}"); os._exit(0)
        except BaseException: print(module, traceback.format_exc(), flush=True); os._exit(1)
    os.waitpid(pid, 0)
print("done")
"""

@pytest.mark.fault("no network: each address is refused", "the import of each module", "none is asked for")
def test_each_module_imports_alone(tmp_path, record_property):
    "In a process in which no other module of the package was imported; the libraries were, for the ten seconds that they take. With sockets blocked, see tests/offline"
    assert MODULES
    path, contacted = os.pathsep.join([str(ROOT/"tests/offline"), *filter(None, [os.environ.get("PYTHONPATH")])]), tmp_path/"contacted"
    r = run(sys.executable, "-W", "error::SyntaxWarning", "-c", IMPORTS, *MODULES, PYTHONPATH=path, CONTACTED=str(contacted))
    assert r.stdout == "done\n", r.stdout + r.stderr
    assert not contacted.exists(), contacted.read_text()
    record_property("provoked", len(MODULES))

def test_what_takes_long_exists():
    "Of a test that was renamed, `long` would mark nothing"
    for name in (*LONG, *FIRST):
        file, _, test = name.partition("::")
        assert (ROOT/file).exists(), file
        assert not test or f"def {test.partition('[')[0]}(" in (ROOT/file).read_text(), name

SITE = f"""
import os, sys, warnings
import {LIBRARIES}
from pathlib import Path
from nbdev.process import NBProcessor
from nbdev.processors import add_show_docs, exec_show_docs, populate_language
os.chdir("nbs"); said = os.dup(1)
for path in sorted(Path().glob("[0-9]*/*.ipynb")):
    if not (pid := os.fork()):
        for n in (1, 2): os.dup2(os.open(os.devnull, os.O_WRONLY), n)
        try: NBProcessor(path, [populate_language, add_show_docs, exec_show_docs], rm_directives=False).process()
        except Exception as e: os.write(said, f"{{path}}: {{e}}\\n".encode())
        os._exit(0)
    os.waitpid(pid, 0)
"""

@pytest.mark.slow
def test_the_site_can_be_made():
    "As `make docs` does: nbdev runs the cells that export or import, and those only, for the documentation: an import stands in a cell that needs no other"
    r = run(sys.executable, "-c", SITE)
    assert r.returncode == 0 and not r.stdout, r.stdout + r.stderr
