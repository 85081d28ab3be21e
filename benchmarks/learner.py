"""What the Learner and its callbacks cost beside a bare loop, and what bfloat16 saves.

One network of preset `base` (256 tokens, EVA 4096 to CLIP 1024, batch 4) takes the same steps in turns, in one process: in a bare PyTorch loop
(forward, loss, backward, clipping, AdamW) and in a Learner with all the callbacks that `blip3o_train` gives it."""
import tempfile
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
from machine import DEVICE, DTYPES, median, now, spread

EVERY, KINDS = 3, ("probed", "plain", "plain", "monitored") # of the steps of a turn, by a MonitorCallback(3)

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

def steps(folder, precision, bs, turns, **options):
    "Seconds of the steps of each kind, in the bare loop and in the Learner"
    dtype, out = DTYPES[precision], tempfile.mkdtemp()
    c = make_config(embeddings_dir=str(folder), output_dir=out, batch_size=bs, num_epochs=1, precision=precision, eval_samples=0, schedule="constant", warmup=0., max_samples=bs*len(KINDS), valid_samples=1,
                    checkpoint_every=10**9, monitor_every=EVERY, **options)
    dls, clock, seconds = loaders(c, folder), Clock(), {}
    model = model_of(c, dls).to(DEVICE)
    learn = learner_of(c, dls, model, progress=False, cbs=[clock])
    learn.remove_cb(learn.checkpoint) # writing states is bounded by the disk and as rare as one likes
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for i in range(turns):
        for s in bare(model, opt, dls, (learn.flow.target_norm, learn.flow.cond_norm), dtype)[1:]: seconds.setdefault("bare", []).append(s)
        learn.fit(1, 1e-4)
        for kind, s in zip(KINDS, clock.seconds, strict=True): seconds.setdefault(kind, []).append(s)
    return seconds, 3*forward_flops(model.config)*bs, learn.monitor.probe_every

def main(quick=False):
    seed_everything(0)
    bs, turns = (2, 1) if quick else (4, 4) if DEVICE == "cpu" else (64, 20)
    tokens, clip, eva = (16, 32, 64) if quick else (256, 1024, 4096)
    folder, n, every = Path(tempfile.mkdtemp())/"features", 2*bs*len(KINDS) + 16, make_config().monitor_every
    with ShardWriter(folder, {"clip": {"model": "noise"}, "eva": {"model": "noise"}}) as w:
        w.add_batch([f"{i:05}" for i in range(n)], torch.randn(n, tokens, clip), torch.randn(n, tokens, eva), [""]*n, [""]*n)
    results = dict(batch=bs, turns=turns, monitored_every=every)
    for precision in ("fp32", "bf16") if fast_dtype(DEVICE) == torch.bfloat16 else ("fp32",):
        seconds, flops, probe_every = steps(folder, precision, bs, turns, **(dict(model_size="nano") if quick else {}))
        t = {k: median(v) for k, v in seconds.items()}
        ours = t["plain"] + (t["monitored"] - t["plain"])/every + (t["probed"] - t["monitored"])/(every*probe_every)
        results[precision] = dict(step_s=t, spread={k: spread(v) for k, v in seconds.items()}, learner_s=ours, overhead=ours/t["bare"] - 1, flops_per_s=flops/t["bare"], probed_every=every*probe_every)
    return results
