"""Two processes, with DDP and with FSDP, are one process on the joint batch; they stop together, and what they store one process can load."""
import os, re, socket, subprocess, sys, time
from pathlib import Path
import pytest

BS, EPOCHS, STEPS = 32, 4, 20 # of the joint batch

def folder_of(root):
    from blip3o_nb.core import toy_features
    from blip3o_nb.features.shards import ShardWriter
    toy = toy_features(190)
    with ShardWriter(root/"set", {"clip": {"model": "toy-clip"}, "eva": {"model": "toy-eva"}}, dtype="fp32") as w: w.add_batch(toy["keys"], {"clip": toy["clip"], "eva": toy["eva"]}, toy["captions"], [""]*190)

def learner(root, bs, *cbs, seed=0, **kw):
    "AdamW, average, clipping and dropout of the conditioning are on"
    from blip3o_nb.core import seed_everything
    from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
    from blip3o_nb.training.learner import flow_learner
    from blip3o_nb.features.loading import feature_dls
    seed_everything(seed)
    dit = BLIP3oDiT(BLIP3oDiTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_tokens=17, clip_embedding_size=32, eva_embedding_size=48, cond_dropout=.1))
    return flow_learner(feature_dls(root/"set", bs=bs, device="cpu"), dit, precision="fp32", clip=.2, ema=.9, progress=False, cbs=cbs, **kw)

def result(learn):
    "Of a learner after its fit: plain weights, average, moments and record"
    import torch
    sd = lambda m: {k: v.clone() for k, v in m.state_dict().items()}
    assert type(learn.model).__name__ == "BLIP3oDiT" and all(type(p) is torch.nn.Parameter for p in learn.model.parameters())
    moments = {n: learn.opt.opt.state[p]["exp_avg"].clone() for n, p in learn.model.named_parameters()}
    return dict(model=sd(learn.model), ema=sd(learn.ema_model.module), moments=moments, n=int(learn.ema_model.n_averaged), record=learn.record)

def far(a, b): return max((a[k] - b[k]).abs().max().item() for k in a | b)

def fitted(root, bs, *cbs, seed=0, epochs=EPOCHS, **kw):
    learn = learner(root, bs, *cbs, seed=seed, **kw)
    learn.fit(epochs, 2e-3)
    return learn

def driver(root, what):
    "Run by each process"
    import torch
    from fastai.callback.core import Callback
    from blip3o_nb.files import InputError
    from blip3o_nb.core import ranks
    from blip3o_nb.runs.distributed import (DistributedCallback, everyone, full_state, load_full_state,
                                            processes, together, whole_average)
    rank, world = ranks()
    def keep(name, value):
        if rank == 0: torch.save(value, root/f"{name}.pt")
    class Keep(Callback):
        "The state after the second epoch, and a network that is whole in the middle of the fit"
        order = 70
        def after_epoch(self):
            if self.epoch != 1: return
            state = full_state(self.learn); keep("state", state); keep("state_forms", everyone([len(state["model"]), len(state["ema"]), type(self.learn.model).__name__]))
            with whole_average(self.learn) as m:
                if rank == 0: keep("whole", {k: v.clone() for k, v in m.state_dict().items()}) # one process alone may use it
    class Load(Callback):
        order = 40
        def __init__(self, state): self.state = state
        def before_fit(self): load_full_state(self.learn, self.state if rank == 0 else None)
    class Poison(Callback):
        "The second process has a batch that is not finite"
        order = -3 # after `FlowCallback` and the dropout
        def before_batch(self):
            if self.training and rank == 1 and self.train_iter == 3: self.learn.xb = (self.xb[0]*torch.nan, *self.xb[1:])

    class Unread(Callback):
        "The second process alone cannot read its batch"
        order = -6
        def before_batch(self):
            if self.training and rank == 1 and self.train_iter == 3: raise InputError("shard-00003 is damaged: extract it again")

    with processes("cpu"):
        if what == "accelerate":
            keep("accelerate", result(fitted(root, BS//world, DistributedCallback("ddp"))))
            return stop(lambda: fitted(root, BS//world, DistributedCallback("ddp"), Unread()))
        fsdp = fitted(root, BS//world, DistributedCallback("fsdp"), Keep(), seed=rank) # the weights of the first process count
        keep("fsdp", result(fsdp))
        halfway = torch.load(root/"state.pt") if rank == 0 else None
        loaded = fitted(root, BS//world, DistributedCallback("fsdp"), Load(halfway), seed=7, epochs=0)
        keep("fsdp_loaded", result(loaded))
        resumed = learner(root, BS//world, DistributedCallback("fsdp"), Load(halfway), seed=7)
        resumed.flow.epochs = 2
        resumed.fit(EPOCHS - 2, 2e-3)
        keep("fsdp_resumed", result(resumed))
        for strategy in ("fsdp", "ddp"): # in pieces, and in two fits
            again = fitted(root, BS//world//2, DistributedCallback(strategy), epochs=2, accumulate=2); again.fit(2, 2e-3)
            keep(f"{strategy}_again", result(again))
        said = {}
        for name, f in {"unlike": lambda: fitted(root, 16 - rank, DistributedCallback()), "one": lambda: check_one(together, rank)}.items():
            try: f()
            except InputError as e: said[name] = [type(e).__name__, str(e)]
        keep("said", everyone(said))
        stop(lambda: fitted(root, BS//world, DistributedCallback(), Poison()))

def stop(f):
    "As a command does: the line, and exit code 2"
    from blip3o_nb.files import InputError
    from blip3o_nb.runs.distributed import Elsewhere
    try: f()
    except InputError as e:
        sys.stderr.write(f"at {time.time()} {type(e).__name__} says: {e}\n") # one write: both processes share the stream
        if isinstance(e, Elsewhere): raise # `processes` ends this one
        sys.exit(2)

def check_one(together, rank):
    from blip3o_nb.files import InputError
    with together():
        if rank == 1: raise InputError("the second has no disk: buy one")

BIN = Path(sys.executable).parent

def launch(root, *command):
    "The driver in two processes; both launchers look after them every 3 s, so that one that has stopped leaves the other the time to say so"
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1"}
    r = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
    r.ended = time.time()
    return r

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed"); folder_of(root)
    return root

@pytest.fixture(scope="module")
def one(root):
    learn = fitted(root, BS)
    assert len(learn.record["loss"]) == STEPS
    return result(learn)

@pytest.fixture(scope="module")
def two(root): return launch(root, BIN/"torchrun", "--standalone", "--nproc-per-node", 2, "--monitor-interval", 3, __file__, root, "torchrun")

@pytest.fixture(scope="module")
def by_accelerate(root):
    if not (BIN/"accelerate").exists(): pytest.skip("accelerate is not installed")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    return launch(root, BIN/"accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
                  "--main_process_port", port, "--monitor_interval", 3, __file__, root, "accelerate")

def stored(root, name, r):
    import torch
    assert (root/f"{name}.pt").exists(), r.stderr[-3000:]
    return torch.load(root/f"{name}.pt")

def same(a, b, eps=1e-5):
    "Weights, average and moments"
    assert a["n"] == b["n"]
    for k in ("model", "ema", "moments"): assert far(a[k], b[k]) < eps, k

def same_record(a, b):
    for k in ("loss", "valid_loss"): assert max(abs(x - y) for x, y in zip(a["record"][k], b["record"][k], strict=True)) < 1e-5, k

def test_fsdp_is_one_process(root, one, two):
    fsdp = stored(root, "fsdp", two)
    same(fsdp, one); same_record(fsdp, one)
    assert far(one["model"], one["ema"]) > 1e-3 # or the average would say nothing

def test_ddp_is_one_process_and_fsdp_under_accelerate(root, one, two, by_accelerate):
    ddp = stored(root, "accelerate", by_accelerate)
    same(ddp, one); same_record(ddp, one); same(ddp, stored(root, "fsdp", two))

@pytest.mark.parametrize("name", ["fsdp_again", "ddp_again"])
def test_pieces_accumulate_and_a_second_fit_goes_on(root, one, two, name): same(stored(root, name, two), one)

def test_a_state_goes_back_into_two_processes(root, two):
    state, loaded = stored(root, "state", two), stored(root, "fsdp_loaded", two)
    assert far(loaded["model"], state["model"]) == far(loaded["ema"], state["ema"]) == 0 and loaded["n"] == state["ema_steps"] == STEPS//2
    assert far(loaded["moments"], {k: v["exp_avg"] for k, v in state["opt"]["state"].items()}) == 0
    forms = stored(root, "state_forms", two)
    assert [f[2] for f in forms] == ["FSDPBLIP3oDiT"]*2 and forms[0][:2] == [len(state["model"])]*2 and forms[1][:2] == [0, 0]
    assert far(stored(root, "whole", two), state["ema"]) == 0

def test_two_processes_resume_bit_for_bit(root, two):
    "The state of two processes in two others: no sum is taken in another order"
    alone, resumed = stored(root, "fsdp", two), stored(root, "fsdp_resumed", two)
    assert alone["n"] == resumed["n"] == STEPS
    assert all(far(alone[k], resumed[k]) == 0 for k in ("model", "ema", "moments"))
    assert far(stored(root, "state", two)["model"], alone["model"]) > 1e-3

def test_one_process_goes_on_from_the_state_of_two(root, one, two):
    import torch
    from blip3o_nb.runs.distributed import full_state, load_full_state
    state = stored(root, "state", two)
    assert set(state["model"]) == set(one["model"]) and all(type(v) is torch.Tensor for v in state["model"].values())
    learn = fitted(root, BS, seed=5, epochs=0)
    load_full_state(learn, state)
    again = full_state(learn)
    assert far(again["model"], state["model"]) == far(again["ema"], state["ema"]) == 0
    for a, b in zip(again["opt"]["param_groups"], state["opt"]["param_groups"], strict=True): assert {**a, "params": set(a["params"])} == {**b, "params": set(b["params"])}
    learn.flow.epochs = 2
    learn.fit(EPOCHS - 2, 2e-3)
    same(result(learn), one)
    assert far(again["model"], one["model"]) > 1e-3 # a state does not change as training goes on

@pytest.mark.fault("a number that is not finite in one process of two", "training", "both stop with one line")
def test_a_number_that_is_not_finite_stops_both_with_one_line(two):
    says = dict(re.findall(r"at \S+ (InputError|Elsewhere) says: (.*)", two.stderr))
    assert two.returncode == 1 and set(says) == {"InputError", "Elsewhere"} and says["InputError"] == says["Elsewhere"], two.stderr[-3000:]
    assert says["InputError"].startswith("the loss is nan in step 4, which was not taken: the features of the batch")
    assert "Traceback" not in two.stderr.split("torch/distributed/elastic")[0] # the launcher's own comes after
    # Where the launcher looks between the two ends, it ends the second itself (-15); torch aborts a process (-6)
    # whose peer is gone while it takes leave. Both have said their line by then.
    codes = re.findall(r"exitcode\s+: (-?\d+)", two.stderr)
    assert "2" in codes and set(codes) <= {"2", "-15", "-6"}
    assert two.ended - float(re.search(r"at (\S+)", two.stderr)[1]) < 60

@pytest.mark.fault("a process of two that stops", "training", "the other ends")
def test_a_process_that_stops_alone_ends_the_other(by_accelerate):
    at, line = re.search(r"at (\S+) InputError says: (.*)", by_accelerate.stderr).groups()
    assert by_accelerate.returncode == 1 and line == "shard-00003 is damaged: extract it again" and by_accelerate.ended - float(at) < 60

def test_processes_refuse_together(root, two):
    first, second = stored(root, "said", two)
    assert second["one"] == ["InputError", "the second has no disk: buy one"] and first["one"] == ["Elsewhere", second["one"][1]]
    assert [x["unlike"][0] for x in (first, second)] == ["InputError", "Elsewhere"]
    assert first["unlike"][1] == second["unlike"][1] == "the processes differ in the samples of a batch ([16, 15]): start all with the same options and data"

def test_refusals_of_the_environment(root, monkeypatch):
    import torch
    from blip3o_nb.files import InputError
    from blip3o_nb.runs.distributed import DistributedCallback, load_full_state, processes
    learn = learner(root, 16, DistributedCallback())
    with pytest.raises(InputError, match="call learn.fit"): load_full_state(learn, {})
    for k, v in dict(RANK=3, WORLD_SIZE=4, LOCAL_RANK=3).items(): monkeypatch.setenv(k, str(v))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="process 3 of this machine has no GPU of its own, there are 2"):
        with processes("cuda"): pass
    with pytest.raises(InputError, match="have not joined"): learn.fit(1)

if __name__ == "__main__": driver(Path(sys.argv[1]), sys.argv[2])
