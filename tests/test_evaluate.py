"""Evaluations that are large, killed, or fed with what cannot be judged: memory, resumption, and what is said."""
import json, signal, subprocess, sys, time
import pytest, torch
from safetensors.torch import load_file, save_file
from blip3o_nb.files import InputError, read_json, write_json
from blip3o_nb.core import layout_of, seed_everything, toy_features
from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
from blip3o_nb.judging.evaluate import evaluate
from blip3o_nb.judging.report import patch_grid
from blip3o_nb.generation.pipeline import save_checkpoint
from blip3o_nb.training.learner import flow_learner
from blip3o_nb.features.loading import feature_dls
from blip3o_nb.features.shards import FeatureDataset, ShardWriter

def shards(folder, n, **kw):
    toy = toy_features(n)
    with ShardWriter(folder, {"clip": {"model": "toy-clip"}, "eva": {"model": "toy-eva"}}, **kw) as w:
        w.add_batch(toy["keys"], {"clip": toy["clip"], "eva": toy["eva"]}, toy["captions"], [""]*n)
    return folder

def checkpoint(features, folder, share=.15, layout=None, tokens=17):
    seed_everything(0)
    config = BLIP3oDiTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                             num_tokens=tokens, clip_embedding_size=32, eva_embedding_size=48)
    dls = feature_dls(features, bs=64, share=share, max_samples=256, max_held_out=64, layout=layout)
    learn = flow_learner(dls, BLIP3oDiT(config), lr=3e-3, progress=False)
    learn.fit(1)
    return save_checkpoint(learn, folder)

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return shards(root/"features", 300), checkpoint(root/"features", root/"flow")

PROGRAM = """
import json, resource, sys
from blip3o_nb import evaluate
flow, features, out, n = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3 # MB
if int(n): evaluate(flow, features, num_samples=200, samples=1, progress=False) # what a small one needs, libraries included
before = peak()
report = evaluate(flow, features, out, samples=1)
print(json.dumps(dict(report=report.to_dict(), before=before, after=peak())))
"""

def run(*args, **kw): return subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

@pytest.mark.fault("kill -9 in the middle", "evaluation of many samples", "the same report, what was judged is not judged again; memory as for 200 pictures")
@pytest.mark.slow # test_kills has a shorter one
@pytest.mark.parametrize("n", [600, 10_000])
def test_many_samples_stream_and_survive_a_kill(tmp_path, n):
    "Of n pictures about half are held out: memory stays that of 200, progress is shown; killed in the middle, the same call ends at the same report"
    features = shards(tmp_path/"features", n)
    flow = checkpoint(features, tmp_path/"flow", share=.5)
    batches = -(-len(FeatureDataset(features, "held_out", .5))//32)
    killed = run(flow, features, tmp_path/"out", 0)
    deadline = time.time() + 120
    while len(list(tmp_path.glob("out/parts-*/*.safetensors"))) < batches//5 and killed.poll() is None and time.time() < deadline: time.sleep(.05)
    killed.send_signal(signal.SIGKILL); killed.wait()
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/parts-*/*.safetensors")}
    assert batches//5 <= len(done) < batches
    resumed, whole = (p.communicate(timeout=300) for p in (run(flow, features, tmp_path/"out", 0), run(flow, features, tmp_path/"other", 200)))
    assert "evaluate: " in whole[1] and f"{batches}/{batches}" in whole[1], whole[1][-500:]
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())
    a, b = (json.loads(x[0].splitlines()[-1]) for x in (resumed, whole))
    assert a["report"] == b["report"] and b["report"]["facts"]["images"] > .48*n
    assert b["after"] - b["before"] < 150, f"{b['after'] - b['before']:.0f} MB more than for 200 pictures"

@pytest.mark.fault("NaN in features of another hand", "evaluation", "the picture is named, nothing is scored")
def test_features_that_are_not_numbers(small, tmp_path):
    "NaN in a shard is named with its picture, and nothing is scored"
    features, flow = small
    toy, bad = toy_features(300), tmp_path/"bad"
    shards(bad, 300, dtype="fp32")
    held = FeatureDataset(bad, "held_out")
    [f] = bad.glob("eva/*.safetensors")
    tensors, said = load_file(f), read_json(f.with_suffix(".json"))
    tensors["tokens"][said["keys"].index(held.keys[3]), 0, 10] = torch.nan
    save_file(tensors, f) # by another hand, which writes no checksums
    write_json(f.with_suffix(".json"), said | dict(bytes=f.stat().st_size, sha256="", checksums={}))
    with pytest.raises(InputError, match=f"eva features in .* first '{held.keys[3]}'"): evaluate(flow, bad, tmp_path/"out", progress=False)
    assert not list(tmp_path.glob("out/report*"))

def test_a_network_that_diverged(small, tmp_path):
    "Weights that are not numbers are an error with the row's name, not a table of NaN"
    import shutil
    features, flow = small
    shutil.copytree(flow, tmp_path/"flow")
    state = load_file(tmp_path/"flow"/"model.safetensors"); next(iter(state.values())).fill_(torch.nan); save_file(state, tmp_path/"flow"/"model.safetensors")
    with pytest.raises(InputError, match="generated tokens of .* are not finite"): evaluate(tmp_path/"flow", features, progress=False)

def test_duplicate_keys(small, tmp_path):
    "A set that lists an image twice is refused by the file's name"
    import shutil
    features, flow = small
    shutil.copytree(features, tmp_path/"twice")
    part = next((tmp_path/"twice"/"samples").glob("*.json"))
    write_json(part, {k: v*2 if isinstance(v, list) else v for k, v in read_json(part).items()})
    with pytest.raises(InputError, match="part-00000.json is damaged"): evaluate(flow, tmp_path/"twice", progress=False)

def test_other_features_and_folders(small, tmp_path):
    features, flow = small
    toy = toy_features(300)
    with ShardWriter(tmp_path/"other", {"clip": {"model": "toy-clip"}, "eva": {"model": "another"}}) as w: w.add_batch(toy["keys"], {"clip": toy["clip"], "eva": toy["eva"]}, toy["captions"], [""]*300)
    (tmp_path/"empty").mkdir()
    for features_, message in ((tmp_path/"other", "model 'toy-eva', .* has 'another'"), (tmp_path/"empty", "is no set of features")):
        with pytest.raises(InputError, match=message): evaluate(flow, features_, progress=False)
    with pytest.raises(InputError, match="no checkpoint in"): evaluate(tmp_path/"empty", features, progress=False)

def test_a_training_on_fewer_tokens_than_are_stored(tmp_path):
    "Its report is of the tokens that it generates: patches at their places, and no CLS among them"
    toy = toy_features(300)
    contract = {c: {"model": f"toy-{c}", "layout": "cls_patch", "prefix": 1} for c in ("clip", "eva")}
    with ShardWriter(tmp_path/"features", contract) as w:
        w.add_batch(toy["keys"], {"clip": toy["clip"], "eva": toy["eva"]}, toy["captions"], [""]*300)
    flow = checkpoint(tmp_path/"features", tmp_path/"flow", layout="patch_only", tokens=16)
    report = evaluate(flow, tmp_path/"features", samples=1, progress=False)
    assert report.layout == layout_of(16, 0)
    assert patch_grid(report, report.main.patches).shape[-2:] == (4, 4)

def test_features_whose_encoder_is_not_known(tmp_path):
    "Without a model in the contract there are no captions, and the report says so"
    toy = toy_features(300)
    with ShardWriter(tmp_path/"features", {"clip": {}, "eva": {}}) as w: w.add_batch(toy["keys"], {"clip": toy["clip"], "eva": toy["eva"]}, toy["captions"], [""]*300)
    report = evaluate(checkpoint(tmp_path/"features", tmp_path/"flow"), tmp_path/"features", samples=1, progress=False)
    assert "i2t R@5" not in report.main.scores and "centred" in report.main.scores
    assert any("mean token stands for them" in n for n in report.notes)
