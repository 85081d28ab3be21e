"""What holds for every input, tried on inputs that hypothesis makes up: 20 a property and always the same in the short form, up to 1000 or two minutes in the full one."""
import contextlib, io, json, math, pickle, random, sys, tempfile, time, warnings
from dataclasses import fields
from functools import wraps
from pathlib import Path
import pytest
import torch, torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st
from blip3o_nb.commands import cli
from blip3o_nb.judging import metrics
from blip3o_nb.commands.command import fold
from blip3o_nb.earlier.pickles import convert
from blip3o_nb.files import InputError
from blip3o_nb.core import layout_of, to_layout
from blip3o_nb.network.dit import BLIP3oDiTConfig
from blip3o_nb.network.nextdit import NextDiTConfig
from blip3o_nb.options import RECIPES, TrainingConfig, config_text, make_config, read_config, value_type
from blip3o_nb.features.shards import DTYPES, FeatureDataset, ShardWriter
from blip3o_nb.runs.runs import check_config

def prop(*examples, **strategies):
    "A test of a property: its arguments are drawn from the strategies, and `examples` are tried first"
    def wrap(f):
        def test(times, record_property):
            n, end = 0, time.time() + 120
            def run(**kw):
                nonlocal n
                if time.time() > end: return
                n += 1
                with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=SHM) as d:
                    warnings.simplefilter("ignore")
                    f(**kw, **({"folder": Path(d)} if "folder" in f.__code__.co_varnames else {}))
            run = given(**strategies)(run)
            for e in examples: run = example(**e)(run)
            settings(max_examples=times(20, 1000), derandomize=times(True, False), deadline=None, database=None, suppress_health_check=list(HealthCheck))(run)()
            record_property("provoked", n)
        return wraps_name(f, test)
    return wrap

SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None # where nothing waits for a disk
def wraps_name(f, test): test.__name__, test.__doc__, test.__module__ = f.__name__, f.__doc__, f.__module__; return test
def fault(what, where, outcome): return pytest.mark.fault(what, where, outcome)

# --- strategies --------------------------------------------------------------------------------------------------------------------------------------
texts = st.text(max_size=12) | st.sampled_from(["", "\0", "\x1b[2J", "\r\n", "\u202egnp.exe", "../../x", "a~1", "a~2", "</script>", "\U0001f408", "e\u0301", "\x7f", "=1+1"])
halves = st.sampled_from(["\ud800", "a\udfff", "\udce9.png"])

@st.composite
def samples(draw, most=9):
    "Keys, captions and tokens of some pictures, in any layout"
    keys = draw(st.lists(texts, unique=True, min_size=1, max_size=most))
    n, grid, cls, scale, g = len(keys), draw(st.integers(1, 3)), draw(st.booleans()), 10.**draw(st.integers(-3, 3)), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = {name: scale*torch.randn(n, grid*grid + cls, draw(st.integers(1, 5)), generator=g) for name in ("clip", "eva")}
    return dict(keys=keys, captions=draw(st.lists(texts, min_size=n, max_size=n)), **x)

def write(folder, s, dtype, shard_size, cuts):
    "In batches that end at `cuts`, each by a writer of its own half of the time"
    ends = sorted({c % len(s["keys"]) for c in cuts} - {0}) + [len(s["keys"])]
    for a, b in zip([0, *ends], ends):
        with ShardWriter(folder, {"clip": {"model": "a"}, "eva": {"model": "b"}}, dtype, shard_size) as w: w.add_batch(s["keys"][a:b], {"clip": s["clip"][a:b], "eva": s["eva"][a:b]}, s["captions"][a:b], ["h"]*(b - a))
    return folder

def close(a, b, dtype):
    if dtype == "int8": return ((a - b).abs() <= b.abs().amax(-1, keepdim=True)/127*.5001 + 1e-30).all()
    return torch.allclose(a, b, rtol=dict(fp32=0, fp16=2**-10, bf16=2**-7)[dtype], atol=1e-7*(dtype == "fp16"))

# --- shards and conversions ---------------------------------------------------------------------------------------------------------------------------
@fault("keys and captions of any Unicode, in any order, dtype and shard size", "shards", "what is written is read back, within the rounding of the dtype")
@prop(s=samples(), dtype=st.sampled_from([*DTYPES]), shard_size=st.integers(1, 11), cuts=st.lists(st.integers(0, 20), max_size=1), seed=st.integers(0, 99))
def test_what_is_written_is_read(s, dtype, shard_size, cuts, seed, folder):
    random.Random(seed).shuffle(order := list(range(len(s["keys"]))))
    s = {k: [v[i] for i in order] if isinstance(v, list) else v[order] for k, v in s.items()}
    ds = FeatureDataset(write(folder/"s", s, dtype, shard_size, cuts))
    assert (ds.keys, ds.captions, ds.image_hashes, ds.verify() >= 1) == (s["keys"], s["captions"], ["h"]*len(order), True)
    assert all(close(ds.column(n), s[n], dtype) for n in ("clip", "eva"))
    i = seed % len(order)
    assert torch.equal(ds[ds.keys[i]]["eva"], ds.column("eva")[i])
    sides = [FeatureDataset(folder/"s", side).keys for side in ("train", "held_out")]
    assert sorted(sides[0] + sides[1]) == sorted(ds.keys)
    files = {p.name.split("-")[0].split(".")[0] for p in folder.rglob("*.*")}
    assert files <= {"shard", "part", "manifest"} and {p.name for p in (folder/"s").iterdir() if p.is_dir()} == {"clip", "eva", "samples"}

@fault("keys and captions with half a character", "shards", "refused in one line")
@prop(half=halves, caption=st.booleans())
def test_half_a_character_is_refused(half, caption, folder):
    with ShardWriter(folder/"s", {"clip": {}, "eva": {}}) as w:
        with pytest.raises(InputError, match="no text that can be stored"): w.add("a" if caption else half, half if caption else "", clip=torch.ones(1, 1), eva=torch.ones(1, 1))
        w.add("b", clip=torch.ones(1, 1), eva=torch.ones(1, 1))
    assert FeatureDataset(folder/"s").keys == ["b"]

@fault("keys and captions of any Unicode, in any layout, type and size of file", "conversion", "shards to pickles to shards is the same set")
@prop(s=samples(), dtype=st.sampled_from(["fp32", "fp16", "bf16"]), sizes=st.tuples(*[st.integers(1, 9)]*3))
def test_to_pickles_and_back(s, dtype, sizes, folder):
    a = FeatureDataset(write(folder/"a", s, dtype, sizes[0], []))
    convert(folder/"a", folder/"p", to="pickles", dtype=dtype, shard_size=sizes[1])
    convert(folder/"p", folder/"b", dtype=dtype, shard_size=sizes[2])
    b = FeatureDataset(folder/"b")
    assert (b.keys, b.captions, b.contract) == (a.keys, a.captions, a.contract) and all(torch.equal(a.column(n), b.column(n)) for n in ("clip", "eva"))
    assert {p.relative_to(folder).parts[0] for p in folder.rglob("*.*")} == {*"abp"}

# --- layouts ----------------------------------------------------------------------------------------------------------------------------------------------
@fault("any number of tokens, any name of a layout", "layouts", "a layout, or one line")
@prop(dict(n=4, layout="grid_²"), dict(n=4, layout="grid_" + "9"*5000), dict(n=4, layout="4"), n=st.integers(-5, 400), layout=st.sampled_from(["cls_patch", "patch_only"]) | texts | st.integers(-2, 200).map("grid_{}".format))
def test_layouts(n, layout):
    try: have = layout_of(n)
    except InputError: have = None
    assert (have is not None) == (n > 0) and (have is None or have.num_tokens == n)
    if have is None: return
    x = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    try: y = to_layout(x, layout)
    except InputError: return
    assert layout.startswith(("cls_patch", "patch_only", "grid_")) and layout_of(y.shape[1]).has_cls == (layout == "cls_patch") and len(y) == 2 and y.shape[2] == 3
    assert torch.allclose(y[:, layout == "cls_patch":].mean(1), x[:, have.has_cls:].mean(1)), "pooling keeps the mean of the patches"
    if layout.startswith("grid_"): assert torch.equal(to_layout(y, layout), y)

# --- configurations -----------------------------------------------------------------------------------------------------------------------------------------
anything = st.none() | st.booleans() | st.integers() | st.floats() | texts | halves | st.lists(st.integers(), max_size=2) | st.sampled_from([10**400, -1, 0, 2**63, 1e308, "x"*5000])
KINDS = {bool: st.booleans(), int: st.integers(-2**63 + 1, 2**63 - 1), float: st.floats(allow_nan=False), str: texts}
def values(annotation):
    "Any value of an option"
    kind, optional = value_type(annotation)
    return KINDS[kind] | st.none() if optional else KINDS[kind]
TRAINING = {f.name: values(f.type) for f in fields(TrainingConfig)} | {"recipe": st.sampled_from([None, "", *RECIPES])}
SIZES = dict(hidden_size=st.sampled_from([8, 16, 48, 64]), num_attention_heads=st.sampled_from([1, 2, 4]), num_key_value_heads=st.sampled_from([1, 2]), num_tokens=st.sampled_from([4, 5, 16, 257]))

def some(strategies): return st.lists(st.sampled_from([*strategies]), unique=True, max_size=6).flatmap(lambda ks: st.fixed_dictionaries({k: strategies[k] for k in ks}))

@fault("any values of the options", "configuration of a training", "the same after a TOML file")
@prop(given=some(TRAINING))
def test_training_config_through_toml(given, folder):
    try: config = make_config(**given)
    except InputError: assume(False)
    (folder/"c.toml").write_text(config_text(config), encoding="utf-8")
    assert make_config(**read_config(folder/"c.toml")) == config

@fault("impossible values of the options", "configuration of a training", "one line, and nothing else")
@prop(dict(given={"ema": 10**400}), dict(given={"seed": 10**400}), dict(given={"recipe": []}), given=some({k: anything for k in [*TRAINING, "\x1b[2J", "x"*600]}))
def test_training_config_of_anything(given):
    try: check_config(make_config(**given), Path("nowhere"))
    except InputError as e: assert str(e).isprintable() and len(str(e)) <= 600

@fault("impossible values of the options", "configuration of a network", "one line, or a configuration that is the same after JSON")
@prop(dict(kind=BLIP3oDiTConfig, given={"hidden_size": 2**30 + 2}), dict(kind=BLIP3oDiTConfig, given={"num_hidden_layers": 2.}), dict(kind=NextDiTConfig, given={"cond_tokens": 2**40}),
      kind=st.sampled_from([BLIP3oDiTConfig, NextDiTConfig]), given=some(SIZES).flatmap(lambda d: some({f.name: anything for f in [*fields(BLIP3oDiTConfig), *fields(NextDiTConfig)]}).map(lambda e: {**e, **d})))
def test_network_config_of_anything(kind, given):
    given = {k: v for k, v in given.items() if k in {f.name for f in fields(kind)}}
    try: c = kind.from_dict(given)
    except InputError as e: assert str(e).isprintable() and len(str(e)) <= 600; return
    assert kind.from_dict(json.loads(json.dumps(c.to_dict()))) == c

# --- command lines ---------------------------------------------------------------------------------------------------------------------------------------------
PROGRAMS = {n: f for n, f in vars(cli).items() if n.startswith("blip3o_")}
arguments = st.text(st.characters(exclude_characters="\0"), max_size=9) | st.sampled_from(["", "-", "--", "---", "--=", "--=x", "=", "-h", "--help", "set", "pickles", "pickles/a.pkl", "file", "nowhere", "/dev/null", "/proc/self/mem", "x"*5000,
    "0", "-1", "1", "1e999", "nan", str(10**30), "9"*5000, "--pdb", "\x1b[2J", "\u202e", "a\nb", "\udce9", "$(id)", "%s", "{}", "@file", "~", "~nobody", "*", "{1..3}", "{0", "datasets", "pipe:cat"])
NAMES = sorted({w for p in PROGRAMS.values() for w in p.__wrapped__.__annotations__} | {"output_dir", "batch_size", "num_tokens", "overfitting_test", "debug", "max_samples", "model_path", "lr", "fp16", "normalize_targets", "include_cls"})
options = st.builds(lambda n, dash, eq, v: f"--{n.replace('_', dash)}" + (f"={v}" if eq else ""), st.sampled_from(NAMES), st.sampled_from("_-"), st.booleans(), arguments)

@fault("any list of arguments", "command lines", "the list under the program's names, or one line")
@prop(argv=st.lists(arguments | options, max_size=8))
def test_fold_of_anything(argv):
    with contextlib.redirect_stderr(io.StringIO()):
        try: out = fold(argv, ["bs", "layout", "out"], {"batch_size": "bs", "include_cls": "layout=cls_patch", "output_dir": "out", "model_path": "", "layout=patches": "patch_only"}, {"debug": "x", "num_tokens=": "y"})
        except InputError as e: assert str(e).isprintable() and len(str(e)) <= 600; return
    assert all(isinstance(a, str) for a in out) and len(out) <= len(argv) and all(a in ("--", ) or a[2:].split("=")[0] in ("bs", "layout", "out", "help") for a in out if a.startswith("--"))

@pytest.fixture
def stubs(monkeypatch, tmp_path_factory):
    "A folder with a set, pickles and a file, and programs that stop where the work would begin"
    folder = tmp_path_factory.mktemp("cwd")
    s = dict(keys=[str(i) for i in range(9)], captions=["a"]*9, **{n: torch.randn(9, 5, 4) for n in ("clip", "eva")})
    write(folder/"set", s, "fp32", 4, []); convert(folder/"set", folder/"pickles", to="pickles"); (folder/"pickles"/"embeddings_shard_00000_cls_patch.pkl").rename(folder/"pickles"/"a.pkl")
    (folder/"file").write_text("no picture")
    def stop(*_, **__): raise InputError("the work would begin here")
    for where in ("features.encoders.load_encoder", "earlier.programs.list_tars", "runs.runs.model_of", "judging.evaluate.evaluate", "generation.pipeline.write_samples"): monkeypatch.setattr(f"blip3o_nb.{where}", stop)
    monkeypatch.chdir(folder)

def call(name, argv):
    "Exit code and what was printed, to both sides"
    before, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = [name, *argv]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): PROGRAMS[name]()
        return 0, out.getvalue(), err.getvalue()
    except SystemExit as e: return e.code or 0, out.getvalue(), err.getvalue()
    finally: sys.argv = before

@fault("any list of arguments", "the console programs", "exit code 0, 1 or 2, one line of at most 700 characters on stderr, no traceback")
@pytest.mark.usefixtures("stubs")
class TestPrograms:
    @staticmethod
    def holds(name, argv):
        code, out, err = call(name, argv)
        lines = [l for l in err.splitlines() if " is not needed: " not in l]
        assert code in (0, 1, 2) and (code == 0 or len(lines) == 1 and lines[0].startswith(f"{name}: ")), (code, err)
        assert all(l.isprintable() and len(l) < 700 for l in lines), err
    test_any_arguments = staticmethod(prop(
        dict(name="blip3o_eval", argv=["set", "--seed", str(10**30)]), dict(name="blip3o_train", argv=["--embeddings-dir", "x"*5000]), dict(name="blip3o_sample", argv=["a", "--texts", "/"]),
        dict(name="blip3o_convert", argv=["x"*5000, "y"]), dict(name="blip3o_convert", argv=["set", "file"]), dict(name="blip3o_convert", argv=["set", "\udce9"]), dict(name="blip3o_extract", argv=["--images", "x"*5000]),
        dict(name="blip3o_download", argv=["a/b", "--out", "file"]), dict(name="blip3o_eval", argv=["x"*5000]), dict(name="blip3o_train", argv=["--embeddings_dir", "set", "--output_dir", "\udce9"]),
        name=st.sampled_from([*PROGRAMS]), argv=st.lists(arguments | options, max_size=7))(lambda name, argv: TestPrograms.holds(name, argv)))

# --- metrics ---------------------------------------------------------------------------------------------------------------------------------------------------
@st.composite
def clouds(draw, least=4):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32))); n, d = draw(st.integers(least, 12)), draw(st.integers(2, 6))
    return torch.randn(n, d, generator=g), torch.randn(n, d, generator=g), torch.randperm(n, generator=g), 10.**draw(st.integers(-3, 3))

@fault("any tokens, any scale, any order of the images", "metrics of tokens", "cosines in [-1, 1] that know no scale; an order of images that changes nothing")
@prop(x=clouds())
def test_token_scores(x):
    a, b, p, scale = x; a, b = (y.unsqueeze(1).repeat(1, 3, 1) for y in (a, b))
    s, t = metrics.token_scores(a, b, torch.zeros(a.shape[-1])), metrics.token_scores(a[p], b[p], torch.zeros(a.shape[-1]))
    assert all(torch.allclose(s[k][p], t[k], atol=1e-5) for k in s) and s["cosine"].abs().max() <= 1 + 1e-6 and s["angle"].min() >= 0 and s["angle"].max() <= 180
    scaled = metrics.token_scores(scale*a, b)
    assert torch.allclose(scaled["cosine"], s["cosine"], atol=1e-4) and torch.allclose(scaled["norm ratio"], scale*s["norm ratio"], rtol=1e-4)
    c = metrics.bootstrap(s["cosine"], n_boot=50)
    assert s["cosine"].min() - 1e-6 <= c.low <= c.high <= s["cosine"].max() + 1e-6 and metrics.quality_band(metrics.QUALITY["general"], c.value) in ("poor", "fair", "good", "excellent")

@fault("any embeddings with ties and numbers that are none, in any order", "metrics of retrieval", "shares in [0, 1] that know no scale and no order; a tie never helps")
@prop(x=clouds(), ties=st.booleans(), nan=st.booleans())
def test_retrieval(x, ties, nan):
    a, b, p, scale = x; n = len(a); own = torch.arange(n)
    if ties: b = b[:1].repeat(n, 1)
    if nan: a = a.clone(); a[0] = math.nan
    s = metrics.retrieval(a, b, own)
    assert all(set(v.tolist()) <= {0., 1.} for v in s.values()) and (not nan or s["i2t R@1"][0] == 0)
    if ties: assert s["i2t R@1"].sum() == 0 and s["i2t R@1"].mean() <= metrics.chance_level(own, n)["i2t R@1"]
    if not nan and not ties:
        assert all(torch.equal(s[k], v) for k, v in metrics.retrieval(scale*a, b/scale, own).items()), "lengths do not matter"
        assert all(torch.equal(s[k][p] if k.startswith("i2t") else s[k], v) for k, v in metrics.retrieval(a[p], b, own[p]).items())
    exact = metrics.retrieval(b, b, own)["i2t R@1"]
    assert exact.all() if not ties and (F.normalize(b, dim=1) @ F.normalize(b, dim=1).T - torch.eye(n)).max() < .999 else True

@fault("any two clouds, any order and scale", "metrics of sets", "symmetric, within their bounds, and the same for any order of the images")
@prop(x=clouds(least=5))
def test_sets(x):
    a, b, p, scale = x; k = 3
    assert metrics.cka(a, b) == pytest.approx(metrics.cka(b[p], a[p]), abs=1e-5) == pytest.approx(metrics.cka(scale*a, b), abs=1e-5) and metrics.cka(a, b) <= 1 + 1e-6 and metrics.cka(a, a) == pytest.approx(1)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b[p], a), rel=1e-4, abs=1e-4) and metrics.frechet_distance(a, b) >= 0 and metrics.frechet_distance(a, a[p]) == pytest.approx(0, abs=1e-4)
    o = metrics.knn_overlap(a, b, k)
    assert ((0 <= o) & (o <= 1)).all() and torch.equal(metrics.knn_overlap(a, scale*a, k), torch.ones(len(a)))
    gens = torch.stack([a, b])[:, :, None]
    assert metrics.diversity(gens).min() > -1e-6 and metrics.diversity(torch.stack([a, scale*a])[:, :, None]).abs().max() < 1e-3
