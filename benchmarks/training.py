"""What the Learner and its callbacks cost beside a bare loop, and what bfloat16 saves: `python benchmarks/training.py` (or `make bench`).

One network of preset `base` (256 tokens, EVA 4096 to CLIP 1024, batch 4) takes the same steps in turns, in one process: in a bare PyTorch loop
(forward, loss, backward, clipping, AdamW) and in a Learner with all the callbacks that `blip3o_train` gives it. Prints medians and the ratio of
each turn, and writes benchmarks/training.json."""
import json, platform, statistics, tempfile, time
from pathlib import Path
import torch
from fastai.callback.core import Callback
from blip3o_nb.core import seed_everything
from blip3o_nb.dit import forward_flops
from blip3o_nb.losses import BLIP3oFlowMatchingLoss
from blip3o_nb.optimisation import fast_dtype
from blip3o_nb.paths import LinearPath
from blip3o_nb.recipes import make_config
from blip3o_nb.shards import ShardWriter
from blip3o_nb.training import learner_of, loaders, model_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BS, TURNS = (4, 3) if DEVICE == "cpu" else (64, 20)
EVERY, KINDS = 3, ("probed", "plain", "plain", "monitored") # of the steps of a turn, by a MonitorCallback(3)

def now():
    if DEVICE == "cuda": torch.cuda.synchronize()
    return time.perf_counter()

class Clock(Callback):
    "Seconds of each step, loading of its batch included"
    order = 99
    def before_train(self): self.at, self.seconds = now(), []
    def after_batch(self):
        if self.training: self.seconds.append(now() - self.at); self.at = now()

def bare(model, opt, dls, norms, dtype):
    "Seconds of each step of an epoch without fastai"
    loss, path, seconds = BLIP3oFlowMatchingLoss(prediction_type="sample", loss_space="sample"), LinearPath(), []
    model.train(); at = now()
    for cond, target in dls.train:
        x1 = norms[0].encode(target)
        s = path.sample(torch.randn_like(x1), x1, torch.rand(len(x1), device=x1.device))
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32): out = model(s.xt, s.t, norms[1].encode(cond))
        loss(out.float(), s).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step(); opt.zero_grad()
        seconds.append(now() - at); at = now()
    return seconds

def turns(folder, precision):
    "Median seconds of the steps of each kind, in the bare loop and in the Learner"
    dtype, out = dict(fp32=torch.float32, bf16=torch.bfloat16)[precision], tempfile.mkdtemp()
    c = make_config(embeddings_dir=str(folder), output_dir=out, batch_size=BS, num_epochs=1, precision=precision, eval_samples=0, schedule="constant", warmup=0., max_samples=BS*len(KINDS), valid_samples=1,
                    checkpoint_every=10**9, monitor_every=EVERY)
    dls, clock, seconds = loaders(c, folder), Clock(), {}
    model = model_of(c, dls).to(DEVICE)
    learn = learner_of(c, dls, model, progress=False, cbs=[clock])
    learn.remove_cb(learn.checkpoint) # writing states is bounded by the disk and as rare as one likes
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for i in range(TURNS):
        for s in bare(model, opt, dls, (learn.flow.target_norm, learn.flow.cond_norm), dtype)[1:]: seconds.setdefault("bare", []).append(s)
        learn.fit(1, 1e-4)
        for kind, s in zip(KINDS, clock.seconds, strict=True): seconds.setdefault(kind, []).append(s)
    return seconds, 3*forward_flops(model.config)*BS, learn.monitor.probe_every

def main():
    seed_everything(0)
    folder, n, every = Path(tempfile.mkdtemp())/"features", 2*BS*len(KINDS) + 16, make_config().monitor_every
    with ShardWriter(folder, {"clip": {"model": "noise"}, "eva": {"model": "noise"}}) as w:
        w.add_batch([f"{i:05}" for i in range(n)], torch.randn(n, 256, 1024), torch.randn(n, 256, 4096), [""]*n, [""]*n)
    results = dict(about=dict(machine=platform.machine(), device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", threads=torch.get_num_threads(), torch=torch.__version__,
                              batch=BS, turns=TURNS, bf16_in_hardware=fast_dtype(DEVICE) == torch.bfloat16))
    for precision in ("fp32", "bf16") if fast_dtype(DEVICE) == torch.bfloat16 else ("fp32",):
        seconds, flops, probe_every = turns(folder, precision)
        t = {k: statistics.median(v) for k, v in seconds.items()}
        ours = t["plain"] + (t["monitored"] - t["plain"])/every + (t["probed"] - t["monitored"])/(every*probe_every)
        results[precision] = dict(median=t, learner=ours, overhead=ours/t["bare"] - 1, gflops=flops/t["bare"]/1e9, seconds=seconds)
        print(f"{precision}: {', '.join(f'{k} {v:.2f} s' for k, v in t.items())} a step; bare loop {flops/t['bare']/1e9:.0f} GFLOP/s; with one step of {every} monitored and one of {every*probe_every} probed "
              f"the Learner takes {ours:.2f} s, {ours/t['bare'] - 1:.1%} more")
    if "bf16" in results: print(f"bf16 is {results['fp32']['learner']/results['bf16']['learner']:.2f} times as fast as fp32")
    else: print("bf16: this processor has no instructions for it, so it is not measured")
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")

if __name__ == "__main__": main()
