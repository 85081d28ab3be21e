"""Hostile pickles by every route, through the reader of nbs/9_earlier/01_pickles.ipynb: each is refused with one line, nothing runs, and no file takes memory or time
that it does not have. The corpus is checked itself: what carries code runs it under the stock reader."""
import copyreg, io, json, os, pickle, resource, struct, subprocess, sys, zipfile
from pathlib import Path
import numpy as np
import pytest
import torch
from blip3o_nb.earlier import pickles
from blip3o_nb.files import InputError
from blip3o_nb.core import toy_features
from blip3o_nb.earlier.pickles import convert, load_pickle, read_pickle_shard
from blip3o_nb.features.shards import FeatureDataset, ShardWriter

# --- pickles by hand -------------------------------------------------------------------------------------------------------------------------------
def glob(name):  # GLOBAL
    module, attr = name.rsplit(".", 1)
    return f"c{module}\n{attr}\n".encode()
def text(s): return b"X" + struct.pack("<I", len(s.encode())) + s.encode()
def stack_global(module, attr): return b"\x80\x04" + text(module) + text(attr) + b"\x93"
def binbytes(b): return b"B" + struct.pack("<I", len(b)) + b
def call(f, *args): return f + b"(" + b"".join(args) + b"tR"  # REDUCE
def num(n): return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)  # LONG1
def tup(*items): return b"(" + b"".join(items) + b"t"
def shard(clip): return b"\x80\x04}(" + text("clip_blip3o_embeddings") + clip + text("eva_blip3o_embeddings") + clip + b"u."
def torch_file(obj, new): torch.save(obj, b := io.BytesIO(), _use_new_zipfile_serialization=new); return b.getvalue()

class Code:
    "Rebuilt by a call"
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

class State:
    "Sets its state by a call, and runs its argument when it is made"
    def __new__(cls, command=None, **kw):
        if command: os.system(command)
        return super().__new__(cls)
    def __setstate__(self, command): os.system(command)

def in_tensor(blob): return call(glob("torch.storage._load_from_bytes"), binbytes(blob))

def code(marker):
    "Pickles that write the file `marker` when the stock reader reads them: `{route: (bytes, what the message must name)}`"
    sh = f"touch {marker}"
    system, cmd, py = glob("os.system"), text(sh), text(f"__import__('os').system('{sh}')")
    popen = tup(b"(" + text("touch") + text(str(marker)) + b"l")
    array = np.empty(1, object); array[0] = Code(os.system, sh)
    return {
        "GLOBAL": (call(system, cmd) + b".", "os.system"),
        "STACK_GLOBAL": (call(stack_global("os", "system"), cmd) + b".", "os.system"),
        "INST": (b"(" + cmd + b"ios\nsystem\n.", "os.system"),
        "OBJ": (b"(" + glob("subprocess.Popen") + popen[1:-1] + b"o.", "subprocess.Popen"),
        "NEWOBJ": (b"\x80\x02" + glob(f"{__name__}.State") + tup(cmd) + b"\x81.", f"{__name__}.State"),
        "NEWOBJ_EX": (b"\x80\x04" + glob(f"{__name__}.State") + tup(cmd) + b"}\x92.", f"{__name__}.State"),
        "NEWOBJ of an allowed class": (b"\x80\x02" + glob("collections.OrderedDict") + b")\x81.", "NEWOBJ"),
        "BUILD": (b"\x80\x02" + glob(f"{__name__}.State") + b")\x81" + cmd + b"b.", f"{__name__}.State"),
        "EXT1": (call(b"\x82\xf1", cmd) + b".", "EXT1"), "EXT2": (call(b"\x83\xf1\x00", cmd) + b".", "EXT2"), "EXT4": (call(b"\x84\xf1\x00\x00\x00", cmd) + b".", "EXT4"),
        "eval": (call(glob("builtins.eval"), py) + b".", "builtins.eval"),
        "exec": (call(glob("builtins.exec"), py) + b".", "builtins.exec"),
        "python 2 eval": (call(glob("__builtin__.eval"), py) + b".", "__builtin__.eval"),
        "getattr": (call(call(glob("builtins.getattr"), call(glob("builtins.__import__"), text("os")), text("system")), cmd) + b".", "builtins.getattr"),
        "__import__": (call(call(glob("operator.attrgetter"), text("system")), call(glob("builtins.__import__"), text("os"))) + b"." , "operator.attrgetter"),
        "attrgetter": (call(call(call(glob("operator.attrgetter"), text("system")), glob("shutil.os")), cmd) + b".", "operator.attrgetter"),
        "methodcaller": (call(call(glob("operator.methodcaller"), text("system"), cmd), glob("shutil.os")) + b".", "operator.methodcaller"),
        "partial": (call(call(glob("functools.partial"), system, cmd)) + b".", "functools.partial"),
        "dotted name": (call(stack_global("torch", "os.system"), cmd) + b".", "torch.os.system"),
        "dotted class": (call(stack_global("collections", "OrderedDict.__init__.__objclass__.__mro__"), cmd) + b".", "collections.OrderedDict.__init__"),
        "an allowed module": (call(glob("numpy.testing._private.utils.runstring"), py, b"}") + b".", "numpy.testing._private.utils.runstring"),
        "torch.load": (call(glob("torch.serialization.load"), text("x.pt")) + b".", "torch.serialization.load"),
        "_reconstructor": (call(glob("copyreg._reconstructor"), glob(f"{__name__}.State"), glob("builtins.object"), b"N") + cmd + b"b.", "copyreg._reconstructor"),
        "Popen": (call(glob("subprocess.Popen"), popen[1:-1]) + b".", "subprocess.Popen"),
        "webbrowser": (call(glob("webbrowser.open"), text("http://localhost:9")) + b".", "webbrowser.open"),
        "runpy": (call(glob("runpy.run_path"), text("x.py")) + b".", "runpy.run_path"),
        "pickle.loads": (call(glob("pickle.loads"), binbytes(call(system, cmd) + b".")) + b".", "pickle.loads"),
        "path": (pickle.dumps(Path("/etc/passwd")), "PosixPath"),
        "object array": (pickle.dumps(array), "posix.system"),
        "array of a class": (call(glob("numpy._core.multiarray._reconstruct"), glob("subprocess.Popen"), tup(num(0)), binbytes(b"b")) + b".", "subprocess.Popen"),
        "torch zip": (torch_file(Code(os.system, sh), True), "posix.system"),
        "torch zip, in a dictionary": (torch_file({"a": torch.ones(2), "b": Code(os.system, sh)}, True), "posix.system"),
        "torch before 1.6": (torch_file(Code(os.system, sh), False), "posix.system"),
        "in a tensor": (in_tensor(torch_file(Code(os.system, sh), False)) + b".", "posix.system"),
        "in a tensor, zip": (in_tensor(torch_file(Code(os.system, sh), True)) + b".", ""),
        "in a tensor in a tensor": (in_tensor(in_tensor(torch_file(Code(os.system, sh), False)) + b"."), "torch.storage._load_from_bytes"),
        "in a caption": (pickle.dumps({"captions": ["a cat", Code(os.system, sh)]}), "posix.system"),
        "second pickle of five": (pickle.dumps(torch.serialization.MAGIC_NUMBER, 2) + call(system, cmd) + b".", "os.system"),
    }

RUNS = """GLOBAL STACK_GLOBAL INST OBJ NEWOBJ NEWOBJ_EX BUILD EXT1 EXT2 EXT4 eval exec getattr attrgetter methodcaller partial _reconstructor Popen""".split() + [
    "python 2 eval", "dotted name", "an allowed module", "pickle.loads", "object array", "torch zip", "torch zip, in a dictionary", "torch before 1.6", "in a tensor",
    "in a tensor, zip", "in a caption"]

def wrong(): # no code, but not what torch and numpy write
    storage, x = torch_file(torch.ones(8)._typed_storage(), False), torch.ones(2, 4, 3)
    rebuild, reconstruct = glob("torch._utils._rebuild_tensor_v2"), glob("numpy._core.multiarray._reconstruct")
    tensor = lambda size, stride, offset=0: call(rebuild, in_tensor(storage), num(offset), tup(*map(num, size)), tup(*map(num, stride)), b"\x89", b"N")
    dtype = lambda code, *state: call(glob("numpy.dtype"), text(code), b"\x89", b"\x88") + (tup(*state) + b"b" if state else b"")
    fresh = call(reconstruct, glob("numpy.ndarray"), tup(num(0)), binbytes(b"b"))
    array = lambda shape, dt, data: fresh + tup(num(1), tup(*map(num, shape)), dt, b"\x89", data) + b"b"
    u, minus = b"N", num(-1)
    return {
        "zero strides": (shard(tensor((2**13, 2**14, 2**13), (0, 0, 0))), "over a storage of 8 values"),
        "a stride back": (shard(tensor((2, 2, 2), (-4, 2, 1), 4)), "a stride that is none"),
        "past the end": (shard(tensor((2, 2, 2), (4, 2, 1), 1)), "over a storage of 8 values"),
        "a negative size": (shard(tensor((-2, 2, 2), (4, 2, 1))), "a shape that is none"),
        "an enormous size": (shard(tensor((2**62, 2**62, 2**62), (0, 0, 0))), "a shape that is none"),
        "a long shape": (shard(tensor((1,)*99, (1,)*99)), "a shape that is none"),
        "shape and stride differ": (shard(tensor((2, 2), (1,))), "_rebuild_tensor_v2"),
        "a tensor of a tensor": (shard(call(rebuild, tensor((8,), (1,)), num(0), tup(num(8)), tup(num(1)))), "a storage that is none"),
        "codec": (call(glob("_codecs.encode"), text("x"*9), text("zip_codec")) + b".", "zip_codec"),
        "codec of an import": (call(glob("_codecs.encode"), text("x"), text("antigravity")) + b".", "antigravity"),
        "decode": (call(glob("codecs.decode"), binbytes(b"x"), text("zip_codec")) + b".", "codecs.decode"),
        "dtype of objects with other flags": (shard(array((1,), dtype("O8", num(3), text("|"), u, u, u, minus, minus, num(0)), b"]" + text("a") + b"a")), "an array of fields"),
        "dtype with fields": (shard(array((1,), dtype("V8"), binbytes(b"x"*8))), "V8"),
        "dtype by expression": (shard(array((1,), dtype("i4,O"), binbytes(b"x"*8))), "i4,O"),
        "pointers from bytes": (shard(array((1,), dtype("O8"), binbytes(b"x"*8))), "objects that are not text"),
        "objects that are none": (shard(array((1,), dtype("O8"), b"]Na")), "objects that are not text"),
        "bytes that are missing": (shard(array((9, 9, 9), dtype("f4"), binbytes(b"x"*8))), "over other bytes"),
        "an array of nothing": (shard(array((2**40,), dtype("U0"), binbytes(b""))), ""),
        "an array twice": (shard(array((2,), dtype("f4"), binbytes(b"x"*8)) + tup(num(1), tup(num(1)), dtype("O8"), b"\x89", b"]") + b"b"), "the state of a ndarray"),
        "other byte order": (pickle.dumps(np.ones(2, ">f4")), "byte order"),
        "a call of a text": (text("x") + b")R.", "a call of a str"),
        "arguments in a list": (glob("collections.OrderedDict") + b"]R.", "a call"),
        "pairs to a dictionary": (call(glob("collections.OrderedDict"), b"]") + b".", "collections.OrderedDict"),
        "state of a dictionary": (b"}}" + text("__setstate__") + b"Nsb.", "the state of a dict"),
        "append to a dictionary": (b"}Na.", "a list that is none"),
        "set in a list": (b"]NNs.", "a dictionary whose keys"),
        "a set": (pickle.dumps({1, 2}, 4), "EMPTY_SET"),
        "persistent id": (b"Pposix\n.", "PERSID"),
        "binary persistent id": (text("x") + b"Q.", "persistent id"),
        "out of band": (b"\x80\x05\x97.", "NEXT_BUFFER"),
        "empty": (b"", "is empty"),
        "text": (b"<html>404 not found</html>", "no pickle"),
        "json": (b'{"clip": 1}', "no pickle"),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(99), ""),
        "a zip": (b"PK\x03\x04" + bytes(99), ""),
        "only STOP": (b".", ""),
        "a protocol to come": (b"\x80\x63N.", ""),
        "cut short": (pickle.dumps({"clip_blip3o_embeddings": x, "captions": ["a"]*99})[:300], ""),
        "cut short, torch": (torch_file({"a": x}, True)[:-100], ""),
        "cut short, torch before 1.6": (torch_file({"a": x}, False)[:-20], ""),
        "not in the memo": (b"h\x07.", ""),
        "text that is none": (b"\x80\x04\x8c\x02\xff\xfe.", ""),
        "sparse": (pickle.dumps(torch.eye(3).to_sparse()), "_rebuild_sparse_tensor"),
        "another device": (torch_file({f"{n}_blip3o_embeddings": torch.empty(2, 4, 3, device="meta") for n in ("clip", "eva")}, True), "_rebuild_meta_tensor_no_storage"),
    }

def bombs(folder):
    "Small files that ask for much memory, time or stack"
    deep, less = (b")" + b"\x85"*n for n in (500_000, 200_000))
    blob = torch_file({"a": torch.ones(8)}, False)
    first3 = blob[:blob.index(b"\x80\x02}q\x00X\x01")]                    # magic number, protocol, system
    nested = lambda obj: first3 + obj + b"\x80\x02]." 
    pid = lambda n, key="0": tup(text("storage"), glob("torch.FloatStorage"), text(key), text("cpu"), num(n), b"N") + b"Q"
    def archive(obj, method=zipfile.ZIP_STORED):
        with zipfile.ZipFile(b := io.BytesIO(), "w", method) as z:
            z.writestr("a/data.pkl", obj); z.writestr("a/version", "3\n"); z.writestr("a/byteorder", "little")
        return b.getvalue()
    one = pickle.dumps(torch.ones(4, 3), 4)[2:-1]
    refs = lambda item, n: b"]" + item + b"r\xfe\xff\xff\xff" + b"a" + b"(" + b"j\xfe\xff\xff\xff"*n + b"e"
    ones = b"]" + one + b"q\xfe" + b"a(" + b"h\xfe"*200_000 + b"e"
    row = pickle.dumps(torch.ones(100_000, 4, 3), 4)[2:-1]
    return {
        "memo": b"]r\xff\xff\xff\xff.",
        "bytes": b"\x8e" + struct.pack("<Q", 2**40),
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"x",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**40),
        "number": b"\x8b\xff\xff\xff\x7f",
        "text": b"\x8d" + struct.pack("<Q", 2**34),
        "deep key": b"}" + deep + b"Ns.",
        "deep key of a file of torch": archive(b"\x80\x02}" + less + b"Ns."),
        "deep key in a tensor": in_tensor(nested(b"}" + less + b"Ns.")) + b".", "deep lists": b"]"*200_000 + b"a"*199_999 + b".", "instructions": b"]"*600_001 + b".",
        "storage in a tensor": in_tensor(nested(pid(2**40) + b".")) + b".",
        "many storages in a tensor": in_tensor(nested(b"]" + b"".join(pid(50, str(i)) + b"a" for i in range(2000)) + b".")) + b".",
        "storage of a file of torch": archive(b"\x80\x02" + tup(text("storage"), glob("torch.FloatStorage"), text("0"), text("cpu"), num(2**33)) + b"Q."),
        "a view in a file of torch":
            archive(call(glob("torch._utils._rebuild_tensor_v2"), tup(text("storage"), glob("torch.FloatStorage"), text("0"), text("cpu"), num(1)) + b"Q", num(0), tup(num(2**33)), tup(num(0)), b"\x89", b"N") + b"."),
        "compressed": archive(b"N."*20_000_000, zipfile.ZIP_DEFLATED), "one tensor many times": shard(ones),
        "one text many times": b"\x80\x04}(" + text("clip_blip3o_embeddings") + row + text("eva_blip3o_embeddings") + row + text("captions") + refs(text("x"*1_000_000), 99_999) + b"u.",
    }

# --- the tests --------------------------------------------------------------------------------------------------------------------------------------
NAMES = list(code("x"))
WRONG = wrong()

def refused(path):
    with pytest.raises(InputError) as e: read_pickle_shard(path)
    assert path.name in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 400 + len(str(path)), str(e.value)
    return str(e.value)

@pytest.fixture
def extension():
    "A program that registered an extension: code 241 is os.system"
    copyreg.add_extension("os", "system", 0xf1)
    yield
    copyreg.remove_extension("os", "system", 0xf1)

@pytest.mark.fault("pickle that asks for code", "conversion", "refused, by the name of what it asked for")
@pytest.mark.parametrize("route", NAMES)
def test_code_is_refused_by_name(route, tmp_path, extension):
    data, name = code(tmp_path/"marker")[route]
    (f := tmp_path/"shard.pkl").write_bytes(data)
    assert name in refused(f)
    assert [p.name for p in tmp_path.iterdir()] == ["shard.pkl"]

@pytest.mark.parametrize("route", RUNS)
def test_corpus_is_live(route, tmp_path, extension):
    "The stock reader runs what the routes carry, so the corpus tests something"
    data = code(tmp_path/"marker")[route][0]
    try: out = torch.load(io.BytesIO(data), weights_only=False) if route.startswith("torch") else pickle.loads(data)
    except Exception: out = None # some fail after the harm is done
    if isinstance(out, subprocess.Popen): out.wait()
    for _ in range(3000): # up to a minute, for what goes on after the reader has returned
        if (tmp_path/"marker").exists(): break
        __import__("time").sleep(.02)
    assert (tmp_path/"marker").exists()

@pytest.mark.fault("pickle of what no writer of features writes: views past the end, other types, damage", "conversion", "refused in one line that names the file and what is wrong")
@pytest.mark.parametrize("what", WRONG)
def test_what_features_do_not_need(what, tmp_path):
    data, part = WRONG[what]
    (f := tmp_path/"shard.pkl").write_bytes(data)
    assert part in refused(f)

CHILD = """if True:
    import json, os, resource, sys, time, warnings
    from pathlib import Path
    from blip3o_nb.files import InputError
    from blip3o_nb.earlier import pickles
    from blip3o_nb.earlier.pickles import convert
    from blip3o_nb.earlier.pickles import read_pickle_shard
    pickles.MAX_OPS = 600_000
    def status(k): return int(next(l for l in open("/proc/self/status") if l.startswith(k)).split()[1])/1024
    def reset(): Path("/proc/self/clear_refs").write_text("5")
    limit = int(status("VmSize") + 3000) << 20
    folder = Path(sys.argv[1]); files = folder/"files"
    convert(files/"one", folder/"warm", shard_size=8)
    reset(); before = status("VmRSS"); convert(files/"four", folder/"out", shard_size=8)
    print(json.dumps(["convert", "", status("VmHWM") - before, 0]), flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for f in sorted(files.glob("*.pkl")):
        reset(); before, t = status("VmRSS"), time.process_time() # of the processor, however busy the machine is
        try: said = repr(read_pickle_shard(f))
        except InputError as e: said = "InputError: " + str(e)
        print(json.dumps([f.stem, said, status("VmHWM") - before, time.process_time() - t]), flush=True)"""

@pytest.fixture(scope="module")
def child(tmp_path_factory):
    "What a process of bounded memory says to the bombs, and what it takes to convert three files"
    folder = tmp_path_factory.mktemp("bombs")
    for name, n in (("one", 1), ("four", 4)):
        (folder/"files"/name).mkdir(parents=True)
        for i in range(n): (folder/"files"/name/f"embeddings_shard_0000{i}_patch_only.pkl").write_bytes(pickle.dumps({f"{k}_blip3o_embeddings": torch.ones(20, 16, 8192) for k in ("clip", "eva")}))
    for name, data in bombs(folder).items(): (folder/"files"/f"{name}.pkl").write_bytes(data)
    r = subprocess.run([sys.executable, "-c", CHILD, folder], capture_output=True, text=True, cwd=Path(pickles.__file__).parents[1])
    return {name: rest for name, *rest in map(json.loads, r.stdout.splitlines())}, r

SAYS = {"instructions": "more than 600,000 instructions", "compressed": "an archive that torch does not write", "storage in a tensor": "more than it has",
        "storage of a file of torch": "more than it has", "many storages in a tensor": "more than it has", "deep key": "keys are not text"}

@pytest.mark.fault("small pickle that asks for much memory, time or stack", "conversion", "refused in one line, with less than 700 MiB and 30 s")
@pytest.mark.parametrize("name", list(bombs("x")))
def test_bombs_take_no_more_than_their_file(name, child):
    results, r = child
    assert name in results, f"the process died at it or before ({r.returncode}): {r.stderr[-500:]}"
    said, mib, seconds = results[name]
    assert said.startswith("InputError: ") and f"{name}.pkl" in said and "\n" not in said and SAYS.get(name, "") in said, said
    assert mib < 700 and seconds < 30, f"{mib:.0f} MiB, {seconds:.1f} s"

def test_conversion_holds_one_file(child):
    mib = child[0]["convert"][1]
    assert mib < 2.7*20, f"{mib:.0f} MiB for four files of 20" # one file, its larger column twice, and a shard of the new set

# --- what honest code writes, beyond what the notebook shows ----------------------------------------------------------------------------------------
TOY = toy_features(30)
COLUMNS = {f"{n}_blip3o_embeddings": TOY[n] for n in ("clip", "eva")}

@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_numpy_1(protocol, tmp_path):
    "numpy 1 wrote numpy.core where numpy 2 writes numpy._core"
    data = pickle.dumps({**{k: v.numpy() for k, v in COLUMNS.items()}, "captions": np.array(TOY["captions"]), "keys": np.array(TOY["keys"], object)}, protocol)
    for new in (b"multiarray", b"numeric"): data = data.replace(b"numpy._core." + new, b"numpy.core." + new)
    for n in (21, 18): data = data.replace(b"\x8c" + bytes([n+1]) + b"numpy.core", b"\x8c" + bytes([n]) + b"numpy.core") # the length before the name
    if protocol > 3: data = data[:2] + data[11:] if data[2:3] == b"\x95" else data # without frames, whose lengths changed
    (f := tmp_path/"shard.pkl").write_bytes(data)
    s = read_pickle_shard(f)
    assert torch.equal(s["clip"], TOY["clip"]) and s["captions"] == TOY["captions"] and s["keys"] == TOY["keys"]

@pytest.mark.parametrize("x", [TOY["clip"][::2, 1:], TOY["clip"].transpose(0, 1), TOY["clip"].double(), TOY["clip"].half().requires_grad_()], ids=["view", "transposed", "double", "grad"])
@pytest.mark.parametrize("how", ["pickle", "zip", "legacy"])
def test_every_tensor_comes_back(x, how, tmp_path):
    obj = {"clip_blip3o_embeddings": x, "eva_blip3o_embeddings": x}
    if x.shape[1] == 30: obj = {k: v.transpose(0, 1).contiguous().transpose(0, 1)[:, :25] for k, v in obj.items()} # 25 tokens, strides that do not fall
    (f := tmp_path/"shard.pkl").write_bytes(pickle.dumps(obj) if how == "pickle" else torch_file(obj, how == "zip"))
    s = read_pickle_shard(f)
    assert torch.equal(s["clip"], obj["clip_blip3o_embeddings"]) and s["clip"].dtype == x.dtype and not s["clip"].requires_grad

def test_file_of_torch_is_mapped(tmp_path):
    (f := tmp_path/"shard.pkl").write_bytes(torch_file(COLUMNS, True))
    s = read_pickle_shard(f)
    assert str(f) in Path("/proc/self/maps").read_text() and torch.equal(s["eva"], TOY["eva"])

@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path/"shards", {"clip": {"model": "a"}, "eva": {"model": "b"}}, shard_size=8) as w: w.add_batch(TOY["keys"], {"clip": TOY["clip"], "eva": TOY["eva"]}, TOY["captions"], [""]*30)
    return tmp_path/"shards"

def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

@pytest.mark.fault("killed in the third pickle", "conversion", "gone on with; the end is that of an undisturbed run")
def test_pickles_are_gone_on_with(shards, tmp_path, monkeypatch):
    "Killed after two files: the third is whole or absent, and the end is that of an undisturbed run"
    convert(shards, tmp_path/"whole", to="pickles", shard_size=8)
    dump, count = pickle.dump, []
    def dies(data, f, protocol):
        if isinstance(data, dict) and "total_samples" in data: count.append(1) # torch uses it too
        if len(count) == 3: f.write(b"half a file"); raise KeyboardInterrupt
        dump(data, f, protocol)
    monkeypatch.setattr(pickle, "dump", dies)
    with pytest.raises(KeyboardInterrupt): convert(shards, tmp_path/"killed", to="pickles", shard_size=8)
    monkeypatch.undo()
    assert set(files(tmp_path/"killed")) == {"converted.json", *(f"embeddings_shard_0000{i}_cls_patch.pkl" for i in range(2))}
    r = convert(shards, tmp_path/"killed", to="pickles", shard_size=8)
    assert (r["new"], r["skipped"]) == (14, 16)
    a, b = files(tmp_path/"whole"), files(tmp_path/"killed")
    assert a.keys() == b.keys() and a["embeddings_manifest.json"] == b["embeddings_manifest.json"]
    for name in a:
        if name.endswith(".pkl"): assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(pickle.loads(a[name]).values(), pickle.loads(b[name]).values(), strict=True))

@pytest.mark.fault("disk full", "conversion", "one line; no half of a file is left")
@pytest.mark.parametrize("to", ["pickles", "grid_pickle"])
def test_full_disk(shards, tmp_path, to):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(InputError, match="free some space"): convert(shards, tmp_path/"full", to=to, shard_size=8, layout="grid_4" if to == "grid_pickle" else None)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path/"full").glob("*.pkl")) and not list((tmp_path/"full").glob(".*"))

def test_one_row_of_a_view_is_stored_alone(shards, tmp_path):
    "A pickled view brings all it is a view of: one sample without its CLS token counts as contiguous"
    convert(shards, tmp_path/"one", to="pickles", shard_size=1, layout="patch_only")
    s = pickle.loads((tmp_path/"one"/"embeddings_shard_00000_patch_only.pkl").read_bytes())
    assert s["clip_blip3o_embeddings"].untyped_storage().nbytes() == 16*32*4

def test_reduced_layouts_say_so(shards, tmp_path):
    convert(shards, tmp_path/"p", to="pickles", layout="patch_only", dtype="bf16")
    convert(tmp_path/"p", tmp_path/"s")
    ds = FeatureDataset(tmp_path/"s")
    assert ds.contract["clip"] == {"model": "a", "layout": "patch_only", "num_tokens": 16, "grid": 4} and ds.shape("eva") == (16, 48)

@pytest.mark.fault("contract whose layout is a path", "conversion", "no file leaves the folder")
def test_contract_in_a_file_cannot_name_a_path(shards, tmp_path):
    with ShardWriter(tmp_path/"odd", {"clip": {"layout": "../../x"}, "eva": {}}) as w: w.add_batch(TOY["keys"], {"clip": TOY["clip"], "eva": TOY["eva"]}, [""]*30, [""]*30)
    assert [f.name for f in convert(tmp_path/"odd", tmp_path/"p", to="pickles")["files"]] == ["embeddings_shard_00000_cls_patch.pkl"]

@pytest.mark.fault("one key for two pictures, in two files", "conversion", "refused in one line; what is stored stays")
def test_a_key_of_a_later_file_is_not_lost(tmp_path):
    "A picture of another file under a key that an earlier run stored is an error, not a sample that is skipped"
    (src := tmp_path/"src").mkdir()
    (src/"embeddings_shard_00000_cls_patch.pkl").write_bytes(pickle.dumps({**COLUMNS, "keys": TOY["keys"]}))
    assert convert(src, tmp_path/"dst")["new"] == 30
    (src/"embeddings_shard_00001_cls_patch.pkl").write_bytes(pickle.dumps({**{k: v.flip(0) for k, v in COLUMNS.items()}, "keys": TOY["keys"]}))
    with pytest.raises(InputError, match="embeddings_shard_00001_cls_patch.pkl is in .* with other features"): convert(src, tmp_path/"dst")
    assert len(FeatureDataset(tmp_path/"dst")) == 30
