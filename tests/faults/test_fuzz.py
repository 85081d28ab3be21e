"""Files that are nearly right: a seeded mutator over every format that is read. A file is read, refused with one line, or a picture is skipped with a reason;
nothing else comes out, in bounded time and memory. Each input that once did something else stands in `FOUND` or among the seeds."""
import hashlib, io, json, os, pickle, random, re, resource, shutil, signal, tarfile, tempfile, time, traceback, warnings
from copy import deepcopy
from functools import cache
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from blip3o_nb.commands.cli import read_classes
from blip3o_nb.earlier.pickles import convert, read_pickle_shard
from blip3o_nb.files import InputError
from blip3o_nb.core import toy_features
from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
from blip3o_nb.features.images import ImageSource, Unreadable, read_captions, read_images
from blip3o_nb.generation.pipeline import Pipeline, save_checkpoint
from blip3o_nb.training.learner import flow_learner
from blip3o_nb.features.loading import tensor_dls
from blip3o_nb.network.nextdit import NextDiT, NextDiTConfig
from blip3o_nb.options import TrainingConfig, config_text, make_config, read_config
from blip3o_nb.features.shards import FeatureDataset, ShardWriter
from blip3o_nb.runs.runs import check_config

MEMORY, SECONDS = 1 << 30, 20 # that one file may take: bytes beyond what the process has, and seconds
LINE = 600                    # characters of a message, the path in it not counted

# --- the mutator ------------------------------------------------------------------------------------------------------------------------------------
NUMBERS = ["0", "-1", "1", "255", "65536", "2147483648", "4294967295", "9223372036854775808", "1e999", "-1e999", "NaN", "Infinity", "1.5", "9"*400, "9"*5000, "1e-999", "00", "0x10"]
BYTES = [b"\0", b"\xff", b"A", b"\n", b"\r", b'"', b"{", b"[", b"\x1b[2J", b"\xe2\x80\xae", b"\xed\xa0\x80", b"%s", b"../", b"'", b"\\", b","]
VALUES = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, 1e308, float("nan"), float("inf"), "", "x", "\x1b[31m\n", "../../../etc/passwd", "x"*5000, "\ud800", "<b>", "nan", [], [[]], {}, [1, 2], {"a": 1}]

def bend(r, x):
    "A value of JSON with one of its parts replaced, taken away, doubled, renamed or buried"
    spots = []
    def walk(v):
        for k in (list(v) if isinstance(v, dict) else range(len(v)) if isinstance(v, list) else ()): spots.append((v, k)); walk(v[k])
    walk(x)
    if not spots or r.random() < .03: return deepcopy(r.choice(VALUES))
    v, k = r.choice(spots)
    how = r.randrange(8)
    if how < 4: v[k] = deepcopy(r.choice(VALUES)) # values are bent themselves
    elif how == 4: del v[k]
    elif how == 5: a, b = r.choice(spots); v[k] = json.loads(json.dumps(a[b])) if b in (a if isinstance(a, dict) else range(len(a))) else None
    elif how == 6 and isinstance(v, dict): v[r.choice(["", "x", "\n", k + "x"])] = v.pop(k)
    elif how == 7: v[k] = [v[k]] if r.random() < .5 else {"a": v[k]}
    return x

def bent(r, data):
    try: x = json.loads(data)
    except (ValueError, RecursionError): return data
    for _ in range(r.choice([1, 1, 1, 2, 3])): x = bend(r, x)
    return json.dumps(x).encode()

def broken(r, data, others):
    "Bytes with one to four faults"
    data = bytearray(data)
    for _ in range(r.choice([1, 1, 2, 4])):
        n, how = len(data), r.randrange(9); at = r.randrange(n + 1)
        if not n: break
        if how == 0:
            for _ in range(r.choice([1, 1, 8])): data[r.randrange(n)] ^= 1 << r.randrange(8)
        elif how == 1: data[r.randrange(n)] = r.choice(r.choice(BYTES))
        elif how == 2: del data[at:]
        elif how == 3: del data[at:at + r.choice([1, 2, 8, 512, n])]
        elif how == 4: other = r.choice(others); data[at:] = other[r.randrange(len(other) + 1):]
        elif how == 5: data[at:at] = r.choice(BYTES)*r.choice([1, 3, 100, 4000])
        elif how == 6: block = bytes(data[at:at + r.choice([1, 4, 64, 512])]); data[at:at] = block*r.choice([1, 2, 500])
        elif how == 7: # a number
            if (found := list(re.finditer(rb"-?\d+(\.\d+)?", data))) and r.random() < .7: m = r.choice(found); data[m.start():m.end()] = r.choice(NUMBERS).encode()
            else: w = r.choice([1, 2, 4, 8]); data[at:at + w] = r.choice([0, 1, 2**(8*w) - 1, 2**(8*w - 1), 2**(8*w - 1) - 1, 2**(4*w)]).to_bytes(w, r.choice(["little", "big"]))
        elif how == 8: a, b = r.choice([(b"[", b"]"), (b'{"a":', b"}"), (b"[", b""), (b"(", b""), (b"\x85", b"")]); k = r.choice([20, 1500, 50_000]); data[at:at] = a*k + b*k
    return bytes(data)

# --- the corpus: what the library itself writes -----------------------------------------------------------------------------------------------------
TOY = toy_features(6, grid=2, clip_dim=4, eva_dim=6)
CONTRACT = {n: dict(model=f"toy-{n}", stage="hidden", layout="cls_patch", width=w, num_tokens=5, grid=2) for n, w in (("clip", 4), ("eva", 6))}

def shards(folder, dtype="bf16"):
    with ShardWriter(folder, CONTRACT, dtype, shard_size=4) as w: w.add_batch(TOY["keys"], {"clip": TOY["clip"], "eva": TOY["eva"]}, TOY["captions"], [""]*6)
    return folder

def checkpoint(folder, nextdit=False): return shutil.copytree(trained(nextdit), folder, dirs_exist_ok=True)

@cache
def trained(nextdit):
    torch.manual_seed(0)
    if nextdit: model = NextDiT(NextDiTConfig(target_size=4, cond_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, num_tokens=4))
    else: model = BLIP3oDiT(BLIP3oDiTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_tokens=5, clip_embedding_size=4, eva_embedding_size=6))
    part = lambda n: (TOY["eva"][:, nextdit:][n], TOY["clip"][:, nextdit:][n])
    learn = flow_learner(tensor_dls(part(slice(4)), part(slice(4, 6)), bs=2, device="cpu", contract=CONTRACT), model, progress=False)
    learn.fit(1)
    return save_checkpoint(learn, tempfile.mkdtemp(), method="euler", steps=2, seed=0)

def picture(format, mode="RGB", **kw):
    x = np.random.default_rng(0).integers(0, 256, (9, 13, 4), dtype="uint8")
    Image.fromarray(x).convert(mode).save(b := io.BytesIO(), format, **kw)
    return b.getvalue()

PICTURES = [picture("png"), picture("png", "P"), picture("png", "LA"), picture("jpeg"), picture("jpeg", "CMYK", progressive=True), picture("gif", "P"), picture("bmp"), picture("webp"),
            picture("webp", "RGBA", lossless=True), picture("tiff"), picture("tiff", compression="tiff_lzw"), picture("tiff", "F"), picture("png", "I;16")]

def tar(mode="w", format=tarfile.PAX_FORMAT):
    b = io.BytesIO()
    with tarfile.open(fileobj=b, mode=mode, format=format) as t:
        for i in range(3):
            for ext, data in (("png", PICTURES[i]), ("txt", b"a cat"), ("json", b'{"caption": "a dog"}')): info = tarfile.TarInfo(f"{'ä'*60 if i else 'a'}{i}.{ext}"); info.size = len(data); t.addfile(info, io.BytesIO(data))
    return b.getvalue()

def pickles():
    columns = {f"{n}_blip3o_embeddings": TOY[n] for n in ("clip", "eva")} | {k: TOY[k] for k in ("captions", "keys")}
    yield from (pickle.dumps(columns, p) for p in (2, 4, 5))
    yield pickle.dumps({**columns, **{f"{n}_blip3o_embeddings": TOY[n].numpy() for n in ("clip", "eva")}, "captions": np.array(TOY["captions"])}, 4)
    for zipped in (True, False): torch.save(columns, b := io.BytesIO(), _use_new_zipfile_serialization=zipped); yield b.getvalue()

class Given(ImageSource):
    def __init__(self, data): super().__init__("given"); self.keys, self.data = ["a"], data
    def files(self, i): return {"png": self.data}

# --- the targets: a class a format, with its seeds, and how one of them is put in place and read ------------------------------------------------------
ROOT = Path(__file__).parents[2]

class Target:
    name, text = "x.bin", False   # of the file; text: mutated as JSON half of the time
    def __init__(self, folder): self.folder = folder; folder.mkdir(parents=True, exist_ok=True); self.path = folder/self.name; self.seeds = list(self.make())
    def put(self, data): self.path.write_bytes(unsealed(data) if self.text else data)

class Pickles(Target):
    name = "embeddings_shard_00000_cls_patch.pkl"
    def make(self): return pickles()
    def read(self): read_pickle_shard(self.path)

class Tars(Target):
    name = "a.tar"
    def make(self): return tar(), tar("w:gz"), tar(format=tarfile.GNU_FORMAT)
    def read(self):
        source = read_images(self.path)
        for s in source: assert s.image.mode == "RGB"
        reasons(source)

class Pictures(Target):
    name = "a"
    def make(self): return PICTURES
    def read(self):
        for at_least in (None, 4):
            try: assert Given(self.path.read_bytes()).sample(0, at_least).image.mode == "RGB"
            except Unreadable as e: assert one_line(str(e)), str(e)

class Shards(Target):
    "Tensors of a shard; whoever writes them writes their size and checksum as well"
    name = "clip/shard-00000.safetensors"
    def make(self):
        for d in ("bf16", "int8"): yield (shards(self.folder/d, d)/self.name).read_bytes()
        shards(self.folder)
    def put(self, data):
        super().put(data)
        sign(self.path)
    def read(self): read_set(self.folder)

class Manifest(Target):
    "That a folder is a set"
    name, text = "manifest.json", True
    def make(self): yield (shards(self.folder)/self.name).read_bytes()
    def read(self): read_set(self.folder)

class Column(Manifest): name = "clip/manifest.json"
class Part(Manifest): name = "samples/part-00000.json"
class Entry(Manifest): name = "eva/shard-00000.json"

class Resumed(Target):
    "A set that is resumed: what it says of itself, of a column, of samples and of a shard"
    name, text = "clip/shard-00000.json", True
    names = ("clip/shard-00000.json", "samples/part-00000.json", "clip/manifest.json", "manifest.json")
    def make(self):
        shards(self.folder)
        self.whole = {f: f.read_bytes() for f in self.folder.rglob("*") if f.is_file()}
        for n in self.names: yield self.whole[self.folder/n]
    def put(self, data):
        kinds = {b'"checksums"': 0, b'"captions"': 1, b'"num_tokens"': 2}
        self.path = self.folder/self.names[next((k for word, k in kinds.items() if word in data), 3)]
        self.path.write_bytes(unsealed(data))
    def read(self):
        try:
            with ShardWriter(self.folder, CONTRACT, shard_size=4) as w: w.add("other", clip=TOY["clip"][0], eva=TOY["eva"][0])
        finally:
            for f in [f for f in self.folder.rglob("*") if f.is_file() and f not in self.whole]: f.unlink()
            for f, data in self.whole.items(): f.write_bytes(data)

class Earlier(Target):
    "What a set of an earlier format says of itself"
    name, text, of = "manifest.json", True, "shards_3"
    def make(self):
        shutil.copytree(ROOT/"tests/old"/self.of, self.folder, dirs_exist_ok=True)
        m = json.loads((self.folder/self.name).read_bytes())
        yield json.dumps(m).encode()
    def read(self): read_set(self.folder)

class Headers(Earlier):
    "What a shard of an earlier format says of its samples"
    name = "shard-00000.safetensors"
    def make(self):
        shutil.copytree(ROOT/"tests/old"/self.of, self.folder, dirs_exist_ok=True)
        with safe_open(self.path, "pt") as f:
            yield f.metadata()["samples"].encode()
            self.tensors = {k: f.get_tensor(k) for k in f.keys()}
    def put(self, data):
        save_file(self.tensors, self.path, {"samples": data.decode("utf-8", "replace")})
        m, d = json.loads(unsealed((self.folder/"manifest.json").read_bytes())), self.path.read_bytes()
        head = hashlib.sha256(d[:8 + int.from_bytes(d[:8], "little")]).hexdigest()
        m["shards"][0].update(bytes=len(d), sha256=hashlib.sha256(d).hexdigest(), header=head)
        (self.folder/"manifest.json").write_text(json.dumps(m))

class Flow(Target):
    name, text = "flow.json", True
    def make(self): yield (checkpoint(self.folder)/self.name).read_bytes()
    def read(self):
        pipe = Pipeline.from_pretrained(self.folder, device="cpu")
        if pipe.steps < 100: pipe(torch.zeros(1, 5, 6))

class Config(Flow):
    name = "config.json"
    def read(self): BLIP3oDiT.from_pretrained(self.folder); super().read()

class NextConfig(Target):
    name, text = "config.json", True
    def make(self): yield (checkpoint(self.folder, True)/self.name).read_bytes()
    def read(self): NextDiT.from_pretrained(self.folder)

class Weights(Flow):
    name, text = "model.safetensors", False
    def make(self): save_file(load_file(checkpoint(self.folder)/self.name), self.path); yield self.path.read_bytes(); yield (checkpoint(self.folder)/self.name).read_bytes()
    def read(self):
        BLIP3oDiT.from_pretrained(self.folder)
        Pipeline.from_pretrained(self.folder, device="cpu")

class Normalizers(Weights): name = "normalizers.safetensors"

class Converted(Target):
    name, text = "converted.json", True
    def make(self):
        (self.folder/"src").mkdir(); (self.folder/"src"/"a.pkl").write_bytes(next(pickles()))
        self.path = self.folder/"dst"/self.name
        convert(self.folder/"src", self.folder/"dst"); yield self.path.read_bytes()
        convert(self.folder/"dst", self.folder/"back", to="pickles"); yield (self.folder/"back"/self.name).read_bytes()
    def put(self, data):
        for d in ("dst", "back"): (self.folder/d/self.name).write_bytes(unsealed(data))
    def read(self):
        for src, dst, to in (("src", "dst", "shards"), ("dst", "back", "pickles")):
            try: convert(self.folder/src, self.folder/dst, to=to)
            except InputError as e: check_line(e, self.folder/dst/self.name)

class Toml(Target):
    name = "config.toml"
    def make(self): yield config_text(TrainingConfig()).encode(); yield config_text(make_config("rae", output_dir="ä\t\"x\"")).encode()
    def read(self):
        options = read_config(self.path) # names the file; the values are judged as if they came from the command line
        try: check_config(make_config(**options), Path("nowhere"))
        except InputError as e: assert one_line(str(e)), str(e)

class Captions(Target):
    name = "a.csv"
    def make(self): yield 'key,text\na.png,"a, ""b"""\nä,c\n'.encode(); yield b"file_name\tcaption\nx\ty\n"; yield b'{"key": "a", "text": ["b", "c"]}\n{"image": "c.png", "caption": "d"}\n'
    def read(self):
        for name in ("a.csv", "a.jsonl"): # a message names what it read
            data = self.path.read_bytes(); (f := self.folder/name).write_bytes(data)
            try: assert all(type(v) is str and v.encode() is not None for v in read_captions(f).values())
            except InputError as e: check_line(e, f)

class Classes(Target):
    name = "classes.csv"
    def make(self): yield 'a,cat\nb,dog\n"c ""d""",ä\n'.encode()
    def read(self): read_classes(self.path)

def unsealed(data):
    "JSON as by another hand, so that what lies behind the seal is reached"
    try: x = json.loads(data)
    except (ValueError, RecursionError): return data
    if not isinstance(x, dict) or x.pop("seal", None) is None: return data
    return json.dumps(x).encode()

def sign(path):
    "Put size and checksum of a shard into its entry"
    f = path.with_suffix(".json")
    entry, data = json.loads(unsealed(f.read_bytes())), path.read_bytes()
    entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    f.write_text(json.dumps(entry))

def read_set(folder):
    for split in (None, "train"):
        ds = FeatureDataset(folder, split)
        for n in ("clip", "eva"):
            if len(ds): assert ds.column(n).shape == (len(ds), *ds.shape(n)) and all(type(k) is str for k in ds.keys + ds.captions)
    return ds._repr_markdown_()

def one_line(s, path=""): return s and "\n" not in s and s.isprintable() and len(s.replace(str(path), "").replace(str(Path(path).parent), "")) <= LINE
def reasons(source): assert all(one_line(r) for r in source.skipped.values()), source.skipped
def check_line(e, path):
    assert one_line(str(e), path), f"a message of {len(str(e))} characters: {str(e)[:700]!r}"
    assert path.name in str(e) or str(path.parents[1]) in str(e) or str(path.parent) in str(e), f"it does not name the file: {str(e)[:300]!r}"

TARGETS = [Pickles, Tars, Pictures, Shards, Manifest, Column, Part, Entry, Resumed, Earlier, Headers, Flow, Config, NextConfig, Weights, Normalizers, Converted, Toml, Captions, Classes]

# --- inputs that once did something else: a traceback, a file that nobody named, memory without end ---------------------------------------------------
def but(*path, **kw):
    "The seed with other values at a place of it; `...` takes a name away"
    def f(seed):
        x = y = json.loads(seed)
        for k in path: y = y[k]
        for k, v in kw.items(): y.__setitem__(k, v) if v is not ... else y.pop(k)
        return json.dumps(x).encode()
    return f

def given(data): return lambda seed: data
def all_of(name, *values): return [but(**{name: v}) for v in values]

DEEP = given(b"["*100_000 + b"]"*100_000)
NETWORK = [DEEP, given(b"[]"), given(b"1"), *all_of("architectures", [], [1], {}, "x", ["\x1b[31m\n"]), *all_of("hidden_size", 8., 2**40, 10**30, True, "8"), *all_of("num_hidden_layers", 10**9, 1.5, [1]),
           *all_of("num_attention_heads", 1e308), *all_of("num_tokens", 2**62, 10**30)]
FOUND = {
    "Flow": [DEEP, given(b"[]"), *(but(**{k: ...}) for k in ("task", "objective", "path", "target_norm", "cond_shape", "method", "steps", "contract", "training")), *all_of("task", [], "\x1b"), *all_of("steps", 10**30, -1, 1.5, None),
             *all_of("path", {}, {"name": "linear", "sigma_max": 10**30}, {"name": "linear", "sigma_min": []}, {"name": [], "x": 1}), *all_of("target_shape", ["x", 4], [2**40, 2**20], [5], None), *all_of("target_norm", [1], "<b>"),
             *all_of("method", [], "x"), *all_of("objective", "\x1b[2J", None), *all_of("contract", True, {"clip": True, "eva": {}}, {"clip": {"model": []}, "eva": {}}), *all_of("training", {"record": {"step": 1}}, {"record": {"step": [1], "loss": []}}), *all_of("held_out", "x", 2)],
    "Config": [*NETWORK, *all_of("cond_tokens", 10**12, 2**34), *all_of("fusion", "x", 1), *all_of("head_layers", 10**9), *all_of("feature_scale", None, "1"), but(hidden_size=2**30 + 2), but(head_width=4, head_layers=10**9)],
    "NextConfig": [*NETWORK, *all_of("intermediate_size", 2**62, False), *all_of("time", [], "\x1b")],
    "Manifest": [DEEP, given(b"[]"), *all_of("format", 1, [], ...), *all_of("shard_size", 0, -1, "4", True, ...)],
    "Column": [DEEP, given(b"1"), *all_of("num_tokens", 0, -1, "5", 2**40, None, ...), *all_of("width", None, 5.), *all_of("dtype", "int8", [], ...),
               *all_of("contract", 1.5, [], None), but("contract", **{"\n": 1})],
    "Part": [DEEP, *all_of("keys", None, 5, ["a"], ["a"]*4, ["\ud800", "b", "c", "d"], [1, 2, 3, 4], ...), *all_of("captions", None, [None]*4, [[]]*4),
             *all_of("image_hashes", {}, [{}]*4), *all_of("skipped", 1, {"a": 1}), *all_of("plan", 1, {"first": "x"}, {"first": -1, "keys": ""})],
    "Entry": [DEEP, *all_of("keys", None, ["a"]*4, [1]*4), *all_of("file", 5, "../x", "/etc/passwd", "manifest.json", "../manifest.json", "shard-00001.safetensors"),
              *all_of("bytes", "x", -1, ...), *all_of("checksums", 1, {"": "x"}, {"": 1}, {"": "0"*48}), *all_of("lengths", [1], ["x"]*4, 4),
              *all_of("tensor", "", 1, "\n"), *all_of("contract", None, [], {}), *all_of("skipped", 1, {"a": 1})],
    "Resumed": [DEEP, *all_of("file", 1, "../../x", ...), *all_of("keys", "4", [], ["x"]*4), *all_of("bytes", 10**9, "x"), *all_of("sha256", ...), *all_of("skipped", 1, {"a": 1})],
    "Earlier": [DEEP, *all_of("shards", 1, [1], [{}], ["x"], None), *all_of("shapes", "x", {}, {"clip": 1, "eva": [5, 6]}, {"clip": [{}, 4], "eva": [5, 6]}, {"clip": [5], "eva": [5]}, ...),
                *all_of("dtype", "int8", [], ...), *all_of("contract", 1.5, {"clip": True}, {"\n": {}}), *(but("shards", 0, file=v) for v in (5, "../x", "/etc/passwd", "../shard-00000.safetensors", "manifest.json", "shard-00001.safetensors")),
                *(but("shards", 0, bytes=v) for v in ("x", ...))],
    "Headers": [DEEP, given(b"1"), given(b'"x"'), *all_of("keys", None, 5, ["a"], ["a"]*4, ["\ud800", "b", "c", "d"], [1, 2, 3, 4], ...), *all_of("captions", None, [None]*4, [[]]*4), *all_of("contract", None, [], 1, {"clip": []}, ...), but("contract", **{"\n": 1}), *all_of("image_hashes", {}, [{}]*4)],
    "Converted": [DEEP, given(b"[]"), given(b"1"), given(b'{"a.pkl": 1}'), given(b'{"a.pkl": {"last": []}}'), given(b'{"a.pkl": {"last": "toy0-00005"}}'), *all_of("keys", "\ud800", [])],
    "Toml": [given(d) for d in (b"a = " + b"["*5000 + b"]"*5000, b"ema = 1" + b"0"*400, b"seed = 1" + b"0"*400, b"seed = " + b"9"*5000, b"weight_decay = true", b"ema = nan", b"'\\u001b[2J' = 1", b"'" + b"x"*5000 + b"' = 1", b"recipe = []", b"batch_size = [1]")],
    "Weights": [lambda seed: seed.replace(b'"F32"', b'"I32"'), lambda seed: seed.replace(b'"F32"', b'"F64"', 1), lambda seed: seed[:8]]}

# --- the loop, in a process of its own ----------------------------------------------------------------------------------------------------------------
class Slow(BaseException): "Not an `Exception`, which a reader may catch"

def vm(k): return int(next(l for l in open("/proc/self/status") if l.startswith(k)).split()[1]) << 10

def trial(target, data):
    "What is wrong with how this input is read, or None"
    target.put(data)
    def stop(*_): raise Slow(f"more than {SECONDS} s")
    signal.signal(signal.SIGALRM, stop); signal.alarm(SECONDS)
    try: target.read(); return None
    except InputError as e:
        try: check_line(e, target.path)
        except AssertionError as a: return f"InputError: {a}"
    except (KeyboardInterrupt, SystemExit): raise
    except BaseException as e: return f"{type(e).__name__}: {str(e)[:300]} at " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__)[-1:-6:-1])
    finally: signal.alarm(0)

def loop(kind, folder, seconds, most, out):
    torch.set_num_threads(1); warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    target, r, start, n, bad = kind(folder/"files"), random.Random(kind.__name__), time.time(), 0, {}
    inputs = [*target.seeds, *(f(target.seeds[0]) for f in FOUND.get(kind.__name__, []))]
    for data in target.seeds: assert trial(target, data) is None, f"a seed is not read: {trial(target, data)}"
    resource.setrlimit(resource.RLIMIT_AS, (vm("VmSize") + MEMORY,)*2)
    before = vm("VmHWM")
    while n < len(inputs) or (time.time() - start < seconds and n < most and len(bad) < 12):
        if n < len(inputs): data = inputs[n]
        else:
            data = r.choice(target.seeds)
            data = bent(r, data) if target.text and r.random() < .6 else broken(r, data, target.seeds)
        n += 1
        if said := trial(target, data):
            where = re.sub(r"\d+", "", said)[:120]
            if where not in bad: bad[where] = said; (folder/f"{len(bad)}-{target.path.name}").write_bytes(data)
        if vm("VmHWM") - before > MEMORY: bad["memory"] = f"{vm('VmHWM') - before >> 20} MiB"; break
    out.write_text(json.dumps(dict(n=n, bad=list(bad.values()), mib=(vm("VmHWM") - before) >> 20)))

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted by Linux")
@pytest.mark.fault("files of every format with flipped bits, cuts, splices, runs, extreme numbers, repeated blocks and deep nesting", "every reader",
                   "read, or refused in one line that names the file, or a picture skipped with a reason; at most 1 GiB and 20 s a file, and no traceback")
@pytest.mark.parametrize("kind", TARGETS, ids=lambda k: k.__name__.lower())
def test_nearly_right(kind, tmp_path, times, record_property):
    seconds, most = times((.5, 200), (20, 10**9))
    for nextdit in (False, True): trained(nextdit) # once, before the processes part
    if not (pid := os.fork()):
        try: loop(kind, tmp_path, seconds, most, tmp_path/"result.json"); code = 0
        except BaseException: traceback.print_exc(); code = 1
        finally: os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"the process ended with {code}; the input lies in {tmp_path}"
    got = json.loads((tmp_path/"result.json").read_text())
    record_property("provoked", got["n"])
    assert not got["bad"], f"{len(got['bad'])} kinds of fault in {got['n']} inputs, which lie in {tmp_path}:\n" + "\n".join(got["bad"])
