"""`blip3o_demo` from a shell: what a small run leaves behind, a second run, what bad input does (unknown names stand in 16_cli); and the full run's figures."""
import json, os, subprocess, sys, time
from pathlib import Path
import pytest
import torch

BIN = Path(sys.executable).parent
SMALL = ["--limit", "192", "--epochs", "2", "--bs", "32"]

def demo(*args, **env):
    return subprocess.run([str(BIN/"blip3o_demo"), *map(str, args)], capture_output=True, text=True, env={**os.environ, **env})

def refused(r, *words):
    "Exit code 2 and one line on stderr that has these words"
    assert r.returncode == 2, r.stderr
    assert len(r.stderr.splitlines()) == 1, r.stderr
    assert all(w in r.stderr for w in words), r.stderr

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")/"run"
    r = demo("--out", out, *SMALL)
    assert r.returncode == 0, r.stderr
    return out

def test_help_is_quick():
    took = []
    for _ in range(5): # other tests may keep both cores busy
        start = time.time(); r = demo("--help"); took.append(time.time() - start)
    assert r.returncode == 0 and "--fresh" in r.stdout
    assert min(took) < 2

def test_small_run_leaves_report_and_checkpoint(small):
    page = (small/"report.html").read_text()
    assert page.count("data:image/png;base64,") >= 5
    assert "http://" not in page and "https://" not in page
    report = json.loads((small/"report.json").read_text())
    assert [r["role"] for r in report["rows"]].count("floor") == 2
    assert {"ridge", "regression", "flow", "real tokens"} <= {r["name"] for r in report["rows"]}

def test_checkpoint_loads_again(small):
    from blip3o_nb.inference import Pipeline
    from blip3o_nb.shards import FeatureDataset
    held = FeatureDataset(small/"features", "held_out")
    pipe = Pipeline.from_pretrained(small/"checkpoint", task="clip_generation")
    a, b = pipe(held.column("eva")), pipe(held.column("eva"))
    assert a.shape == held.column("clip").shape and torch.equal(a, b)

def test_second_run_reuses(small):
    before = {f: f.stat().st_mtime_ns for f in small.rglob("*") if f.is_file()}
    r = demo("--out", small, *SMALL)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count("there already") == 4, r.stdout
    assert before == {f: f.stat().st_mtime_ns for f in before}

def test_same_seed_same_figures(small, tmp_path):
    r = demo("--out", tmp_path/"again", *SMALL)
    assert r.returncode == 0, r.stderr
    a, b = (json.loads((d/"report.json").read_text())["rows"] for d in (small, tmp_path/"again"))
    assert a == b

def test_checkpoint_of_another_task_is_refused(small):
    refused(demo("--out", small, *SMALL, "--task", "eva_reproduction"), "clip_generation", "--fresh")

def test_other_options_are_refused(small):
    refused(demo("--out", small, *SMALL, "--lr", "0.5"), "lr", "--fresh")

def test_corrupt_tar_is_refused(tmp_path):
    from blip3o_nb.core import data_path
    good = data_path("openclipart.tar.gz").read_bytes()
    bad = tmp_path/"bad.tar"
    bad.write_bytes(b"this is no tar" * 1000)
    refused(demo("--out", tmp_path/"run", "--images", bad), "bad.tar")
    cut = tmp_path/"cut.tar.gz"
    cut.write_bytes(good[:len(good)//50])
    refused(demo("--out", tmp_path/"run2", "--images", cut), "cut.tar.gz")
    assert not (tmp_path/"run").exists() and not (tmp_path/"run2").exists()

def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path/"file").write_text("")
    refused(demo("--out", tmp_path/"file"/"run"), "--out")

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
