"""A training step at the published sizes (256 tokens, EVA 4096 to CLIP 1024) beside its peers: seconds, share of the matrix product, memory, and what the
step costs as tokens, batch and depth grow."""
import json, sys
from contextlib import nullcontext
import torch, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from blip3o_nb.network.dit import PRESETS, BLIP3oDiT, BLIP3oDiTConfig, forward_flops
from blip3o_nb.training.optimisation import has_bf16
from machine import DEVICE, DTYPES, in_child, median, now, product, spread, turns
from peers import Lineage, Lumina

def sizes(preset, **kw):
    p = PRESETS[preset]
    return {**dict(dim=p["hidden_size"], layers=p["num_hidden_layers"], heads=p["num_attention_heads"], kv_heads=p["num_key_value_heads"], target=1024, cond=4096, tokens=256), **kw}

def ours(dim, layers, heads, kv_heads, target, cond, tokens):
    return BLIP3oDiT(BLIP3oDiTConfig(hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
                                     num_key_value_heads=kv_heads, target_size=target, cond_size=cond,
                                     num_tokens=tokens))

NETWORKS = {"blip3o_nb": ours, "Lumina": Lumina, "lineage": Lineage}

def build(name, s): # random everywhere: an output layer of zeros would leave the backward pass nothing to do
    net = NETWORKS[name](**s)
    for p in net.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=p.shape[-1]**-.5)
    return net.to(DEVICE).train()

def batch(s, bs):
    g = torch.Generator().manual_seed(0)
    return [x.to(DEVICE) for x in (torch.randn(bs, s["tokens"], s["target"], generator=g), torch.rand(bs, generator=g), torch.randn(bs, s["tokens"], s["cond"], generator=g))]

def optimiser(name, net): return torch.optim.AdamW(net.parameters(), lr=1e-4, fused=None if name == "lineage" else True) # the attempts took torch's default

def one_step(net, f, opt, xs, dtype):
    "Seconds of forward, backward and optimiser (gradient clipping included); `f` is the network or what was compiled of it"
    at = now()
    with torch.autocast(DEVICE, DTYPES[dtype]) if dtype != "fp32" else nullcontext(): loss = F.mse_loss(f(*xs).float(), xs[0])
    mid = now(); loss.backward()
    end = now(); torch.nn.utils.clip_grad_norm_(net.parameters(), 1.); opt.step(); opt.zero_grad()
    return mid - at, end - mid, now() - end

def count_flops(name, s):
    "Operations of the matrix products of one picture, forward and forward with backward, as torch counts them (gradients that nobody needs are not counted), and parameters"
    net, xs = build(name, s), batch(s, 1)
    with FlopCounterMode(display=False) as f: out = net(*xs)
    forward = f.get_total_flops()
    with FlopCounterMode(display=False) as f: out.sum().backward()
    return forward, forward + f.get_total_flops(), sum(p.numel() for p in net.parameters())

def training(preset, bs, rounds, dtypes, compiled=False, s=None):
    "Turns of one step of each network in each precision; what does not fit into memory together (`large` on a CPU) is built anew for each turn"
    s, keep, nets, took = s or sizes(preset), preset != "large" or DEVICE == "cuda", {}, {}
    xs, products = batch(s, bs), {d: product(d) for d in dtypes}
    def ways_of(name):
        net = build(name, s); opt = optimiser(name, net)
        ways = {(name, d): (net, net, opt, xs, d) for d in dtypes}
        if compiled and name == "blip3o_nb": ways |= {(f"{name}, compiled", d): (net, torch.compile(net), opt, xs, d) for d in dtypes}
        return ways
    rates = {d: [] for d in dtypes}
    for r in range(rounds + 1): # the first round warms up
        for d in dtypes: rates[d] += [products[d]() for _ in range(3)]
        for name in NETWORKS:
            if name not in nets: nets[name] = ways_of(name)
            for key, args in nets[name].items():
                if not keep: one_step(*args) # the first step of a new network makes the optimiser's state
                if r or not keep: took.setdefault(key, []).append(one_step(*args))
                else: one_step(*args)
            if not keep: nets.clear(); args = None
        if not keep and r == rounds - 1: break
    rows, sums = {}, {n: count_flops(n, s) for n in NETWORKS}
    for (key, d), ts in took.items():
        whole, (forward, total, parameters) = [sum(t) for t in ts], sums[key.partition(",")[0]]
        step = median(whole)
        rows[f"{key}, {d}"] = dict(step_s=step, spread=spread(whole), **{f"{part}_s": median(t) for part, t in zip(("forward", "backward", "optimiser"), zip(*ts))}, samples_per_s=bs/step, model_flops=total,
                                   forward_flops=forward, flops_per_s=total*bs/step, share=total*bs/step*median(rates[d]), parameters=parameters, seconds=ts)
    return dict(batch=bs, rounds=rounds, **s, product={d: 1/median(v) for d, v in rates.items()}, rows=rows)

GROUPS = {"matrix products": ("mm", "addmm", "bmm", "mkldnn_linear", "linear"), "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"),
          "optimiser": ("_fused_adamw_", "_foreach_norm", "_foreach_mul_", "linalg_vector_norm", "_foreach_zero_", "zero_"), "norms": ("rms_norm",)}

def profile(preset, bs, dtype, s=None):
    "Share of each kind of operation in a step, by torch's profiler: of the time within the operations themselves"
    s = s or sizes(preset); net = build("blip3o_nb", s); args = net, net, optimiser("blip3o_nb", net), batch(s, bs), dtype
    one_step(*args)
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if DEVICE == "cuda" else [kind.CPU]) as p: one_step(*args)
    spent = {e.key: getattr(e, "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total") for e in p.key_averages()}
    total, groups = sum(spent.values()), dict.fromkeys([*GROUPS, "element by element, and the rest"], 0.)
    for k, v in spent.items():
        op = k.removeprefix("aten::")
        group = next((g for g, names in GROUPS.items() if any(op == n or g in ("attention", "norms") and n in op for n in names)), "element by element, and the rest")
        groups[group] += v/total
    return dict(groups=groups, largest={k: v/total for k, v in sorted(spent.items(), key=lambda x: -x[1])[:12]})

def memory(name, preset, bs):
    "Most memory that the process ever held over two steps, and before the network was built (MB); a process of its own"
    held = lambda what: int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1])/1024
    s, before = sizes(preset), held("VmRSS")
    net = build(name, s); opt, xs = optimiser(name, net), batch(s, bs)
    if DEVICE == "cuda": torch.cuda.reset_peak_memory_stats()
    for _ in range(2): one_step(net, net, opt, xs, "fp32" if DEVICE == "cpu" else "bf16")
    return dict(peak_mb=torch.cuda.max_memory_allocated()/2**20 if DEVICE == "cuda" else held("VmHWM"), before_mb=before)

def attention(tokens, heads=12, d=64):
    "Memory that attention over that many tokens takes while it runs (MB), beside that of its weights were they formed; a process of its own"
    held = lambda what: int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1])/1024
    from blip3o_nb.network.attention import Attention
    net, x = Attention(heads*d, heads, 4).to(DEVICE), torch.randn(1, tokens, heads*d, device=DEVICE, requires_grad=True)
    net(x[:, :64]).sum().backward()
    if DEVICE == "cuda": torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()/2**20
    else: before = held("VmRSS")
    net(x).sum().backward()
    return dict(took_mb=(torch.cuda.max_memory_allocated()/2**20 if DEVICE == "cuda" else held("VmHWM")) - before, weights_mb=heads*tokens**2*4/2**20)

def cost(rounds, preset="small", quick=False):
    "A step of one network as one size grows: seconds and operations"
    base = dict(tokens=256, batch=4, layers=8)
    grid = [base, *[{**base, "tokens": n} for n in (64, 144, 576)], *[{**base, "batch": n} for n in (1, 2, 8, 16)], *[{**base, "layers": n} for n in (2, 4, 16)]]
    if quick: preset, base = "nano", dict(tokens=16, batch=2, layers=2); grid = [base, {**base, "tokens": 64}]
    def way(g):
        s = sizes(preset, tokens=g["tokens"], layers=g["layers"]); net = build("blip3o_nb", s); args = net, net, optimiser("blip3o_nb", net), batch(s, g["batch"]), "bf16" if DEVICE == "cuda" else "fp32"
        one_step(*args)
        return sum(one_step(*args))
    took = turns({i: (lambda g=g: way(g)) for i, g in enumerate(grid)}, rounds, warm=0)
    return dict(preset=preset, base=base, rows=[dict(**g, step_s=median(took[i]), spread=spread(took[i]), flops=3*g["batch"]*forward_flops(ours(**sizes(preset, tokens=g["tokens"], layers=g["layers"])).config)) for i, g in enumerate(grid)])

def main(quick=False):
    torch.manual_seed(0)
    dtypes = tuple(DTYPES) if has_bf16(DEVICE) else ("fp32",) # emulated bf16 takes minutes for the backward pass of one step
    toy, fast = sizes("tiny", layers=2, tokens=16, target=32, cond=64), dtypes[-1]
    if quick: t, prof = {"tiny": training("tiny", 2, 1, ("fp32",), s=toy)}, profile("tiny", 2, "fp32", toy)
    elif DEVICE == "cuda": t, prof = {p: training(p, 128, 10, ("bf16",), compiled=True) for p in ("base", "large")}, profile("base", 128, "bf16")
    else: t, prof = {p: training(p, 4, rounds, dtypes, compiled=p != "large") for p, rounds in (("tiny", 7), ("base", 5), ("large", 2))}, profile("base", 4, fast)
    child = lambda *a: in_child(__file__, *a)
    m = {n: child("memory", n, "tiny" if quick else "base", 4) for n in (["lineage"] if quick else NETWORKS)}
    return dict(training=t, profile=prof, memory=m, attention=child("attention", 4096), cost=cost(1 if quick else 3, quick=quick))

if __name__ == "__main__" and sys.argv[1] == "--child":
    kind, *a = sys.argv[2:]
    print(json.dumps(memory(a[0], a[1], int(a[2])) if kind == "memory" else attention(int(a[0]))))
