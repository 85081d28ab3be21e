"""What the Learner and its callbacks cost beside a bare loop, and what bfloat16 saves.

Two networks of preset `base` (256 tokens, EVA 4096 to CLIP 1024, batch 4) take steps in turns, in one process: one in a Learner with all the callbacks that
`blip3o_train` gives it, one in a bare PyTorch loop (forward, loss, backward, clipping, AdamW). The overhead is made of medians of ratios of neighbours."""
import tempfile
from pathlib import Path
import torch
from fastai.callback.core import Callback
from blip3o_nb.core import seed_everything
from blip3o_nb.network.dit import forward_flops
from blip3o_nb.flow.losses import BLIP3oFlowMatchingLoss
from blip3o_nb.training.optimisation import has_bf16
from blip3o_nb.flow.paths import LinearPath
from blip3o_nb.options import make_config
from blip3o_nb.features.shards import ShardWriter
from blip3o_nb.runs.runs import learner_of, loaders, model_of
from machine import DEVICE, DTYPES, median, now, spread

EVERY, KINDS = 5, ("probed", *["plain"]*4, "monitored") # of the steps of a turn, by a MonitorCallback(5)

class Stamp(Callback):
    "When an event has reached the callbacks up to here"
    def __init__(self, order): self.order, self.at = order, {}
    def __call__(self, event): self.at[event] = now()

TORCH = (("before_batch", "after_pred"), ("after_pred", "after_loss"), ("before_backward", "after_backward"), ("before_step", "after_step")) # between them the step itself works

class Pair(Callback):
    """Seconds of each step (loading included), of what the Learner adds within it, and of a bare step that follows each. Neighbours in time, since a machine is not the
    same from one minute to the next; and even so a step varies by more than the Learner adds, so that this is also counted within the step: all but what a bare loop does"""
    order = 99
    def __init__(self, bare): self.bare, self.rows, self.first, self.last, self.shared = bare, [], Stamp(-100), Stamp(98), 0.
    def before_fit(self):
        for cb, event in ((self.flow, "before_batch"), (self.grad_clip, "before_step")): setattr(cb, event, self.counted(type(cb), cb, event))
    def counted(self, cls, cb, event): # a bare loop makes its batch and clips, too
        def f():
            begun = now(); getattr(cls, event)(cb); self.shared += now() - begun
        return f
    def before_train(self): self.it, self.at = self.bare(), now()
    def after_batch(self):
        if not self.training: return
        step, first, last = now() - self.at, self.first.at, self.last.at
        own = step - self.shared - (first["before_batch"] - self.at) - sum(first[b] - last[a] for a, b in TORCH)
        at = now(); next(self.it)
        self.rows.append((step, own, now() - at)); self.shared, self.at = 0., now()

def bare(model, opt, dls, norms, dtype):
    "An epoch without fastai, a step for each `next`"
    loss, path = BLIP3oFlowMatchingLoss(prediction_type="sample", loss_space="sample"), LinearPath()
    for cond, target in dls.train:
        x1 = norms[0].encode(target)
        s = path.sample(torch.randn_like(x1), x1, torch.rand(len(x1), device=x1.device))
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32): out = model(s.xt, s.t, norms[1].encode(cond))
        loss(out.float(), s).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step(); opt.zero_grad()
        yield

def steps(folder, precision, bs, turns, **options):
    "Seconds of the steps of each kind, each with those of the bare step beside it"
    c = make_config(embeddings_dir=str(folder), output_dir=tempfile.mkdtemp(), batch_size=bs, num_epochs=1, precision=precision, eval_samples=0, schedule="constant", warmup=0., max_samples=bs*len(KINDS), valid_samples=1,
                    checkpoint_every=10**9, monitor_every=EVERY, **options)
    dls, plain = loaders(c, folder), loaders(c, folder)
    model, twin = model_of(c, dls).to(DEVICE), model_of(c, dls).to(DEVICE).train()
    opt = torch.optim.AdamW(twin.parameters(), lr=1e-4, fused=True)
    pair = Pair(lambda: bare(twin, opt, plain, (learn.flow.target_norm, learn.flow.cond_norm), DTYPES[precision]))
    learn = learner_of(c, dls, model, progress=False, cbs=[pair, pair.first, pair.last])
    learn.remove_cb(learn.checkpoint) # writing states is bounded by the disk and as rare as one likes
    learn.fit(1, 1e-4); pair.rows.clear() # the first makes the optimisers' moments
    for _ in range(turns): learn.fit(1, 1e-4)
    pairs = {k: [] for k in KINDS}
    for kind, row in zip(KINDS*turns, pair.rows, strict=True): pairs[kind].append(row)
    return pairs, 3*forward_flops(model.config)*bs, learn.monitor.probe_every

def main(quick=False):
    seed_everything(0)
    bs, turns = (2, 1) if quick else (4, 8) if DEVICE == "cpu" else (64, 20)
    tokens, clip, eva = (16, 32, 64) if quick else (256, 1024, 4096)
    folder, n, every = Path(tempfile.mkdtemp())/"features", 2*bs*len(KINDS) + 16, make_config().monitor_every
    with ShardWriter(folder, {"clip": {"model": "noise"}, "eva": {"model": "noise"}}) as w:
        w.add_batch([f"{i:05}" for i in range(n)], {"clip": torch.randn(n, tokens, clip), "eva": torch.randn(n, tokens, eva)}, [""]*n, [""]*n)
    results = dict(batch=bs, turns=turns, monitored_every=every)
    for precision in ("fp32", "bf16") if has_bf16(DEVICE) else ("fp32",):
        pairs, flops, probe_every = steps(folder, precision, bs, turns, **(dict(model_size="nano") if quick else {}))
        theirs, t = [b for rows in pairs.values() for *_, b in rows], lambda kind, f: median([f(*row) for row in pairs[kind]])
        def mean(f): # of all steps, by how often each kind comes
            plain, monitored, probed = (t(k, f) for k in ("plain", "monitored", "probed"))
            return plain + (monitored - plain)/every + (probed - monitored)/(every*probe_every)
        own, step = {k: t(k, lambda step, own, bare: own) for k in pairs}, median(theirs)
        results[precision] = dict(bare_s=step, spread=spread(theirs), own_s=own, own=mean(lambda step, own, bare: own)/t("plain", lambda step, own, bare: step - own), neighbours=mean(lambda step, own, bare: step/bare) - 1,
                                  flops_per_s=flops/step, probed_every=every*probe_every, rows=pairs)
    return results
