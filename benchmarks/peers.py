"""The networks that a step and a sample are measured beside, each called as `model(xt, t, cond)` with tokens `[B, N, D]`.

`Lineage` is written here after the descriptions of the earlier public attempts at this map, as far as they decide how fast it is; it is no copy of their
code. `Lumina` is diffusers' `LuminaNextDiT2DModel`, which BLIP3-o's own decoder is."""
import torch, torch.nn as nn, torch.nn.functional as F
from blip3o_nb.network.dit import time_embedding

def norm(x, gain): # as it is written where no fused kernel is used
    y = x.float()
    return (y*torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)*gain

def angles(n, dim):
    "Cosines and sines of a three-axis rotary embedding `[n, dim/2]`: kind, row, column"
    side = round(n**.5); i = torch.arange(n)
    axes, each = [torch.zeros(n), i//side, i % side], [dim//2 - 2*(dim//6), dim//6, dim//6]
    a = torch.cat([p[:, None]*10000.**(-torch.arange(k)/max(k, 1)) for p, k in zip(axes, each)], 1)
    return a.cos(), a.sin()

def turn(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a*cos - b*sin, a*sin + b*cos], -1)

class LineageAttention(nn.Module):
    "Grouped heads copied to full number, the weights of attention formed and kept"
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.d = heads, kv_heads, dim//heads
        self.q, self.k, self.v, self.o = [nn.Linear(dim, n*self.d, bias=False) for n in (heads, kv_heads, kv_heads, heads)]
    def forward(self, x, y, rope=None):
        q, k, v = [f(z).unflatten(-1, (n, self.d)).transpose(1, 2) for f, z, n in ((self.q, x, self.heads), (self.k, y, self.kv_heads), (self.v, y, self.kv_heads))]
        if rope is not None: q, k = turn(q, *rope), turn(k, *rope)
        k, v = [z.repeat_interleave(self.heads//self.kv_heads, 1) for z in (k, v)]
        w = (q @ k.transpose(-1, -2)*self.d**-.5).softmax(-1) # [B, heads, N, M]
        return self.o((w @ v).transpose(1, 2).flatten(2))

class LineageBlock(nn.Module):
    "Norms before and behind each branch, modulation from the time, a projection of the conditioning of its own"
    def __init__(self, dim, heads, kv_heads, cond):
        super().__init__()
        self.attn, self.cross, self.cond = LineageAttention(dim, heads, kv_heads), LineageAttention(dim, heads, kv_heads), nn.Linear(cond, dim)
        self.w1, self.w2, self.w3 = nn.Linear(dim, 4*dim, bias=False), nn.Linear(dim, 4*dim, bias=False), nn.Linear(4*dim, dim, bias=False)
        self.ada, self.gains = nn.Linear(dim, 9*dim), nn.ParameterList(torch.ones(dim) for _ in range(6))
    def forward(self, x, temb, rope, cond):
        mods, y = self.ada(F.silu(temb))[:, None].chunk(9, -1), self.cond(cond)
        for i, f in enumerate((lambda z: self.attn(z, z, rope), lambda z: self.cross(z, y), lambda z: self.w3(F.silu(self.w1(z))*self.w2(z)))):
            shift, scale, gate = mods[3*i:3*i+3]
            x = x + gate*norm(f(norm(x, self.gains[2*i])*(1 + scale) + shift), self.gains[2*i+1])
        return x

class Lineage(nn.Module):
    "The design of the earlier attempts: the conditioning projected in every block, explicit attention, nothing kept between evaluations"
    def __init__(self, dim, layers, heads, kv_heads, target=1024, cond=4096, tokens=256):
        super().__init__()
        self.tokens, self.d = tokens, dim//heads
        self.inp, self.out = nn.Linear(target, dim), nn.Linear(dim, target)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(LineageBlock(dim, heads, kv_heads, cond) for _ in range(layers))
        self.gain = nn.Parameter(torch.ones(dim))
    def forward(self, xt, t, cond):
        x, temb, rope = self.inp(xt), self.time(time_embedding(t)), [a.to(xt.device) for a in angles(self.tokens, self.d)]
        for b in self.blocks: x = b(x, temb, rope, cond)
        return self.out(norm(x, self.gain))

@torch.no_grad()
def midpoint(model, cond, x, steps=50):
    "The attempts' sampler, with time in the right direction: two evaluations for each step"
    h = 1/steps
    for i in range(steps):
        t = torch.full((len(x),), i*h, device=x.device)
        x = x + h*model(x + h/2*model(x, t, cond), t + h/2, cond)
    return x

class Lumina(nn.Module):
    "diffusers' `LuminaNextDiT2DModel` at those sizes: a token is a pixel of a square picture, its angles computed once"
    def __init__(self, dim, layers, heads, kv_heads, target=1024, cond=4096, tokens=256):
        super().__init__()
        from diffusers import LuminaNextDiT2DModel
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
        self.side = round(tokens**.5)
        self.net = LuminaNextDiT2DModel(sample_size=self.side, patch_size=1, in_channels=target, hidden_size=dim, num_layers=layers, num_attention_heads=heads, num_kv_heads=kv_heads,
                                        cross_attention_dim=cond, learn_sigma=False)
        self.angles = get_2d_rotary_pos_embed_lumina(dim//heads, 384, 384)
    def forward(self, xt, t, cond):
        picture = xt.mT.unflatten(-1, (self.side, self.side))
        if self.angles.device != xt.device: self.angles = self.angles.to(xt.device)
        mask = torch.ones(cond.shape[:2], device=cond.device)
        return self.net(picture, t, cond, mask, self.angles, cross_attention_kwargs={}).sample.flatten(2).mT
