"""A training that is killed, and killed again, ends with the weights of one that was left alone; in bfloat16
it ends at the same loss."""
import os, random, signal, statistics, time, traceback
import pytest, torch
from blip3o_nb.core import toy_features
from blip3o_nb.features.shards import ShardWriter
from blip3o_nb.options import make_config
from blip3o_nb.training.optimisation import has_bf16

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             learning_rate=3e-3, num_epochs=3, batch_size=16, gradient_accumulation_steps=2,
             checkpoint_every=7, eval_samples=16, cond_dropout=.1, monitor_every=5)

@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder, toy = tmp_path_factory.mktemp("training")/"features", toy_features(400)
    contract = {"clip": {"model": "toy-clip"}, "eva": {"model": "toy-eva"}}
    with ShardWriter(folder, contract, dtype="fp32") as w:
        w.add_batch(toy["keys"], {c: toy[c] for c in contract}, toy["captions"], [""]*400)
    return folder

def killer(kill):
    "A callback that kills its process the `kill[1]`-th time that `kill[0]` happens"
    from fastai.callback.core import Callback
    class Kill(Callback):
        order = 99
        def die(self, when, at):
            if kill and kill[0] == when and at == kill[1]: os.kill(os.getpid(), signal.SIGKILL)
        def before_step(self): self.die("before a step", self.train_iter)
        def after_batch(self):
            if self.training: self.die("after a batch", self.train_iter)
            else: self.die("in validation", self.epoch)
    return Kill()

def killed_write(at):
    "Makes the `at`-th `torch.save` end in a file that is cut short, and kills the process"
    save, seen = torch.save, []
    def half(state, path):
        save(state, path)
        seen.append(path)
        if len(seen) == at:
            os.truncate(path, 5000)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half

def in_child(features, out, kill=None):
    "Train in a process of its own, which may kill itself; how it ended"
    from blip3o_nb.runs.runs import train
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        torch.set_num_threads(1)
        if kill and kill[0] == "in a write": killed_write(kill[1])
        config = make_config(embeddings_dir=str(features), output_dir=str(out), **SMALL)
        train(config, progress=False, cbs=[killer(kill)])
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def last(out): return torch.load(sorted((out/"states").glob("*.pt"))[-1], weights_only=True)

def same(a, b, at="state"):
    "Assert that two nested states are equal to the last bit"
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for k in a: same(a[k], b[k], f"{at}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b)): same(x, y, f"{at}[{i}]")
    elif torch.is_tensor(a): assert torch.equal(a, b), f"{at} differs by {(a - b).abs().max():.1e}"
    else: assert a == b or a != a, f"{at}: {a} and {b}"

def without_record(state): return {k: v for k, v in state.items() if k != "record"}

@pytest.mark.fault("kill -9 before a step, after a batch, in a write, in validations", "training",
                   "the same weights, moments, record, to the last bit")
def test_killed_training_ends_with_the_same_bits(features, tmp_path, record_property):
    rng = random.Random(0)
    assert in_child(features, tmp_path/"alone") == 0
    done = last(tmp_path/"alone")
    steps = done["at"]["train_iter"]
    kills = [("before a step", rng.randrange(1, steps//2)*2 - 1),
             ("after a batch", rng.randrange(steps//2, steps)), ("in a write", 2),
             ("in validation", 1), ("in validation", 2)]
    record_property("provoked", len(kills))
    for kill in kills: assert in_child(features, tmp_path/"killed", kill) in (-signal.SIGKILL, 0), kill
    assert in_child(features, tmp_path/"killed") == 0
    end = last(tmp_path/"killed")
    same(without_record(end), without_record(done))
    for k in ("step", "loss", "valid_loss", "gen_centred"): assert end["record"][k] == done["record"][k], k
    a, b = ((tmp_path/n/"model.safetensors").read_bytes() for n in ("alone", "killed"))
    assert a == b

def test_bf16_ends_at_the_same_loss(features, tmp_path):
    from blip3o_nb.runs.runs import train
    def end(precision):
        places = dict(embeddings_dir=str(features), output_dir=str(tmp_path/precision))
        learn = train(make_config(**places, precision=precision, device="cpu", **SMALL), progress=False)
        return learn.record["valid_loss"][-1]
    assert abs(end("bf16")/end("fp32") - 1) < .02

@pytest.mark.slow # what it compares is seconds: it needs the machine for itself
@pytest.mark.skipif(not has_bf16("cpu"),
                    reason="this processor has no instructions for bf16, which is emulated and slower here")
def test_bf16_is_faster():
    from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
    model = BLIP3oDiT(BLIP3oDiTConfig.from_preset("small"))
    x, cond = torch.randn(4, 257, 1024), torch.randn(4, 257, 4096)
    def step(dtype):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32): out = model(x, torch.rand(4), cond)
        out.float().square().mean().backward()
        return time.perf_counter() - start
    times = {d: [step(d) for d in [d]*4][1:] for d in (torch.float32, torch.bfloat16)}
    fp32, bf16 = map(statistics.median, times.values())
    assert fp32 > 1.2*bf16, f"a step takes {fp32:.2f} s in fp32 and {bf16:.2f} s in bf16"
