"""How fast pictures become tokens.

A plain loop over a Hugging Face tower, one picture at a time (open, processor, forward, keep), as earlier attempts extracted, beside `extract` with the
same tower, weights and pictures. Random weights, since speed does not depend on them; the two towers of a run are the same one, in both.
The runs alternate and their medians are compared; the tokens are held against each other. The share is that of the towers' operations in what a float32
matrix product does in a second, measured in the same run: no order of the work gains more than 1/share in that precision. Large pictures are read with
`fast_decode`."""
import shutil, tempfile, time
from pathlib import Path
import numpy as np, torch, transformers
from PIL import Image
from blip3o_nb.encoders import load_encoder
from blip3o_nb.extract import extract
from blip3o_nb.optimisation import fast_dtype
from machine import DEVICE, median, product

TOWERS = { # vision towers of CLIP as published, and two small ones, the first of the shipped CLIP's size
    "6 x 192, patch 12, 96 px": dict(hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, patch_size=12, image_size=96),
    "8 x 384, patch 32, 224 px": dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6, patch_size=32),
    "ViT-B/32, 224 px": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32),
    "ViT-L/14, 224 px": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)}

SIZES = {"640 x 480": (640, 480), "a camera's 4032 x 3024": (4032, 3024)}

def make_pictures(folder, n, size):
    "Random pictures with detail at several scales, as JPEG"
    rng, (w, h) = np.random.default_rng(0), size
    for i in range(n):
        layers = [(a, Image.fromarray(rng.integers(0, 255, (3*k, 4*k, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)) for k, a in ((4, .5), (16, .3), (60, .2))]
        Image.fromarray(sum(a*np.asarray(im, dtype=np.float32) for a, im in layers).astype(np.uint8)).save(folder/f"{i:04d}.jpg", quality=90)

def tower_flops(v):
    "Of one picture: products of the blocks and of attention"
    w, n = v["hidden_size"], (v.get("image_size", 224)//v["patch_size"])**2 + 1
    return v["num_hidden_layers"]*n*(24*w*w + 4*n*w)

def make_tower(folder, vision):
    "A CLIP of that vision tower with random weights, as a folder of the hub's form"
    text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=99, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig(projection_dim=64, vision_config=dict(dict(image_size=224), **vision), text_config=text)).save_pretrained(folder)
    side = vision.get("image_size", 224)
    transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)

def plain_loop(folder, pictures):
    "One picture at a time through the library's own classes, each of the two towers"
    model = transformers.CLIPModel.from_pretrained(folder).eval().to(DEVICE)
    processor, kept = transformers.CLIPImageProcessor.from_pretrained(folder), {}
    begun = time.perf_counter()
    for p in pictures:
        px = processor(images=Image.open(p).convert("RGB"), return_tensors="pt")["pixel_values"].to(DEVICE)
        with torch.no_grad(): kept[p.stem] = [model.vision_model(pixel_values=px).last_hidden_state[0].float().cpu() for _ in range(2)]
    return time.perf_counter() - begun, kept

def ours(folder, pictures, n, out, dtype, fast_decode):
    enc = load_encoder(str(folder), device=DEVICE, dtype=dtype)
    begun = time.perf_counter()
    ds = extract(pictures, out, enc, enc, bs=16, limit=n, progress=False, fast_decode=fast_decode)
    return time.perf_counter() - begun, ds

def main(quick=False, pictures=96, rounds=3):
    transformers.utils.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()
    root, rows, dtype = Path(tempfile.mkdtemp()), {}, fast_dtype(DEVICE)
    try:
        for of, size in SIZES.items():
            large = size[0] > 999
            if quick and large: continue
            photos = root/of; photos.mkdir(); make_pictures(photos, 4 if quick else pictures//(2 if large else 1), size)
            for name, vision in TOWERS.items():
                if "L/14" in name and large or quick and "6 x 192" not in name: continue
                here, row = root/"tower", f"{of}, {name}"
                make_tower(here, vision)
                files = sorted(photos.iterdir())[:pictures//12 if "L/14" in name else pictures//4 if "B/32" in name else None]
                n, times, multiply = len(files), dict(plain=[], ours=[]), product("fp32")
                rates = []
                for r in range(1 if quick else rounds):
                    rates += [multiply() for _ in range(5)]
                    t, kept = plain_loop(here, files); times["plain"].append(t)
                    shutil.rmtree(root/"out", ignore_errors=True)
                    t, ds = ours(here, photos, n, root/"out", dtype, large); times["ours"].append(t)
                cos = min(torch.nn.functional.cosine_similarity(ds[k][c].double(), x.double(), dim=-1).min().item() for k, xs in kept.items() for c, x in zip(("clip", "eva"), xs))
                per, rate = {k: n/median(t) for k, t in times.items()}, 1/median(rates)
                share = {k: v*2*tower_flops(vision)/rate for k, v in per.items()}
                rows[row] = dict(pictures=n, fast_decode=large, plain_images_per_s=per["plain"], images_per_s=per["ours"], ratio=per["ours"]/per["plain"], min_cosine=cos, plain_share=share["plain"], share=share["ours"], times=times)
                shutil.rmtree(here)
    finally: shutil.rmtree(root)
    return dict(dtype=str(dtype).removeprefix("torch."), rows=rows)
