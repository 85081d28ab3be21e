"The benchmark runs, in its toy form; how fast anything is, is not tested here."
import json, math, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]

def figures(x):
    if isinstance(x, dict): x = x.values()
    return [y for v in x for y in figures(v)] if isinstance(x, (list, type({}.values()))) else [x]

def bench(tmp_path, *parts):
    out = tmp_path/"performance.json"
    r = subprocess.run([sys.executable, ROOT/"benchmarks/bench.py", *parts, "--quick", "--device", "cpu", "--gb", ".1", "--folder", tmp_path, "--out", out], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    return json.loads(out.read_text())["cpu"]

@pytest.mark.parametrize("parts", [("steps", "sampling", "learner"), pytest.param(("ceilings", "startup", "scaling", "extraction", "loading"), marks=pytest.mark.slow)], ids=["networks", "others"])
def test_parts(tmp_path, parts):
    record = bench(tmp_path, *parts)
    assert set(record) == {"about", *parts}
    assert all(math.isfinite(v) for v in figures(record) if isinstance(v, (int, float)))
    if "steps" in parts:
        rows = record["steps"]["training"]["tiny"]["rows"]
        assert {k.partition(",")[0] for k in rows} == {"blip3o_nb", "Lumina", "lineage"} and all(r["model_flops"] > 0 for r in rows.values())
        assert record["steps"]["attention"]["took_mb"] < record["steps"]["attention"]["weights_mb"]/2 # the weights of attention are never formed
        assert record["sampling"]["base"]["cache_difference"] < 1e-4

def test_unknown_part(tmp_path):
    r = subprocess.run([sys.executable, ROOT/"benchmarks/bench.py", "nothing"], capture_output=True, text=True)
    assert r.returncode == 2 and "no part nothing: choose of ceilings, " in r.stderr
