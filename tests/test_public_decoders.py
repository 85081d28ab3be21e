"""Public decoders: the pixels of each are those of diffusers on the same tokens, and what does not fit is refused.

Each model is of the published one's class, tiny, with random weights. Nothing is downloaded."""
import json, logging
from types import SimpleNamespace
import numpy as np
import pytest, torch
from PIL import Image
from torch.nn import functional as F
from blip3o_nb.core import named_generator
from blip3o_nb.files import InputError
from blip3o_nb.features.encoders import Encoder, Tower, tower_of
from blip3o_nb.generation.pipeline import check_reads, load_decoder
from blip3o_nb.generation.public_decoders import (CLASSES, PUBLIC_DECODERS, Parts,
                                                  load_public_decoder, sana_connector)

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
logging.getLogger("diffusers").setLevel(logging.ERROR)

def noises(n, first=0): return [named_generator("pixels", 0, first + i) for i in range(n)]
def shaken(model, seed=0):
    "Random weights throughout, so that no part of a model is without effect"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p += .05*torch.randn(p.shape, generator=g)
    return model.eval()

def pixels(x): return torch.from_numpy(x).permute(0, 3, 1, 2)

# Tiny models

def a_vae(latents=4):
    torch.manual_seed(1)
    return shaken(diffusers.AutoencoderKL(block_out_channels=(8, 8), latent_channels=latents, norm_num_groups=4,
                                          down_block_types=("DownEncoderBlock2D",)*2,
                                          up_block_types=("UpDecoderBlock2D",)*2, sample_size=16))

def a_unet(cross, **kw):
    torch.manual_seed(0)
    own = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
               norm_num_groups=4, attention_head_dim=4, cross_attention_dim=cross,
               down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
               up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    return shaken(diffusers.UNet2DConditionModel(**own | kw))

def a_clip(width=32, projects=16, size=32):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(hidden_size=width, intermediate_size=2*width, num_hidden_layers=2,
                                           num_attention_heads=2, image_size=size, patch_size=8,
                                           projection_dim=projects)
    return shaken(transformers.CLIPVisionModelWithProjection(config))

def a_processor(size=32): return transformers.CLIPImageProcessor(size={"shortest_edge": size},
                                                                 crop_size={"height": size, "width": size})

def encoder_of(model, stage, layout, processor=None, name="tower", **kw):
    "Our encoder of a tower of transformers"
    def preprocess(image): return processor(images=image, return_tensors="pt")["pixel_values"][0]
    return Encoder(tower_of(model, None, processor and preprocess, dict(model=name)), stage, layout, **kw)

def said_to_see(enc, size):
    "An encoder whose contract has the published size of images, which a tiny tower has not"
    own = dict(contract=dict(enc.contract, image_size=size), pool=enc.pool)
    return SimpleNamespace(**own, tokens=enc.tokens, preprocess=enc.preprocess)

def a_rae(kind, **kw):
    torch.manual_seed(0)
    sizes = dict(dinov2=(14, 56), siglip2=(16, 64), mae=(16, 64))[kind]
    own = dict(encoder_type=kind, encoder_hidden_size=64, encoder_patch_size=sizes[0], encoder_num_hidden_layers=2,
               encoder_input_size=sizes[1], decoder_hidden_size=32, decoder_num_hidden_layers=2,
               decoder_num_attention_heads=2, decoder_intermediate_size=64, patch_size=4)
    if kind == "siglip2": own |= dict(encoder_norm_mean=[.5]*3, encoder_norm_std=[.5]*3)
    siglip = transformers.SiglipVisionModel # of which diffusers 0.42 expects a part that transformers 5 calls itself
    if not hasattr(siglip, "vision_model"): siglip.vision_model = property(lambda self: self)
    return shaken(diffusers.AutoencoderRAE(**own | kw))

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PIL_IMAGES = [Image.fromarray((255*i.permute(1, 2, 0)).byte().numpy()) for i in IMAGES]

# RAE

STATISTICS = dict(none={}, channel=dict(latents_mean=torch.randn(64, 1, 1, generator=torch.Generator().manual_seed(1)),
                                        latents_std=torch.rand(64, 1, 1, generator=torch.Generator().manual_seed(2)) + .5),
                  position=dict(latents_mean=torch.randn(64, 4, 4, generator=torch.Generator().manual_seed(1)),
                                latents_std=torch.rand(64, 4, 4, generator=torch.Generator().manual_seed(2)) + .5),
                  scaled=dict(scaling_factor=.7))

@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "mae"])
def test_rae_draws_what_diffusers_draws(kind, statistics):
    "On our encoder's tokens, the autoencoder's own pixels; on any tokens, those of its `decode`"
    vae = a_rae(kind, **STATISTICS[statistics])
    tower = tower_of(vae.encoder, about=dict(model="own"))
    tower.resize(vae.config.encoder_input_size)
    enc = Encoder(tower, "normed_plain", "patch_only")
    dec = load_public_decoder(dict(dinov2="rae-dinov2-small", siglip2="rae-siglip2-base", mae="rae-mae-base")[kind],
                              vae, encoder=enc, tower="own")
    side = vae.config.encoder_input_size
    images = F.interpolate(IMAGES, (side, side))
    with torch.no_grad():
        tokens = enc.tokens(vae._resize_and_normalize(images))
        assert (dec.condition(tokens) - vae.encode(images).latent).abs().max() < 1e-4
        assert (dec.pictures(tokens) - vae(images).sample.clamp(0, 1)).abs().max() < 1e-5
        made = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
        latents = vae._normalize_latents(made.transpose(1, 2).unflatten(2, (4, 4)))*vae.config.scaling_factor
        assert (dec.pictures(made) - vae.decode(latents).sample.clamp(0, 1)).abs().max() < 1e-5
    assert dec.pictures(made).std() > .01 and dec.contract["num_tokens"] == 16

def test_rae_without_a_map():
    vae = a_rae("dinov2", reshape_to_2d=False)
    x = torch.randn(2, 16, 64)
    with torch.no_grad(): theirs = vae.decode(x/(1 + 1e-5)).sample.clamp(0, 1)
    assert (load_public_decoder("rae-dinov2-small", vae).pictures(x) - theirs).abs().max() < 1e-5

# Versatile Diffusion

def a_versatile():
    return diffusers.VersatileDiffusionImageVariationPipeline(
        image_feature_extractor=a_processor(), image_encoder=a_clip(), image_unet=a_unet(16), vae=a_vae(),
        scheduler=diffusers.DDIMScheduler(steps_offset=0, clip_sample=True))

@pytest.mark.parametrize("guidance", [7.5, 1.])
def test_versatile_diffusion_draws_what_its_own_pipeline_draws_of_the_images(guidance):
    pipe = a_versatile()
    pipe.set_progress_bar_config(disable=True)
    enc = encoder_of(pipe.image_encoder, "projected", "cls_patch", pipe.image_feature_extractor)
    dec = load_public_decoder("versatile-diffusion", pipe, tower="tower", steps=3, guidance=guidance)
    check_reads(dec.contract, enc.contract)
    tokens = enc.tokens(torch.stack([enc.preprocess(i) for i in PIL_IMAGES]))
    config = dict(pipe.scheduler.config)
    ours = dec.pictures(tokens)
    theirs = pipe(PIL_IMAGES, num_inference_steps=3, guidance_scale=guidance, generator=noises(3), output_type="np")
    assert (ours - pixels(theirs.images)).abs().max() < 1e-5 and ours.std() > .01
    assert (ours[0] - ours[1]).abs().max() > 1e-3           # the tokens have a say
    assert dict(pipe.scheduler.config) == config            # and the given pipeline is left as it was
    assert (dec.pictures(2*tokens) - ours).abs().max() < 1e-5 # their scale has none

# The pooled embedding

def a_tokenizer(folder):
    from transformers import CLIPTokenizer
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocab = {t: i for i, t in enumerate([*letters, *[f"{l}</w>" for l in letters], "<|startoftext|>", "<|endoftext|>"])}
    (folder/"vocab.json").write_text(json.dumps(vocab))
    (folder/"merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder/"vocab.json"), str(folder/"merges.txt"), model_max_length=8)

def an_unclip(folder):
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=52, eos_token_id=53))
    return diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=a_processor(), image_encoder=a_clip(),
        image_normalizer=shaken(diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(16)),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=a_tokenizer(folder), text_encoder=shaken(text),
        unet=a_unet(16, class_embed_type="projection", projection_class_embeddings_input_dim=32),
        scheduler=diffusers.DDIMScheduler(), vae=a_vae())

@pytest.mark.parametrize("level", [0, 300])
def test_stable_unclip_draws_what_its_own_pipeline_draws_of_the_images(level, tmp_path):
    pipe = an_unclip(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    enc = encoder_of(pipe.image_encoder, "hidden", "cls_patch", pipe.feature_extractor)
    dec = load_public_decoder("unclip-small", pipe, encoder=enc, tower="tower", steps=3, noise_level=level)
    x = torch.stack([enc.preprocess(i) for i in PIL_IMAGES])
    theirs = pipe(image=x, prompt=[""]*3, num_inference_steps=3, noise_level=level, generator=noises(3),
                  output_type="np").images
    ours = dec.pictures(enc.tokens(x))
    assert (ours - pixels(theirs)).abs().max() < 1e-5 and ours.std() > .01
    assert (ours[0] - ours[1]).abs().max() > 1e-3
    again = load_public_decoder("unclip-small", pipe, encoder=enc, tower="tower", steps=3, noise_level=level + 9)
    assert (again.pictures(enc.tokens(x)) - ours).abs().max() > 1e-4

def a_kandinsky():
    torch.manual_seed(0)
    unet = a_unet(16, out_channels=8, encoder_hid_dim=16, encoder_hid_dim_type="image_proj",
                  addition_embed_type="image", resnet_time_scale_shift="scale_shift",
                  down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                  up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
                  mid_block_type="UNetMidBlock2DSimpleCrossAttn")
    movq = diffusers.VQModel(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",)*2,
                             up_block_types=("UpDecoderBlock2D",)*2, latent_channels=4, norm_num_groups=8,
                             num_vq_embeddings=12, vq_embed_dim=4, norm_type="spatial")
    return diffusers.KandinskyV22Pipeline(unet=unet, scheduler=diffusers.DDPMScheduler(), movq=shaken(movq))

@pytest.mark.parametrize("guidance", [4., 1.])
def test_kandinsky_draws_what_diffusers_draws_of_the_embedding(guidance):
    pipe, clip = a_kandinsky(), a_clip()
    pipe.set_progress_bar_config(disable=True)
    enc = said_to_see(encoder_of(clip, "normed", "cls_patch", a_processor()), 224)
    x = torch.stack([enc.preprocess(i) for i in PIL_IMAGES])
    with torch.no_grad():
        embeds, zeros = clip(x).image_embeds, clip(torch.zeros(1, 3, 32, 32)).image_embeds # as its prior has it
    side = 8*pipe.movq_scale_factor
    theirs = pipe(embeds, zeros.expand(3, -1), height=side, width=side, num_inference_steps=3,
                  guidance_scale=guidance, generator=noises(3), output_type="np").images
    dec = load_public_decoder("kandinsky-2.2", pipe, encoder=enc, tower="tower", steps=3, guidance=guidance)
    ours = dec.pictures(enc.tokens(x))
    assert (ours - pixels(theirs)).abs().max() < 1e-5 and ours.std() > .01
    assert (ours[0] - ours[1]).abs().max() > 1e-4

# Emu2

def an_emu():
    unet = a_unet(24, addition_embed_type="text_time", addition_time_embed_dim=4,
                  projection_class_embeddings_input_dim=6*4 + 24, transformer_layers_per_block=1)
    return Parts(unet=unet, vae=a_vae(), scheduler=diffusers.EulerDiscreteScheduler())

@torch.no_grad()
def drawn_by_emu(parts, tokens, null, steps, guidance, noise):
    "The loop of Emu2's pipeline, as published: conditioned half first, mean token and sizes beside the time"
    unet, scheduler = parts.unet, parts.scheduler
    cond = torch.cat([tokens, null.expand_as(tokens)]) if guidance > 1 else tokens
    side = unet.config.sample_size*2
    added = dict(text_embeds=cond.mean(1), time_ids=torch.tensor([[side, side, 0, 0, side, side]]*len(cond)))
    scheduler.set_timesteps(steps)
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in noise])*scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        xs = scheduler.scale_model_input(torch.cat([x]*2) if guidance > 1 else x, t)
        eps = unet(xs, t, encoder_hidden_states=cond, added_cond_kwargs=added).sample
        if guidance > 1:
            with_, without = eps.chunk(2)
            eps = without + guidance*(with_ - without)
        x = scheduler.step(eps, t, x).prev_sample
    return (parts.vae.decode(x/parts.vae.config.scaling_factor).sample/2 + .5).clamp(0, 1)

def an_eva():
    from transformers import SiglipVisionConfig, SiglipVisionModel # any tower with 16 x 16 patches will do
    torch.manual_seed(0)
    return shaken(SiglipVisionModel(SiglipVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=3,
                                                       num_attention_heads=2, image_size=64, patch_size=4)))

def a_siglip_processor():
    return transformers.SiglipImageProcessor(size={"height": 64, "width": 64})

@pytest.mark.parametrize("guidance", [3., 1.])
def test_emu2_draws_what_its_published_loop_draws(guidance):
    parts, model = an_emu(), an_eva()
    enc = said_to_see(encoder_of(model, "hidden", "grid_64", a_siglip_processor()), 448)
    dec = load_public_decoder("emu2", parts, encoder=enc, tower="tower", steps=3, guidance=guidance)
    tokens = enc.tokens(torch.stack([enc.preprocess(i) for i in PIL_IMAGES]))
    ours = dec.pictures(tokens)
    theirs = drawn_by_emu(parts, tokens, enc.tokens(torch.zeros(1, 3, 64, 64)), 3, guidance, noises(3))
    assert (ours - theirs).abs().max() < 1e-5 and ours.std() > .01
    assert (ours[0] - ours[1]).abs().max() > 1e-3

def test_pooled_to_64_tokens_as_emu2_does_it():
    "An average over squares of the grid, CLS dropped"
    x = torch.randn(2, 1 + 32*32, 5)
    theirs = F.avg_pool2d(x[:, 1:].permute(0, 2, 1).view(2, 5, 32, 32), 4, 4).view(2, 5, -1).permute(0, 2, 1)
    from blip3o_nb.core import to_layout
    assert (to_layout(x, "grid_64") - theirs).abs().max() < 1e-6

# SigLIP2 and SANA

def a_sana():
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=12,
        sample_size=16)
    vae = diffusers.AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=2,
                                  encoder_block_types=("ResBlock", "EfficientViTBlock"),
                                  decoder_block_types=("ResBlock", "EfficientViTBlock"),
                                  encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                                  encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
                                  encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
                                  downsample_block_type="conv", upsample_block_type="interpolate",
                                  decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=.4)
    return Parts(transformer=shaken(transformer), vae=shaken(vae), connector=shaken(sana_connector(24, 12)),
                 scheduler=diffusers.FlowMatchEulerDiscreteScheduler())

@torch.no_grad()
def drawn_by_sana(parts, tokens, null, steps, guidance, noise):
    "The loop of the published decoder: black image first, connector, sigmas from 1 to 1/steps, no mask"
    scheduler, size = parts.scheduler, parts.transformer.config.sample_size
    scheduler.set_timesteps(steps, sigmas=np.linspace(1, 1/steps, steps))
    cond = torch.cat([null.expand_as(tokens), tokens])
    x = torch.cat([torch.randn(1, 4, size, size, generator=g) for g in noise])
    for t in scheduler.timesteps:
        v = parts.transformer(torch.cat([x]*2), timestep=t.expand(2*len(x)),
                              encoder_hidden_states=parts.connector(cond), encoder_attention_mask=None).sample
        without, with_ = v.chunk(2)
        x = scheduler.step(without + guidance*(with_ - without), t, x).prev_sample
    return (parts.vae.decode(x/parts.vae.config.scaling_factor).sample/2 + .5).clamp(0, 1)

def a_siglip2(model):
    return said_to_see(encoder_of(model, "hidden", "grid_64", a_siglip_processor(), layers=[-2]), 512)

def test_siglip2_sana_draws_what_its_published_loop_draws():
    parts, model = a_sana(), an_eva()
    enc = a_siglip2(model)
    x = torch.stack([enc.preprocess(i) for i in PIL_IMAGES])
    tokens = enc.tokens(x)
    with torch.no_grad(): states = model(x, output_hidden_states=True).hidden_states[-2]
    pooled = F.adaptive_avg_pool2d(states.view(3, 16, 16, 24).permute(0, 3, 1, 2), 8).flatten(2).transpose(1, 2)
    assert (tokens - pooled).abs().max() < 1e-5 # what the published decoder reads
    black = enc.tokens(enc.preprocess(Image.new("RGB", (64, 64)))[None])
    dec = load_public_decoder("siglip2-sana", parts, encoder=enc, tower="tower", steps=3)
    ours = dec.pictures(tokens)
    assert (ours - drawn_by_sana(parts, tokens, black, 3, 3., noises(3))).abs().max() < 1e-5
    assert ours.std() > .01 and (ours[0] - ours[1]).abs().max() > 1e-4
    without = load_public_decoder("siglip2-sana", parts, steps=3, guidance=1.)
    assert (without.pictures(tokens) - drawn_by_sana(parts, tokens, tokens, 3, 1., noises(3))).abs().max() < 1e-5

# What all have in common

def test_an_image_does_not_depend_on_those_beside_it():
    parts, tokens = an_emu(), torch.randn(3, 64, 24)
    dec = load_public_decoder("emu2", parts, null=torch.randn(1, 64, 24), steps=2)
    all_ = dec.pictures(tokens)
    assert (dec.pictures(tokens, bs=2) - all_).abs().max() < 1e-5
    assert (dec.pictures(tokens[2:], first=2) - all_[2:]).abs().max() < 1e-5
    assert (dec.pictures(tokens, seed=1) - all_).abs().max() > 1e-3

def test_guidance_without_what_it_leads_away_from_is_refused():
    dec = load_public_decoder("emu2", an_emu())
    with pytest.raises(InputError, match="give encoder= or null=, or guidance=1"): dec.pictures(torch.randn(1, 64, 24))
    with pytest.raises(InputError, match="reads the pooled embedding of tokens: give encoder=load_encoder"):
        load_public_decoder("kandinsky-2.2", a_kandinsky())
    with pytest.raises(InputError, match="Emu2 has no option 'noise_level': its options are steps, guidance"):
        load_public_decoder("emu2", an_emu(), noise_level=3)

# What does not fit

def reads(name): return {k: v for k, v in PUBLIC_DECODERS[name].reads.items() if k not in ("same_model", "size", "encoder_type")}

WRONG = [
    ("rae-dinov2-base", dict(model="facebook/dinov2-base"), "model 'facebook/dinov2-with-registers-base'",
     "load_encoder('facebook/dinov2-with-registers-base', stage='normed_plain', layout='patch_only'), or give tower="),
    ("rae-dinov2-base", dict(stage="projected"), "stage 'normed_plain'", "load_encoder(..., stage='normed_plain')"),
    ("rae-dinov2-base", dict(layout="grid_64", num_tokens=64), "layout 'patch_only'",
     "load_encoder(..., layout='patch_only')"),
    ("rae-dinov2-base", dict(image_size=518, num_tokens=1369), "image_size 224", "load_encoder(..., size=224)"),
    ("rae-dinov2-base", dict(image_size=None, num_tokens=1369), "num_tokens 256", "load_encoder(..., size=224)"),
    ("rae-dinov2-base", dict(model=None, width=384), "width 768",
     "load_encoder('facebook/dinov2-with-registers-base', stage='normed_plain', layout='patch_only')"),
    ("rae-mae-base", dict(model="facebook/vit-mae-large", width=1024, image_size=224), "model 'facebook/vit-mae-base'",
     "load_encoder('facebook/vit-mae-base', stage='normed_plain', layout='patch_only', size=256)"),
    ("rae-dinov2-base", dict(scale="token"), "scale 'raw'", "undo their scale first, as a Pipeline does"),
    ("versatile-diffusion", dict(layout="patch_only", num_tokens=256), "layout 'cls_patch'",
     "load_encoder(..., layout='cls_patch')"),
    ("versatile-diffusion", dict(stage="hidden", layout="grid_64", width=1024, num_tokens=64),
     "stage 'projected', layout 'cls_patch'", "load_encoder(..., stage='projected', layout='cls_patch')"),
    ("unclip", dict(model="ViT-L-14/openai", embed_dim=768), "model 'ViT-H-14/laion2b_s32b_b79k'",
     "load_encoder('ViT-H-14/laion2b_s32b_b79k', layout='cls_patch')"),
    ("kandinsky-2.2", dict(model=None, embed_dim=768), "embed_dim 1280",
     "load_encoder('ViT-bigG-14/laion2b_s39b_b160k', layout='cls_patch')"),
    ("emu2", dict(image_size=224), "image_size 448", "load_encoder(..., size=448)"),
    ("emu2", dict(stage="normed"), "stage 'hidden'", "load_encoder(..., stage='hidden')"),
    ("siglip2-sana", dict(layers=[-1]), "layers [-2]", "load_encoder(..., layers=[-2])"),
    ("siglip2-sana", dict(layers=None), "layers [-2]", "load_encoder(..., layers=[-2])"),
]

@pytest.mark.parametrize("name, changed, differs, remedy", WRONG)
def test_each_difference_is_named_in_one_line_with_what_would_make_it_fit(name, changed, differs, remedy):
    contract = reads(name)
    check_reads(PUBLIC_DECODERS[name].reads, contract)
    column = {k: v for k, v in (contract | changed).items() if v is not None}
    with pytest.raises(InputError) as e: check_reads(PUBLIC_DECODERS[name].reads, column)
    said = str(e.value)
    assert differs in said and remedy in said and "\n" not in said, said

def test_no_two_published_decoders_of_other_towers_read_the_same():
    "What one reads, no other does, but those that read the same embedding"
    for a in PUBLIC_DECODERS:
        for b in PUBLIC_DECODERS:
            if a == b: continue
            stage_free = {a, b} == {"versatile-diffusion", "unclip-small"} # CLIP-L, by tokens or by their embedding
            if not stage_free:
                with pytest.raises(InputError): check_reads(PUBLIC_DECODERS[b].reads, reads(a))

def test_the_same_weights_under_another_name_and_what_is_not_known():
    row = PUBLIC_DECODERS["versatile-diffusion"].reads
    check_reads(row, reads("versatile-diffusion") | dict(model="openai/clip-vit-large-patch14"))
    check_reads(row, dict(model="unknown", stage="unknown"))
    check_reads(row, {})
    check_reads(PUBLIC_DECODERS["siglip2-sana"].reads, {})

def test_tokens_in_front_of_the_patches_are_no_difference():
    row = PUBLIC_DECODERS["rae-dinov2-base"].reads
    check_reads(row, reads("rae-dinov2-base") | dict(layout="cls_patch", num_tokens=261, prefix=5))
    dec = load_public_decoder("rae-dinov2-small", a_rae("dinov2"))
    x = torch.randn(2, dec.contract["num_tokens"] + 5, dec.contract["width"])
    torch.testing.assert_close(dec.pictures(x), dec.pictures(x[:, 5:]))

def test_tokens_of_another_shape_are_refused():
    dec = load_public_decoder("rae-dinov2-small", a_rae("dinov2"))
    for shape in ((2, 25, 64), (2, 16, 32), (2, 64, 4, 4)):
        with pytest.raises(InputError, match=r"this decoder reads \[B, 16, 64\], as load_encoder\('facebook/dinov2"):
            dec.pictures(torch.randn(shape))

def test_names_and_folders(tmp_path, caplog):
    with pytest.raises(InputError, match="no public decoder and no folder 'rae': choose one of rae-dinov2-small"):
        load_public_decoder("rae")
    with pytest.raises(InputError, match="no public decoder and no folder 'rae'"): load_decoder("public:rae")
    (tmp_path/"empty").mkdir()
    with pytest.raises(InputError, match="nothing of diffusers.* is no row of PUBLIC_DECODERS"):
        load_public_decoder(str(tmp_path/"empty"))
    vae = a_rae("dinov2")
    vae.save_pretrained(tmp_path/"rae")
    with pytest.raises(InputError, match=r"\(AutoencoderRAE, dinov2, 64\) is no row of PUBLIC_DECODERS"):
        load_public_decoder(str(tmp_path/"rae"))
    x = torch.randn(2, 16, 64)
    dec = load_public_decoder("rae-dinov2-small", tmp_path/"rae", device="cpu")
    assert torch.equal(dec.pictures(x), load_public_decoder("rae-dinov2-small", vae).pictures(x))
    said = f"rae-dinov2-small, the weights of {tmp_path/'rae'}: as its model card says"
    assert said in caplog.text
    config = json.loads((tmp_path/"rae/config.json").read_text())
    (tmp_path/"rae/config.json").write_text(json.dumps(config | dict(encoder_hidden_size=1024)))
    with pytest.raises(InputError, match="cannot be loaded"): load_public_decoder(str(tmp_path/"rae"), device="cpu")

def test_a_folder_of_each_kind_is_known(tmp_path):
    "And draws as what was saved into it"
    clip = said_to_see(encoder_of(a_clip(), "normed", "cls_patch", a_processor()), 224)
    for name, pipe, enc in (("versatile-diffusion", a_versatile(), None), ("kandinsky-2.2", a_kandinsky(), clip)):
        pipe.save_pretrained(tmp_path/name)
        x = enc.tokens(torch.rand(1, 3, 32, 32)) if enc else torch.randn(1, 17, 16)
        options = dict(encoder=enc, tower="tower", steps=2)
        ours = load_public_decoder(str(tmp_path/name), device="cpu", **options)
        assert torch.allclose(ours.pictures(x), load_public_decoder(name, pipe, **options).pictures(x), atol=1e-5)
    unclip = tmp_path/"unclip"
    (unclip/"image_normalizer").mkdir(parents=True)
    (unclip/"model_index.json").write_text(json.dumps(dict(_class_name="StableUnCLIPImg2ImgPipeline")))
    (unclip/"image_normalizer/config.json").write_text(json.dumps(dict(embedding_dim=1024)))
    with pytest.raises(InputError, match=r"give encoder=|cannot be loaded"): load_public_decoder(str(unclip))

def test_emu2_is_loaded_without_its_language_model(tmp_path):
    parts = an_emu()
    for part, module in vars(parts).items(): module.save_pretrained(tmp_path/part)
    (tmp_path/"model_index.json").write_text(json.dumps(dict(_class_name="EmuVisualGenerationPipeline")))
    x, null = torch.randn(1, 64, 24), torch.randn(1, 64, 24)
    ours = load_public_decoder(str(tmp_path), null=null, device="cpu", steps=2)
    assert torch.allclose(ours.pictures(x), load_public_decoder("emu2", parts, null=null, steps=2).pictures(x), atol=1e-5)
    for part in ("unet", "vae"): # as it is published: in one variant
        getattr(parts, part).save_pretrained(tmp_path/"published"/part, variant="bf16")
    parts.scheduler.save_pretrained(tmp_path/"published/scheduler")
    again = load_public_decoder("emu2", tmp_path/"published", null=null, device="cpu", steps=2)
    assert torch.equal(again.pictures(x), ours.pictures(x))

def test_siglip2_sana_is_loaded_from_one_file_of_all_its_parts(tmp_path):
    from safetensors.torch import save_file
    parts, base = a_sana(), tmp_path/"sana"
    parts.transformer.save_config(base/"transformer")
    parts.vae.save_config(base/"vae")
    parts.scheduler.save_pretrained(base/"scheduler")
    state = {f"{n}.{k}": v for n, m in vars(parts).items() if n != "scheduler" for k, v in m.state_dict().items()}
    (tmp_path/"decoder").mkdir()
    save_file(state | {"encoder.x": torch.zeros(1)}, tmp_path/"decoder/model.safetensors", {"format": "pt"})
    said = dict.fromkeys(("diffusion_id", "vae_id", "scheduler_id"), str(base))
    (tmp_path/"decoder/config.json").write_text(json.dumps(said))
    x = torch.randn(2, 64, 24)
    ours = load_public_decoder(str(tmp_path/"decoder"), steps=2, guidance=1., device="cpu")
    theirs = load_public_decoder("siglip2-sana", parts, steps=2, guidance=1.)
    assert torch.equal(ours.pictures(x), theirs.pictures(x))

@pytest.mark.fault("no network", "a public decoder is loaded by name", "its licence is said, one line what to do")
def test_the_licence_is_said_before_anything_is_loaded(monkeypatch, caplog, record_property):
    "And an encoder that does not fit is refused before that"
    from blip3o_nb.generation import public_decoders as pd
    asked = []
    def load(cls, source, **kw):
        asked.append((source, caplog.text))
        raise OSError("no network")
    for row in PUBLIC_DECODERS.values(): monkeypatch.setattr(row.bridge, "load", classmethod(load))
    for name, row in PUBLIC_DECODERS.items():
        caplog.clear()
        with pytest.raises(InputError, match=f"{row.source} cannot be loaded: no network"): load_public_decoder(name)
        source, said = asked[-1]
        assert source == row.source and row.licence in said
    n = len(asked)
    enc = SimpleNamespace(contract=dict(model="tiny-clip", stage="projected", layout="cls_patch"))
    for name in PUBLIC_DECODERS:
        with pytest.raises(InputError, match="the decoder reads tokens of model"): load_public_decoder(name, encoder=enc)
    assert len(asked) == n
    record_property("provoked", n)

def test_without_diffusers_the_module_is_imported_and_says_what_to_install(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"public decoders need diffusers: pip install 'blip3o_nb\[peers\]'"):
        load_public_decoder("rae-dinov2-base")

def test_every_class_that_is_named_is_in_this_diffusers():
    for row in PUBLIC_DECODERS.values(): assert all(hasattr(diffusers, n) for n in row.bridge.needs)
    assert set(CLASSES.values()) <= {row.bridge for row in PUBLIC_DECODERS.values()}
