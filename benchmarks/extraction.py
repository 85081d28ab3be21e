"""How fast pictures become tokens.

A plain loop over a Hugging Face tower, one picture at a time (open, processor, forward, keep), as earlier attempts extracted, beside `extract` with the
same tower, weights and pictures. Random weights, since speed does not depend on them; the two towers of a run are the same one, in both.
On a CPU `extract` runs twice: in one process with all threads, and in a process for each thread, which share the shards as under torchrun. Starting a process
and loading weights are counted nowhere. The runs alternate and their medians are compared; the tokens are held against each other. The limit is what the same
calls would take in the best of orders: the library's own forward pass in batches, one on each core at once, and the opening and preprocessing of the plain loop
spread over all cores, both measured in the same turns. Large pictures are read with `fast_decode`, which is less work; their limit is that of the towers alone."""
import os, shutil, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
import numpy as np, torch, transformers
from PIL import Image
from blip3o_nb.features.encoders import load_encoder
from blip3o_nb.features.extract import extract
from blip3o_nb.training.optimisation import fast_dtype
from blip3o_nb.features.shards import FeatureDataset
from machine import DEVICE, median, now

TOWERS = { # vision towers of CLIP and DINOv2 as published, and two small ones, the first of the shipped CLIP's size
    "6 x 192, patch 12, 96 px": dict(hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, patch_size=12, image_size=96),
    "8 x 384, patch 32, 224 px": dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6, patch_size=32),
    "ViT-B/32, 224 px": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32),
    "DINOv2-S/14 with registers, 224 px": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, num_register_tokens=4),
    "ViT-L/14, 224 px": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)}

def is_dino(vision): return "num_register_tokens" in vision

transformers.utils.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()

SIZES = {"640 x 480": (640, 480), "a camera's 4032 x 3024": (4032, 3024)}

def make_pictures(folder, n, size):
    "Random pictures with detail at several scales, as JPEG"
    rng, (w, h) = np.random.default_rng(0), size
    for i in range(n):
        layers = [(a, Image.fromarray(rng.integers(0, 255, (3*k, 4*k, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)) for k, a in ((4, .5), (16, .3), (60, .2))]
        Image.fromarray(sum(a*np.asarray(im, dtype=np.float32) for a, im in layers).astype(np.uint8)).save(folder/f"{i:04d}.jpg", quality=90)

def make_tower(folder, vision):
    "A CLIP or a DINOv2 of that vision tower with random weights, as a folder of the hub's form"
    torch.manual_seed(0)
    side = vision.get("image_size", 224)
    if is_dino(vision):
        config = transformers.Dinov2WithRegistersConfig(image_size=518, **vision) # as published: at 224 interpolated
        transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
        sizes = dict(size={"shortest_edge": 256}, crop_size=side)
        return transformers.BitImageProcessor(resample=Image.Resampling.BICUBIC, **sizes).save_pretrained(folder)
    text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=99,
                bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = transformers.CLIPConfig(projection_dim=64, vision_config=dict(dict(image_size=224), **vision),
                                     text_config=text)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)

def library(folder):
    "The library's own vision tower"
    model = transformers.AutoModel.from_pretrained(folder).eval().to(DEVICE)
    return getattr(model, "vision_model", model)

def plain_loop(folder, pictures):
    "One picture at a time through the library's own classes, each of the two towers: seconds, those of opening and preprocessing, and the tokens"
    model, kept, opening = library(folder), {}, 0.
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    begun = now()
    for p in pictures:
        at = now()
        px = processor(images=Image.open(p).convert("RGB"), return_tensors="pt")["pixel_values"].to(DEVICE)
        opening += now() - at
        with torch.no_grad(): kept[p.stem] = [model(pixel_values=px).last_hidden_state[0].float().cpu() for _ in range(2)]
    return now() - begun, opening, kept

def forward_pass(folder, side, bs):
    "Seconds for a picture of the library's own tower, a batch on each core at once"
    model, px, threads = library(folder), torch.randn(bs, 3, side, side, device=DEVICE), torch.get_num_threads()
    @torch.no_grad()
    def one(_): model(pixel_values=px)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2): begun = now(); list(pool.map(one, range(threads))); took = now() - begun # the second, warm
    torch.set_num_threads(threads)
    return took/(threads*bs)

def ours(folder, pictures, n, out, fast_decode, begin=lambda: None):
    "By this library; last_hidden_state of a CLIP is not normed, that of a DINOv2 is"
    stage = "normed" if (folder/"preprocessor_config.json").read_text().count("BitImage") else "hidden"
    enc = load_encoder(str(folder), stage, device=DEVICE, dtype=fast_dtype(DEVICE))
    begin(); begun = now()
    extract(pictures, out, {"clip": enc, "eva": enc}, bs=16, limit=n, progress=False, fast_decode=fast_decode, shard_size=-(-n//2))
    return now() - begun

def shared(*args, processes):
    "The same by several processes of one thread each, from when all are ready until all are done"
    env = lambda r: {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(r), "WORLD_SIZE": str(processes)}
    children = [subprocess.Popen([sys.executable, __file__, "--child", *map(str, args)], env=env(r), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for r in range(processes)]
    for c in children: c.stdout.readline()
    begun = now()
    for c in children: print(file=c.stdin, flush=True)
    said = [c.stdout.readline() for c in children]; took = now() - begun
    if any(c.wait() for c in children) or set(said) != {"done\n"}: sys.exit("a process of the extraction failed")
    return took

def main(quick=False, pictures=96, rounds=3):
    root, rows, threads = Path(tempfile.mkdtemp()), {}, torch.get_num_threads()
    try:
        for of, size in SIZES.items():
            large = size[0] > 999
            if quick and large: continue
            photos = root/of; photos.mkdir(); make_pictures(photos, 4 if quick else pictures//(2 if large else 1), size)
            for name, vision in TOWERS.items():
                if ("L/14" in name or is_dino(vision)) and large or quick and "6 x 192" not in name: continue
                here, row = root/"tower", f"{of}, {name}"
                make_tower(here, vision)
                files = sorted(photos.iterdir())[:pictures//12 if "L/14" in name else pictures//4 if "224 px" in name and "384, patch" not in name else None]
                n, forwards, openings, times = len(files), [], [], dict(plain=[], ours=[], shared=[])
                for r in range(1 if quick else rounds):
                    forwards.append(forward_pass(here, vision.get("image_size", 224), min(16, n)))
                    t, opening, kept = plain_loop(here, files); times["plain"].append(t); openings.append(opening)
                    for way, f in (("shared", partial(shared, processes=threads)), ("ours", ours)):
                        if way == "shared" and (DEVICE != "cpu" or threads < 2): continue
                        shutil.rmtree(root/"out", ignore_errors=True)
                        times[way].append(f(here, photos, n, root/"out", large))
                ds = FeatureDataset(root/"out")
                cos = min(torch.nn.functional.cosine_similarity(ds[k][c].double(), x.double(), dim=-1).min().item() for k, xs in kept.items() for c, x in zip(("clip", "eva"), xs))
                took, towers, opening = {k: median(t)/n for k, t in times.items() if t}, 2*median(forwards), median(openings)/n
                rows[row] = dict(pictures=n, fast_decode=large, **{f"{k}_images_per_s": 1/t for k, t in took.items()}, ratio=took["plain"]/took["ours"], ratio_shared=took["plain"]/took["shared"] if "shared" in took else None,
                                 limit=took["plain"]/(towers + (0 if large else opening/threads)), towers_s=towers, opening_s=opening, min_cosine=cos, times=times)
                shutil.rmtree(here)
    finally: shutil.rmtree(root)
    return dict(dtype=str(fast_dtype(DEVICE)).removeprefix("torch."), processes=threads, rows=rows)

if __name__ == "__main__" and sys.argv[1] == "--child":
    folder, pictures, n, out, fast_decode = sys.argv[2:]
    def begin(): print("ready", flush=True); sys.stdin.readline()
    ours(Path(folder), Path(pictures), int(n), Path(out), fast_decode == "True", begin); print("done", flush=True)
