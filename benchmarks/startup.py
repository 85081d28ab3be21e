"How long the first second is: a process that imports, and a command that explains itself."
import sys
from machine import median, now, spread, turns
import json, subprocess

WAYS = {"an empty Python": "pass", "import blip3o_nb": "import blip3o_nb", "import torch": "import torch", "from blip3o_nb.network.dit import *": "from blip3o_nb.network.dit import *",
        "from blip3o_nb.training.learner import *": "from blip3o_nb.training.learner import *", "blip3o_train --help": "import sys; sys.argv = ['blip3o_train', '--help']; from blip3o_nb.commands.cli import blip3o_train; blip3o_train()"}
HEAVY = ("torch", "fastai", "open_clip", "transformers", "timm", "diffusers", "matplotlib", "pandas")

def run(code): return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

def process(code):
    begun = now(); run(code)
    return now() - begun

def main(quick=False):
    took = turns({k: (lambda c=c: process(c)) for k, c in WAYS.items()}, 1 if quick else 7)
    loaded = {k: json.loads(run(f"{WAYS[k]}\nimport sys, json\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))").splitlines()[-1]) for k in ("import blip3o_nb", "from blip3o_nb.network.dit import *")}
    return dict(seconds={k: median(v) for k, v in took.items()}, spread={k: spread(v) for k, v in took.items()}, loaded=loaded)
