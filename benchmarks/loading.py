"""How features are read.

Writes a set of the size of two real towers (256 tokens of 1024 and of 4096 channels, bf16). Then measures,
each in a process of its own: memory and first batch over the whole set, and bytes a second from cached files.
Beside them stand a copy of the same bytes in memory, a memory map of the files, and one pickle with the same
samples."""
import json, pickle, shutil, statistics, sys, tempfile, threading, time
from pathlib import Path
from machine import in_child

BS, SHAPES = 8, {"clip": (256, 1024), "eva": (256, 4096)}
SAMPLE = sum(n*d*2 for n, d in SHAPES.values()) # bytes

def make(folder, gb):
    "A set of that size, and the seconds it took; the values repeat after 256 samples, the keys do not"
    import torch
    from blip3o_nb.features.shards import ShardWriter
    g = torch.Generator().manual_seed(0)
    block = {k: torch.randn(256, *s, generator=g).bfloat16() for k, s in SHAPES.items()}
    begun = time.perf_counter()
    with ShardWriter(folder, {k: {"model": "noise"} for k in SHAPES}) as w:
        for i in range(0, int(gb*1e9/SAMPLE), 256):
            keys = [f"{k:08d}" for k in range(i, i + 256)]
            w.add_batch(keys, block, captions=[""]*256, image_hashes=[""]*256)
    return time.perf_counter() - begun

def status(name): # MB
    line = next(l for l in open("/proc/self/status") if l.startswith(name))
    return int(line.split()[1])/1024

class Peak:
    "The most memory of this process while it is watched"
    def __enter__(self):
        self.before, self.mb, self.end = status("VmRSS"), 0., threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()
        return self
    def watch(self):
        while not self.end.wait(.02): self.mb = max(self.mb, status("VmRSS"))
    def __exit__(self, *args): self.end.set()

def iterate(folder):
    "One epoch over the whole set, shuffled, in a fresh process"
    import torch, fastai.data.core
    from blip3o_nb.features.loading import feature_dls
    with Peak() as peak:
        begun = time.perf_counter()
        it = iter(feature_dls(folder, bs=BS, device="cpu").train)
        next(it)
        first = time.perf_counter() - begun
        n = 1 + sum(1 for _ in it)
        took = time.perf_counter() - begun
    gb = n*BS*SAMPLE/1e9
    return dict(samples=n*BS, gb=gb, first_batch_s=first, gb_per_s=gb/took, rss_mb=peak.mb,
                rss_before_mb=peak.before)

def loader(folder, **options):
    "A function that reads an epoch, and as `size` its bytes: the held-out samples are not in it"
    from blip3o_nb.features.loading import feature_dls
    dl = feature_dls(folder, bs=BS, device="cpu", share=.02, in_memory=False, **options).train
    def run():
        for _ in dl: pass
    run.size = len(dl)*BS*SAMPLE
    return run

def copies(ds):
    "Ways to copy the same bytes in memory"
    import numpy as np, torch
    held = torch.empty(len(ds), SAMPLE//2, dtype=torch.int16)
    into = torch.empty(BS, SAMPLE//2, dtype=torch.int16)
    for i in range(len(ds)):
        held[i] = torch.cat([x.flatten().view(torch.int16) for x in ds.stored(tuple(SHAPES), [i])])
    batches = [held[i:i + BS] for i in range(0, len(ds), BS)]
    plain, target = [b.numpy() for b in batches], into.numpy()
    def by_numpy():
        for b in plain: np.copyto(target[:len(b)], b)
    def by_torch():
        for b in batches: into[:len(b)].copy_(b)
    def anew():
        for b in batches: b.clone()
    return {"plain copy in memory (numpy, one thread)": by_numpy,
            "copy in memory by torch, all threads": by_torch,
            "the same into a new batch each time": anew}

def readers(ds, folder, order):
    "Ways to read the files, shuffled"
    import torch
    from safetensors import safe_open
    from blip3o_nb.features.shards import FeatureDataset
    unchecked, names = FeatureDataset(folder), tuple(SHAPES)
    for rows in unchecked._of.values(): rows.sums = [{} for _ in rows.sums]
    views = {c: [safe_open(f, "pt").get_tensor("tokens") for f, *_ in ds._of[c].files] for c in names}
    def mapped(names, idxs):
        for c in names: torch.stack([views[c][i][j] for i, j in zip(*divmod(idxs.numpy(), len(views[c][0])))])
    def epoch(read):
        for idxs in order: read(names, idxs)
    return {"FeatureDataset.stored": lambda: epoch(ds.stored),
            "the same, checksums not compared": lambda: epoch(unchecked.stored),
            "feature_dls, as stored": loader(folder, stored=True), "feature_dls, float32": loader(folder),
            "memory map": lambda: epoch(mapped)}

def throughput(folder, repeat=15):
    "Bytes of the files a second, medians of alternating runs; torch copies with all its threads"
    import torch
    from blip3o_nb.features.shards import FeatureDataset
    ds = FeatureDataset(folder)
    order = torch.randperm(len(ds), generator=torch.Generator().manual_seed(0)).split(BS)
    ways = copies(ds) | readers(ds, folder, order)
    times = {k: [] for k in ways}
    for r in range(repeat + 1):
        for k, f in ways.items():
            begun = time.perf_counter()
            f()
            if r: times[k].append(time.perf_counter() - begun)
    def row(way, t):
        gb, median = getattr(way, "size", len(ds)*SAMPLE)/1e9, statistics.median(t)
        return dict(gb_per_s=gb/median, spread=(max(t) - min(t))/median)
    return {k: row(ways[k], t) for k, t in times.items()}

def pickles(folder, file):
    "The same samples in one pickle, in float32: until the first batch, and memory; the first call makes it"
    import torch
    from blip3o_nb.features.shards import FeatureDataset
    names = {k: f"{k}_blip3o_embeddings" for k in SHAPES}
    if not file.exists():
        ds = FeatureDataset(folder)
        columns = {new: ds.column(k) for k, new in names.items()}
        with open(file, "wb") as f:
            pickle.dump(columns | {"keys": ds.keys, "captions": ds.captions}, f, protocol=4)
        return {}
    begun = time.perf_counter()
    with open(file, "rb") as f: data = pickle.load(f)
    for name in names.values(): data[name][:BS].clone()
    took = time.perf_counter() - begun
    return dict(first_batch_s=took, rss_mb=status("VmHWM"), gb=file.stat().st_size/1e9)

def main(quick=False, gb=20., folder=None):
    gb, small = (.7, .7) if quick else (gb, 1.)
    def part(name, *args): return in_child(__file__, name, *args)
    root = Path(tempfile.mkdtemp(dir=folder, prefix="bench-"))
    try:
        if shutil.disk_usage(root).free < gb*1e9 + 8e9:
            sys.exit(f"{root.parent} has not {gb + 8:.0f} GB free: choose another --folder, or less --gb")
        rows = dict(sample_mb=SAMPLE/1e6, batch=BS, write_gb_per_s=gb/make(root/"large", gb))
        rows["whole set"] = part("iterate", root/"large")
        shutil.rmtree(root/"large")
        make(root/"small", small)
        rows["from cached files"] = part("throughput", root/"small")
        part("pickles", root/"small", root/"p.pkl")
        rows["one pickle"] = part("pickles", root/"small", root/"p.pkl")
        rows["shards of the same samples"] = part("iterate", root/"small")
    finally: shutil.rmtree(root)
    return rows

if __name__ == "__main__" and sys.argv[1] == "--child":
    print(json.dumps(globals()[sys.argv[2]](*map(Path, sys.argv[3:]))))
