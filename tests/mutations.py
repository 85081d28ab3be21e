"""The bug zoo put into the library: each entry changes a few words of one module, in a copy of the package, and names the test that has to fail there."""
import csv, os, shutil, subprocess, sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

class Mutation(NamedTuple):
    bug: int    # its number in the zoo
    words: str  # what is changed
    module: str # file of the package
    old: str    # text that stands there exactly once
    new: str
    test: str   # of test_bugs.py

MUTATIONS = [
    Mutation(1, "every step but the last goes backwards", "flow/samplers.py", "    h = u - t\n    vs = []", "    h = u - t if u == 1 else t - u\n    vs = []",
             "test_sampler_moves_with_the_velocity"),
    Mutation(2, "the network is told 1-t", "flow/samplers.py", "t = torch.full((len(x),), t,", "t = torch.full((len(x),), 1 - t,",
             "test_network_is_told_the_time_of_its_points"),
    Mutation(3, "the loss gets a draw of its own", "training/learner.py", "self.cond_norm.encode(self.x)), (s,)",
             "self.cond_norm.encode(self.x)), (PathSample(s.x0.roll(1, 0), s.x1, s.t, s.xt, s.x1 - s.x0.roll(1, 0)),)", "test_loss_compares_with_the_noise_of_the_input"),
    Mutation(3, "the velocity is that of another noise", "flow/paths.py", "s*x1, x1 - self.removed*x0)", "s*x1, x1 - self.removed*torch.randn_like(x0))",
             "test_loss_compares_with_the_noise_of_the_input"),
    Mutation(4, "the velocity at xt is log_x0(x1)", "flow/paths.py", "v = tangent(xt, (s*theta).cos()*y - theta*(s*theta).sin()*a)", "v = y",
             "test_spherical_velocity_is_tangent_and_arrives"),
    Mutation(5, "the floor of the cosine is that of an unrelated guess", "flow/losses.py", "F.cosine_similarity(-s.x0, s.v, dim=-1)", "F.cosine_similarity(s.x0, s.x1, dim=-1)",
             "test_velocity_cosine_stands_beside_its_trivial_value"),
    Mutation(6, "noise and times start again from the seed in each batch", "training/learner.py", "for p in self.dl.places(self.iter)]",
             "for p in self.dl.places(0)]", "test_noise_and_times_are_fresh_in_every_batch"),
    Mutation(6, "noise and times start again from the seed in each epoch", "training/learner.py", "when = self.epochs - 1 if", "when = 0 if",
             "test_noise_and_times_are_fresh_in_every_batch"),
    Mutation(7, "validation reads the training split", "features/loading.py", 'FeatureDataset(folder, "held_out", share, max_held_out)', 'FeatureDataset(folder, "train", share, max_held_out)',
             "test_validation_has_no_training_picture"),
    Mutation(7, "each worker process reads all pictures", "features/loading.py", "    return dl.of(plan.keys[i], plan.seed, plan.repeat)\n",
             "    dl = dl.of(plan.keys[i], plan.seed, plan.repeat)\n    dl.sample = lambda: iter(dl.get_idxs())\n    return dl\n", "test_worker_processes_share_the_pictures"),
    Mutation(8, "angles are spread for neighbouring channels, pairs are halves", "network/attention.py", "torch.cat([a*cos - b*sin, a*sin + b*cos], -1)",
             "(x*cos.repeat_interleave(2, -1) + torch.cat([-b, a], -1)*sin.repeat_interleave(2, -1))", "test_rotation_keeps_lengths_and_sees_distances_only"),
    Mutation(9, "time is not scaled", "network/dit.py", "scale:float=1000.,", "scale:float=1.,", "test_network_can_tell_times_apart"),
    Mutation(10, "the gate stands before the norm", "network/dit.py", "torch.addcmul(x, gate, post(f(modulate(rms_norm(x), shift, scale))))",
             "x + post(gate*f(modulate(rms_norm(x), shift, scale)))", "test_gate_scales_its_branch"),
    Mutation(11, "gradients are cleared before each batch", "training/learner.py", "        s = self.draw(self.target_norm.encode(self.y))\n",
             "        s = self.draw(self.target_norm.encode(self.y))\n        self.opt.zero_grad()\n", "test_accumulated_gradients_equal_the_large_batch"),
    Mutation(12, "pooling leaves out the final norm", "features/encoders.py", "    x = tower.normed(x, self.stage)\n", "",
             "test_pooled_tokens_are_the_towers_own_embedding"),
    Mutation(12, "pooling leaves out the projection", "features/encoders.py", '(x if self.stage == "projected" else tower.project(x)).mean(1)', "x.mean(1)",
             "test_pooled_tokens_are_the_towers_own_embedding"),
    Mutation(12, "the report has no ceiling", "judging/evaluate.py", 'add("real tokens", "ceiling",', 'add("real tokens", "baseline",', "test_every_report_has_floor_and_ceiling"),
    Mutation(13, "a key stands in the learner", "training/learner.py", "from functools import partial\n", "from functools import partial\nWANDB_API" + "_KEY = '" + "0123456789abcdef"*2 + "'\n",
             "test_no_key_in_the_repository"),
]

SHIM = "import blip3o_nb, pytest, sys; print('imported', blip3o_nb.__file__); sys.exit(pytest.main(sys.argv[1:]))"

def run(folder, *tests):
    "Named tests on the package in `folder`, in a process of its own: exit code and output"
    args = [f"{ROOT}/tests/test_bugs.py::{t}" for t in tests]
    r = subprocess.run([sys.executable, "-c", SHIM, "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider", "-q", "--tb=short", "-x", *args], cwd=folder,
                       capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"})
    assert f"imported {folder}/blip3o_nb/__init__.py" in r.stdout, r.stdout + r.stderr
    return r.returncode, r.stdout

def copy(folder):
    "The package's modules in a new folder, its data by reference"
    (folder/"blip3o_nb").mkdir(parents=True)
    for f in (ROOT/"blip3o_nb").rglob("*.py"):
        to = folder/f.relative_to(ROOT)
        to.parent.mkdir(exist_ok=True)
        shutil.copy(f, to)
    (folder/"blip3o_nb"/"data").symlink_to(ROOT/"blip3o_nb"/"data")
    return folder

def mutate(m, folder):
    f = copy(folder)/"blip3o_nb"/m.module
    text = f.read_text()
    assert text.count(m.old) == 1, f"{m.module} has {text.count(m.old)} places that read {m.old!r}"
    f.write_text(text.replace(m.old, m.new))
    return folder

def run_all(tmp):
    "A row for each mutation, after a pass of all their tests on an unchanged copy"
    code, out = run(copy(tmp/"unchanged"), *dict.fromkeys(m.test for m in MUTATIONS))
    assert code == 0, out
    rows = []
    for i, m in enumerate(MUTATIONS):
        code, out = run(mutate(m, tmp/str(i)), m.test)
        said = next((l[1:].strip() for l in out.splitlines() if l.startswith("E ")), "")
        rows.append(dict(bug=m.bug, mutation=m.words, module=m.module, test=m.test, result={0: "passes", 1: "fails"}.get(code, f"exit {code}"),
                         assertion=said.removeprefix("AssertionError: ")))
    return rows

def write(rows, path):
    with open(path, "w", newline="") as f:
        w = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        w.writeheader(); w.writerows(rows)
