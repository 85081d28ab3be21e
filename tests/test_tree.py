"""Export and clean leave the tree as it is, and each module imports by itself."""
import ast, json, os, re, shutil, subprocess, sys
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

# The house

ROOMS = 34

def rooms(nbs):
    "Module -> its first notebook, in the order of reading: the ground, then the parts by number"
    found = {}
    for nb in sorted(nbs.glob("[0-9]*/[0-9]*.ipynb")) + sorted(nbs.glob("[0-9]*.ipynb")):
        cells = ["".join(c["source"]) for c in json.loads(nb.read_text())["cells"]]
        begins = re.fullmatch(r"#\| default_exp (\S+)", cells[0].strip())
        if begins: found[begins[1]] = nb.relative_to(nbs)
        else: # a further chapter of a room
            [room] = {m for c in cells for m in re.findall(r"^#\| export (\S+)", c)}
            assert room in found and found[room].parent == nb.relative_to(nbs).parent, nb
    return dict(sorted(found.items(), key=lambda room: (len(room[1].parts), room[1])))

def imported(module, source):
    "Modules of the package that a module imports, within its functions too"
    for n in ast.walk(ast.parse(source)):
        if not isinstance(n, ast.ImportFrom): continue
        name = n.module or ""
        if n.level: yield ".".join([*module.split(".")[:-n.level], *filter(None, [name])])
        elif name.startswith("blip3o_nb."): yield name.removeprefix("blip3o_nb.")

def odd_imports(sources):
    "Imports that run up the order of `sources`; the room of earlier formats is for commands and runs only"
    place = {m: i for i, m in enumerate(sources)}
    for module, source in sources.items():
        part = module.partition(".")[0]
        for other in imported(module, source):
            if other not in place: yield f"{module} imports {other}, which is no room"
            elif other.startswith("earlier.") and part != "earlier":
                if part not in ("commands", "runs"): yield f"{module} imports {other}"
            elif place[other] >= place[module]: yield f"{module} imports {other}, which comes later"

def test_no_arrow_runs_up():
    names = rooms(ROOT/"nbs")
    assert set(names) == set(MODULES) and len(names) <= ROOMS
    assert not list(odd_imports({m: (PACKAGE/f"{m.replace('.', '/')}.py").read_text() for m in names}))

def test_an_arrow_that_runs_up_is_seen():
    sources = {"files": "", "core": "def f(): from .flow.paths import x", "flow.paths": "from ..core import y",
               "flow.losses": "from blip3o_nb.earlier.programs import z\nfrom .samplers import s",
               "earlier.programs": "from ..files import w"}
    assert list(odd_imports(sources)) == ["core imports flow.paths, which comes later",
                                          "flow.losses imports earlier.programs",
                                          "flow.losses imports flow.samplers, which is no room"]

def test_each_notebook_writes_the_module_that_its_place_says():
    for module, nb in rooms(ROOT/"nbs").items():
        assert module == ".".join(re.sub(r"^\d+_", "", p) for p in nb.with_suffix("").parts)

NO_TORCH = ("files", "options", "commands.command", "commands.cli", "earlier.programs")

def test_commands_explain_themselves_without_torch():
    code = "import sys, importlib\nfor m in sys.argv[1:]: importlib.import_module(f'blip3o_nb.{m}')\nprint('torch' in sys.modules)"
    r = run(sys.executable, "-c", code, *[m for m in NO_TORCH if m in MODULES])
    assert r.stdout == "False\n", r.stdout + r.stderr

def test_every_public_name_and_every_module_of_before():
    "Public names are there; a module of before names the room that holds its names now"
    import blip3o_nb
    assert all(getattr(blip3o_nb, name) for name in blip3o_nb.__all__)
    for old, new in blip3o_nb._MOVED.items():
        if old == "training": continue # a part has that name now
        with pytest.raises(ImportError, match=f"blip3o_nb.{old} is now blip3o_nb.{new}: import from there"):
            __import__(f"blip3o_nb.{old}")
    with pytest.raises(ImportError, match="blip3o_nb.training.train is now blip3o_nb.runs.runs"):
        exec("from blip3o_nb.training import train")
    with pytest.raises(ImportError, match="blip3o_nb.shards is now blip3o_nb.features.shards"):
        exec("from blip3o_nb import shards")
    with pytest.raises(ModuleNotFoundError): __import__("blip3o_nb.no_such_room")

def test_rooms_ask_what_a_thing_has_and_not_whose_class_it_is():
    "No isinstance of a class of this package outside the module that defines it, but for its exceptions"
    trees = {p: ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py")}
    own = {n.name: p for p, tree in trees.items() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    found = []
    for p, tree in trees.items():
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "isinstance"]
        names = {x.id for n in calls for x in ast.walk(n.args[1]) if isinstance(x, ast.Name)}
        found += [f"{p.name}: {c}" for c in names - {"InputError"} if own.get(c, p) != p]
    assert not found and "BLIP3oDiT" in own

def test_exported_code_can_be_read():
    "Lines of at most 110 characters, one statement a line, functions of at most 40 lines"
    wide = []
    for p in PACKAGE.rglob("*.py"):
        text = "" if p.name.startswith("_") else p.read_text().partition("\n# %% ../")[2] # without the generated head
        wide += [f"{p.name}: {l}" for l in text.splitlines() if len(l) > 110]
        for n in ast.walk(ast.parse(p.read_text())):
            if not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
            lines = n.end_lineno - n.body[0].lineno
            if lines > 40: wide.append(f"{p.name}: {n.name} has {lines} lines")
    assert not wide
