"""Decoders of tokens into images: what does not fit or is damaged is refused in one line, a training resumes,
and diffusers draws the same pixels."""
import json, shutil
from dataclasses import replace
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from PIL import Image
from blip3o_nb.core import Task, is_held_out, load_tensors, save_tensors, seed_everything
from blip3o_nb.features.encoders import load_encoder
from blip3o_nb.features.extract import extract
from blip3o_nb.features.images import read_images
from blip3o_nb.features.loading import feature_dls
from blip3o_nb.features.shards import FeatureDataset
from blip3o_nb.files import InputError, data_path, read_json, write_json
from blip3o_nb.generation import pixels as px
from blip3o_nb.generation.pipeline import Pipeline, save_checkpoint
from blip3o_nb.generation.pixels import (Decoder, DecoderConfig, PixelScale, TokenNoise, ViTDecoder,
                                         decoder_learner, patchify, pixel_dls)
from blip3o_nb.judging.metrics import psnr, ssim
from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
from blip3o_nb.runs.resume import CheckpointCallback
from blip3o_nb.training.learner import flow_learner

SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)

class Means:
    "A stranger's encoder of 32 pixels: the mean colour of 4x4 patches and registers in front; no mean, no std"
    width, device = 6, torch.device("cpu")
    def __init__(self, front=1, name="means", **contract):
        self.front, self.num_tokens = front, front + 16
        layout = "cls_patch" if front else "patch_only"
        self.contract = dict(model=f"python:{name}:Means", stage="hidden", layout=layout, prefix=front, width=6,
                             num_tokens=self.num_tokens, image_size=32, fingerprint="1f") | contract
    def preprocess(self, image):
        x = torch.from_numpy(np.array(image.resize((32, 32)), dtype=np.float32)/255).permute(2, 0, 1)
        return x*4 - 1
    def tokens(self, pixels): # [B, 3, 32, 32] -> [B, front + 16, 6]
        x = patchify(pixels, 4).unflatten(2, (64, 3))
        x = torch.cat([x.mean(2), x.std(2)], -1)
        return torch.cat([x.mean(1, keepdim=True)]*self.front + [x], 1)

@pytest.fixture(scope="module")
def art(tmp_path_factory):
    "Images of coloured squares, and their tokens by the stranger's encoder"
    root, g = tmp_path_factory.mktemp("pixels"), np.random.default_rng(0)
    (root/"images").mkdir()
    for i in range(120):
        coarse = g.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.NEAREST).save(root/"images"/f"{i:03}.png")
    extract(root/"images", root/"set", {"means": Means(), "bare": Means(0), "many": Means(5)}, progress=False)
    return root

def loaders(art, column="bare", front=0, **kw):
    return pixel_dls(art/"set", column, art/"images", Means(front), bs=16, device="cpu", **kw)

@pytest.fixture(scope="module")
def linear(art): return Decoder.fit(art/"set", "means", art/"images", "linear", encoder=Means(), device="cpu")

@pytest.fixture(scope="module")
def vit(art):
    return Decoder.fit(art/"set", "means", art/"images", encoder=Means(), device="cpu", epochs=8, bs=16, network=SMALL,
                       lr=3e-3, precision="fp32", progress=False)

def held(art, column="means"):
    ds = FeatureDataset(art/"set", "held_out")
    return ds.column(column), loaders(art, column, {"means": 1, "bare": 0, "many": 5}[column]).plan.fetch[1](range(len(ds)))[1]/255

# Fitting

@pytest.mark.parametrize("column,front", [("means", 1), ("bare", 0), ("many", 5)])
def test_both_kinds_fit_any_layout(art, column, front):
    "CLS, none, and CLS with four registers: the linear one finds the squares nearly exactly, the ViT beats the mean"
    tokens, pixels = held(art, column)
    own = dict(encoder=Means(front), device="cpu")
    exact = Decoder.fit(art/"set", column, art/"images", "linear", network=dict(penalty=1.), **own)
    assert psnr(exact.pictures(tokens), pixels).min() > 30
    assert exact.contract["num_tokens"] == 16 + front
    trained = Decoder.fit(art/"set", column, art/"images", epochs=12, bs=16, network=SMALL, lr=5e-3, ema=.9, tau=.05,
                          precision="fp32", progress=False, **own)
    mean = loaders(art, column, front).target_stats.mean.float()
    assert psnr(trained.pictures(tokens), pixels).mean() > psnr(mean.expand_as(pixels), pixels).mean() + 1
    assert (trained.contract["layout"], trained.contract["num_tokens"], trained.contract["prefix"]) == ("patch_only", 16, 0)
    assert torch.equal(trained.pictures(tokens), trained.pictures(tokens[:, front:]))

def test_pixels_are_those_of_the_key(art, tmp_path):
    "Whether they are kept or read again, in this process or another; and of the image that was extracted"
    kept, fresh = loaders(art), loaders(art, in_memory=False, num_workers=1)
    for _ in range(2):
        for (a, b), (c, d) in zip(kept.valid, fresh.valid): assert torch.equal(a, c) and torch.equal(b, d)
    b = kept.valid.one_batch()
    for key, pixels in zip(kept.valid.batch_keys(0), b[1]):
        image = Image.open(art/"images"/f"{key.removesuffix('.png')}.png").convert("RGB")
        assert (torch.from_numpy(np.array(image)).permute(2, 0, 1)/255 - pixels).abs().max() < 3e-3
    shutil.copytree(art/"images", tmp_path/"images")
    some = sorted((tmp_path/"images").iterdir())
    shutil.copy(some[1], some[0])
    changed = pixel_dls(art/"set", "bare", tmp_path/"images", Means(0), bs=16, device="cpu")
    def every(dls): return [*dls.train.new(shuffle=False, drop_last=False), *dls.valid]
    with pytest.raises(InputError, match="is another than the one that was extracted: restore it, or extract again"):
        every(changed)
    some[0].write_bytes(some[1].read_bytes()[:60])
    broken = pixel_dls(art/"set", "bare", tmp_path/"images", Means(0), bs=16, device="cpu")
    with pytest.raises(InputError, match="the image '.*' cannot be read"): every(broken)
    some[0].unlink()
    with pytest.raises(InputError, match="has no image '.*', whose tokens there are"):
        pixel_dls(art/"set", "bare", tmp_path/"images", Means(0), bs=16)

def test_an_encoder_is_found_by_the_contract_and_starts_no_code(art):
    with pytest.raises(InputError, match="the set .* does not start code: load that encoder and give it to encoder="):
        pixel_dls(art/"set", "means", art/"images")
    with pytest.raises(InputError, match="a linear decoder is fitted at once: leave out tau"):
        Decoder.fit(art/"set", "means", art/"images", "linear", encoder=Means(), tau=.1)

# Training

class Stop(Callback):
    order = 70
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.train_iter == self.at: raise CancelFitException

def learner(art, *cbs):
    seed_everything(0)
    return decoder_learner(loaders(art), ViTDecoder(DecoderConfig(16, 6, 32, **SMALL)), lr=3e-3, progress=False,
                           precision="fp32", cbs=cbs)

def test_a_training_that_was_stopped_resumes_bit_for_bit(art, tmp_path):
    "With the states of flows: weights, average and record are those of the run that was never stopped"
    whole = learner(art, CheckpointCallback(tmp_path/"whole", every=4))
    whole.fit_warmup(3)
    learner(art, CheckpointCallback(tmp_path/"cut", every=4), Stop(9)).fit_warmup(3)
    again = learner(art, CheckpointCallback(tmp_path/"cut", every=4))
    again.fit_warmup(3)
    assert again.record == whole.record and len(whole.record["loss"]) == whole.train_iter
    for learn in (whole, again): assert learn.judged_model is not learn.model
    for a, b in ((whole.model, again.model), (whole.judged_model, again.judged_model)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    other = learner(art, CheckpointCallback(tmp_path/"cut", every=4))
    other.dls.train.bs = 8
    with pytest.raises(InputError, match="is of a training with"): other.fit_warmup(3)

def test_a_loss_that_is_not_finite_names_its_images(art):
    learn = learner(art)
    learn.loss_func = lambda made, real: (made - real).abs().mean()*float("nan")
    with pytest.raises(InputError, match="the loss is nan in step 1, which was not taken: the features of the batch"):
        learn.fit(1)

def test_noise_has_the_sizes_that_were_chosen(art):
    "Half-normal sizes with deviation tau, none at validation"
    learn, seen = learner(art), {True: [], False: []}
    class Look(Callback):
        order = -3
        def before_batch(self):
            clean = learn.flow.cond_norm.encode(learn.flow.tokens)
            seen[self.training].append((self.xb[0] - clean).flatten(1).std(1))
    learn.remove_cb(TokenNoise)
    learn.fit(6, cbs=[TokenNoise(.5), Look()])
    assert torch.cat(seen[False]).max() == 0
    assert torch.cat(seen[True]).square().mean().sqrt().item() == pytest.approx(.5, rel=.1)

# Refusals

@pytest.fixture(scope="module")
def flow(art):
    "A checkpoint of a flow that nobody has trained"
    dls = feature_dls(art/"set", Task("means_from_bare", "means", "bare"), bs=16, device="cpu")
    config = BLIP3oDiTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **dls.sizes)
    learn = flow_learner(dls, BLIP3oDiT(config), progress=False)
    learn.fit(0)
    return save_checkpoint(learn, art/"flow")

@pytest.mark.parametrize("changed,message", [
    (dict(model="python:others:Means"), "of model 'python:others:Means'; these are of model 'python:means:Means': make them with load_encoder"),
    (dict(fingerprint="2e"), "fingerprint '2e'; these are of fingerprint '1f': load the weights that it was fitted to, or fit"),
    (dict(weights="laion"), None), # the column says nothing of its weights
    (dict(stage="normed"), r"load_encoder\(..., stage='normed'\)"),
    (dict(layout="grid_4", num_tokens=4), r"load_encoder\(..., layout='grid_4'\)"),
    (dict(layers=[-2]), r"load_encoder\(..., layers=\[-2\]\)"),
    (dict(num_tokens=65, image_size=64), r"load_encoder\(..., size=64\)"),
    (dict(width=8), "width 8; these are of width 6"),
    (dict(prefix=2, num_tokens=17), "prefix 2; these are of prefix 1")])
def test_tokens_that_a_decoder_does_not_read_are_refused(art, flow, linear, tmp_path, changed, message):
    "Before anything is generated, in one line, at loading and at the call"
    cond = FeatureDataset(art/"set", "held_out").column("bare")[:3]
    fine = Pipeline.from_pretrained(flow, decoder=linear.save_pretrained(tmp_path/"decoder"), device="cpu")
    assert fine.pictures(cond).shape == (3, 3, 32, 32)
    class Other: contract = linear.contract | changed; pictures = linear.pictures
    if message is None:
        assert fine.pictures(cond, decoder=Other()).shape == (3, 3, 32, 32)
        return
    with pytest.raises(InputError, match=message) as e: fine.pictures(cond, decoder=Other())
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match=message): Pipeline.from_pretrained(flow, decoder=Other())

# Files

def test_it_is_stored_whole_or_not_at_all(vit, linear, tmp_path, monkeypatch):
    "Over an older decoder too: what was interrupted is no decoder, and not the old one with new weights"
    linear.save_pretrained(tmp_path/"d")
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    for name in ("save_tensors", "write_json"):
        with monkeypatch.context() as m:
            m.setattr(px, name, full)
            with pytest.raises((InputError, OSError), match="No space left"): vit.save_pretrained(tmp_path/"d")
        with pytest.raises(InputError, match="no decoder in"): Decoder.from_pretrained(tmp_path/"d")
    vit.save_pretrained(tmp_path/"d", torch.float16)
    assert sorted(p.name for p in (tmp_path/"d").iterdir()) == ["decoder.json", "decoder.safetensors"]
    x = torch.randn(3, 16, 6)
    assert (Decoder.from_pretrained(tmp_path/"d", "cpu").pictures(x) - vit.pictures(x)).abs().max() < 5e-3

@pytest.mark.parametrize("kind", ["vit", "linear"])
def test_damage_is_found(request, kind, tmp_path):
    "Each flipped byte, a file cut short, weights of another network or not finite, fields that cannot be"
    d = request.getfixturevalue(kind)
    f, folder = d.save_pretrained(tmp_path/"d")/"decoder.json", tmp_path/"d"
    weights, good = folder/"decoder.safetensors", {p: p.read_bytes() for p in (tmp_path/"d").iterdir()}
    def refused(message=None):
        with pytest.raises(InputError, match=message) as e: Decoder.from_pretrained(folder, "cpu")
        assert "\n" not in str(e.value) and "decoder." in str(e.value)
        for p, b in good.items(): p.write_bytes(b)
    for p, b in good.items():
        for at in np.linspace(0, len(b) - 1, 12).astype(int):
            p.write_bytes(b[:at] + bytes([b[at] ^ 255]) + b[at + 1:])
            refused()
        p.write_bytes(b[:len(b)//2])
        refused()
    weights.unlink()
    refused("no file .*decoder.safetensors")
    state = load_tensors(weights)[0]
    for k in state:
        if k.startswith("model."):
            save_tensors(weights, {**state, k: state[k]*float("nan")})
            refused(f"do not fit decoder.json, first {k.removeprefix('model.')}")
    save_tensors(weights, {k: v for k, v in state.items() if k != "norm.std"})
    refused("normaliser")
    about = read_json(f)
    for other in (dict(kind="gan"), dict(format=2), dict(norm="batch"), dict(shape=[16]), dict(image_size=0), dict(contract=[]),
                  dict(config={**about["config"], "colour": 1}), dict(config={**about["config"], "token_size": 10**9}),
                  dict(config={**about["config"], "token_size": 5}), dict(config={**about["config"], "image_size": 64}),
                  dict(config={**about["config"], "num_tokens": "16"}), dict(config=3), dict(training=3)):
        write_json(f, {**about, **other})
        refused()
    f.write_text(json.dumps([about]))
    refused("is no object")
    assert Decoder.from_pretrained(folder, "cpu").contract == d.contract

def test_the_shipped_one():
    "Named by its tower; at most 6 MB; draws held-out images as well as its record says"
    d = Decoder.from_pretrained("tiny-clip", "cpu")
    assert d.contract["model"] == "tiny-clip" and d.pictures(torch.zeros(1, 65, 192)).shape == (1, 3, 96, 96)
    assert sum(p.stat().st_size for p in data_path("tiny-decoder").iterdir()) < 6e6
    source, tower = read_images(data_path("emoji.tar.gz")), load_encoder("tiny-clip", device="cpu")
    away = [i for i, k in enumerate(source.keys) if is_held_out(k)][::22]
    seen = torch.stack([tower.preprocess(source[i].image) for i in away])
    assert psnr(d.pictures(tower.tokens(seen)), PixelScale(tower.preprocess).unit(seen)).mean() > 25

# Peers

def test_diffusers_draws_the_same_pixels(vit):
    "Of a decoder of ours as an `AutoencoderRAE`, also through its `decode`; and of one of theirs with ImageNet's scale"
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "AutoencoderRAE"): pytest.skip("this diffusers has no AutoencoderRAE")
    seed_everything(0)
    def peer(**options): return diffusers.AutoencoderRAE(encoder_type="mae", encoder_num_hidden_layers=1, **options).eval()
    config = replace(vit.model.config, token_size=64)
    ours = ViTDecoder(config)
    rae = peer(**config.to_rae())
    rae.decoder.load_state_dict(ours.state_dict())
    z = torch.randn(3, 16, 64)
    latents = z.transpose(1, 2).unflatten(2, (4, 4))
    with torch.no_grad():
        a, b = ours(z), rae._denormalize_image(rae.decoder.unpatchify(rae.decoder(z).logits))
        assert (a - b).abs().max() < 1e-5
        assert (a - rae.decode(latents).sample).abs().max() < 1e-4 # which adds 1e-5 to a deviation of 1
    theirs = peer(encoder_hidden_size=64, decoder_hidden_size=48, decoder_num_hidden_layers=3, decoder_num_attention_heads=3,
                  decoder_intermediate_size=40, patch_size=8, encoder_patch_size=16, encoder_input_size=64)
    for p in theirs.decoder.parameters(): torch.nn.init.normal_(p, std=.2)
    back = ViTDecoder(DecoderConfig.from_rae(theirs.config))
    back.load_state_dict(theirs.decoder.state_dict())
    with torch.no_grad():
        want = theirs._denormalize_image(theirs.decoder.unpatchify(theirs.decoder(z).logits))
        assert (back(z) - want).abs().max() < 1e-5 and want.shape == (3, 3, 32, 32)
    assert DecoderConfig.from_rae(config.to_rae()) == config

def test_scores_are_those_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    g = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 40, 40, generator=g)
    b = (a + .2*torch.randn(a.shape, generator=g)).clamp(0, 1)
    for x, y, s, p in zip(a.numpy(), b.numpy(), ssim(a, b), psnr(a, b)):
        own = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0)
        assert metrics.structural_similarity(x, y, **own) == pytest.approx(s.item(), abs=1e-4)
        assert metrics.peak_signal_noise_ratio(x, y, data_range=1) == pytest.approx(p.item(), abs=1e-3)
