"""Sampling to equal quality, beside the attempts' sampler (50 steps of the midpoint rule, 100 evaluations, in fp32): how many evaluations a trained flow needs,
and what they cost, at the demo's size from first to last and at `base` by the evaluation."""
from contextlib import nullcontext
from pathlib import Path
import torch
from blip3o_nb.generation.pipeline import Pipeline
from blip3o_nb.judging.metrics import patch_cosine
from blip3o_nb.training.optimisation import has_bf16
from blip3o_nb.flow.paths import shift_times
from blip3o_nb.flow.samplers import sample
from blip3o_nb.features.shards import FeatureDataset
from machine import DEVICE, median, seconds, spread, turns
from peers import midpoint
from steps import NETWORKS, batch, build, sizes

RUNS = [("euler", n, s) for s in (1., .5, .2, .1) for n in (1, 2, 3, 4, 5, 6, 8)] + [("midpoint", n, s) for s in (1., .5) for n in (1, 2, 3, 4)]

def grid(steps, shift): return shift_times(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift)

def demo(run, n, rounds, bs=64):
    "The flow of `make demo` on held-out pictures: evaluations until within .005, and the time they take beside 100 of the stand-in at the same size"
    pipe, held = Pipeline.from_pretrained(run/"checkpoint"), FeatureDataset(run/"features", "held_out")
    model, c = pipe.model.to(DEVICE), pipe.model.config
    cond, real = pipe.cond_norm.encode(held.column("eva")[:n]).to(DEVICE), held.column("clip")[:n].float()
    mean, x0 = FeatureDataset(run/"features", "train").stats("clip").mean.float(), pipe.path.noise(real.shape, torch.Generator().manual_seed(0)).to(DEVICE)
    decode = lambda z: pipe.target_norm.decode(z.cpu())
    exact = decode(sample(model, cond, pipe.path, "rk4", 64, x0=x0))
    best, rows = patch_cosine(exact, real, mean).mean().item(), []
    for method, steps, shift in RUNS:
        z, info = sample(model, cond, pipe.path, method, times=grid(steps, shift), x0=x0, return_info=True)
        x = decode(z); rows.append(dict(method=method, steps=steps, shift=shift, nfe=info.nfe, to_converged=patch_cosine(x, exact, mean).mean().item(), to_real=patch_cosine(x, real, mean).mean().item()))
    least = lambda ok: min((r for r in rows if ok(r)), key=lambda r: r["nfe"])
    chosen = {"within .005 of the converged solution": least(lambda r: r["to_converged"] > .995), "its score within .005 of the converged one's": least(lambda r: r["to_real"] > best - .005)}
    xs = x0[:bs], cond[:bs]
    stand_in = build("lineage", dict(dim=c.hidden_size, layers=c.num_hidden_layers, heads=c.num_attention_heads, kv_heads=c.num_key_value_heads, target=c.target_size, cond=c.cond_size, tokens=c.num_tokens)).eval()
    go = lambda r: lambda: seconds(lambda: sample(model, xs[1], pipe.path, r["method"], times=grid(r["steps"], r["shift"]), x0=xs[0]))
    took = turns({**{k: go(r) for k, r in chosen.items()}, "stand-in": lambda: seconds(lambda: midpoint(stand_in, xs[1], xs[0]))}, rounds)
    return dict(pictures=n, seed=0, converged_to_real=best, rows=rows, chosen=chosen, batch=bs, seconds={k: median(v) for k, v in took.items()}, spread={k: spread(v) for k, v in took.items()})

def evaluations(preset, bs, rounds, s=None):
    "Seconds of one evaluation, by four of each sampler: with the conditioning's part computed once and anew, and of the peers; and of four Euler steps as a user calls them"
    s = s or sizes(preset); x, _, cond = batch(s, bs)
    nets = {n: build(n, s).eval() for n in NETWORKS}
    ours, half = nets["blip3o_nb"], has_bf16(DEVICE)
    def auto(on): return torch.autocast(DEVICE, torch.bfloat16) if on else nullcontext()
    def plain(net): # no cache: what `cond_cache` computes is computed again at each evaluation
        return lambda x, t, c: net(x, t, c)
    def with_(model, on, steps=4):
        def go():
            with auto(on): sample(model, cond, method="euler", steps=steps, x0=x, prediction_type="sample")
        return go
    cached, anew = sample(ours, cond, steps=2, method="euler", x0=x), sample(plain(ours), cond, steps=2, method="euler", x0=x, prediction_type="sample")
    ways = {"blip3o_nb, fp32": with_(ours, False), "blip3o_nb without its cache, fp32": with_(plain(ours), False), "Lumina, fp32": with_(plain(nets["Lumina"]), False),
            "stand-in, fp32": lambda: midpoint(nets["lineage"], cond, x, 2)}
    if half: ways |= {"blip3o_nb, bf16": with_(ours, True), "Lumina, bf16": with_(plain(nets["Lumina"]), True)}
    took = turns({k: (lambda f=f: seconds(f)/4) for k, f in ways.items()}, rounds)
    fast = torch.compile(ours) if DEVICE == "cuda" else ours
    eight = turns({"eight": lambda: seconds(with_(fast, half, 8))}, rounds)["eight"]
    return dict(batch=bs, **s, seconds={k: median(v) for k, v in took.items()}, spread={k: spread(v) for k, v in took.items()}, cache_difference=(cached - anew).abs().max().item(),
                eight_evaluations_images_per_s=bs/median(eight), eight_dtype="bf16" if half else "fp32")

def main(quick=False, run=Path("runs/demo")):
    torch.manual_seed(0)
    if quick: return dict(base=evaluations("tiny", 2, 1, sizes("tiny", layers=2, tokens=16, target=32, cond=64)))
    out = dict(base=evaluations("base", 4 if DEVICE == "cpu" else 256, 4))
    return out | dict(demo=demo(run, 128, 3))
