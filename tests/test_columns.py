"""Two columns of a stranger's names and widths, from images to a report: in Python, and by the commands.

`dots` are 261 tokens of 384 channels, five of them in front of a grid of 16 x 16; `strips` are 196 of 48."""
import json, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest, torch
from PIL import Image
from blip3o_nb import (BLIP3oDiT, BLIP3oDiTConfig, FeatureDataset, Pipeline, Task, evaluate, extract,
                       feature_dls, flow_learner, save_checkpoint, write_report)

BIN = Path(sys.executable).parent
SHAPES = {"dots": (261, 384), "strips": (196, 48)}

STRANGER = '''
import numpy as np, torch

class Patches:
    "Patches of an image through a fixed random matrix, and some tokens in front that hold the mean"
    device = torch.device("cpu")
    def __init__(self, name, grid, patch, width, prefix):
        self.grid, self.patch, self.width, self.prefix = grid, patch, width, prefix
        self.num_tokens = prefix + grid**2
        g = torch.Generator().manual_seed(len(name))
        self.weight = torch.randn(3*patch**2, width, generator=g)/patch
        self.contract = dict(model=f"python:stranger:{name}", weights="fixed", stage="hidden", layout="own",
                             width=width, num_tokens=self.num_tokens, prefix=prefix, grid=grid,
                             image_size=grid*patch)
    def preprocess(self, image):
        side = self.grid*self.patch
        return torch.from_numpy(np.array(image.convert("RGB").resize((side, side)))).permute(2, 0, 1)/255
    def tokens(self, pixels):
        x = torch.nn.functional.unfold(pixels, self.patch, stride=self.patch).transpose(1, 2) @ self.weight
        return torch.cat([x.mean(1, keepdim=True).expand(-1, self.prefix, -1), x], 1)

def dots(): return Patches("dots", 16, 6, 384, 5)
def strips(): return Patches("strips", 14, 7, 48, 0)
'''

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with 40 images, and the stranger's module"
    root = tmp_path_factory.mktemp("columns")
    (root/"stranger.py").write_text(STRANGER)
    (root/"images").mkdir()
    draw = np.random.default_rng(0)
    for i in range(40):
        small = draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((96, 96), Image.BICUBIC).save(root/"images"/f"{i:03d}.png")
        (root/"images"/f"{i:03d}.txt").write_text(f"image {i}")
    return root

def run(place, *command, code=0):
    "What a program prints, on stderr where it is to fail"
    found = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": found}
    r = subprocess.run(list(map(str, command)), cwd=place, capture_output=True, text=True, env=env)
    assert r.returncode == code, r.stdout + r.stderr
    return r.stderr if code else r.stdout

LOAD = """
import sys, torch
from blip3o_nb import FeatureDataset, Pipeline
pipe = Pipeline.from_pretrained(sys.argv[1])
cond = FeatureDataset(sys.argv[2], "held_out").column(pipe.task.cond)[:2]
torch.save((pipe.task, pipe(cond, seed=3)), sys.argv[3])
"""

def test_in_python(place):
    "Extract, train, save, load in a fresh process, sample, evaluate, report"
    sys.path.insert(0, str(place))
    try: import stranger
    finally: sys.path.remove(str(place))
    encoders = {name: getattr(stranger, name)() for name in SHAPES}
    ds = extract(place/"images", place/"features", encoders, progress=False)
    assert {n: tuple(ds.shape(n)) for n in ds.columns} == SHAPES
    assert (ds.layout("dots").prefix, ds.layout("dots").grid) == (5, 16)
    task = Task("strips_from_dots", "strips", "dots")
    dls = feature_dls(place/"features", task, bs=8, seed=0)
    torch.manual_seed(0)
    model = BLIP3oDiT(BLIP3oDiTConfig.from_preset("nano", num_hidden_layers=2, **dls.sizes))
    learn = flow_learner(dls, model, lr=1e-3, progress=False)
    learn.fit(1)
    folder = save_checkpoint(learn, place/"checkpoint")
    held = FeatureDataset(place/"features", "held_out")
    here = Pipeline.from_learner(learn)(held.column("dots")[:2], seed=3)
    run(place, sys.executable, "-c", LOAD, folder, place/"features", place/"there.pt")
    same_task, there = torch.load(place/"there.pt", weights_only=False)
    assert same_task == task and there.shape == (2, *SHAPES["strips"])
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
    report = evaluate(folder, place/"features", place/"evaluation")
    assert (write_report(report, place/"evaluation", place/"images")).exists()
    found = json.loads((place/"evaluation"/"report.json").read_text())
    rows = {r["name"]: r["scores"] for r in found["rows"]}
    assert all("cosine" in scores for scores in rows.values()) and "real tokens" in rows

def test_by_the_commands(place):
    "The same from a shell, in the other direction; an encoder is named by where Python finds it"
    said = run(place, BIN/"blip3o_extract", "--images", "images", "--out", "set", "--dtype", "fp32",
               "--encoder", "dots=python:stranger:dots", "--encoder", "strips=python:stranger:strips")
    assert "dots [261, 384]" in said and "strips [196, 48]" in said
    run(place, BIN/"blip3o_train", "--target", "dots", "--cond", "strips", "--embeddings_dir", "set",
        "--output_dir", "run", "--model_size", "nano", "--num_hidden_layers", "2",
        "--num_epochs", "1", "--batch_size", "8", "--eval_samples", "4")
    assert Pipeline.from_pretrained(place/"run").task.name == "dots_from_strips"
    run(place, BIN/"blip3o_eval", "run", "--embeddings_dir", "set", "--out", "scores", "--images", "images")
    assert (place/"scores"/"report.html").exists()
    sample = BIN/"blip3o_sample", "run", "--images", "images", "--out", "samples"
    assert "does not start code" in run(place, *sample, code=2)
    run(place, *sample, "--encoder", "strips=python:stranger:strips")
    assert len((place/"samples"/"samples.jsonl").read_text().splitlines()) == 40

def test_one_column_at_a_time(place):
    "By two commands the set is the same as by one"
    for name in SHAPES:
        run(place, BIN/"blip3o_extract", "--images", "images", "--out", "apart", "--dtype", "fp32",
            "--encoder", f"{name}=python:stranger:{name}")
    run(place, BIN/"blip3o_extract", "--images", "images", "--out", "both", "--dtype", "fp32",
        *[x for name in SHAPES for x in ("--encoder", f"{name}=python:stranger:{name}")])
    files = [p.relative_to(place/"both") for p in sorted((place/"both").rglob("*.safetensors"))]
    assert files and all((place/"apart"/f).read_bytes() == (place/"both"/f).read_bytes() for f in files)
