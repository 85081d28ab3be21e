"""`blip3o_demo` from a shell: what a small run leaves behind, a second run, the same from the built wheel, what bad input does (unknown names stand in 8_commands/02_cli), the help of every program; and the full run's figures."""
import configparser, io, json, os, re, shutil, subprocess, sys, sysconfig, venv
from contextlib import redirect_stderr
from pathlib import Path
from unittest.mock import patch
import pytest
import torch
from blip3o_nb.commands.cli import blip3o_demo

ROOT, BIN = Path(__file__).parents[1], Path(sys.executable).parent
SMALL = ["--limit", "96", "--epochs", "1"]

settings = configparser.ConfigParser(delimiters=["="]); settings.read(ROOT/"settings.ini")
PROGRAMS = [line.split("=")[0] for line in settings["DEFAULT"]["console_scripts"].split() if line.startswith("blip3o_")]

def run(*cmd, cwd): return subprocess.run(list(map(str, cmd)), cwd=cwd, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})

def wheel_of(folder):
    source = folder/"source" # building leaves files behind
    source.mkdir()
    for name in ("pyproject.toml", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT/name, source)
    shutil.copytree(ROOT/"blip3o_nb", source/"blip3o_nb", ignore=shutil.ignore_patterns("__pycache__"))
    r = run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    assert r.returncode == 0, r.stderr
    return next(folder.glob("*.whl"))

def demo_in(env, folder, *args):
    "Nothing but `runs` appears in the folder"
    folder.mkdir()
    r = run(env/"bin/blip3o_demo", *args, cwd=folder)
    assert r.returncode == 0, r.stderr
    assert (folder/"runs/demo/report.html").exists() and [p.name for p in folder.iterdir()] == ["runs"]
    return folder/"runs/demo"

def demo(*args, before=()): return subprocess.run([*before, str(BIN/"blip3o_demo"), *map(str, args)], capture_output=True, text=True)

ALONE = ["unshare", "-rn"] if shutil.which("unshare") and not subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode else [] # without any network, where this machine allows that

def refused(args, *words):
    "Exit code 2 and one line on stderr that has these words; in this process, which has the libraries already"
    with patch.object(sys, "argv", ["blip3o_demo", *map(str, args)]), redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as e: blip3o_demo()
    said = err.getvalue()
    assert e.value.code == 2 and len(said.splitlines()) == 1 and all(w in said for w in words), said

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "Made with sockets blocked, see tests/offline"
    out = tmp_path_factory.mktemp("demo")/"run"
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", os.pathsep.join([str(ROOT/"tests/offline"), *filter(None, [os.environ.get("PYTHONPATH")])])); m.setenv("CONTACTED", str(out.parent/"contacted"))
        r = demo("--out", out, *SMALL, before=ALONE)
    assert r.returncode == 0, r.stderr
    return out

@pytest.mark.fault("no network: each address is refused, and there is no other interface where the machine allows that", "blip3o_demo", "it runs to its end and asks for none")
def test_nobody_is_contacted(small): assert not (small.parent/"contacted").exists(), (small.parent/"contacted").read_text()

def test_small_run_leaves_report_and_checkpoint(small):
    page = (small/"report.html").read_text()
    assert page.count("data:image/png;base64,") >= 5
    assert "http://" not in page and "https://" not in page
    report = json.loads((small/"report.json").read_text())
    assert [r["role"] for r in report["rows"]].count("floor") == 4
    assert page.index('alt="Pictures"') < page.index("<table>") and (small/"figures"/"pictures.png").exists()
    assert {"nearest training image", "the image itself", "ridge", "regression", "flow", "real tokens"} <= {r["name"] for r in report["rows"]}

def test_checkpoint_loads_again(small):
    from blip3o_nb.generation.pipeline import Pipeline
    from blip3o_nb.features.shards import FeatureDataset
    held = FeatureDataset(small/"features", "held_out")
    pipe = Pipeline.from_pretrained(small/"checkpoint", task="clip_generation")
    a, b = pipe(held.column("eva")), pipe(held.column("eva"))
    assert a.shape == held.column("clip").shape and torch.equal(a, b)

def test_second_run_reuses(small, capsys):
    before = {f: f.stat().st_mtime_ns for f in small.rglob("*") if f.is_file()}
    with patch.object(sys, "argv", ["blip3o_demo", "--out", str(small), *SMALL]): blip3o_demo()
    assert (said := capsys.readouterr().out).count("there already") == 4, said
    assert before == {f: f.stat().st_mtime_ns for f in before}

def test_wheel_does_the_same_in_an_empty_folder(small, tmp_path):
    "Installed into an environment with the libraries of this one (without what is installed for editing), it ends at the same figures"
    env, wheel = tmp_path/"env", wheel_of(tmp_path)
    venv.create(env, with_pip=False)
    here = next((env/"lib").glob("python*/site-packages"))
    (here/"libraries.pth").write_text(sysconfig.get_path("purelib"))
    r = run(sys.executable, "-m", "pip", "--python", env/"bin/python", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    r = run(env/"bin/python", "-c", "import blip3o_nb; print(blip3o_nb.__file__)", cwd=tmp_path)
    assert str(env) in r.stdout, r.stdout + r.stderr
    a, b = (json.loads((d/"report.json").read_text())["rows"] for d in (small, demo_in(env, tmp_path/"empty", *SMALL)))
    assert a == b

@pytest.mark.slow
def test_wheel_with_its_own_libraries(tmp_path):
    env, uv = tmp_path/"env", BIN/"uv"
    if not uv.exists(): pytest.skip("uv is not installed")
    wheel = wheel_of(tmp_path)
    venv.create(env, with_pip=False)
    r = run(uv, "pip", "install", "--quiet", "--python", env/"bin/python", wheel, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    demo_in(env, tmp_path/"empty", *SMALL)

LIBRARIES = {"torch", "torchvision", "fastai", "open_clip", "transformers", "timm", "numpy", "pandas", "matplotlib"}

@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program, tmp_path):
    "It comes at once: none of the large libraries is imported for it. Every option has a heading and its default"
    command, env = [Path(sys.executable).parent/program, "--help"], {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    r = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in r.stderr.splitlines()}
    assert r.returncode == 0 and "blip3o_nb" in imported and not imported & LIBRARIES, imported & LIBRARIES
    groups = re.findall(r"^([a-z][^\n]*):$", r.stdout, re.M)
    assert len(groups) >= 3, groups
    for option in re.split(r"\n  (?=--)", r.stdout.partition("options:")[2])[1:]:
        assert "(default:" in " ".join(option.split()), option
    assert not list(tmp_path.iterdir())

def test_checkpoint_of_another_task_is_refused(small):
    refused(["--out", small, *SMALL, "--task", "eva_reproduction"], "clip_generation", "--fresh")

def test_other_options_are_refused(small):
    refused(["--out", small, *SMALL, "--lr", "0.5"], "lr", "--fresh")

def test_corrupt_tar_is_refused(tmp_path):
    from blip3o_nb.files import data_path
    good = data_path("emoji.tar.gz").read_bytes()
    bad = tmp_path/"bad.tar"
    bad.write_bytes(b"this is no tar" * 1000)
    refused(["--out", tmp_path/"run", "--images", bad], "bad.tar")
    cut = tmp_path/"cut.tar.gz"
    cut.write_bytes(good[:len(good)//50])
    refused(["--out", tmp_path/"run2", "--images", cut], "cut.tar.gz")
    assert not (tmp_path/"run").exists() and not (tmp_path/"run2").exists()

def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path/"file").write_text("")
    refused(["--out", tmp_path/"file"/"run"], "--out")

@pytest.mark.slow
def test_full_demo_reaches_its_bar(tmp_path):
    "Bars a little below the figures of the README, with the options a newcomer gets"
    r = demo("--out", tmp_path/"run")
    assert r.returncode == 0, r.stderr
    report = json.loads((tmp_path/"run"/"report.json").read_text())
    rows = {x["name"]: x["scores"] for x in report["rows"]}
    value = lambda name, metric: rows[name][metric]["value"]
    assert rows["flow"]["centred"]["n"] >= 500
    assert value("flow", "centred") >= .90
    assert value("flow", "centred") > value("ridge", "centred")
    assert value("flow", "i2t R@5") >= .85*value("real tokens", "i2t R@5")
    assert value("shuffled conditioning", "centred") < .5*value("flow", "centred")
    assert value("real tokens", "PSNR") > 25 and value("flow", "PSNR") > 23 > value("nearest training image", "PSNR")
