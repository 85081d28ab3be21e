"""The transformer at the sizes of real features: each preset starts as it should, each direction, width and token count goes through."""
import itertools
import pytest
import torch
from blip3o_nb.core import seed_everything
from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig, PRESETS
from blip3o_nb.network.nextdit import NextDiT, NextDiTConfig
from blip3o_nb.flow.samplers import sample

FEW = dict(num_tokens=5, clip_embedding_size=16, eva_embedding_size=24) # the preset's own network, few and narrow tokens

@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ("base", "large", "nextdit") else n for n in PRESETS])
def test_no_parameter_is_dead_after_three_steps(name):
    seed_everything(0)
    dtype = torch.bfloat16 if name == "nextdit" else torch.float32 # two billion parameters and their gradients: 8 GB, not 16
    net = BLIP3oDiT(BLIP3oDiTConfig.from_preset(name, **FEW)).to(dtype)
    x1, cond, t = torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 5, 24, dtype=dtype), torch.rand(2)
    first = net(x1, t, cond)
    assert torch.equal(first, torch.zeros_like(first))
    for _ in range(3):
        net.zero_grad()
        (net(torch.randn_like(x1), t, cond) - x1).square().mean().backward()
        dead = [n for n, p in net.named_parameters() if not p.grad.any()]
        with torch.no_grad():
            for p in net.parameters(): p.sub_(p.grad.sign_(), alpha=1e-4)
    assert dead == []

DIRECTIONS = {"clip_generation": ("eva", "clip"), "eva_reproduction": ("clip", "eva"), "eva_denoising": ("eva", "eva")}
WIDTHS = [(768, 768), (1024, 4096), (768, 1280), (1024, 1792), (1280, 1024)] # of CLIP and of EVA-CLIP towers

@pytest.mark.parametrize("task, tokens", list(itertools.product(DIRECTIONS, (64, 256, 257))))
def test_forward_backward_save_load(task, tokens, tmp_path):
    for clip, eva in WIDTHS:
        seed_everything(0)
        net = BLIP3oDiT(BLIP3oDiTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_tokens=tokens, clip_embedding_size=clip,
                                        eva_embedding_size=eva, task=task))
        for p in net.parameters(): torch.nn.init.normal_(p, std=.05)
        c, d = ({"clip": clip, "eva": eva}[k] for k in DIRECTIONS[task])
        assert (net.config.cond_size, net.config.target_size) == (c, d)
        args = torch.randn(2, tokens, d), torch.rand(2), torch.randn(2, tokens, c)
        out = net(*args)
        assert out.shape == (2, tokens, d) and out.isfinite().all()
        out.square().mean().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
        net.save_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(BLIP3oDiT.from_pretrained(tmp_path)(*args), out)
            half = net.bfloat16()(*[a.bfloat16() for a in args]).float()
        assert (half - out).norm() < .05*out.norm()

def test_sampler_drives_nextdit():
    seed_everything(0)
    net = NextDiT(NextDiTConfig(target_size=24, cond_size=40, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                intermediate_size=64, num_tokens=16))
    cond, x0 = torch.randn(3, 9, 40), torch.randn(3, 16, 24)
    with torch.no_grad():
        x = x0
        for i in range(4): x = x + net(x, torch.full((3,), i/4), cond)/4
    assert torch.allclose(sample(net, cond, method="euler", steps=4, x0=x0), x, atol=1e-5)

def test_guidance_starts_from_the_learned_null():
    seed_everything(0)
    net = BLIP3oDiT(BLIP3oDiTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_tokens=16, clip_embedding_size=24, eva_embedding_size=40,
                                    prediction_type="velocity", cond_dropout=.1)).eval()
    for p in net.parameters(): torch.nn.init.normal_(p, std=.05)
    cond, x0, t = torch.randn(3, 16, 40), torch.randn(3, 16, 24), torch.zeros(3)
    with torch.no_grad(): told, untold = net(x0, t, cond), net(x0, t, cond, torch.ones(3, dtype=torch.bool))
    assert not torch.allclose(told, untold)
    x1 = sample(net, cond, method="euler", steps=1, x0=x0, guidance_scale=3.)
    assert torch.allclose(x1, x0 + untold + 3*(told - untold), atol=1e-5)
