"""How fast pictures become tokens: `python benchmarks/extraction.py [--pictures 48]` (part of `make bench`).

A plain loop over a Hugging Face tower, one picture at a time (open, processor, forward, keep), as earlier attempts extracted, beside `extract` with the
same tower, weights and pictures. Random weights, since speed does not depend on them; the two towers of a run are the same one, in both.
The runs alternate and their medians are compared; the tokens are held against each other. Writes benchmarks/extraction.json."""
import argparse, json, os, platform, shutil, statistics, tempfile, time
from pathlib import Path
import numpy as np, torch, transformers
from PIL import Image
from blip3o_nb.encoders import load_encoder
from blip3o_nb.extract import extract
from blip3o_nb.learner import fast_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOWERS = { # vision towers of CLIP as published, and two small ones, the first of the shipped CLIP's size
    "6 x 192, patch 12, 96 px": dict(hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, patch_size=12, image_size=96),
    "8 x 384, patch 32, 224 px": dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6, patch_size=32),
    "ViT-B/32, 224 px": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32),
    "ViT-B/16, 224 px": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16),
    "ViT-L/14, 224 px": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)}

def make_pictures(folder, n):
    "Photographs' sizes, smooth and noisy, as JPEG"
    rng = np.random.default_rng(0)
    for i in range(n):
        small = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(folder/f"{i:04d}.jpg", quality=90)

def make_tower(folder, vision):
    "A CLIP of that vision tower with random weights, as a folder of the hub's form"
    text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=99, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig(projection_dim=64, vision_config=dict(dict(image_size=224), **vision), text_config=text)).save_pretrained(folder)
    side = vision.get("image_size", 224)
    transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)

def plain_loop(folder, pictures, repeat=1):
    "One picture at a time through the library's own classes, each of the two towers"
    model = transformers.CLIPModel.from_pretrained(folder).eval().to(DEVICE)
    processor, kept = transformers.CLIPImageProcessor.from_pretrained(folder), {}
    begun = time.perf_counter()
    for p in pictures:
        px = processor(images=Image.open(p).convert("RGB"), return_tensors="pt")["pixel_values"].to(DEVICE)
        with torch.no_grad(): kept[p.stem] = [model.vision_model(pixel_values=px).last_hidden_state[0].float().cpu() for _ in range(2)]
    return time.perf_counter() - begun, kept

def ours(folder, pictures, out, dtype, num_workers, compile=False):
    enc = load_encoder(str(folder), device=DEVICE, dtype=dtype, compile=compile)
    if compile: enc.tokens(torch.zeros(16, 3, *[enc.tower.image_size]*2)) # compiling is not counted
    begun = time.perf_counter()
    ds = extract(pictures[0].parent, out, enc, enc, bs=16, progress=False, num_workers=num_workers)
    return time.perf_counter() - begun, ds

def main():
    p = argparse.ArgumentParser(); p.add_argument("--pictures", type=int, default=48); p.add_argument("--repeat", type=int, default=3); p.add_argument("--towers", default=""); p.add_argument("--workers", type=int, default=0)
    p.add_argument("--compile", action="store_true")
    a = p.parse_args()
    transformers.utils.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()
    root, rows, dtype = Path(tempfile.mkdtemp()), {}, fast_dtype(DEVICE)
    about = dict(machine=platform.machine(), device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", threads=torch.get_num_threads(), torch=torch.__version__, dtype=str(dtype), repeat=a.repeat)
    print(about)
    try:
        for name, vision in TOWERS.items():
            if a.towers not in name: continue
            n = a.pictures if "L/14" not in name else max(8, a.pictures//4)
            here = root/name.replace("/", "_"); (here/"pictures").mkdir(parents=True); make_pictures(here/"pictures", n)
            make_tower(here/"tower", vision)
            pictures, times = sorted((here/"pictures").iterdir()), dict(plain=[], ours=[])
            for r in range(a.repeat):
                t, kept = plain_loop(here/"tower", pictures); times["plain"].append(t)
                shutil.rmtree(here/"out", ignore_errors=True)
                t, ds = ours(here/"tower", pictures, here/"out", dtype, a.workers, a.compile); times["ours"].append(t)
            cos = min(torch.nn.functional.cosine_similarity(ds[k][c].double(), x.double(), dim=-1).min().item() for k, xs in kept.items() for c, x in zip(("clip", "eva"), xs))
            per = {k: n/statistics.median(t) for k, t in times.items()}
            rows[name] = dict(pictures=n, plain_images_per_s=per["plain"], images_per_s=per["ours"], ratio=per["ours"]/per["plain"], min_cosine=cos, times=times)
            print(f"{name:34} plain {per['plain']:7.2f} images/s   extract {per['ours']:7.2f} images/s   ratio {rows[name]['ratio']:.2f}   smallest cosine of a token {cos:.6f}", flush=True)
    finally: shutil.rmtree(root)
    if not a.towers: Path(__file__).with_suffix(".json").write_text(json.dumps(dict(about=about, **rows), indent=1) + "\n")

if __name__ == "__main__": main()
