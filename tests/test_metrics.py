"""Metrics and baselines against libraries and against the formulas written out in loops."""
import ast, itertools, math
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cosine
from sklearn.linear_model import Ridge
from sklearn.metrics import top_k_accuracy_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from blip3o_nb.judging.baselines import (CopyBaseline, MLPBaseline, MeanBaseline, Moments, ProcrustesBaseline,
                                         RidgeBaseline)
from blip3o_nb.files import InputError
from blip3o_nb.core import toy_features
from blip3o_nb.features.loading import tensor_dls
from blip3o_nb.judging.metrics import (bootstrap, calibration, chance_level, cka, class_embeddings,
                                       derangement, diversity, frechet_distance, half_sampling, knn_overlap,
                                       patch_cosine, retrieval, token_scores, zero_shot, zero_shot_chance)

def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def test_cosine_against_scipy_and_sklearn():
    a, b, c = draw(5, 3, 7), draw(5, 3, 7, seed=1), draw(3, 7, seed=2)
    for center in (None, c):
        u, v = (a, b) if center is None else (a-center, b-center)
        want = [[1 - cosine(u[i, j], v[i, j]) for j in range(3)] for i in range(5)]
        assert np.allclose(patch_cosine(a, b, center), want, atol=1e-6)
    flat = cosine_similarity(a.flatten(0, 1), b.flatten(0, 1)).diagonal().reshape(5, 3)
    s = token_scores(a, b)
    assert np.allclose(s["cosine"], flat.mean(1), atol=1e-6)
    assert np.allclose(s["angle"], np.degrees(np.arccos(flat)).mean(1), atol=1e-3)
    assert np.allclose(s["L2"], np.linalg.norm(a-b, axis=-1).mean(1), atol=1e-5)

def by_hand(sim, own, ks):
    "Recall both ways with plain loops: the best right answer's place when all that tie with it stand in front of it"
    n, m = len(sim), len(sim[0])
    def value(x): return -math.inf if math.isnan(x) else x
    def hits(queries, candidates, right, s, k):
        out = []
        for q in queries:
            rel = [c for c in candidates if right(q, c)]
            if rel:
                best = max(value(s(q, c)) for c in rel)
                out.append(float(sum(value(s(q, c)) >= best for c in candidates if not right(q, c)) < k))
        return out
    out = {}
    for k in ks:
        out[f"i2t R@{k}"] = hits(range(n), range(m), lambda i, j: j in own[i], lambda i, j: sim[i][j], k)
        out[f"t2i R@{k}"] = hits(range(m), range(n), lambda j, i: j in own[i], lambda j, i: sim[i][j], k)
    return out

def circle(*degrees): return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])

CASES = { # image embeddings, text embeddings, own captions
    "plain": (circle(0, 50, 100), circle(10, 40, 120), [[0], [1], [2]]),
    "wrong order": (circle(0, 50, 100), circle(10, 40, 120), [[2], [0], [1]]),
    "two texts tie": (circle(0, 90), circle(0, 0, 90), [[0], [2]]),
    "two images tie": (circle(0, 0, 90), circle(0, 20, 90), [[0], [1], [2]]),
    "a tie of right ones does no harm": (circle(0, 90), circle(0, 0, 90), [[0, 1], [2, 2]]),
    "several captions an image": (circle(0, 60), circle(30, 100, 55, 170), [[0, 1], [2, 3]]),
    "captions shared by images": (circle(0, 40, 80), circle(20, 75), [[0], [0], [1]]),
    "a caption of no image": (circle(0, 90), circle(45, 0, 90), [[1], [2]]),
    "all equal": (circle(0, 0, 0, 0), circle(0, 0, 0, 0), [[0], [1], [2], [3]]),
    "an image of NaN": (torch.cat([circle(0)*math.nan, circle(60)]), circle(0, 60), [[0], [1]]),
    "a caption of NaN": (circle(0, 60, 30), torch.cat([circle(0), circle(60)*math.nan, circle(30)]), [[0], [1], [2]]),
    "one image": (circle(10), circle(0, 20, 90), [[1]]),
    "one image, one caption": (circle(10), circle(90), [[0]]),
    "a zero vector": (torch.zeros(2, 2), circle(0, 90), [[0], [1]]),
}

@pytest.mark.parametrize("case", CASES)
def test_retrieval_against_loops(case):
    x, t, own = CASES[case]; ks = (1, 2, 3, 10) # also more than there are candidates
    sim = (torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(t, dim=1).T).mul(1e4).round().div(1e4) # ties are exact
    want = by_hand(sim.tolist(), own, ks)
    got = retrieval(x, t, torch.tensor(own), ks)
    assert {k: v.tolist() for k, v in got.items()} == want

def test_retrieval_known_answers():
    "What the loops are to say, said by hand"
    def r1(case): x, t, own = CASES[case]; return {k: v.tolist() for k, v in retrieval(x, t, torch.tensor(own), (1,)).items()}
    assert r1("plain") == {"i2t R@1": [1, 1, 1], "t2i R@1": [1, 1, 1]}
    assert r1("two texts tie") == {"i2t R@1": [0, 1], "t2i R@1": [1, 1]}       # the second text belongs to no image
    assert r1("captions shared by images") == {"i2t R@1": [1, 1, 1], "t2i R@1": [1, 1]}
    assert r1("a caption of no image")["i2t R@1"] == [1, 1] and len(r1("a caption of no image")["t2i R@1"]) == 2
    assert r1("all equal") == {"i2t R@1": [0]*4, "t2i R@1": [0]*4}
    assert r1("an image of NaN") == {"i2t R@1": [0, 1], "t2i R@1": [0, 1]}
    assert r1("one image, one caption") == {"i2t R@1": [1], "t2i R@1": [1]}    # no wrong answer to be confused with

def test_retrieval_on_random_cases():
    g = torch.Generator().manual_seed(0)
    for seed in range(30):
        n, m = 2 + seed % 6, 3 + seed % 5
        x, t = torch.randint(-1, 2, (n, 3), generator=g).float(), torch.randint(-1, 2, (m, 3), generator=g).float() # many ties and zero vectors
        own = torch.stack([torch.randperm(m, generator=g)[:2] for _ in range(n)])
        sim = (torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(t, dim=1).T).mul(1e4).round().div(1e4)
        assert {k: v.tolist() for k, v in retrieval(x, t, own, (1, 2)).items()} == by_hand(sim.tolist(), own.tolist(), (1, 2))

def test_chance_is_the_best_fixed_ranking():
    own = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    def recall(order, k): return sum(o in order[:k] for o in own.tolist())/len(own)
    for k in (1, 2, 3): assert chance_level(own, 4, (k,))[f"i2t R@{k}"] == pytest.approx(max(recall(o, k) for o in itertools.permutations(range(4))))

def test_zero_shot_against_sklearn():
    x, c, labels = draw(200, 16), draw(8, 16, seed=1), torch.randint(8, (200,), generator=torch.Generator().manual_seed(2))
    got, sim = zero_shot(x, c, labels), cosine_similarity(x, c)
    for k in (1, 5): assert got[f"top-{k}"].mean().item() == pytest.approx(top_k_accuracy_score(labels, sim, k=k, labels=range(8)))
    assert zero_shot_chance(labels, 8)["top-1"] == pytest.approx(labels.bincount().max().item()/200)
    assert list(zero_shot(x, c[:5], labels % 5)) == ["top-1"]
    assert zero_shot(x[:1], c[:1], torch.tensor([0]))["top-1"].tolist() == [1]

def test_class_embeddings_by_loop():
    def encode(texts): return torch.stack([draw(6, seed=sum(map(ord, t))) * len(t) for t in texts])
    names, templates = ["cat", "a dog"], ("a picture of {}", "{}", "one {} and another {}")
    for n, e in zip(names, class_embeddings(encode, names, templates)):
        mean = np.mean([(v := encode([t.replace("{}", n)])[0].numpy())/np.linalg.norm(v) for t in templates], 0)
        assert np.allclose(e, mean/np.linalg.norm(mean), atol=1e-6)

def test_frechet_against_scipy():
    for seed in range(3):
        a, b = ((draw(300, 6, seed=s) @ draw(6, 6, seed=s+9) + s).double().numpy() for s in (seed, seed+20))
        ca, cb = np.cov(a.T), np.cov(b.T)
        want = ((a.mean(0)-b.mean(0))**2).sum() + np.trace(ca + cb - 2*sqrtm(ca @ cb).real)
        assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(want, rel=1e-6)

def test_cka_against_hsic_in_loops():
    "Unbiased HSIC as the mean over all quadruples of different images (Song et al., 2012, equation 4)"
    n = 7; x, y = (draw(n, d, seed=s).double().numpy() for d, s in ((3, 0), (4, 1))); y[:, :3] += x
    def hsic(a, b):
        k, l = a @ a.T, b @ b.T
        quads = list(itertools.permutations(range(n), 4))
        return np.mean([k[i, j]*(l[i, j] + l[q, r] - 2*l[i, q]) for i, j, q, r in quads])
    assert cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(hsic(x, y)/math.sqrt(hsic(x, x)*hsic(y, y)), rel=1e-8)

def test_cka_against_its_closed_form():
    "Of z and z + s e, with white z and e and many images: |C_zy|^2/(|C_z||C_y|), where C_z = C_zy = I and C_y = (1 + s^2) I"
    z, e = draw(1000, 8), draw(1000, 8, seed=1)
    for s in (.5, 2.): assert cka(z, z + s*e) == pytest.approx(1/(1+s*s), abs=.03)

def test_knn_against_sklearn():
    a, b = draw(80, 5), draw(80, 9, seed=1); b[:, :5] += a
    near = [NearestNeighbors(n_neighbors=11, metric="cosine", algorithm="brute").fit(x).kneighbors(x)[1] for x in (a, b)]
    want = [len((set(p)-{i}) & (set(q)-{i}))/10 for i, (p, q) in enumerate(zip(*near))]
    assert np.allclose(knn_overlap(a, b, 10), want)

def test_diversity_and_calibration_by_loop():
    gens, real = draw(4, 6, 3, 5), draw(6, 3, 5, seed=1)
    pairs = list(itertools.combinations(range(4), 2))
    want = [np.mean([cosine(gens[i, n, t], gens[j, n, t]) for i, j in pairs for t in range(3)]) for n in range(6)]
    assert np.allclose(diversity(gens), want, atol=1e-6)
    g, r = gens.double().numpy(), real.double().numpy()
    assert calibration(gens, real) == pytest.approx((1+1/4)*g.var(0, ddof=1).mean()/((g.mean(0)-r)**2).mean(), rel=1e-5)
    with pytest.raises(InputError, match="same images"): calibration(gens, real[1:])

@pytest.mark.parametrize("n, resamples", ((50, 200), (2**21 - 5, 3))) # the second is drawn in two parts
def test_bootstrap_draws_one_resample_after_the_other(n, resamples):
    x, g = draw(n).double(), torch.Generator().manual_seed(3)
    means = torch.stack([x[torch.randint(n, (n,), generator=g)].mean() for _ in range(resamples)])
    s = bootstrap(x, resamples, seed=3)
    assert [s.low, s.high] == pytest.approx(means.quantile(torch.tensor([.025, .975], dtype=torch.double)).tolist())

def test_half_sampling_is_seeded():
    x = draw(100)
    assert half_sampling(lambda v: v.mean(), x) == half_sampling(lambda v: v.mean(), x) != half_sampling(lambda v: v.mean(), x, seed=1)
    assert sorted(derangement(9).tolist()) == list(range(9))

# Baselines

def batches(x, y, bs): return SimpleNamespace(train=list(zip(x.split(bs), y.split(bs))))

@pytest.fixture(scope="module")
def toy(): t = toy_features(120, grid=3, clip_dim=8, eva_dim=12); return t["eva"], t["clip"]

@pytest.mark.parametrize("tokens", (10, 9)) # with CLS and without
def test_ridge_against_sklearn(toy, tokens):
    x, y = (v[:, -tokens:] for v in toy)
    ridge = RidgeBaseline(.05).fit(batches(x, y, 7))
    got = ridge.generate(x[:5])
    for k in ([slice(0, 1), slice(1, 10)] if tokens == 10 else [slice(0, 9)]):
        xs, ys = (v[:, k].flatten(0, 1).double().numpy() for v in (x, y)); c = xs - xs.mean(0)
        want = Ridge(alpha=.05*np.linalg.eigvalsh(c.T @ c).mean()).fit(xs, ys).predict(x[:5, k].flatten(0, 1))
        assert np.allclose(got[:, k].flatten(0, 1), want, atol=1e-4)

@pytest.mark.parametrize("make", (MeanBaseline, ProcrustesBaseline, RidgeBaseline))
def test_streaming_equals_one_batch(toy, make):
    x, y = toy; a, b, c = (make().fit(batches(x, y, bs)).generate(x) for bs in (1, 32, 120)) # batches of one: most have no fifth picture
    assert torch.allclose(a, c, atol=1e-5) and torch.allclose(b, c, atol=1e-5) and a.shape == y.shape and a.dtype == torch.float32

def test_moments_merge_far_from_zero():
    x, y = draw(90, 5).double() + 1e6, draw(90, 3, seed=1).double() - 1e5
    parts, whole = sum((Moments.of(x[i:i+11], y[i:i+11]) for i in range(0, 90, 11)), Moments()), Moments.of(x, y)
    assert torch.allclose(parts.xx, whole.xx, rtol=1e-6, atol=1e-6) and torch.allclose(parts.xy, whole.xy, rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize("make", (MeanBaseline, RidgeBaseline))
def test_loaders_and_random_state_stay_as_they_were(toy, make):
    x, y = toy; dls = tensor_dls((x[:100], y[:100]), (x[100:], y[100:]), bs=32, device="cpu")
    fresh = [c[:, 0, 0].tolist() for c, _ in tensor_dls((x[:100], y[:100]), (x[100:], y[100:]), bs=32, device="cpu").train]
    torch.manual_seed(3); state = torch.get_rng_state()
    fitted = make().fit(dls)
    assert torch.equal(torch.get_rng_state(), state)
    assert [c[:, 0, 0].tolist() for c, _ in dls.train] == fresh
    assert torch.equal(make().fit(dls).generate(x), fitted.generate(x)) # a second fit sees the same, whatever was iterated before

def test_the_last_pictures_are_fitted_too(toy):
    x, y = toy; dls = tensor_dls((x[:100], y[:100]), (x[100:], y[100:]), bs=32, device="cpu") # 100 is no multiple of 32, and the loader drops the rest
    assert torch.allclose(MeanBaseline().fit(dls).mean, y[:100].mean(0), atol=1e-6)

def test_what_cannot_be_fitted(toy):
    x, y = toy
    for make, b, part in ((CopyBaseline, batches(x, y, 32), "nothing to copy"), (RidgeBaseline, batches(x[:4], y[:4], 4), "give RidgeBaseline an alpha"),
                          (RidgeBaseline, batches(x[:, 1:], y, 32), "bring both to one layout"), (MLPBaseline, batches(x[:, 1:], y, 32), "bring both to one layout"),
                          (MeanBaseline, SimpleNamespace(train=[]), "with a training split"), (ProcrustesBaseline, SimpleNamespace(train=[]), "with a training split")):
        with pytest.raises(InputError, match=part): make().fit(b)

def test_import_needs_no_training_library():
    "Neither the modules nor those that they import name one outside of a function"
    package, seen = Path(__file__).parents[1]/"blip3o_nb", {}
    todo = ["judging.baselines", "judging.metrics"]
    while todo:
        module = todo.pop()
        if module in seen: continue
        body = ast.parse((package/f"{module.replace('.', '/')}.py").read_text()).body
        froms = [n for n in body if isinstance(n, ast.ImportFrom)]
        names = [a.name for n in body if isinstance(n, ast.Import) for a in n.names]
        seen[module] = {n.split(".")[0] for n in [*names, *(n.module for n in froms if not n.level)]}
        for n in froms: # one dot: of the same part, two: from the package
            parts = module.split(".")[:-n.level] if n.level else None
            if parts is not None: todo.append(".".join([*parts, n.module]))
    assert {"judging.baselines", "judging.metrics", "features.loading", "core"} <= set(seen)
    assert not {"fastai", "open_clip", "transformers", "timm", "sklearn"} & set().union(*seen.values())
