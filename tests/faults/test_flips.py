"""A byte that changes on a disk: whatever is read afterwards is what was written, or an error that names the file."""
import io, random, shutil, tarfile, warnings
from types import SimpleNamespace
import pytest, torch
from PIL import Image
from blip3o_nb.files import InputError, sha256_file
from blip3o_nb.core import seed_everything, toy_features
from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
from blip3o_nb.features.images import read_images
from blip3o_nb.generation.pipeline import Pipeline, save_checkpoint
from blip3o_nb.training.learner import flow_learner
from blip3o_nb.features.loading import feature_dls
from blip3o_nb.runs.resume import CheckpointCallback
from blip3o_nb.features.shards import FeatureDataset, ShardWriter

def toy(folder, n, dtype="bf16", **kw):
    t = toy_features(n, grid=2, clip_dim=6, eva_dim=8)
    with ShardWriter(folder, {"clip": {"model": "toy-clip"}, "eva": {"model": "toy-eva"}}, dtype, **kw) as w: w.add_batch(t["keys"], {"clip": t["clip"], "eva": t["eva"]}, t["captions"], ["ab"]*n)
    return folder

def all_of(folder):
    ds = FeatureDataset(folder)
    return ds.keys, ds.captions, ds.image_hashes, ds.contract, ds.dtypes, *(ds.column(c) for c in ("clip", "eva"))

def checkpoint_of(folder):
    p = Pipeline.from_pretrained(folder, device="cpu")
    return p.task.name, p.objective, p.method, p.steps, p.held_out, p.contract, p.training, type(p.path).__name__, vars(p.model.config), dict(p.model.state_dict()), *({"mode": n.mode, **n.state_dict()} for n in (p.target_norm, p.cond_norm))

def state_of(folder):
    with warnings.catch_warnings(record=True) as said: warnings.simplefilter("always"); state = CheckpointCallback(folder).latest()
    if any("cannot be read" in str(w.message) for w in said): assert state["at"]["train_iter"] == 3; raise InputError(f"{folder}: the state before it")
    return state

def pictures_of(path):
    source = read_images(path)
    return source.keys, source.skipped, [source.files(i) for i in range(len(source))]

def equal(a, b):
    if torch.is_tensor(a): return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b or a != a

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "One of each kind of file, small"
    root = tmp_path_factory.mktemp("flips")
    toy(root/"set", 8, shard_size=5); toy(root/"set8", 4, "int8"); toy(root/"features", 60, "fp32")
    seed_everything(0)
    model = BLIP3oDiT(BLIP3oDiTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_tokens=5, clip_embedding_size=6, eva_embedding_size=8))
    learn = flow_learner(feature_dls(root/"features", bs=16), model, lr=3e-3, progress=False, cbs=[CheckpointCallback(root/"states", every=1)])
    learn.fit(2); save_checkpoint(learn, root/"checkpoint")
    files = [f for f in sorted((root/"states").glob("*.pt"))]
    (root/"tars").mkdir(); (root/"zipped").mkdir()
    for name in ("tars/a.tar", "zipped/a.tar.gz"):
        with tarfile.open(root/name, "w:gz" if name.endswith("gz") else "w") as t:
            for i in range(3):
                Image.effect_noise((24, 24), 60).convert("RGB").save(b := io.BytesIO(), "JPEG")
                for ext, data in (("jpg", b.getvalue()), ("txt", b"a caption")):
                    info = tarfile.TarInfo(f"{i}.{ext}"); info.size = len(data); t.addfile(info, io.BytesIO(data))
    (root/"tars"/"SHA256SUMS").write_text(f"{sha256_file(root/'tars'/'a.tar')}  a.tar\n")
    return SimpleNamespace(root=root, last_state=files[-1].name)

def flips(path, read, n):
    "Flip a bit of `n` bytes of a file (all of them where it has no more), its first, last and those between evenly; how many were named, after each was harmless or named"
    data, rng, whole, named = path.read_bytes(), random.Random(0), read(), 0
    size = len(data)
    places = range(size) if size <= n else sorted({*range(min(24, n//4)), *range(size - min(24, n//4), size), *(int((i + rng.random())*size/n) for i in range(n))})
    try:
        for i in places:
            path.write_bytes(data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i+1:])
            try: assert equal(read(), whole), f"byte {i} of {path.name} changed what is read, and nothing said so"
            except InputError as e: assert str(path.parents[1]) in str(e) and "\n" not in str(e), (i, e); named += 1
    finally: path.write_bytes(data)
    return len(places), named

def provoke(record_property, path, read, n):
    n, named = flips(path, read, n)
    record_property("provoked", n); record_property("named", named)
    return n, named

FLIP = ("a flipped bit", "named, or without effect on what is read")

@pytest.mark.fault(FLIP[0], "feature set: manifests, samples, entries, tokens", FLIP[1])
@pytest.mark.parametrize("name", ["manifest.json", "samples/part-00001.json", "clip/manifest.json", "eva/shard-00000.json",
                                  "clip/shard-00000.safetensors", "eva/shard-00001.safetensors", "8/eva/shard-00000.safetensors"])
def test_set(made, name, record_property, times):
    folder, name = (made.root/"set8", name[2:]) if name.startswith("8") else (made.root/"set", name)
    n, named = provoke(record_property, folder/name, lambda: all_of(folder), times(120, 100_000))
    assert named > .8*n

@pytest.mark.fault(FLIP[0], "feature set: samples and entry of a shard, before an extraction is resumed", FLIP[1])
@pytest.mark.parametrize("name", ["samples/part-00000.json", "clip/shard-00000.json", "clip/manifest.json"])
def test_entry(made, name, record_property, times):
    folder, contract = made.root/"set", {"clip": {"model": "toy-clip"}, "eva": {"model": "toy-eva"}}
    def read():
        with ShardWriter(folder, contract, shard_size=5) as w: return sorted(w.done), w.shapes
    provoke(record_property, folder/name, read, times(60, 100_000))

@pytest.mark.fault(FLIP[0], "checkpoint: weights, configurations, normalisers", FLIP[1])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "flow.json", "normalizers.safetensors"])
def test_checkpoint(made, name, record_property, times):
    f = made.root/"checkpoint"/name
    n, named = provoke(record_property, f, lambda: checkpoint_of(f.parent), times(60, 3000))
    assert named > .6*n

@pytest.mark.fault(FLIP[0], "state of a training", "the state before it is taken, with a warning, or without effect")
def test_state(made, record_property, times):
    f = made.root/"states"/made.last_state
    n, named = provoke(record_property, f, lambda: state_of(f.parent), times(60, 3000))
    assert named > .4*n # the rest pads the archive

@pytest.mark.fault(FLIP[0], "pictures: tar with a list SHA256SUMS, tar.gz", FLIP[1])
@pytest.mark.parametrize("name", ["tars/a.tar", "zipped/a.tar.gz"])
def test_pictures(made, name, record_property, times):
    f = made.root/name
    n, named = provoke(record_property, f, lambda: pictures_of(f), times(120, 100_000))
    assert named > .9*n
