"""Evaluations that are large, killed, or fed with what cannot be judged: memory, resumption, and what is said."""
import json, shutil, signal, subprocess, sys, time
from types import SimpleNamespace
import pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from blip3o_nb.files import InputError, data_path, read_json, write_json
from blip3o_nb.core import get_task, layout_of, seed_everything, toy_features
from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
from blip3o_nb.judging.evaluate import IMAGE_ROWS, difference, evaluate, second_eye
from blip3o_nb.judging.metrics import METRICS, TABLE, Figure, Metric, register
from blip3o_nb.judging.report import page, patch_grid, table, write_report
from blip3o_nb.features.encoders import load_encoder
from blip3o_nb.features.extract import extract
from blip3o_nb.features.images import read_images
from blip3o_nb.generation.pipeline import save_checkpoint
from blip3o_nb.generation.pixels import Decoder
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

# Images

@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "Eighty of the shipped images in a folder, their tokens, and a flow of one epoch"
    root, source = tmp_path_factory.mktemp("drawn"), read_images(data_path("emoji.tar.gz"))
    (root/"images").mkdir()
    for i in range(80):
        image = root/"images"/f"{i:03}.png"
        source[50*i].image.save(image)
        image.with_suffix(".txt").write_text(source[50*i].caption)
    extract(root/"images", root/"features", {"clip": load_encoder("tiny-clip"), "eva": load_encoder("tiny-eva")}, progress=False)
    dls = feature_dls(root/"features", "clip_generation", bs=32)
    seed_everything(0)
    config = BLIP3oDiTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **dls.sizes)
    learn = flow_learner(dls, BLIP3oDiT(config), lr=3e-3, progress=False)
    learn.fit(1)
    save_checkpoint(learn, root/"flow")
    return root

def judged(root, out=None, decoder="tiny-clip", images=None, **kw):
    return evaluate(root/"flow", root/"features", out, samples=1, bs=4, decoder=decoder, images=images or root/"images",
                    progress=False, **kw)

def parts(out): return {p: p.stat().st_mtime_ns for p in out.glob("parts-*/*")}

def test_an_evaluation_of_images_resumes(drawn, tmp_path):
    "What was judged is not judged again, the report is the same; another decoder is another evaluation"
    first = judged(drawn, tmp_path)
    before = parts(tmp_path)
    lost = sorted(before)[1]
    lost.unlink()
    again = judged(drawn, tmp_path)
    assert again.to_dict() == first.to_dict() and again.pictured == first.pictured
    assert all(torch.equal(again.pictures[k], v) for k, v in first.pictures.items())
    assert {p for p, t in parts(tmp_path).items() if before[p] != t} == {lost}
    flat = Decoder.fit(drawn/"features", "clip", drawn/"images", "linear", device="cpu")
    other = judged(drawn, tmp_path, flat)
    evaluate(drawn/"flow", drawn/"features", tmp_path, samples=1, bs=4, progress=False)
    judged(drawn, tmp_path, second=load_encoder("tiny-clip", layout="patch_only"))
    assert len(set(p.parent for p in parts(tmp_path))) == 4
    a, b = (r.row("real tokens") for r in (first, other))
    assert difference(a, b, "PSNR").low > 0 and other.facts["decoder"] == "Decoder"
    assert torch.equal(a.values["cosine"], b.values["cosine"])

def test_a_strangers_metric_of_images(drawn):
    "One row, and every method has it in every table; other measures of the real tokens stay ceilings"
    register(Metric("brightness", lambda drawn: drawn.mean((1, 2, 3)), ("drawn",), better="", shown=TABLE, group="Mine",
                    figures=(Figure("Brightness", "histogram"),)))
    try:
        report = judged(drawn)
        rows = {r.name: r for r in report.rows}
        assert set(IMAGE_ROWS) < set(rows) and all("brightness" in r.scores for r in rows.values())
        assert rows["mean image"].values["brightness"].std() < 1e-6 < rows["the image itself"].values["brightness"].std()
        assert "brightness" in str(report) and "<h2>Mine</h2>" in page(report, {}) and table(report).count(",brightness,") == len(rows)
        assert [n for n in report.notes if n.startswith("Images: ")]
    finally: del METRICS["brightness"]

def test_a_decoder_of_a_stranger(drawn, tmp_path):
    "Images of another size are brought to that of the tower; what are none are refused"
    class Grey:
        def pictures(self, tokens): return torch.full((len(tokens), 3, 40, 40), .5)
    report = judged(drawn, decoder=Grey())
    assert report.pictures["flow"].shape[2:] == report.pictures["the image"].shape[2:] == (96, 96)
    assert report.facts["decoder"] == "Grey" and report.row("flow").scores["PSNR to decoded real"].value > 99
    assert "alt=\"Pictures\"" in write_report(report, tmp_path).read_text() and (tmp_path/"figures"/"pictures.svg").exists()
    Grey.pictures = lambda self, tokens: torch.full((len(tokens), 40, 40), .5)
    with pytest.raises(InputError, match="which are no images"): judged(drawn, decoder=Grey())

@pytest.mark.parametrize("message", ["has no image", "is another than the one that was extracted"])
def test_images_that_are_not_those_of_the_features(drawn, tmp_path, message):
    shutil.copytree(drawn/"images", tmp_path/"images")
    held = FeatureDataset(drawn/"features", "held_out").keys[3]
    changed = next((tmp_path/"images").glob(f"{held}*.png"))
    if "another" in message: Image.new("RGB", (96, 96), "red").save(changed)
    else: changed.unlink()
    with pytest.raises(InputError, match=f"'{held}.*{message}|{message} '{held}") as e: judged(drawn, images=tmp_path/"images")
    assert "\n" not in str(e.value)

def test_without_a_second_encoder():
    "What was not wished for is left out and said, what was given is refused"
    def unknown(column): raise InputError(f"nobody knows who made {column}")
    pipe = SimpleNamespace(encoder=unknown, task=get_task("clip_generation"))
    eye, why = second_eye(pipe)
    assert eye is None and why == "No distances of images in a second encoder: nobody knows who made eva."
    with pytest.raises(InputError, match="has no preprocess"): second_eye(pipe, pipe)
