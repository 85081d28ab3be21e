"""Files that earlier versions wrote, kept in tests/old: they are read, and a set is gone on with."""
import shutil
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from blip3o_nb.core import toy_features
from blip3o_nb.generation.pipeline import Pipeline
from blip3o_nb.features.shards import FORMATS, FeatureDataset, ShardWriter, pack, unpack

OLD = Path(__file__).with_name("old")
TOY = toy_features(60, grid=2, clip_dim=6, eva_dim=8)
TOY |= load_file(OLD/"features.safetensors") # what was stored: made again, it differs in last bits between processors

@pytest.mark.fault("files of an earlier version", "feature set, formats 1 and 2", "read as they were written, checked as far as they can be, gone on with")
@pytest.mark.parametrize("name,dtype", [("shards_1", "bf16"), ("shards_2", "bf16"), ("shards_2_int8", "int8")])
def test_an_old_set(name, dtype, tmp_path):
    ds = FeatureDataset(OLD/name)
    assert ds.manifest["format"] == f"blip3o_nb shards {name[7]}" and ds.keys == TOY["keys"][:6] and ds.captions == TOY["captions"][:6]
    for c in ("clip", "eva"): assert torch.equal(ds.column(c), unpack(pack(TOY[c][:6], dtype)).float())
    assert ds.verify() == len(ds.manifest["shards"])
    shutil.copytree(OLD/name, tmp_path/"set")
    with ShardWriter(tmp_path/"set", ds.contract, dtype, shard_size=4) as w:
        assert w.done == set(TOY["keys"][:6])
        w.add_batch(*([TOY[k][6:10] for k in ("keys", "clip", "eva", "captions")]), [""]*4)
    more = FeatureDataset(tmp_path/"set")
    assert more.manifest["format"] == FORMATS[0] and more.keys == TOY["keys"][:10] and more.verify() == len(ds.manifest["shards"]) + 1
    for c in ("clip", "eva"): assert torch.equal(more.column(c), unpack(pack(TOY[c][:10], dtype)).float())

@pytest.mark.fault("files of an earlier version", "checkpoint, format 1", "gives the answers that it gave")
def test_an_old_checkpoint():
    pipe, was = Pipeline.from_pretrained(OLD/"checkpoint_1", device="cpu"), load_file(OLD/"checkpoint_1"/"answer.safetensors")
    torch.testing.assert_close(pipe(was["cond"], seed=0), was["tokens"], rtol=0, atol=1e-5)

