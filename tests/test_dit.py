"""The transformer at the sizes of real features: presets start as they should, layouts and widths go through."""
import json, subprocess, sys
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file
from blip3o_nb.core import seed_everything
from blip3o_nb.network.attention import grid_positions
from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig, PRESETS, load_network
from blip3o_nb.network.nextdit import NextDiT, NextDiTConfig
from blip3o_nb.flow.samplers import sample

FEW = dict(num_tokens=5, target_size=16, cond_size=24) # the preset's own network, few and narrow tokens

SLOW = ("base", "large", "nextdit")

@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PRESETS])
def test_no_parameter_is_dead_after_three_steps(name):
    seed_everything(0)
    dtype = torch.bfloat16 if name == "nextdit" else torch.float32 # two billion parameters: 8 GB, not 16
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

def random_net(**sizes):
    "A small network in which nothing is zero"
    seed_everything(0)
    small = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    net = BLIP3oDiT(BLIP3oDiTConfig(**{**small, **sizes}))
    for p in net.parameters(): torch.nn.init.normal_(p, std=.05)
    return net

WIDTHS = [(768, 768), (1024, 4096), (768, 1280), (1024, 1792), (1280, 1024)] # of CLIP and of EVA-CLIP towers

def go_through(net, folder):
    "Forward, backward, save, load, and all of it in bfloat16"
    c = net.config
    xt, cond = torch.randn(2, c.num_tokens, c.target_size), torch.randn(2, c.cond_tokens, c.cond_size)
    args = xt, torch.rand(2), cond
    out = net(*args)
    assert out.shape == args[0].shape and out.isfinite().all()
    out.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    net.save_pretrained(folder)
    with torch.no_grad():
        again = load_network(folder)
        assert again.config == c and torch.equal(again(*args), out)
        half = net.bfloat16()(*[a.bfloat16() for a in args]).float()
    assert (half - out).norm() < .05*out.norm()

@pytest.mark.parametrize("tokens", (64, 256, 257))
@pytest.mark.parametrize("direction", ("forth", "back", "itself"))
def test_forward_backward_save_load(direction, tokens, tmp_path):
    for clip, eva in WIDTHS:
        target, cond = dict(forth=(clip, eva), back=(eva, clip), itself=(eva, eva))[direction]
        go_through(random_net(num_tokens=tokens, target_size=target, cond_size=cond), tmp_path)

REGISTERS = dict(n=261, front=5, width=384) # 16x16 patches behind CLS and four registers
PATCHES = dict(n=196, front=0, width=48)
TEXT = dict(n=77, front=None, width=96)

@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("target, cond", [(REGISTERS, PATCHES), (PATCHES, REGISTERS), (REGISTERS, REGISTERS),
                                          (REGISTERS, TEXT), (TEXT, REGISTERS), (TEXT, TEXT)])
def test_layouts(target, cond, axes, tmp_path):
    net = random_net(num_tokens=target["n"], prefix_tokens=target["front"], target_size=target["width"],
                     cond_tokens=cond["n"], cond_prefix_tokens=cond["front"], cond_size=cond["width"],
                     rope_axes=axes)
    c = net.config
    assert c.fusion == (target is cond is REGISTERS)
    for layout in (c.layout, c.cond_layout):
        assert len(grid_positions(layout, c.layout, kinds=axes == 3).unique(dim=0)) == layout.num_tokens
    go_through(net, tmp_path)

def test_a_text_of_a_square_number_of_tokens_is_no_grid():
    def rope(n, **front):
        return random_net(num_tokens=16, target_size=8, cond_tokens=n, cond_size=8, **front).cond_rope[:, :64]
    assert torch.equal(rope(64, cond_prefix_tokens=64), rope(77))
    assert not torch.equal(rope(64), rope(77))

NETS = {"BLIP3oDiT": dict(num_tokens=17, cond_tokens=12), "fused": dict(num_tokens=16),
        "NextDiT": dict(num_tokens=16, num_key_value_heads=2, intermediate_size=64)}

@pytest.mark.parametrize("name", NETS)
def test_padding_has_no_effect(name):
    sizes = dict(target_size=24, cond_size=40, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    if name == "NextDiT":
        seed_everything(0)
        net = NextDiT(NextDiTConfig(**sizes, **NETS[name]))
        for p in net.parameters(): torch.nn.init.normal_(p, std=.2)
    else: net = random_net(**sizes, **NETS[name], cond_dropout=.2)
    net.eval()
    n, m = net.config.num_tokens, net.config.cond_tokens or 12
    xt, t, cond = torch.randn(3, n, 24), torch.rand(3), torch.randn(3, m, 40)
    mask = torch.arange(m) < torch.tensor([[5], [m], [1]])
    with torch.no_grad():
        out = net(xt, t, cond, cond_mask=mask)
        for padding in (0., -30., float("inf"), float("nan")):
            other = cond.masked_fill(~mask[..., None], padding)
            assert torch.equal(net(xt, t, other, cond_mask=mask), out), padding
            assert torch.equal(net(xt, t, net.cond_cache(other, cond_mask=mask)), out), padding
        for i in range(3):
            alone = net(xt[i:i+1], t[i:i+1], cond[i:i+1], cond_mask=mask[i:i+1])
            torch.testing.assert_close(alone, out[i:i+1], atol=1e-5, rtol=1e-5)
        assert (net(xt, t, cond) - out)[0].abs().max() > 1e-3 # it is the mask that does it
        torch.testing.assert_close(net(xt, t, cond, cond_mask=torch.ones_like(mask)), net(xt, t, cond))

OLD = Path(__file__).with_name("old")/"checkpoint_1"

def test_a_checkpoint_with_the_names_of_earlier_versions(tmp_path):
    earlier = {"task", "clip_embedding_size", "eva_embedding_size"}
    assert earlier <= set(json.loads((OLD/"config.json").read_text()))
    net = load_network(OLD)
    assert (net.config.target_size, net.config.cond_size) == (6, 8)
    was, now = load_file(OLD/"model.safetensors"), net.state_dict()
    assert set(was) == set(now) and all(torch.equal(was[k], now[k]) for k in was)
    net.save_pretrained(tmp_path)
    assert not earlier & set(json.loads((tmp_path/"config.json").read_text()))
    args = torch.randn(2, 5, 6), torch.rand(2), torch.randn(2, 5, 8)
    assert torch.equal(load_network(tmp_path)(*args), net(*args))

def test_names_of_earlier_work():
    widths = dict(clip_embedding_size=24, eva_embedding_size=40)
    for earlier, sizes in [(widths, (24, 40)), ({}, (1024, 4096)), (dict(task="eva_reproduction"), (4096, 1024)),
                           (dict(task="eva_reproduction", **widths), (40, 24)),
                           (dict(task="eva_denoising", eva_embedding_size=40), (40, 40)),
                           (dict(in_channels=24, model_dim=96, num_heads=4), (24, 4096))]:
        config = BLIP3oDiTConfig(**earlier)
        assert (config.target_size, config.cond_size) == sizes
        assert BLIP3oDiTConfig.from_dict(earlier) == config == BLIP3oDiTConfig.from_dict(config.to_dict())

@pytest.mark.parametrize("line", [f"from {m} import BLIP3oDiT" for m in ("blip3o_nb", "blip3o_nb.network.dit")])
def test_from_nextdit_is_there_without_an_import_of_nextdit(line):
    words = "from_nextdit({'lm_head.weight': torch.zeros(1)})"
    program = f"import torch\n{line}\ntry: BLIP3oDiT.{words}\nexcept ValueError as e: print(e)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "holds 0 Lumina-Next transformers" in out

def test_sampler_drives_nextdit():
    seed_everything(0)
    net = NextDiT(NextDiTConfig(target_size=24, cond_size=40, hidden_size=48, num_hidden_layers=2,
                                num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, num_tokens=16))
    cond, x0 = torch.randn(3, 9, 40), torch.randn(3, 16, 24)
    with torch.no_grad():
        x = x0
        for i in range(4): x = x + net(x, torch.full((3,), i/4), cond)/4
    assert torch.allclose(sample(net, cond, method="euler", steps=4, x0=x0), x, atol=1e-5)

def test_guidance_starts_from_the_learned_null():
    net = random_net(hidden_size=48, num_tokens=16, target_size=24, cond_size=40, prediction_type="velocity",
                     cond_dropout=.1).eval()
    cond, x0, t = torch.randn(3, 16, 40), torch.randn(3, 16, 24), torch.zeros(3)
    with torch.no_grad(): told, untold = net(x0, t, cond), net(x0, t, cond, torch.ones(3, dtype=torch.bool))
    assert not torch.allclose(told, untold)
    x1 = sample(net, cond, method="euler", steps=1, x0=x0, guidance_scale=3.)
    assert torch.allclose(x1, x0 + untold + 3*(told - untold), atol=1e-5)
