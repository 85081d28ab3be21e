"""Paths, conversions and samplers against independent implementations: diffusers' scheduler, and facebookresearch/flow_matching where it is installed."""
import math
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from blip3o_nb.flow.samplers import CONVENTIONS, DIFFUSERS, FLOW_MATCHING, SOLVERS, runge_kutta, sample
from blip3o_nb.files import InputError
from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
from blip3o_nb.network.nextdit import NextDiT, NextDiTConfig
from blip3o_nb.flow.paths import (LinearPath, MixtureModel, PREDICTION_TYPES, SlerpPath, SphereModel,
                                  on_sphere, shift_times)
F64 = torch.float64
def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, dtype=F64): return torch.randn(*shape, generator=gen(seed), dtype=dtype)
def apart(a, b): return (a - b).abs().max().item()

@pytest.fixture(scope="module")
def flow_matching():
    "pip install flow_matching; CC BY-NC 4.0, so it is no dependency of this package"
    pytest.importorskip("flow_matching", reason="optional: pip install flow_matching (CC BY-NC 4.0, non-commercial, so not among the dependencies)")
    from types import SimpleNamespace
    from flow_matching.path import AffineProbPath, CondOTProbPath, GeodesicProbPath
    from flow_matching.path.scheduler import CondOTScheduler
    from flow_matching.solver import ODESolver, RiemannianODESolver
    from flow_matching.utils import ModelWrapper
    from flow_matching.utils.manifolds import Sphere
    return SimpleNamespace(**{k: v for k, v in locals().items() if k[0].isupper()})

def mixture(prediction_type="velocity"): return MixtureModel(randn(5, 3, seed=1), .4, prediction_type)
def von_mises_fisher(prediction_type="velocity"):
    mu = on_sphere(torch.tensor([.3, -.5, .8], dtype=F64))
    return SphereModel(lambda x: 6*(x @ mu - 1), n=16, prediction_type=prediction_type)

def small_net(prediction_type="velocity"):
    torch.manual_seed(0)
    net = BLIP3oDiT(BLIP3oDiTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_tokens=16, clip_embedding_size=24,
                                    eva_embedding_size=40, prediction_type=prediction_type)).eval().double()
    for p in net.parameters(): torch.nn.init.normal_(p, std=.05)
    return net

# ---- diffusers

def scheduler(steps, shift=1., default=False, **kw):
    s = FlowMatchEulerDiscreteScheduler(shift=shift, **kw)
    s.set_timesteps(steps) if default else s.set_timesteps(sigmas=torch.linspace(1, 1/steps, steps, dtype=F64).tolist())
    return s

@torch.no_grad()
def drive(s, model, x, *cond, **kw):
    for tau in s.timesteps: x = s.step(model(x, tau, *cond), tau, x, return_dict=False, **kw)[0]
    return x

def grid(s): return 1 - s.sigmas.double()

@pytest.mark.parametrize("shift, default", [(1., False), (3., False), (.3, False), (1., True), (3., True)])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_scheduler_drives_a_mixture(kind, shift, default):
    x0, model, s = randn(200, 3), mixture(kind), scheduler(12, shift, default)
    theirs, ours = drive(s, DIFFUSERS.their_model(model), x0), sample(model, x0=x0, method="euler", times=grid(s))
    assert apart(theirs, ours) < 3e-6 # it rounds the state to float32 before each step

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_scheduler_step_agrees_to_the_last_digits(kind):
    model, s = mixture(kind), scheduler(8) # eighths and 125ths are exact in float32; so is the state below
    f, x = DIFFUSERS.their_model(model), randn(200, 3, dtype=torch.float32).double()
    for i, tau in enumerate(s.timesteps):
        nxt = s.step(f(x, tau), tau, x, return_dict=False)[0]
        assert apart(nxt, sample(model, x0=x, method="euler", times=[i/8, (i+1)/8])) < 1e-14
        x = nxt.float().double()

@pytest.mark.parametrize("shift", [1., 3.])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_scheduler_drives_a_transformer(kind, shift):
    net, cond, x0 = small_net(kind), randn(2, 16, 40), randn(2, 16, 24, seed=1)
    s = scheduler(8, shift)
    ours = sample(net, cond, x0=x0, method="euler", times=grid(s))
    assert apart(drive(s, DIFFUSERS.their_model(net), x0, cond), ours) < 1e-5*ours.abs().max()
    s = scheduler(8, shift)
    assert apart(drive(s, DIFFUSERS.their_model(net), x0, net.cond_cache(cond)), ours) < 1e-5*ours.abs().max() # conditioning prepared once

@pytest.mark.parametrize("shift", [.5, 1., 2., 6.])
def test_shift_is_shift_times(shift):
    assert apart(grid(scheduler(50, shift)), shift_times(torch.linspace(0, 1, 51, dtype=F64), shift)) < 2e-7

def test_their_network_in_our_sampler():
    "A network with diffusers' call, answer and output object, and the sampler of `sample`"
    net = mixture()
    class Theirs:
        def __call__(self, hidden_states, timestep, encoder_hidden_states=None, return_dict=True):
            v = -net(hidden_states, 1 - timestep/1000, encoder_hidden_states)
            return Transformer2DModelOutput(sample=v) if return_dict else (v,)
    x0, which = randn(50, 3), torch.arange(50) % 5
    for method in SOLVERS:
        kw = dict(x0=x0, method=method, steps=6)
        assert apart(sample(DIFFUSERS.our_model(Theirs()), which, **kw), sample(net, which, **kw)) < 1e-11
    by_name = lambda x, timestep, cond: Theirs()(x, timestep, encoder_hidden_states=cond, return_dict=False)
    kw = dict(x0=x0, method="heun", guidance_scale=2., steps=6)
    null = (which + 1) % 5 # anything but the conditioning
    assert apart(sample(DIFFUSERS.our_model(by_name), which, null=null, **kw), sample(net, which, null=null, **kw)) < 1e-11

def test_nextdit_of_blip3o_has_the_convention_built_in():
    torch.manual_seed(0)
    c = dict(target_size=24, cond_size=40, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, num_tokens=16)
    blip3o, lumina = NextDiT(NextDiTConfig(**c, time="blip3o")).eval(), NextDiT(NextDiTConfig(**c, time="lumina")).eval()
    for p in blip3o.parameters(): torch.nn.init.normal_(p, std=.1)
    lumina.load_state_dict(blip3o.state_dict())
    x, t, cond = randn(3, 16, 24, dtype=torch.float32), torch.tensor([0., .4, 1.]), randn(3, 9, 40, dtype=torch.float32)
    with torch.no_grad(): # the network without its convention takes what diffusers' scheduler gives it
        assert apart(DIFFUSERS.our_model(lumina)(x, t, cond), blip3o(x, t, cond)) < 1e-6

# ---- adapters

@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("dtype, tol", [(F64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, .1)])
def test_round_trip(name, dtype, tol):
    c, net = CONVENTIONS[name], lambda x, t, cond: mixture()(x.double(), t.double(), cond).to(x.dtype)
    x, t, which = randn(100, 3).to(dtype), torch.rand(100, generator=gen(2), dtype=torch.promote_types(dtype, torch.float32)), torch.arange(100) % 5
    there = c.our_model(c.their_model(net))
    assert there(x, t, which).dtype == dtype and apart(there(x, t, which), net(x, t, which)) < tol
    twice = c.their_model(c.our_model(c.their_model(net)))
    assert apart(twice(x, c.their_time(t), which), c.their_model(net)(x, c.their_time(t), which)) < tol

@pytest.mark.parametrize("name", CONVENTIONS)
def test_time_as_number_scalar_or_batch(name):
    c, x = CONVENTIONS[name], randn(4, 3)
    f, s = c.their_model(mixture()), c.their_time(.25)
    for time in (s, torch.tensor(s), torch.tensor([s], dtype=F64), torch.full((4,), s, dtype=F64)):
        assert apart(f(x, time), c.velocity(mixture()(x, torch.full((4,), .25, dtype=F64)))) < 1e-12

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", CONVENTIONS)
def test_ends_of_time_give_finite_velocities(name, kind):
    c, x = CONVENTIONS[name], randn(4, 3)
    for t in (-.3, 0., 1e-7, 1-1e-7, 1., 1.3): # adaptive solvers look past the end
        assert c.their_model(mixture(kind))(x, c.their_time(t)).isfinite().all()

def test_time_in_another_unit_is_refused():
    for name in ("rae", "flow_matching"):
        with pytest.raises(InputError, match="out of range"): CONVENTIONS[name].their_model(mixture())(randn(2, 3), 1000.)

# ---- facebookresearch/flow_matching

def test_linear_path_is_conditional_ot(flow_matching):
    x0, x1, t = randn(64, 5, 7), randn(64, 5, 7, seed=1), torch.rand(64, generator=gen(2), dtype=F64)
    ours = LinearPath().sample(x0, x1, t)
    for path in (flow_matching.CondOTProbPath(), flow_matching.AffineProbPath(flow_matching.CondOTScheduler())):
        theirs = path.sample(x_0=x0, x_1=x1, t=t)
        assert apart(ours.xt, theirs.x_t) < 1e-14 and apart(ours.v, theirs.dx_t) < 1e-14

def test_conversions_are_those_of_the_affine_path(flow_matching):
    t = torch.linspace(.06, .94, 64, dtype=F64)[:, None] # ours clamp a divisor below 0.05
    out, xt, path = randn(64, 7), randn(64, 7, seed=1), flow_matching.CondOTProbPath()
    name = dict(velocity="velocity", epsilon="epsilon", sample="target")
    for frm in PREDICTION_TYPES:
        for to in PREDICTION_TYPES:
            if frm == to: continue
            theirs = getattr(path, f"{name[frm]}_to_{name[to]}")(out, xt, t) # any answer, true or not
            assert apart(getattr(LinearPath(), f"{to}_from")(frm, out, xt, t[:, 0]), theirs) < 1e-12

def test_slerp_path_is_the_geodesic_of_the_sphere(flow_matching):
    path = flow_matching.GeodesicProbPath(flow_matching.CondOTScheduler(), flow_matching.Sphere())
    for d in (3, 64, 1024):
        x0, x1 = (on_sphere(randn(40, d, seed=s)) for s in (0, 1))
        t = torch.cat([torch.rand(38, generator=gen(2), dtype=F64), torch.tensor([0., 1.], dtype=F64)])
        ours, theirs = SlerpPath().sample(x0, x1, t), path.sample(x_0=x0, x_1=x1, t=t)
        assert apart(ours.xt, theirs.x_t) < 1e-14 and apart(ours.v, theirs.dx_t) < 1e-13, d

# what torchdiffeq calls rk4
THREE_EIGHTHS = runge_kutta((0, 1/3, 2/3, 1), ((), (1/3,), (-1/3, 1), (1, -1, 1)), (1/8, 3/8, 3/8, 1/8), order=4)

@pytest.mark.parametrize("ours, theirs", [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2"), ("three_eighths", "rk4")])
def test_samplers_are_those_of_the_solver(flow_matching, monkeypatch, ours, theirs):
    monkeypatch.setitem(SOLVERS, "three_eighths", THREE_EIGHTHS)
    solver = flow_matching.ODESolver(flow_matching.ModelWrapper(FLOW_MATCHING.their_model(mixture())))
    x0, which, end = randn(100, 3), torch.arange(100) % 5, .75 if ours == "heun" else 1. # ours takes another rule for a last step to t=1
    for cond in (None, which):
        a = sample(mixture(), cond, x0=x0, method=ours, times=torch.arange(0, end+.01, 1/8))
        b = solver.sample(x_init=x0, step_size=1/8, method=theirs, time_grid=torch.tensor([0., end], dtype=F64), cond=cond)
        assert apart(a, b) < 1e-13
        back = solver.sample(x_init=b, step_size=1/8, method=theirs, time_grid=torch.tensor([end, 0.], dtype=F64), cond=cond)
        assert ours != "euler" or apart(sample(mixture(), cond, x0=b, method=ours, times=torch.arange(end, -.01, -1/8)), back) < 1e-13

def solve(flow_matching, x0, steps, method="rk4", model=None):
    solver = flow_matching.ODESolver(FLOW_MATCHING.their_model(model or mixture()))
    return solver.sample(x_init=x0, step_size=1/steps, method=method, time_grid=torch.tensor([0., 1.], dtype=F64))

def test_rk4_meets_theirs_at_fourth_order(flow_matching):
    "Two rules of order four, and of order three for our last step: their difference falls sixteen-fold when the step is halved"
    x0 = randn(100, 3)
    d = {n: apart(sample(mixture(), x0=x0, method="rk4", steps=n), solve(flow_matching, x0, n)) for n in (32, 64)}
    assert d[64] < 1e-5 and 3.5 < math.log2(d[32]/d[64]) < 4.5, d

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_adaptive_solver_of_theirs_takes_every_prediction_type(flow_matching, kind):
    x0, solver = randn(50, 3), flow_matching.ODESolver(FLOW_MATCHING.their_model(mixture(kind)))
    for ends, tol in (((.1, .9), 1e-5), ((0., 1.), 1e-3)): # it looks past the end, where data prediction says nothing about velocity
        x1 = solver.sample(x_init=x0, step_size=None, method="dopri5", atol=1e-7, rtol=1e-7, time_grid=torch.tensor(ends, dtype=F64))
        assert apart(x1, sample(mixture(), x0=x0, method="rk4", times=torch.linspace(*ends, 65, dtype=F64))) < tol

@pytest.mark.parametrize("path", [SlerpPath("project"), SlerpPath()])
@pytest.mark.parametrize("kind", ["velocity", "sample"])
def test_sphere_samplers_meet_the_riemannian_solver(flow_matching, path, kind):
    "Euler with projection is the same rule; the others share its order, for theirs does not pull velocities back to the start of a step"
    model, x0 = von_mises_fisher(kind), on_sphere(randn(20, 3))
    wrapped = flow_matching.ModelWrapper(FLOW_MATCHING.their_model(model, path))
    solver = flow_matching.RiemannianODESolver(flow_matching.Sphere(), wrapped)
    theirs = lambda m, n: solver.sample(x_init=x0, step_size=1/n, method=m, time_grid=torch.tensor([0., 1.], dtype=F64))
    ours = lambda m, n: sample(model, path=path, x0=x0, method=m, steps=n)
    if path.retraction == "project": assert apart(ours("euler", 16), theirs("euler", 16)) < 1e-13
    if kind == "sample": return # rk4 of theirs looks at t = 1, where that answer says nothing
    for m, order in (("midpoint", 2), ("rk4", 4)):
        d = {n: apart(ours(m, n), theirs(m, n)) for n in (8, 16)}
        assert d[16] < 2e-2 and math.log2(d[8]/d[16]) > order - .6, (m, d)
