"""The bug zoo of nbs/experiments/bug_zoo.ipynb: one property for each bug, on the library's own functions. `pytest -m slow -n 0` puts each bug into a copy
of the library and expects the property to fail there."""
import re, subprocess
from functools import partial
from itertools import pairwise
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
import blip3o_nb
from blip3o_nb.files import InputError
from blip3o_nb.core import layout_of, seed_everything, toy_features
from blip3o_nb.flow.losses import BLIP3oFlowMatchingLoss
from blip3o_nb.flow.paths import LinearPath, SlerpPath, exp_map, log_map
from blip3o_nb.flow.samplers import SOLVERS, sample

ROOT = Path(__file__).parents[1]

def size(x): return x.abs().max().item()

def draws(path, n=64, d=32):
    g = seed_everything(0)
    return path.noise((n, d), g), path.noise((n, d), g), torch.linspace(0, 1, n)

@pytest.fixture(scope="module")
def features(tmp_path_factory):
    "Toy features as shards: 64 training pictures and a few held out"
    from blip3o_nb.features.shards import ShardWriter
    folder, toy = tmp_path_factory.mktemp("zoo")/"toy", toy_features(90)
    with ShardWriter(folder, {"clip": {}, "eva": {}}, dtype="fp32", shard_size=32) as w: w.add_batch(toy["keys"], {"clip": toy["clip"], "eva": toy["eva"]}, [""]*90, [""]*90)
    return folder

def learner(features, bs=16, cbs=(), **kw):
    from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
    from blip3o_nb.training.learner import flow_learner
    from blip3o_nb.features.loading import feature_dls
    seed_everything(0)
    net = BLIP3oDiT(BLIP3oDiTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_tokens=17, clip_embedding_size=32,
                                    eva_embedding_size=48, prediction_type="velocity"))
    return flow_learner(feature_dls(features, bs=bs, max_samples=64, device="cpu"), net, precision="fp32",
                        path=LinearPath(), progress=False, cbs=cbs, **kw)

def batches(features, epochs=1):
    "What the network is given and what the loss compares with, batch by batch: `[(xt, t), PathSample]`"
    from fastai.callback.core import Callback
    class Record(Callback):
        def after_batch(self):
            if self.training: self.learn.seen.append((self.xb[:2], self.yb[0]))
    learn = learner(features, cbs=[Record()])
    learn.seen = []
    learn.fit(epochs)
    return learn.seen

@pytest.mark.parametrize("method", SOLVERS)
def test_sampler_moves_with_the_velocity(method):
    "Bug 1: under a constant velocity of one, what starts at 0 ends at 1"
    end = sample(lambda x, t, cond: torch.ones_like(x), x0=torch.zeros(1, 1), method=method, steps=50).item()
    assert abs(end - 1) < 1e-5, f"moved by {end:+.2f} instead of +1.00"

@pytest.mark.parametrize("method", SOLVERS)
def test_network_is_told_the_time_of_its_points(method):
    "Bug 2: under that velocity a point's position is its time"
    told = []
    def model(x, t, cond): told.append((x[:, 0], t)); return torch.ones_like(x)
    sample(model, x0=torch.zeros(1, 1), method=method, steps=50)
    off = max(size(x - t) for x, t in told)
    assert off < 1e-5, f"at some point the time told is off by {off:.2f}"

def test_loss_compares_with_the_noise_of_the_input(features):
    "Bug 3: the target's own noise, data and time rebuild the network's input, and its velocity leads from there to the data"
    for (xt, t), s in batches(features):
        rebuilt, arrived = (1-s.t)[:, None, None]*s.x0 + s.t[:, None, None]*s.x1, xt + (1-t)[:, None, None]*s.v
        assert torch.equal(t, s.t)
        assert size(rebuilt - xt) < 1e-5, f"the target's noise would have made another input, off by {size(rebuilt - xt):.1f}"
        assert size(arrived - s.x1) < 1e-4, f"the target misses the data by {size(arrived - s.x1):.1f}"

def test_spherical_velocity_is_tangent_and_arrives():
    "Bug 4: no velocity leaves the sphere, and each leads to its data in the time that is left"
    s = SlerpPath().sample(*draws(SlerpPath()))
    off = size((s.xt*s.v).sum(-1))
    assert off < 1e-5, f"a velocity points off the sphere by {off:.2f}"
    assert size(exp_map(s.xt, (1-s.t)[:, None]*s.v) - s.x1) < 1e-5

def test_velocity_cosine_stands_beside_its_trivial_value():
    "Bug 5: minus the noise scores what the loss reports as trivial, 0.77 for data of 0.83 times the norm of the noise"
    g = seed_everything(0)
    s, loss = LinearPath().sample(torch.randn(64, 17, 512, generator=g), .83*torch.randn(64, 17, 512, generator=g), torch.rand(64, generator=g)), BLIP3oFlowMatchingLoss()
    loss(-s.x0, s)
    cosine, trivial = loss.parts.cosine.item(), loss.parts.trivial_cosine.item()
    assert abs(cosine - .77) < .01
    assert abs(cosine - trivial) < 1e-5, f"knowing nothing scores {cosine:.2f}, and {trivial:.2f} stands beside it"

def test_noise_and_times_are_fresh_in_every_batch(features):
    "Bug 6: over two epochs of the same pictures, no noise and no time comes twice"
    s = [s for _, s in batches(features, epochs=2)]
    same = sum(torch.equal(a.x0, b.x0) or torch.equal(a.t, b.t) for i, a in enumerate(s) for b in s[:i])
    assert same == 0, f"{same} pairs of {len(s)} batches share their noise or times"

def test_validation_has_no_training_picture(features):
    "Bug 7: the two sides of the DataLoaders share no key, and copies under other names are refused"
    from blip3o_nb.features.loading import feature_dls
    from blip3o_nb.core import leak_check
    from blip3o_nb.features.shards import FeatureDataset
    dls = feature_dls(features, bs=16, device="cpu")
    both = set(dls.train_ds.keys) & set(dls.valid_ds.keys)
    assert not both, f"{len(both)} of {len(dls.valid_ds)} validation pictures are training pictures"
    with pytest.raises(InputError): leak_check(FeatureDataset(features, "train"), FeatureDataset(features))

def test_worker_processes_share_the_pictures(features):
    "Bug 7: with two processes reading, each picture comes once an epoch"
    from blip3o_nb.features.loading import feature_dls
    dls = feature_dls(features, bs=16, num_workers=2, device="cpu")
    n, distinct = (len(x := torch.cat([target for _, target in dls.valid]).flatten(1))), len(x.unique(dim=0))
    assert n == distinct == len(dls.valid_ds), f"{n} validation pictures were read of {len(dls.valid_ds)}"

def test_rotation_keeps_lengths_and_sees_distances_only():
    "Bug 8: positions change no length, and moving all of them changes no logit"
    from blip3o_nb.network.attention import grid_positions, rope_table, rotate
    q, k = torch.randn(2, 65, 32, generator=seed_everything(0))
    turn = lambda x, by=0.: rotate(x, *rope_table(grid_positions(layout_of(65)) + by, 32))
    ratio = turn(q).norm(dim=-1)/q.norm(dim=-1)
    assert size(ratio - 1) < 1e-5, f"lengths change by {100*size(ratio - 1):.0f} %"
    assert size(turn(q) @ turn(k).T - turn(q, 5.) @ turn(k, 5.).T) < 1e-3

def test_network_can_tell_times_apart():
    "Bug 9: what the network makes of noise and of data, and of two times a hundredth apart, is not the same vector"
    from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
    net = BLIP3oDiT(BLIP3oDiTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_tokens=4, clip_embedding_size=8, eva_embedding_size=8))
    seen = []
    net.time.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net(torch.zeros(4, 4, 8), torch.tensor([0., 1., .5, .51]), torch.zeros(4, 4, 8))
    ends, near = (F.cosine_similarity(*seen[0][i:i+2], dim=0).item() for i in (0, 2))
    assert ends < .5, f"noise and data have embeddings of cosine {ends:.2f}"
    assert near < .95, f"two times a hundredth apart have embeddings of cosine {near:.2f}"

def test_gate_scales_its_branch():
    "Bug 10: behind a norm, half the gate is half the branch"
    from blip3o_nb.network.dit import Block
    seed_everything(0)
    block, x = Block(32, 2, 1, 64, sandwich=True, cross=False), torch.randn(2, 17, 32)
    def branch(gate):
        with torch.no_grad(): block.ada.weight.zero_(); block.ada.bias.copy_(torch.cat([torch.zeros(64), torch.full((32,), gate)]).repeat(2))
        return (block(x, torch.zeros(2, 1, 32), None) - x).norm().item()
    ratio = branch(.02)/branch(.01)
    assert abs(ratio - 2) < .05, f"twice the gate makes the branch {ratio:.2f} times as large"

def test_accumulated_gradients_equal_the_large_batch(features):
    "Bug 11: four batches of 8 with their gradients accumulated train as one of 32"
    from fastai.optimizer import OptimWrapper
    def weights(bs, accumulate):
        learn = learner(features, bs=bs, accumulate=accumulate, clip=1e9, wd=0.)
        learn.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
        learn.fit(2, .1)
        return learn.model.out.weight.detach() # of the last layer, zero at the start
    large, small = weights(32, 1), weights(8, 4)
    off = ((small - large).norm()/large.norm()).item()
    assert off < 1e-3, f"the weights go elsewhere, by {100*off:.0f} % of the way"

@pytest.mark.parametrize("name", ["tiny-clip", "tiny-eva"])
def test_pooled_tokens_are_the_towers_own_embedding(name):
    "Bug 12: retrieval reads what the tower's own library computes, its final norm and projection included"
    from blip3o_nb.features.encoders import load_encoder
    enc = load_encoder(name, device="cpu")
    images = torch.rand(4, 3, *[enc.tower.image_size]*2, generator=seed_everything(0))
    with torch.no_grad(): own = enc.tower.model.encode_image(images)
    ours = enc.pool(enc.tokens(images))
    assert ours.shape == own.shape, f"pooled embeddings are {ours.shape[1]} wide, the tower's {own.shape[1]}"
    off = ((ours - own).norm()/own.norm()).item()
    assert off < 1e-4, f"pooled embeddings differ from the tower's by {100*off:.0f} % of their length"

def test_every_report_has_floor_and_ceiling(features, tmp_path):
    "Bug 12: a score stands between what ignores the picture and the real tokens"
    from blip3o_nb.judging.evaluate import evaluate
    from blip3o_nb.generation.pipeline import save_checkpoint
    learn = learner(features)
    learn.fit(1)
    roles = [r.role for r in evaluate(save_checkpoint(learn, tmp_path/"flow"), features, progress=False).rows]
    missing = {"floor", "ceiling"} - set(roles)
    assert not missing, f"the report has no {' and no '.join(sorted(missing))}"

KEY = re.compile(r"(?i:(?:api_?key|secret|token|password|wandb login)\W{1,6}(?=[\w-]*\d)([\w-]{24,}))|\b((?:gh[oprsu]|hf)_\w{30,}|github_pat_\w{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|"
                 r"sk-[\w-]{32,}|AIza[\w-]{35}|xox[abprs]-[\w-]{20,})|(-----BEGIN [A-Z ]*PRIVATE KEY-----)")

def keys_in(text): return [a or b or c for a, b, c in KEY.findall(text)]

def files_with_keys(root):
    "Files that git would carry, outputs of notebooks among them, that hold what looks like a key"
    r = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    names = [root/n for n in r.stdout.split("\n") if n] if r.returncode == 0 else [p for d in ("nbs", "tests") for p in (root/d).rglob("*")]
    return [p for p in names if p.suffix not in (".gz", ".png", ".safetensors") and p.is_file() and keys_in(p.read_text(errors="ignore"))]

@pytest.mark.fault("a key in a file: a job script, a notebook's output", "the repository", "none is there")
def test_no_key_in_the_repository():
    "Bug 13: no file that git would carry, and no module of the package, holds what looks like a key"
    planted = "0123456789abcdef"*2 + "01234567" # a key of 40 hexadecimal digits, as W&B's are
    for line in ("export WANDB_API_KEY={}", "wandb login {}", "os.environ['WANDB_API_KEY'] = '{}'"): assert keys_in(line.format(planted)) == [planted]
    found = {p.name for p in (*files_with_keys(ROOT), *(p for p in Path(blip3o_nb.__file__).parent.rglob("*.py") if keys_in(p.read_text())))}
    assert not found, f"what looks like a key stands in {', '.join(sorted(found))}"

def test_each_mutation_finds_its_place():
    "Code that moves must not leave a mutation behind: each of them names a text that stands once in its module"
    from mutations import MUTATIONS
    lost = [m.words for m in MUTATIONS if (ROOT/"blip3o_nb"/m.module).read_text().count(m.old) != 1]
    assert not lost, f"mutations.py looks for what is not there: {', '.join(lost)}"

@pytest.mark.slow
def test_every_bug_makes_its_test_fail(tmp_path):
    "Each mutation of mutations.py, in a copy of the package; writes nbs/experiments/mutations.csv"
    import mutations
    rows = mutations.run_all(tmp_path)
    mutations.write(rows, ROOT/"nbs"/"experiments"/"mutations.csv")
    assert [r["mutation"] for r in rows if r["result"] != "fails"] == []
