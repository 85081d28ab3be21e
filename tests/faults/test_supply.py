"""What the package is made of and whom it asks: requirements and their bounds, the lock, licences, secrets, addresses; and that nobody is contacted unasked. The demo and the modules' imports run in `test_demo.py` and `test_tree.py` with sockets blocked."""
import ast, configparser, json, os, re, runpy, socket, subprocess, sys
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT, BIN = Path(__file__).parents[2], Path(sys.executable).parent
settings = configparser.ConfigParser(delimiters=["="]); settings.read(ROOT/"settings.ini")
DECLARED = {extra: [Requirement(r) for r in settings["DEFAULT"][f"{extra}_requirements".lstrip("_")].split()] for extra in ("", "dev", "trackers")}
LOCK = [Requirement(line) for line in (ROOT/"requirements.lock").read_text().splitlines()]
UNLOCKED = {"wandb"} # an extra that nothing here installs: `make` would bring it to everybody
TOOLS = {"jupyterlab": "Makefile", "nbdev": "docs.sh", "datasets": "blip3o_nb/features/images.py", "ipykernel": "tests/test_widgets.py", "accelerate": "tests/test_distributed.py", "tensorboard": "blip3o_nb/training/monitors.py",
         "torchvision": "tests/conftest.py"} # used and not imported: where; torchvision by the image processors of transformers, which does not require it

owners = cache(packages_distributions) # module -> distributions
def name_of(r): return canonicalize_name(r.name)
def all_declared(): return [r for rs in DECLARED.values() for r in rs]
def tracked(): return [ROOT/n for n in git(ROOT, "ls-files", "-co", "--exclude-standard").splitlines() if (ROOT/n).is_file()]
def git(root, *args):
    r = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, errors="replace")
    if r.returncode: pytest.skip(f"no git repository here: {r.stderr.strip()}")
    return r.stdout

# Bounds and the lock

def wrong_bounds(declared, lock):
    "What is wrong with requirements and the lock, one line each"
    have = {}
    for r in lock: have.setdefault(name_of(r), []).append(r)
    for r in declared:
        if not any(s.operator in (">=", "~=", "==") for s in r.specifier): yield f"{r.name} has no lower bound"
        if name_of(r) in UNLOCKED: continue
        if name_of(r) not in have: yield f"{r.name} is not in the lock"
        for l in have.get(name_of(r), []):
            for s in l.specifier:
                if not r.specifier.contains(s.version, prereleases=True): yield f"the lock has {l.name} {s.version}, which is not {r.specifier}"
    for r in lock:
        if r.url or [s.operator for s in r.specifier] != ["=="]: yield f"the lock does not pin {r}"

@pytest.mark.fault("a requirement without a lower bound, or outside the lock", "settings.ini, requirements.lock", "named")
def test_bounds_and_lock(record_property):
    assert not list(wrong_bounds(all_declared(), LOCK))
    faults = [("a", ["a==1"], "no lower bound"), ("a>=1", [], "not in the lock"), ("a>=2", ["a==1"], "which is not >=2"), ("a>=1", ["a==1", "b>=1"], "not pin b"), ("a>=1", ["a @ https://example.org/a.whl"], "not pin a")]
    for declared, lock, said in faults: assert any(said in w for w in wrong_bounds([Requirement(declared)], list(map(Requirement, lock)))), said
    record_property("provoked", len(faults))

# What is imported is declared, and what is declared is used

def imports(source):
    "Names of the modules of other packages that code imports anywhere -> whether it does so at the top level, where nothing can catch it"
    tree, found = ast.parse(source), {}
    for n in ast.walk(tree):
        for name in [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module] if isinstance(n, ast.ImportFrom) and not n.level else []:
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != "blip3o_nb": found[top] = found.get(top, False) or n in tree.body
    return found

def undeclared(sources, declared, extras):
    "Imports of a package that no requirement brings; those of extras must not stand at the top"
    for path, source in sources.items():
        for module, top in imports(source).items():
            names = {canonicalize_name(d) for d in owners().get(module, [module])}
            if not names & (declared if top else declared | extras): yield f"{path} imports {module}, which settings.ini does not name"

@pytest.mark.fault("an import of what is not required, a requirement that nothing uses", "settings.ini", "named")
def test_imports_are_declared_and_requirements_used(record_property):
    always, extras = {name_of(r) for r in DECLARED[""]}, {name_of(r) for e in ("dev", "trackers") for r in DECLARED[e]}
    package = {str(p.relative_to(ROOT/"blip3o_nb")): p.read_text() for p in (ROOT/"blip3o_nb").rglob("*.py")}
    assert package and not list(undeclared(package, always, extras))
    assert list(undeclared({"a.py": "def f(): import colorama_is_not_here"}, always, extras)) and list(undeclared({"a.py": "import pytest"}, always, extras)) and not list(undeclared({"a.py": "def f(): import pytest"}, always, extras))
    left = (always | extras) - {n for n, file in TOOLS.items() if re.search(rf"\b({n}|{n.replace('lab', ' lab')})\b", (ROOT/file).read_text())}
    for path in sorted(tracked(), key=lambda p: p.suffix == ".ipynb"): # notebooks, which are large, for what no module imports
        if left and path.suffix in (".py", ".ipynb"): left -= {canonicalize_name(d) for names in re.findall(r"^[ \"]*(?:from|import) (\w+(?:, *\w+)*)", path.read_text(), re.M) for m in names.split(", ") for d in owners().get(m, [m])}
    assert not left, f"settings.ini names what nothing uses: {left}"
    record_property("provoked", 2)

# Licences

ALLOWED = r"MIT|MIT-0|MIT-CMU|HPND|0BSD|[23]-Clause BSD|BSD|BSD License|BSD-[23]-Clause|New BSD|ISC|ISC License \(ISCL\)|MIT License|Apache([ -]2(\.0)?)?( License)?|Apache License, Version 2\.0|Apache Software License|Apache-2\.0 WITH LLVM-exception|3-Clause BSD License|" \
          r"PSF-2\.0|PSF|Python Software Foundation License|CNRI-Python|Zlib|BSL-1\.0|CC0-1\.0|Unlicense|The Unlicense \(Unlicense\)|MPL-2\.0|Mozilla Public License 2\.0 \(MPL 2\.0\)" # MPL binds changes of its own files only
REFUSED = r"(?i)\b[AL]?GPL|affero|general public|SSPL|BUSL|business source|commons.clause|non.?commercial|\bBY-NC|elastic license"
EXCEPTIONS = {r"nvidia-[\w-]+|cuda-toolkit": "NVIDIA's libraries for CUDA: proprietary, free to use and to pass on, brought by torch on Linux; this project ships none of them"}

def licence_of(metadata):
    "What a distribution says of its licence: the expression, else its classifiers, else the first line of the text"
    said = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License ::") and not c.endswith("OSI Approved")]
    return metadata.get("License-Expression") or " AND ".join(dict.fromkeys(said)) or (metadata.get("License") or "").strip().partition("\n")[0]

def verdict(name, licence):
    "Why a licence is not accepted, or an empty string"
    if any(re.fullmatch(e, name) for e in EXCEPTIONS) and re.fullmatch(r"|.*NVIDIA.*", licence): return ""
    choices = [[part.strip(" ()") if "Apache" in part or part.count("(") != part.count(")") else part.strip() for part in re.split(r" AND |;", choice)] for choice in licence.split(" OR ")]
    if any(all(re.fullmatch(ALLOWED, part) for part in parts) for parts in choices): return ""
    return f"{name}: {'a licence that is refused' if re.search(REFUSED, licence) else 'a licence that is not known here'}, {licence or 'none given'}"

@pytest.mark.fault("a licence that binds who uses the package, or that nobody has looked at", "requirements.lock", "named")
def test_licences(record_property):
    here = [r for r in LOCK if not r.marker or r.marker.evaluate(default_environment())]
    wrong = [v for r in here if (v := verdict(name_of(r), licence_of(distribution(r.name).metadata)))]
    assert len(here) > 150 and not wrong, wrong
    planted = {"GPL-3.0-only": "refused", "MIT AND AGPL-3.0-or-later": "refused", "GNU General Public License v3 (GPLv3)": "refused", "LGPL-2.1": "refused", "CC-BY-NC-4.0": "refused", "Free for non-commercial use": "refused",
               "LicenseRef-Own": "not known", "": "not known", "MIT OR GPL-2.0": "", "(MIT OR Apache-2.0)": ""}
    for licence, said in planted.items(): assert said in (v := verdict("a", licence)) and bool(v) == bool(said), (licence, v)
    assert verdict("a", "NVIDIA Proprietary Software")
    record_property("provoked", 9)

# Secrets and addresses

def keys_in_history(root, patches):
    "What looks like a key in messages of commits, and in everything that was ever in a file"
    from test_bugs import keys_in
    return keys_in(git(root, "log", "--all", "--format=%an %ae%n%B", *(["-p", "--no-color"] if patches else [])))

SECRETS = {"W&B": "WANDB_API_KEY={}".format("0123456789abcdef"*2 + "01234567"), "GitHub": "ghp_" + "a1B2"*9, "GitHub, new": "github_pat_" + "a1B2c3"*8, "Hugging Face": "hf_" + "aB3d"*9, "AWS": "AKIA" + "ABCD1234"*2,
           "OpenAI": "sk-proj-" + "aB3d"*9, "Google": "AIza" + "aB3d5"*7, "Slack": "xoxb-" + "1234567890-"*2 + "aB3d5", "a private key": "-----BEGIN {} KEY-----".format("OPENSSH PRIVATE"), "a token": "token = '{}'".format("q7"*16)}

@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.fault("a key in a file of the repository, in one that was deleted, in a message", "the repository and its history", "found")
def test_a_planted_key_is_found(kind, tmp_path):
    from test_bugs import files_with_keys
    def commit(message): git(tmp_path, "add", "-A"); git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", message)
    git(tmp_path, "init", "-q"); (tmp_path/"a.txt").write_text("nothing here\n"); commit("nothing")
    assert not files_with_keys(tmp_path) and not keys_in_history(tmp_path, True)
    cell = dict(cell_type="code", source=[], metadata={}, execution_count=1, outputs=[dict(output_type="stream", name="stdout", text=[SECRETS[kind] + "\n"])])
    (tmp_path/"b.ipynb").write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5), indent=1))
    assert [p.name for p in files_with_keys(tmp_path)] == ["b.ipynb"]
    commit("work"); (tmp_path/"b.ipynb").unlink(); commit("gone")
    assert not files_with_keys(tmp_path) and keys_in_history(tmp_path, True) and not keys_in_history(tmp_path, False)
    (tmp_path/"a.txt").write_text("more\n"); commit(f"with {SECRETS[kind]}")
    assert keys_in_history(tmp_path, False)

@pytest.mark.fault("keys looked for in the messages of this repository; in the full form in all that was ever committed", "the history", "none")
def test_no_key_in_the_history(times): assert not keys_in_history(ROOT, times(False, True))

FOREIGN = [re.compile(e) for e in (r"/(?<![\w.~$}/]/)(?:home|Users|root|work|opt|mnt|tmp|var/folders)/[\w.-]+", # a folder of one machine
                                   r"--(?:extra-index-url|index-url|find-links)[ =]+\S*[/:]\S+", r"://[^\s\"'<>]*/simple\b", r"://[^\s\"'<>/@]+:[^\s\"'<>/@]+@\S+")] # an index; a name and a password

@pytest.mark.fault("a path of one machine, the address of a package index", "every file of the repository", "named")
def test_no_machine_and_no_index(record_property):
    planted = ["/home/ann/data", "in /root/x.py", "'/Users/ann'", "--index-url https://example.org/simple", "--extra-index-url=file:///opt/wheels", "https://user:word@example.org/x"]
    for text in planted: assert any(e.search(text) for e in FOREIGN), text
    texts = {p.relative_to(ROOT): p.read_text(errors="ignore") for p in tracked() if p.suffix not in (".gz", ".png", ".safetensors") and p != Path(__file__)}
    found = [f"{p}: {m[0]}" for p, text in texts.items() for e in FOREIGN for m in e.finditer(text)]
    assert not found, found
    record_property("provoked", len(planted))

# Nobody is contacted

@pytest.fixture
def alone(monkeypatch):
    "In this process: addresses that were asked for; each of them is refused"
    for name in ("connect", "connect_ex", "sendto"): monkeypatch.setattr(socket.socket, name, getattr(socket.socket, name))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr"): monkeypatch.setattr(socket, name, getattr(socket, name))
    return runpy.run_path(str(ROOT/"tests/offline/sitecustomize.py"))

@pytest.mark.fault("a process that asks for an address", "tests/offline", "refused and written down")
def test_the_guard_sees_who_is_contacted(tmp_path):
    program = "import socket, urllib.request\nfor f in (lambda: urllib.request.urlopen('http://example.org'), lambda: socket.create_connection(('127.0.0.1', 9)), lambda: socket.socket().connect_ex(('127.0.0.1', 9))):\n    try: f()\n    except OSError: pass\na, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))"
    r = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT/"tests/offline"), "CONTACTED": str(tmp_path/"contacted")}, capture_output=True, text=True)
    assert r.stdout == "b'x'\n", r.stderr
    said = (tmp_path/"contacted").read_text().splitlines()
    assert len(said) == 3 and "example.org" in said[0], said

@pytest.mark.fault("a training without a tracker, sockets blocked", "blip3o_train", "trains, and nobody is contacted")
def test_training_contacts_nobody(tmp_path, monkeypatch, capsys, alone):
    from blip3o_nb.commands.cli import blip3o_train
    from blip3o_nb.core import toy_features
    from blip3o_nb.features.shards import ShardWriter
    monkeypatch.setenv("CONTACTED", str(tmp_path/"contacted"))
    toy = toy_features(24, grid=2)
    with ShardWriter(tmp_path/"features", {"clip": {"model": "toy-clip"}, "eva": {"model": "toy-eva"}}) as w: w.add_batch(toy["keys"], {"clip": toy["clip"], "eva": toy["eva"]}, toy["captions"], [""]*24)
    options = dict(embeddings_dir=tmp_path/"features", output_dir=tmp_path/"run", model_size="nano", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_epochs=1, batch_size=4)
    monkeypatch.setattr(sys, "argv", ["blip3o_train", *(x for k, v in options.items() for x in (f"--{k}", str(v)))])
    blip3o_train()
    assert (tmp_path/"run"/"model.safetensors").exists() and not (tmp_path/"contacted").exists()

# The lowest versions

@pytest.mark.slow
@pytest.mark.fault("every requirement at its lowest version", "a fresh virtual environment", "the demo and notebooks run")
def test_lowest_versions(tmp_path):
    uv, env = BIN/"uv", tmp_path/"env"
    if not uv.exists(): pytest.skip("uv is not installed")
    def run(*cmd, **more):
        r = subprocess.run(list(map(str, cmd)), cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{env/'bin'}{os.pathsep}{os.environ['PATH']}", **more})
        assert r.returncode == 0, (r.stdout + r.stderr)[-3000:]
        return r.stdout
    (tmp_path/"in").write_text("\n".join(map(str, all_declared())))
    run(uv, "venv", "--python", f"{sys.version_info[0]}.{sys.version_info[1]}", env)
    run(uv, "pip", "install", "--quiet", "--python", env/"bin/python", "--resolution", "lowest-direct", "-r", tmp_path/"in")
    installed = {canonicalize_name(n): Version(v) for n, v in (line.split("==") for line in run(uv, "pip", "freeze", "--python", env/"bin/python").splitlines() if "==" in line)}
    assert installed["torch"] < Version(distribution("torch").version.partition("+")[0])
    run(env/"bin/python", "-c", f"import sys; sys.argv = ['blip3o_demo', '--limit', '96', '--epochs', '1', '--out', {str(tmp_path/'demo')!r}]\nfrom blip3o_nb.commands.cli import blip3o_demo; blip3o_demo()")
    assert (tmp_path/"demo"/"report.html").exists()
    for name in LOWEST: run(env/"bin/python", "-c", f"from nbdev.test import nbdev_test; nbdev_test({f'nbs/{name}.ipynb'!r}, n_workers=0)")

LOWEST = ("02_viz", "3_features/06_shards", "3_features/02_encoders", "3_features/03_pretrained", "3_features/04_texts", "3_features/01_images", "2_network/03_nextdit", "4_training/02_learner", "03_options", "6_judging/04_report", "5_generation/03_widgets") # those that use most of other libraries
