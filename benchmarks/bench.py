"""How fast this library is on this machine, beside what the machine can do: `python benchmarks/bench.py` (or `make bench`).

Prints a table and writes benchmarks/results.json. Everything runs in this one process, one thing at a time; each figure is the
median of several repetitions after a warm-up, and the shares are of the matrix product's own speed, measured just before."""
import json, platform, statistics, time
from pathlib import Path
import torch
from blip3o_nb.core import data_path, seed_everything
from blip3o_nb.dit import BLIP3oDiT, BLIP3oDiTConfig, forward_flops
from blip3o_nb.encoders import load_encoder
from blip3o_nb.images import read_images
from blip3o_nb.optimisation import fast_dtype
from blip3o_nb.losses import BLIP3oFlowMatchingLoss
from blip3o_nb.paths import LinearPath
from blip3o_nb.samplers import sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = fast_dtype(DEVICE)

def seconds(f, repeat=7):
    "Median time of a call"
    times = []
    for _ in range(repeat + 2):
        start = time.perf_counter()
        f()
        if DEVICE == "cuda": torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])

def machine(n=2048):
    "Operations a second of a square matrix product, and bytes a second of a copy"
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    big = torch.empty(2**26, device=DEVICE)
    return 2*n**3/seconds(lambda: a @ b), 2*big.nbytes/seconds(lambda: big.clone())

def training_step(model, bs):
    "One step of the flow: forward, loss, backward, clipping and AdamW; without the weight average and the loop of fastai"
    c, opt, loss = model.config, torch.optim.AdamW(model.parameters(), fused=True), BLIP3oFlowMatchingLoss(prediction_type=model.config.prediction_type, loss_space="sample")
    x1, cond = (torch.randn(bs, n, d, device=DEVICE) for n, d in ((c.num_tokens, c.target_size), (c.cond_tokens, c.cond_size)))
    def step():
        s = LinearPath().sample(torch.randn_like(x1), x1, torch.rand(bs, device=DEVICE))
        with torch.autocast(DEVICE, DTYPE, enabled=DTYPE != torch.float32): l = loss(model(s.xt, s.t, cond).float(), s)
        l.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.); opt.step(); opt.zero_grad()
    return step

def main(bs=32):
    seed_everything(0)
    flops, copy = machine()
    rows = {"matrix product": (f"{flops/1e9:.0f} GFLOP/s", flops), "copy": (f"{copy/1e9:.1f} GB/s", copy)}
    model = BLIP3oDiT(BLIP3oDiTConfig.from_preset("nano", clip_embedding_size=192, eva_embedding_size=256, num_tokens=65)).to(DEVICE)
    def add(name, secs, ops=None): rows[name] = (f"{bs/secs:.0f} images/s" + (f", {ops*bs/secs/flops:.0%} of the matrix product" if ops else ""), bs/secs)
    add("training step, nano, 65 tokens", seconds(training_step(model, bs)), 3*forward_flops(model.config)) # backward counts twice
    cond = torch.randn(bs, 65, 256, device=DEVICE)
    add("sampling, Euler, 4 steps", seconds(lambda: sample(model.eval(), cond, method="euler", steps=4)))
    reader = read_images(data_path("openclipart.tar.gz"))
    pictures = [s.image for s, _ in zip(reader, range(bs))]
    for name in ("tiny-clip", "tiny-eva"):
        enc = load_encoder(name, device=DEVICE)
        pixels = torch.stack([enc.preprocess(im) for im in pictures]).to(DEVICE)
        add(f"tokens, {name}", seconds(lambda: enc.tokens(pixels)))
    about = dict(machine=platform.machine(), device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", threads=torch.get_num_threads(), torch=torch.__version__, dtype=str(DTYPE), batch=bs)
    print(about)
    for k, (shown, _) in rows.items(): print(f"{k:34}{shown}")
    Path(__file__).with_name("results.json").write_text(json.dumps(dict(about=about, **{k: v for k, (_, v) in rows.items()}), indent=1) + "\n")

if __name__ == "__main__": main()
