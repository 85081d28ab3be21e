"""Files that earlier versions wrote, kept in tests/old: they are read, and a set is resumed."""
import os, shutil
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from blip3o_nb.core import toy_features
from blip3o_nb.generation.pipeline import Pipeline
from blip3o_nb.features.sets import FORMAT, pack, unpack
from blip3o_nb.features.shards import FeatureDataset, ShardWriter
from blip3o_nb.files import InputError, read_json

OLD = Path(__file__).with_name("old")
TOY = toy_features(60, grid=2, clip_dim=6, eva_dim=8)
TOY |= load_file(OLD/"features.safetensors") # what was stored: made again, it differs in last bits between processors

SETS = [("shards_1", "bf16"), ("shards_2", "bf16"), ("shards_2_int8", "int8"), ("shards_3", "bf16"),
        ("shards_3_int8", "int8")] # the last with what it says of its samples in a tensor

def stored(dtype, first, last):
    "Column -> tokens of these samples as they are read"
    return {c: unpack(pack(TOY[c][first:last], dtype)).float() for c in ("clip", "eva")}

@pytest.mark.fault("files of an earlier version", "feature set, formats 1 to 3",
                   "read as they were written, checked as far as they can be, resumed with their shards as they are")
@pytest.mark.parametrize("name,dtype", SETS)
def test_an_old_set(name, dtype, tmp_path):
    ds = FeatureDataset(OLD/name)
    assert read_json(OLD/name/"manifest.json")["format"] == f"blip3o_nb shards {name[7]}"
    assert ds.keys == TOY["keys"][:6] and ds.captions == TOY["captions"][:6] and ds.columns == ["clip", "eva"]
    for c, x in stored(dtype, 0, 6).items(): assert torch.equal(ds.column(c), x)
    assert ds.verify() == len(list((OLD/name).glob("*.safetensors")))
    folder = shutil.copytree(OLD/name, tmp_path/"set")
    shards = {f: f.read_bytes() for f in folder.glob("*.safetensors")}
    with ShardWriter(folder, ds.contract, dtype, shard_size=4) as w:
        assert w.done == set(TOY["keys"][:6])
        w.add_batch(TOY["keys"][6:10], {c: TOY[c][6:10] for c in ds.columns}, TOY["captions"][6:10], [""]*4)
    more = FeatureDataset(folder)
    assert read_json(folder/"manifest.json")["format"] == FORMAT and more.keys == TOY["keys"][:10]
    assert more.verify() == len(shards) + 2 and all(f.read_bytes() == data for f, data in shards.items())
    for c, x in stored(dtype, 0, 10).items(): assert torch.equal(more.column(c), x)

@pytest.mark.parametrize("name,dtype", SETS)
def test_a_column_is_added_to_an_old_set(name, dtype, tmp_path):
    folder = shutil.copytree(OLD/name, tmp_path/"set")
    with ShardWriter(folder, {"dino": {}}) as w:
        for i, key in enumerate(TOY["keys"][:6]): w.add(key, dino=torch.full((3, 2), float(i)))
    ds = FeatureDataset(folder)
    assert (ds.keys, ds.captions, ds.columns) == (TOY["keys"][:6], TOY["captions"][:6], ["clip", "dino", "eva"])
    assert torch.equal(ds.column("dino")[:, 0, 0], torch.arange(6.))
    for c, x in stored(dtype, 0, 6).items(): assert torch.equal(ds.column(c), x)

def test_an_old_set_that_is_described_anew_and_killed_in_between(tmp_path, monkeypatch):
    "The manifest comes last: until then it is an old set"
    folder, seen, real = shutil.copytree(OLD/"shards_3", tmp_path/"set"), [], os.replace
    class Killed(BaseException): pass
    def replace(a, b):
        if len(seen) == stop: raise Killed
        seen.append(b)
        real(a, b)
    monkeypatch.setattr(os, "replace", replace)
    for stop in range(20):
        seen.clear()
        try: ShardWriter(folder, {"clip": {"model": "toy-clip"}}).__exit__(None)
        except Killed:
            assert torch.equal(FeatureDataset(folder).column("eva"), stored("bf16", 0, 6)["eva"])
            assert read_json(folder/"manifest.json")["format"] == "blip3o_nb shards 3"
        else: break
    assert stop > 6 and read_json(folder/"manifest.json")["format"] == FORMAT
    assert torch.equal(FeatureDataset(folder).column("eva"), stored("bf16", 0, 6)["eva"])

@pytest.mark.parametrize("name", ["shards_3", "shards_3_int8"])
def test_a_flipped_bit_in_an_old_set(name, tmp_path):
    folder = shutil.copytree(OLD/name, tmp_path/"set")
    f, want, named = folder/"shard-00001.safetensors", stored("int8" if "int8" in name else "bf16", 0, 6), 0
    data = f.read_bytes()
    for i in range(0, len(data), 7):
        f.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i+1:])
        try: assert all(torch.equal(FeatureDataset(folder).column(c), x) for c, x in want.items())
        except InputError as e:
            assert str(folder) in str(e)
            named += 1
    assert named > .9*len(data)/7

@pytest.mark.fault("files of an earlier version", "checkpoint, format 1", "gives the answers that it gave")
def test_an_old_checkpoint():
    pipe, was = Pipeline.from_pretrained(OLD/"checkpoint_1", device="cpu"), load_file(OLD/"checkpoint_1"/"answer.safetensors")
    torch.testing.assert_close(pipe(was["cond"], seed=0), was["tokens"], rtol=0, atol=1e-5)

