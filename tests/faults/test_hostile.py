"""Input that was made to do harm: none of it runs code, leaves its folder, reaches a page or a terminal as more than text, or changes what was there before. What pickles, pictures, tars and
downloads are refused for stands in test_pickles.py, test_images.py, test_encoders.py and test_download.py."""
import csv, hashlib, io, json, os, pickle, pickletools, re, struct, subprocess, sys, warnings, zipfile, zlib
from html.parser import HTMLParser
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import open_clip, pytest, torch, transformers
from PIL import Image
from safetensors.torch import save_file
from blip3o_nb.earlier import pickles
from blip3o_nb.earlier.pickles import convert, read_pickle_shard
from blip3o_nb.files import InputError, read_json, write_json
from blip3o_nb.core import toy_features
from blip3o_nb.features.encoders import load_encoder
from blip3o_nb.features.extract import extract
from blip3o_nb.features.images import ImageSource, decode_image, read_captions, read_images
from blip3o_nb.generation.pipeline import Pipeline, write_samples
from blip3o_nb.options import TrainingConfig, config_text
from blip3o_nb.features.shards import FeatureDataset, ShardWriter
from blip3o_nb.judging.report import draw, page, table
from blip3o_nb.runs.resume import CheckpointCallback
from blip3o_nb.viz import gallery
from test_fuzz import CONTRACT, LINE, PICTURES, Captions, Column, Config, Converted, Earlier, Entry, Flow, Headers, Manifest, Part, Resumed, checkpoint, shards, trial, vm
from test_properties import call

ROOT = Path(__file__).parents[2]
SHADY = ["../up", "/abs", "a/../../b", "..", "C:\\x", "~/x", "nul\0l", "\x1b[2J\x1b]0;x\x07", "a\nb\r", "\u202egnp.exe", "</title></script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "javascript:alert(1)",
         "{{ 7*7 }}{% for x in y %}", "=HYPERLINK(\"http://x\")", "+1", "-1", "@x", "$\\frac{1}{0$", "$^$_", "%s%n", "x"*300, "\ufeffa", "a~b", "con", "-rf", "`id`", "$(id)", "*"]

def tree(root): return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in sorted(root.rglob("*"))}

# --- pickles ---------------------------------------------------------------------------------------------------------------------------------------------
ARG = {"uint1": b"\1", "uint2": b"\1\0", "uint4": b"\1\0\0\0", "uint8": struct.pack("<Q", 1), "int4": b"\1\0\0\0", "decimalnl_short": b"1\n", "decimalnl_long": b"1L\n", "stringnl": b"'x'\n", "stringnl_noescape": b"x\n",
       "stringnl_noescape_pair": b"antigravity\nx\n", "floatnl": b"1.\n", "float8": bytes(8), "unicodestringnl": b"x\n"}
REFUSED = [o for o in pickletools.opcodes if ord(o.code) not in pickles._TABLE]

@pytest.mark.fault("each instruction of pickle that is not needed for numbers, text, lists and tensors", "conversion", "refused, by the name of the instruction, before it does anything")
@pytest.mark.parametrize("op", REFUSED, ids=lambda o: o.name)
def test_other_instructions_are_refused(op, tmp_path):
    before = set(sys.modules)
    arg = b"" if op.arg is None else ARG.get(op.arg.name) or {1: b"\1x", 4: b"\1\0\0\0x", 8: struct.pack("<Q", 1) + b"x"}[dict(string1=1, bytes1=1, unicodestring1=1, long1=1).get(op.arg.name, 8 if "8" in op.arg.name else 4)]
    for around in (lambda d: d, lambda d: torch_zip(d), lambda d: pickle.dumps(torch.serialization.MAGIC_NUMBER, 2) + d):
        (f := tmp_path/"a.pkl").write_bytes(around(b"\x80\x04N(NN" + op.code.encode("latin-1") + arg + b"."))
        with pytest.raises(InputError, match=f"instruction {op.name}"): read_pickle_shard(f)
    assert "antigravity" not in set(sys.modules) - before

def torch_zip(data):
    with zipfile.ZipFile(b := io.BytesIO(), "w") as z: z.writestr("a/data.pkl", data); z.writestr("a/version", "3\n")
    return b.getvalue()

def test_every_instruction_that_makes_objects_is_among_the_refused_or_checked():
    makes = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
    own = {o.name for o in pickletools.opcodes if ord(o.code) in pickles._TABLE} & makes
    assert own == {"INST", "GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE", "BUILD"}, "these go through find_class, persistent_load, _reduce and _build"
    assert all(pickles._TABLE[c] is not pickle._Unpickler.dispatch[c] for c in b"Rb")

# --- JSON ----------------------------------------------------------------------------------------------------------------------------------------------------
def first_number(text, new): return re.sub(r": \d+", f": {new}", text, count=1)
JSONS = {"deep lists": lambda t: "["*200_000 + "]"*200_000, "deep objects": lambda t: '{"a":'*100_000 + "1" + "}"*100_000, "deep value": lambda t: t.replace(": ", ": " + "["*50_000 + "]"*50_000 + ', "x": ', 1),
         **{n: lambda t, n=n: first_number(t, n) for n in ("NaN", "Infinity", "-Infinity", "1e999", "9"*4000, "9"*5000, "-1", "1.5", "true", "null", '"1"', "[]", "{}")},
         "names twice": lambda t: t.rstrip()[:-1] + "," + t.lstrip()[1:], "other name twice": lambda t: t.replace("{", '{"task": [], "format": 1, "file": "../../x", "shards": [], "architectures": {},', 1), "mark in front": lambda t: "\ufeff" + t, "zero byte": lambda t: t + "\0",
         "half a character": lambda t: t.replace('": "', '": "\\ud800', 1), "control characters": lambda t: t.replace('": "', '": "\\u001b[2J\\u202e', 1), "a list": lambda t: f"[{t}]", "a number": lambda t: "1", "nothing": lambda t: "", "half": lambda t: t[:len(t)//2],
         "long text": lambda t: t.replace('": "', '": "' + "x"*2_000_000, 1), "a file outside": lambda t: t.replace("shard-00000", "../../../etc/passwd"), "an absolute file": lambda t: t.replace("shard-00000", "/etc/passwd"),
         "a link of names": lambda t: t.replace("shard-00000.safetensors", "manifest.json")}

@pytest.mark.fault("JSON with deep nesting, NaN, infinities, huge numbers, names twice, control characters and names of other files", "manifests, parts, entries, headers, checkpoint, conversion", "read, or refused in one line that names the file")
@pytest.mark.parametrize("kind", [Manifest, Column, Part, Entry, Resumed, Earlier, Headers, Flow, Config, Converted, Captions], ids=lambda k: k.__name__.lower())
def test_json(kind, tmp_path, record_property):
    target, bad = kind(tmp_path/"files"), {}
    record_property("provoked", len(JSONS))
    for name, f in JSONS.items():
        if said := trial(target, f(target.seeds[-1].decode()).encode("utf-8", "surrogatepass")): bad[name] = said
    assert not bad, "\n".join(f"{k}: {v}" for k, v in bad.items())

# --- code beside weights -------------------------------------------------------------------------------------------------------------------------------------
def evil(marker): return f"open({str(marker)!r}, 'w').close()\nfrom transformers import CLIPTokenizer, CLIPImageProcessor, CLIPConfig, CLIPModel\nclass Evil(CLIPTokenizer): pass\nclass EvilProcessor(CLIPImageProcessor): pass\n"

class Code:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

def hf_clip(d):
    part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    chars = [c for c in map(chr, range(33, 127))]; words = [*chars, *(c + "</w>" for c in chars), "<|startoftext|>", "<|endoftext|>"]
    transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(d)
    about = dict(vocab_size=len(words), max_position_embeddings=8, bos_token_id=len(words)-2, eos_token_id=len(words)-1, pad_token_id=len(words)-1)
    transformers.CLIPModel(transformers.CLIPConfig(projection_dim=8, vision_config=dict(part, image_size=8, patch_size=4), text_config=part | about)).save_pretrained(d)
    transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8).save_pretrained(d)
    return d

def open_clip_folder(d, **text):
    d.mkdir(exist_ok=True)
    vision = dict(image_size=8, patch_size=4, layers=1, width=16, head_width=8)
    cfg = dict(embed_dim=8, vision_cfg=vision, text_cfg=dict(context_length=8, vocab_size=49408, width=16, heads=2, layers=1) | text)
    (d/"open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    plain = open_clip.CLIP(**{**cfg, "text_cfg": {k: v for k, v in cfg["text_cfg"].items() if not k.startswith(("hf_", "tokenizer_"))}})
    torch.save(plain.state_dict(), d/"open_clip_pytorch_model.bin")
    return d

def edit(file, **kw): file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | kw))

def tokenizer_code(d, marker):
    hf_clip(d); (d/"evil.py").write_text(evil(marker)); edit(d/"tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil")
def processor_code(d, marker):
    hf_clip(d); (d/"evil.py").write_text(evil(marker)); edit(d/"preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.EvilProcessor", "AutoProcessor": "evil.EvilProcessor"}, image_processor_type="EvilProcessor")
def model_code(d, marker):
    hf_clip(d); (d/"evil.py").write_text(evil(marker)); edit(d/"config.json", auto_map={"AutoModel": "evil.CLIPModel", "AutoConfig": "evil.CLIPConfig"})
def nested_code(d, marker):
    hf_clip(d); (d/"evil.py").write_text(evil(marker)); c = json.loads((d/"config.json").read_text())
    edit(d/"config.json", trust_remote_code=True, vision_config=c["vision_config"] | {"auto_map": {"AutoConfig": "evil.CLIPConfig"}, "trust_remote_code": True}, text_config=c["text_config"] | {"auto_map": {"AutoConfig": "evil.CLIPConfig"}})
def pickled_weights(d, marker):
    hf_clip(d); (d/"model.safetensors").unlink(); torch.save({"a": Code(os.system, f"touch {marker}")}, d/"pytorch_model.bin")
def open_clip_weights(d, marker): torch.save({"a": Code(os.system, f"touch {marker}")}, open_clip_folder(d)/"open_clip_pytorch_model.bin")
def open_clip_tokenizer(d, marker): tokenizer_code(d, marker); open_clip_folder(d, hf_tokenizer_name="x", tokenizer_kwargs={"trust_remote_code": True})
def open_clip_text_tower(d, marker):
    model_code(d/"tok", marker); open_clip_folder(d, hf_model_name=str(d/"tok"), hf_model_pretrained=False, hf_proj_type="mlp")
def open_clip_name(d, marker): # a name that the library of timm would look up elsewhere
    open_clip_folder(d); c = json.loads((d/"open_clip_config.json").read_text()); c["model_cfg"]["vision_cfg"]["timm_model_name"] = f"local-dir:{d}"; edit(d/"open_clip_config.json", **c)

@pytest.mark.fault("a folder of an encoder that brings code: of a tokenizer, a processor, a model, in pickled weights, through an option of another library", "encoders", "not run; loaded without it, or refused in one line")
@pytest.mark.parametrize("route", [tokenizer_code, processor_code, model_code, nested_code, pickled_weights, open_clip_weights, open_clip_tokenizer, open_clip_text_tower, open_clip_name], ids=lambda f: f.__name__)
def test_code_beside_weights_is_not_run(route, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path/"modules")); monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (d := tmp_path/"model").mkdir(); route(d, tmp_path/"marker")
    try: load_encoder(str(d), device="cpu").tokens(torch.zeros(1, 3, 8, 8))
    except InputError as e: assert str(e).isprintable() and len(str(e).replace(str(tmp_path), "")) <= LINE
    assert not (tmp_path/"marker").exists(), "its code was run"

def test_the_code_beside_weights_is_live(tmp_path, monkeypatch):
    "Other loaders run it, so the routes test something"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path/"modules"))
    for n, (route, load) in enumerate({tokenizer_code: lambda d: transformers.AutoTokenizer.from_pretrained(d, trust_remote_code=True), open_clip_tokenizer: lambda d: open_clip.get_tokenizer(f"local-dir:{d}"),
                                       pickled_weights: lambda d: torch.load(d/"pytorch_model.bin", weights_only=False)}.items()):
        (d := tmp_path/f"model{n}").mkdir(); route(d, tmp_path/f"marker{n}")
        try: load(d)
        except Exception: pass # some fail after the harm is done
        assert (tmp_path/f"marker{n}").exists(), route.__name__

@pytest.mark.fault("a dataset folder with a loading script", "pictures", "not run")
def test_script_of_a_dataset_is_not_run(tmp_path, monkeypatch):
    pytest.importorskip("datasets"); import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path/"cache"); monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True); monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (d := tmp_path/"evil").mkdir(); (d/"evil.py").write_text(f"open({str(tmp_path/'marker')!r}, 'w').close()\nimport datasets\n")
    with pytest.raises(InputError, match="cannot be loaded"): read_images(f"datasets:{d}")
    assert not (tmp_path/"marker").exists()

# --- sizes and other files -------------------------------------------------------------------------------------------------------------------------------------
def high(f):
    "MiB that a call takes at most, in a process of its own"
    r, w = os.pipe()
    if not (pid := os.fork()):
        torch.set_num_threads(1); Path("/proc/self/clear_refs").write_text("5"); before = vm("VmRSS"); f()
        os.write(w, str(vm("VmHWM") - before >> 20).encode()); os._exit(0)
    os.close(w)
    with os.fdopen(r) as out: mib = out.read()
    assert os.waitpid(pid, 0)[1] == 0 and mib
    return int(mib)

def png(side, depth, color, channels):
    z = zlib.compressobj(1); line = bytes(channels*depth//8*side + 1)
    chunk = lambda kind, d: struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0)) + chunk(b"IDAT", b"".join(z.compress(line) for _ in range(side)) + z.flush()) + chunk(b"IEND", b"")

@pytest.mark.fault("picture of as many pixels as are allowed, in a small file", "pictures", "read, with at most 18 bytes a pixel (1.5 GB for the largest)")
@pytest.mark.parametrize("kind", [(8, 2, 3), (8, 6, 4), (16, 0, 1), (16, 6, 4)], ids=["rgb", "rgba", "grey16", "rgba16"])
def test_large_pictures(kind, times):
    data = png(side := times(2000, 9400), *kind)
    assert high(lambda: decode_image(data)) < 18*side**2/2**20 + 30

@pytest.mark.fault("tables with lines of many megabytes", "captions", "refused with the line; less than 60 MiB beyond the file")
def test_large_tables(tmp_path):
    many = b"[" + b"[],"*5_000_000 + b"[]]"
    for name, data in {"a.jsonl": b'{"key": "a", "b": ' + many + b"}\n", "a.csv": b"key,text\na,b" + b",x"*5_000_000, "b.csv": b"key,text\n" + bytes(10**7)}.items():
        (f := tmp_path/name).write_bytes(data)
        def read():
            with pytest.raises(InputError, match=f"{name}, line [12]: "): read_captions(f)
        assert high(read) < 60

@pytest.mark.fault("state of a training that holds code, or something else", "training", "the state before it is taken, or one line; nothing runs")
@pytest.mark.parametrize("state", [lambda m: Code(os.system, f"touch {m}"), lambda m: {"plan": Code(os.system, f"touch {m}")}, lambda m: {"a": 1}, lambda m: [1], lambda m: dict.fromkeys(("learner", "scaler", "rng", "plan", "record", "at"))], ids=["code", "code inside", "a dictionary", "a list", "nothing in it"])
def test_states(state, tmp_path):
    torch.save(state(tmp_path/"marker"), tmp_path/"step-000000001.pt")
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(InputError, match="no state in .* can be read"): CheckpointCallback(tmp_path).latest()
    assert not (tmp_path/"marker").exists()

@pytest.mark.fault("statistics of other features under the name of this set's", "loading", "counted again")
def test_statistics(tmp_path):
    ds = FeatureDataset(shards(tmp_path/"set")); want = ds.stats("clip", keep_above=0)
    file = next((tmp_path/"set"/".stats").glob("clip*")); good = file.read_bytes()
    for bad in ({"mean": torch.ones(2), "m2": torch.ones(2)}, {"mean": want.mean.float(), "m2": want.m2.float()}, {"mean": want.mean*float("nan"), "m2": want.m2}, {"mean": want.mean, "m2": -want.m2 - 1}, {"mean": want.mean}, {"n": torch.ones(1), "mean": want.mean, "m2": want.m2}):
        save_file(bad, file)
        got = ds.stats("clip", keep_above=0)
        assert torch.equal(got.mean, want.mean) and torch.equal(got.m2, want.m2) and file.read_bytes() == good

# --- names ------------------------------------------------------------------------------------------------------------------------------------------------------
class Given(ImageSource):
    def __init__(self, keys): super().__init__("given"); self.keys = list(keys)
    def files(self, i): # a zero byte is no text, and a reason to leave the image out: 3_features/01_images
        return {"png": PICTURES[0], "txt": SHADY[i % len(SHADY)].replace("\0", "").encode()}

class Fake:
    "An encoder of the contract of `test_fuzz`"
    device, num_tokens = torch.device("cpu"), 5
    def __init__(self, which): self.contract, self.width = CONTRACT[which], CONTRACT[which]["width"]
    def preprocess(self, image): return torch.from_numpy(np.asarray(image.resize((4, 4)), "float32")).permute(2, 0, 1)
    def tokens(self, x): return torch.randn(len(x), 5, self.width, generator=torch.Generator().manual_seed(0))
    pool = lambda self, t: t.mean(1)

@pytest.mark.fault("keys and captions that are paths, markup, escapes, formulas and overrides of the direction", "extraction, conversion, sampling", "stored as they are; no file leaves the output folder")
def test_keys_lead_nowhere(tmp_path, monkeypatch, record_property):
    (home := tmp_path/"a"/"b"/"home").mkdir(parents=True); monkeypatch.chdir(home); monkeypatch.setenv("HOME", str(tmp_path/"a"))
    record_property("provoked", 3*len(SHADY))
    ds = extract(Given(SHADY), "out/shards", {"clip": Fake("clip"), "eva": Fake("eva")}, bs=8, shard_size=8, progress=False)
    assert ds.keys == SHADY and len(set(ds.captions)) > 20
    convert("out/shards", "out/pickles", to="pickles", shard_size=9); convert("out/pickles", "out/again")
    assert FeatureDataset("out/again").keys == SHADY
    pipe = Pipeline.from_pretrained(checkpoint(home/"out"/"flow"), device="cpu").use(eva=Fake("eva"), clip=Fake("clip"))
    write_samples(pipe, Given(SHADY), "out/samples", chunk=8, progress=False)
    lines = [json.loads(l) for l in Path("out/samples/samples.jsonl").read_text(encoding="utf-8").split("\n") if l]
    assert [l["key"] for l in lines] == SHADY and {l["file"] for l in lines} == {f"samples-{i:05d}.safetensors" for i in range(-(-len(SHADY)//8))}
    outside = {p for p in tmp_path.rglob("*") if not p.is_relative_to(home/"out")} - {tmp_path/"a", tmp_path/"a"/"b", home}
    assert not outside and {p.name.split("-")[0].split("_")[0] for p in (home/"out").rglob("*.*")} <= {"shard", "part", "manifest.json", "embeddings", "converted.json", "samples", "samples.json", "samples.jsonl", "model.safetensors", "config.json", "flow.json", "normalizers.safetensors"}

# --- pages and terminals ---------------------------------------------------------------------------------------------------------------------------------------
class Shape(HTMLParser):
    "What a page is made of: its elements, their attributes, and where text addresses something"
    def __init__(self, page): super().__init__(convert_charrefs=True); self.seen = []; self.feed(page); self.close()
    def handle_starttag(self, tag, attrs): self.seen.append((tag, *((k, v if k in ("href", "style", "class") else "data:" if k == "src" and v.startswith("data:image/png;base64,") else "") for k, v in attrs)))
    def handle_comment(self, data): self.seen.append("comment")
    def unknown_decl(self, data): self.seen.append("declaration")

def judged(root, names, model, keys, captions, monkeypatch):
    "Run `blip3o_eval` on two checkpoints in folders of these names: its report, and what it printed"
    toy, seen = toy_features(64, grid=2, clip_dim=4, eva_dim=6), []
    contract = {n: {**c, "model": model} for n, c in CONTRACT.items()}
    with ShardWriter(root/"set", contract) as w: w.add_batch([f"{i}{keys}" for i in range(64)], {"clip": toy["clip"], "eva": toy["eva"]}, [f"{captions}{i % 9}" for i in range(64)], [""]*64)
    for n in names: f = checkpoint(root/n)/"flow.json"; write_json(f, read_json(f) | {"contract": contract, "training": {"note": model, model: captions}})
    monkeypatch.setattr("blip3o_nb.judging.report.write_report", lambda report, out, images: seen.append(report))
    code, out, err = call("blip3o_eval", [*(str(root/n) for n in names), "--embeddings-dir", str(root/"set"), "--out", str(root/"out"), "--samples", "1"])
    assert code == 0, err
    return seen[0], out

@pytest.mark.fault("names of checkpoints and models, keys and captions with markup, scripts, escapes, formulas and overrides of the direction", "report and terminal", "text on the page, on the terminal, in the table and in figures, and nothing else")
def test_report(tmp_path, record_property, monkeypatch):
    shady = "<\\title><\\script><script>alert(1)<\\script>\"' onload x><img src javascript:1>\x1b[2J\u202e{{ 7*7 }}&lt;$\\frac{$"
    (a := tmp_path/"plain").mkdir(), (b := tmp_path/"shady").mkdir()
    record_property("provoked", 6)
    plain, _ = judged(a, ["one", "two"], "model", "key", "caption", monkeypatch)
    report, out = judged(b, [f"-1+1{shady}", f"@{shady}"], shady.replace("\\", "/"), shady.replace("\\", "/"), shady, monkeypatch)
    pages = [Shape(page(r, {})).seen for r in (plain, report)]
    assert pages[0] == pages[1] and len(pages[0]) > 50 and page(report, {}).encode()
    assert all(l.isprintable() for l in out.split("\n")) and "alert" in out, "the terminal gets text only"
    rows = list(csv.reader(io.StringIO(table(report), newline="")))
    assert all(len(r) == len(rows[0]) and all(c.isprintable() for c in r) for r in rows) and not any(c.startswith(tuple("=+@")) or c.startswith("-") and not c[1:2].isdigit() for r in rows for c in r)
    assert all(r[0].startswith("'") for r in rows if "alert" in r[0]) and any("alert" in r[0] for r in rows)
    for name, fig in draw(report).items():
        if name in ("Similarity", "Images", "Spectrum"): fig.savefig(svg := io.StringIO(), format="svg"); assert "<script" not in svg.getvalue()
    for name in ("\udce9", "\x1b[2J"):
        code, _, err = call("blip3o_eval", [f"{name}={b/'one'}"])
        assert code == 2 and "cannot be printed" in err and err.strip().isprintable()

@pytest.mark.fault("captions that are formulas, markup and escapes", "figures", "drawn as text")
def test_captions_in_figures():
    im = Image.fromarray(np.zeros((8, 8, 3), "uint8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # glyphs that no font has
        fig = gallery([im], [SHADY[0]], [SHADY], [SHADY])[0, 0].figure
        fig.savefig(svg := io.StringIO(), format="svg"); plt.close(fig)
    assert "<script" not in svg.getvalue() and "<img" not in svg.getvalue()

# --- the programs, on what is malformed ---------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def state(tmp_path_factory):
    "What earlier runs have left, and malformed input beside it"
    root = tmp_path_factory.mktemp("state"); ok = root/"ok"
    shards(ok/"set"); convert(ok/"set", ok/"pickles", to="pickles"); checkpoint(ok/"flow"); (ok/"flow"/"config.toml").write_text(config_text(TrainingConfig()))
    (bad := root/"bad").mkdir()
    for n, data in {"text.pkl": b"<html>", "code.pkl": b"cos\nsystem\n(S'id'\ntR.", "a.tar": b"x"*2000, "bomb.csv": b"key,text\na," + b"x"*200_000, "c.toml": b"seed = " + b"[" *5000, "wrong.toml": b"learning_rate = 'fast'", "classes.csv": b"a,b,c", "texts.txt": b"\xff\xfe"}.items(): (bad/n).write_bytes(data)
    for n, f, data in (("set1", "manifest.json", b"[" * 10**5), ("set2", "clip/shard-00000.safetensors", None), ("set3", "manifest.json", b'{"format": "blip3o_nb shards 2", "shards": [{"file": "../../etc/passwd"}]}')):
        shards(bad/n); g = bad/n/f; g.write_bytes(data if data else g.read_bytes()[:100])
    for n, f, data in (("flow1", "flow.json", b"{}"), ("flow2", "model.safetensors", b"x"*99), ("flow3", "config.json", b'{"hidden_size": 1e9}'), ("flow4", "normalizers.safetensors", b"")): checkpoint(bad/n); (bad/n/f).write_bytes(data)
    (bad/"pictures").mkdir(); (bad/"pictures"/"a.png").write_bytes(b"no picture")
    return root

LINES = ["blip3o_convert bad/text.pkl ok/set", "blip3o_convert bad/code.pkl ok/set", "blip3o_convert bad/set1 ok/pickles", "blip3o_convert bad/set2 ok/pickles", "blip3o_convert bad/set3 ok/pickles --to grid_pickle", "blip3o_convert ok/set ok/pickles --dtype bf16",
         "blip3o_convert --verify bad/set2", "blip3o_extract --images bad/a.tar --out ok/set", "blip3o_extract --images bad/pictures --captions bad/bomb.csv --out ok/set", "blip3o_extract --images bad/pictures --out ok/set", "blip3o_train --config bad/c.toml --output-dir ok/flow",
         "blip3o_train --config bad/wrong.toml --output-dir ok/flow", "blip3o_train --embeddings-dir bad/set1 --output-dir ok/flow", "blip3o_train --embeddings-dir ok/set --output-dir ok/flow", "blip3o_sample bad/flow1 --images bad/pictures --out ok/set", "blip3o_sample bad/flow2 --images bad/pictures --out ok/set",
         "blip3o_sample bad/flow3 --images bad/pictures --out ok/set", "blip3o_sample bad/flow4 --images bad/pictures --out ok/set", "blip3o_sample ok/flow --images bad/pictures --texts bad/texts.txt --out ok/set", "blip3o_eval bad/flow1 --embeddings-dir ok/set --out ok/flow", "blip3o_eval ok/flow --embeddings-dir bad/set2 --out ok/flow",
         "blip3o_eval ok/flow --embeddings-dir ok/set --classes bad/classes.csv --out ok/flow", "blip3o_download ../.. --out ok/set"]

@pytest.mark.fault("malformed pickles, sets, checkpoints, archives, tables and configurations", "the console programs", "one line, exit code 1 or 2, and every byte of the output folder as it was")
@pytest.mark.parametrize("line", LINES)
def test_programs_on_malformed_input(line, state, monkeypatch):
    monkeypatch.chdir(state); monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True); before = tree(state)
    name, *argv = line.split()
    code, out, err = call(name, argv)
    lines = [l for l in err.splitlines() if not l.startswith(("samples:", "extract:"))]
    assert code in (1, 2) and len(lines) == 1 and lines[0].startswith(f"{name}: ") and len(lines[0]) < LINE + 100 and lines[0].isprintable(), (code, err)
    assert tree(state) == before

@pytest.mark.fault("malformed input", "the console programs, as processes", "one line, exit code 1 or 2, and every byte of the output folder as it was")
def test_processes_on_malformed_input(state, times, record_property):
    some = times([], [LINES[1], LINES[14], LINES[10]]); record_property("provoked", len(some)); before = tree(state)
    if not some: pytest.skip("eight seconds each, in the full form; test_programs_on_malformed_input runs them in this process")
    for line in some:
        name, *argv = line.split()
        r = subprocess.run([sys.executable, "-c", f"import sys; sys.argv[0] = {name!r}; from blip3o_nb.commands.cli import {name}; {name}()", *argv], cwd=state, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert r.returncode in (1, 2) and len(r.stderr.splitlines()) == 1 and r.stderr.startswith(f"{name}: "), (r.returncode, r.stderr[-2000:])
    assert tree(state) == before
