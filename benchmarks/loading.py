"""How features are read.

Writes a set of the size of two real towers (256 tokens of 1024 and of 4096 channels, bf16) with `ShardWriter`, then measures, each in
a process of its own: memory and first batch over the whole set, and bytes a second from cached files beside a plain copy of the same bytes in
memory, beside a memory map of the same files, and beside the pickles that earlier attempts stored."""
import json, pickle, shutil, statistics, sys, tempfile, threading, time
from pathlib import Path
from machine import in_child

BS, SHAPES = 8, {"clip": (256, 1024), "eva": (256, 4096)}
SAMPLE = sum(n*d*2 for n, d in SHAPES.values()) # bytes

def make(folder, gb):
    "A set of that size; the values repeat after 256 samples, the keys do not"
    import torch
    from blip3o_nb.features.shards import ShardWriter
    g = torch.Generator().manual_seed(0)
    block = {k: torch.randn(256, *s, generator=g).bfloat16() for k, s in SHAPES.items()}
    begun = time.perf_counter()
    with ShardWriter(folder, {"clip": {"model": "noise"}, "eva": {"model": "noise"}}) as w:
        for i in range(0, int(gb*1e9/SAMPLE), 256): w.add_batch([f"{k:08d}" for k in range(i, i + 256)], **block, captions=[""]*256, image_hashes=[""]*256)
    return time.perf_counter() - begun

def status(name): return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])/1024 # MB

def iterate(folder):
    "One epoch over the whole set, shuffled, in a fresh process"
    import torch, fastai.data.core
    from blip3o_nb.features.loading import feature_dls
    before, peak, end = status("VmRSS"), [0.], threading.Event()
    def watch():
        while not end.wait(.02): peak[0] = max(peak[0], status("VmRSS"))
    threading.Thread(target=watch, daemon=True).start()
    begun = time.perf_counter()
    dls = feature_dls(folder, bs=BS, device="cpu")
    it = iter(dls.train); next(it); first = time.perf_counter() - begun
    n = 1 + sum(1 for _ in it); took = time.perf_counter() - begun; end.set()
    return dict(samples=n*BS, gb=n*BS*SAMPLE/1e9, first_batch_s=first, gb_per_s=n*BS*SAMPLE/1e9/took, rss_mb=peak[0], rss_before_mb=before)

def throughput(folder, repeat=15):
    "Bytes of the files a second, medians of alternating runs; reading is shared by as many threads as torch has, as is a copy by torch; numpy copies with one"
    import numpy as np, torch
    from safetensors import safe_open
    from blip3o_nb.features.loading import feature_dls
    from blip3o_nb.features.shards import FeatureDataset
    ds, unchecked = FeatureDataset(folder), FeatureDataset(folder)
    unchecked._sums = [{} for _ in unchecked._sums]
    order = torch.randperm(len(ds), generator=torch.Generator().manual_seed(0)).split(BS)
    size = sum(map(len, order))*SAMPLE
    held, into = torch.empty(len(ds), SAMPLE//2, dtype=torch.int16), torch.empty(BS, SAMPLE//2, dtype=torch.int16)
    for i in range(len(ds)): held[i] = torch.cat([x.flatten().view(torch.int16) for x in ds.stored(tuple(SHAPES), [i])])
    batches, plain = [held[i:i + BS] for i in range(0, len(ds), BS)], held.numpy()
    target = into.numpy()
    maps = [safe_open(ds.folder/s["file"], "pt") for s in ds.manifest["shards"]]
    views = [{k: f.get_tensor(k) for k in SHAPES} for f in maps]
    def mapped(idxs):
        for k in SHAPES: torch.stack([views[i][k][j] for i, j in ds._where[idxs].tolist()])
    def epoch(f):
        for idxs in order: f(idxs)
    def loader(**kw):
        dl = feature_dls(folder, bs=BS, device="cpu", share=.02, in_memory=False, **kw).train
        def run():
            for _ in dl: pass
        run.size = len(dl)*BS*SAMPLE # the held-out samples are not in it
        return run
    as_stored, as_float = loader(stored=True), loader()
    ways = {"plain copy in memory (numpy, one thread)": lambda: [np.copyto(target[:len(b)], b) for b in np.array_split(plain, len(batches))] and None,
            "copy in memory by torch, all threads": lambda: [into[:len(b)].copy_(b) for b in batches] and None,
            "the same into a new batch each time": lambda: [None for b in batches if b.clone() is None],
            "FeatureDataset.stored": lambda: epoch(lambda i: ds.stored(tuple(SHAPES), i)), # shuffled, as all that follow
            "the same, checksums not compared": lambda: epoch(lambda i: unchecked.stored(tuple(SHAPES), i)),
            "feature_dls, as stored": as_stored, "feature_dls, float32": as_float,
            "memory map": lambda: epoch(mapped)}
    times = {k: [] for k in ways}
    for r in range(repeat + 1):
        for k, f in ways.items():
            begun = time.perf_counter(); f()
            if r: times[k].append(time.perf_counter() - begun)
    return {k: dict(gb_per_s=getattr(ways[k], "size", size)/1e9/statistics.median(t), spread=(max(t) - min(t))/statistics.median(t)) for k, t in times.items()}

def pickles(folder, file):
    "The same samples in one pickle, as earlier attempts stored them (float32): until the first batch, and memory"
    import torch
    from blip3o_nb.features.shards import FeatureDataset
    if not file.exists():
        ds = FeatureDataset(folder)
        with open(file, "wb") as f: pickle.dump({f"{k}_blip3o_embeddings": ds.column(k) for k in SHAPES} | {"keys": ds.keys, "captions": ds.captions}, f, protocol=4)
        return {}
    before = status("VmRSS"); begun = time.perf_counter()
    with open(file, "rb") as f: data = pickle.load(f)
    {k: data[f"{k}_blip3o_embeddings"][:BS].clone() for k in SHAPES}
    return dict(first_batch_s=time.perf_counter() - begun, rss_mb=status("VmHWM"), gb=file.stat().st_size/1e9)

def main(quick=False, gb=20., folder=None):
    if quick: gb, SMALL = .7, .7
    else: SMALL = 1.
    part = lambda name, *args: in_child(__file__, name, *args)
    root = Path(tempfile.mkdtemp(dir=folder, prefix="bench-"))
    try:
        if shutil.disk_usage(root).free < gb*1e9 + 8e9: sys.exit(f"{root.parent} has not {gb + 8:.0f} GB free: choose another --folder, or a smaller --gb")
        rows = dict(sample_mb=SAMPLE/1e6, batch=BS, write_gb_per_s=gb/make(root/"large", gb))
        rows["whole set"] = part("iterate", root/"large"); shutil.rmtree(root/"large")
        make(root/"small", SMALL); rows["from cached files"] = part("throughput", root/"small")
        part("pickles", root/"small", root/"p.pkl"); rows["one pickle"] = part("pickles", root/"small", root/"p.pkl")
        rows["shards of the same samples"] = part("iterate", root/"small")
    finally: shutil.rmtree(root)
    return rows

if __name__ == "__main__" and sys.argv[1] == "--child": print(json.dumps(globals()[sys.argv[2]](*map(Path, sys.argv[3:]))))
