"""Sets of a million keys and of ten thousand shards, captions of 100 kB, none, one and two samples, and what a process has after much work: time, memory, files and threads stay within bounds."""
import gc, json, os, resource, threading, time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
import matplotlib.pyplot as plt
import pytest, torch
from PIL import Image
from blip3o_nb.earlier.pickles import convert
from blip3o_nb.files import InputError, data_path, read_json
from blip3o_nb.core import leak_check, toy_features
from blip3o_nb.features.shards import FeatureDataset, ShardWriter

ABOUT = {"clip": {"model": "toy-clip"}, "eva": {"model": "toy-eva"}}

def rss(): return int(Path("/proc/self/statm").read_text().split()[1])*os.sysconf("SC_PAGE_SIZE")/1e6 # MB
def handles(): return len(os.listdir("/proc/self/fd"))

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="memory and open files are read from /proc")

@pytest.fixture(scope="module")
def towers():
    from blip3o_nb.features.encoders import load_encoder
    return [load_encoder(n, device="cpu") for n in ("tiny-clip", "tiny-eva")]

@pytest.fixture(scope="module")
def pictures():
    "Bytes of some of the shipped pictures"
    from blip3o_nb.features.images import read_images
    source = read_images(data_path("emoji.tar.gz"))
    return [source.files(i)["webp"] for i in range(8)]

# Large sets

def large(folder, shards, per):
    "A set of tiny samples, written by the writer itself, which does not wait for the disk"
    x = {"clip": torch.randn(per, 4, 4), "eva": torch.randn(per, 4, 8)}
    with patch.object(os, "fsync", lambda fd: None), ShardWriter(folder, ABOUT, shard_size=per) as w:
        for w.number in range(shards):
            names = [f"{w.number:05d}-{i:04d}" for i in range(per)]
            captions = [f"thing {i} of {w.number}" for i in range(per)]
            w.add_batch([f"load-{n}" for n in names], x, captions, [f"{n:>064}" for n in names])
    return folder

class Meter:
    "What a block took: seconds of the processor, and the most memory above what there was before"
    def __enter__(self):
        gc.collect(); Path("/proc/self/clear_refs").write_text("5") # the peak from here on
        self.start, self.before = time.process_time(), rss(); return self
    def __exit__(self, *_):
        self.seconds = time.process_time() - self.start
        self.MB = int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])/1e3*1.024 - self.before

@needs_proc
@pytest.mark.fault("a set of a million keys", "FeatureDataset, leak_check, feature_dls", "opened in seconds, in less than a kilobyte a key")
def test_many_keys(tmp_path, times, record_property):
    "The short form has 20,000. Limits are about three times what a quiet core takes"
    from blip3o_nb.features.loading import feature_dls
    import fastai.data.load # not counted
    n = times(20, 1000)*1000
    folder, said = large(tmp_path/"set", n//1000, 1000), {}
    def took(name, limit, f):
        with Meter() as m: out = f()
        said[name] = f"{m.seconds:.1f} s, {m.MB:.0f} MB"; record_property(name, said[name])
        assert m.seconds < 1 + limit*n and m.MB < 60 + 1e-3*n, said
        return out
    sides = took("open both splits", 40e-6, lambda: [FeatureDataset(folder, s) for s in ("train", "held_out")])
    assert sum(map(len, sides)) == n
    took("leak check", 8e-6, lambda: leak_check(*sides)); del sides
    took("loaders and first batch", 60e-6, lambda: next(iter(feature_dls(folder, bs=64, device="cpu", in_memory=False).train)))

def mapped(): return sum("/shard-" in line for line in Path("/proc/self/maps").read_text().splitlines())

@needs_proc
@pytest.mark.fault("a set of ten thousand shards, 1,024 files may be open", "FeatureDataset, feature_dls",
                   "each sample once, 256 files mapped at most, none kept open")
def test_many_shards(tmp_path, times, record_property):
    from blip3o_nb.features.loading import feature_dls
    n, limits, most, seen = times(600, 10_000), resource.getrlimit(resource.RLIMIT_NOFILE), 0, Counter()
    folder = large(tmp_path/"set", n, 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        with Meter() as m: dls = feature_dls(folder, bs=16, device="cpu", in_memory=False)
        before = handles()
        for i, _ in enumerate(dls.train):
            most = max(most, mapped())
            seen.update(dls.train.batch_keys(i))
        kept_open = handles() - before
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    record_property("mapped", f"{m.seconds:.1f} s, {m.MB:.0f} MB, {most} files")
    assert 200 < most <= 256 and kept_open < 4 and m.seconds < 2 + 5e-3*n, (most, kept_open, m.seconds)
    assert set(seen.values()) == {1} and len(seen) == len(dls.train)*16 > 1.6*n

# Long captions

LONG = ("a red boat on a lake at dawn, seen from a hill; "*2200)[:100_000].strip()

@needs_proc
@pytest.mark.fault("captions of 100 kB beside pictures, in a table, of words and of one word", "extract, FeatureDataset", "stored whole, in bounded memory")
def test_long_captions_are_stored(tmp_path, towers, pictures, record_property):
    from blip3o_nb.features.extract import extract
    folder = tmp_path/"pictures"; folder.mkdir()
    captions = {f"{i}": c for i, c in enumerate((LONG, "\u4e2d"*100_000, "x"*100_000, "", "\U0001f600"*10_000))}
    for (k, c), data in zip(captions.items(), pictures): (folder/f"{k}.webp").write_bytes(data); (folder/f"{k}.txt").write_text(c)
    with Meter() as m: ds = extract(folder, tmp_path/"beside", dict(zip(("clip", "eva"), towers)), progress=False)
    assert dict(zip(ds.keys, ds.captions)) == captions
    table = tmp_path/"table.jsonl"; table.write_text("".join(json.dumps(dict(file_name=f"{k}.webp", caption=c)) + "\n" for k, c in captions.items()))
    for k in captions: (folder/f"{k}.txt").unlink()
    ds = extract(folder, tmp_path/"table", dict(zip(("clip", "eva"), towers)), progress=False, captions=table)
    assert dict(zip(ds.keys, ds.captions)) == captions and m.MB < 200
    record_property("provoked", 2*len(captions))

@pytest.mark.fault("a text of more than a megabyte where a caption should be", "extract", "the picture is listed, the others are stored")
def test_a_book_is_no_caption(tmp_path, towers, pictures):
    from blip3o_nb.features.extract import extract
    folder = tmp_path/"pictures"; folder.mkdir()
    for k, data, caption in zip("ab", pictures, ("a boat", "a boat, "*200_000)): (folder/f"{k}.webp").write_bytes(data); (folder/f"{k}.txt").write_text(caption)
    assert extract(folder, tmp_path/"set", dict(zip(("clip", "eva"), towers)), progress=False).keys == ["a"]
    assert read_json(tmp_path/"set/skipped.json") == {"b": "a txt of 1,600,000 bytes beside it"}

@pytest.mark.fault("a thousand captions of 100 kB in one shard", "ShardWriter", "a set that can be read: a header has 100 MB at most")
def test_a_shard_of_long_captions_can_be_read(tmp_path, times):
    "Characters that JSON writes as an escape of an escape take 14 bytes each"
    n = times(80, 1000)
    with ShardWriter(tmp_path/"set", ABOUT) as w:
        for i in range(n): w.add(f"k{i}", "\U0001f600"*100_000, clip=torch.randn(4, 4), eva=torch.randn(4, 8))
    ds = FeatureDataset(tmp_path/"set")
    assert len(ds) == n and set(map(len, ds.captions)) == {100_000}

@pytest.mark.fault("captions of 100 kB, of words and of one word", "encode_text", "as the tower's tokenizer cuts them, in seconds")
def test_long_captions_are_encoded(towers, record_property):
    texts, tower = [LONG + str(i) for i in range(8)] + ["ab"*50_000, "\u4e2d"*100_000, "&amp;"*20_000, " "*99_999 + "a red boat"], towers[0].tower
    start = time.process_time(); a = towers[0].encode_text(texts); took = time.process_time() - start
    with torch.no_grad(): b = tower.text(tower.tokenize([texts[0], texts[-1]]))
    assert torch.allclose(a[[0, -1]], b, atol=1e-5)
    assert took < 5, took
    record_property("provoked", len(texts))

@pytest.mark.fault("captions of 100 kB, of words and of one word", "gallery, plot_nearest, plot_mix, show_sample", "cut, in seconds")
def test_long_captions_are_cut_in_figures(tmp_path, record_property):
    from blip3o_nb.viz import fig_to_png, gallery
    from blip3o_nb.generation.widgets import plot_mix, plot_nearest, show_sample
    texts, emb = [LONG, "x"*100_000, "\u4e2d"*100_000, "$"*100_000, "a\n"*50_000], torch.randn(5, 8)
    toy, grey = toy_features(5), Image.new("RGB", (8, 8), "grey")
    with ShardWriter(tmp_path/"set", ABOUT) as w: w.add_batch(toy["keys"], {"clip": toy["clip"], "eva": toy["eva"]}, texts, [""]*5)
    ds, start = FeatureDataset(tmp_path/"set"), time.process_time()
    axs = [gallery([grey]*2, texts[:2], [texts]*2, [texts]*2)[0, 0], plot_nearest(emb[0], texts, emb), plot_mix(torch.linspace(0, 1, 3), emb[:3], emb[:2], .5, texts, emb, texts[3:])[0], show_sample(ds, 1)[0, 0]]
    for ax in axs:
        fig_to_png(ax); found = [t.get_text() for t in ax.figure.findobj(plt.Text)]
        assert max(map(len, found)) < 300 and any("xxxx" in t or "red boat" in t for t in found)
        plt.close(ax.figure)
    assert time.process_time() - start < 30
    record_property("provoked", len(texts)*len(axs))

# None, one and two samples

def few(folder, training, held_out):
    "A set with so many pictures on each side of the split"
    from blip3o_nb.core import is_held_out
    toy = toy_features(60, grid=2)
    at = [i for side, n in ((False, training), (True, held_out)) for i in [i for i, k in enumerate(toy["keys"]) if is_held_out(k) == side][:n]]
    with ShardWriter(folder, ABOUT) as w:
        if at: w.add_batch([toy["keys"][i] for i in at], {"clip": toy["clip"][at], "eva": toy["eva"][at]}, [toy["captions"][i] for i in at], [""]*len(at))
    return folder

def trained(features, out, cbs=(), **options):
    from blip3o_nb.options import make_config
    from blip3o_nb.runs.runs import train
    return train(make_config(**{**dict(embeddings_dir=str(features), output_dir=str(out), **TINY, num_epochs=1, batch_size=1, monitor_every=1, device="cpu"), **options}), progress=False, cbs=cbs)

TINY = dict(model_size="nano", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)

NOTHING = {"column": lambda d, out: FeatureDataset(d).column("clip"), "statistics": lambda d, out: FeatureDataset(d).stats("clip"), "training": trained,
           "pickles": lambda d, out: convert(d, out, "pickles"), "one pickle": lambda d, out: convert(d, out, "grid_pickle", layout="grid_4")}

@pytest.mark.parametrize("what", NOTHING)
@pytest.mark.fault("a set without a sample, as a writer leaves it that was given none", "FeatureDataset, train, convert", "one line that says so")
def test_no_sample(what, tmp_path):
    with pytest.raises(InputError, match="holds no sample") as e: NOTHING[what](few(tmp_path/"set", 0, 0), tmp_path/"out")
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("training,held_out,said", [(0, 1, "0 training samples, fewer than one batch"), (1, 0, "no held-out sample among 1"), (1, 1, "one training image less its own mean"), (2, 1, ""), (2, 2, "")])
@pytest.mark.fault("sets of one to four samples", "train", "one line that says what is missing, or weights that are finite")
def test_few_samples_train(training, held_out, said, tmp_path):
    features = few(tmp_path/"set", training, held_out)
    if said:
        with pytest.raises(InputError, match=said): trained(features, tmp_path/"run")
    else: assert all(p.isfinite().all() for p in trained(features, tmp_path/"run", cond_dropout=.1).model.parameters())

@pytest.mark.fault("one picture in training, features per channel; pictures that are all the same", "train", "it trains")
def test_one_picture_and_equal_pictures_train(tmp_path, record_property):
    assert trained(few(tmp_path/"one", 1, 1), tmp_path/"run", target_norm="channel").record["norm_ratio"]
    x = toy_features(1, grid=2)
    with ShardWriter(tmp_path/"same", ABOUT) as w: w.add_batch([f"toy0-{i:05d}" for i in range(20)], {n: x[n].expand(20, -1, -1) for n in ("clip", "eva")}, [""]*20, [""]*20)
    assert trained(tmp_path/"same", tmp_path/"run2").record["norm_ratio"]
    record_property("provoked", 2)

@pytest.mark.fault("6 and 1, 4 and 2, 6 and 2 pictures in training and held out; none to generate from", "convert, evaluate, write_report, Pipeline", "one line, or the right result")
def test_few_samples_judged(tmp_path, record_property):
    from blip3o_nb.judging.evaluate import evaluate
    from blip3o_nb.generation.pipeline import Pipeline
    from blip3o_nb.judging.report import write_report
    features = {n: few(tmp_path/f"{n}", *n) for n in ((6, 1), (4, 2), (6, 2))}
    trained(features[6, 2], tmp_path/"run", eval_samples=0)
    for n in ((6, 1), (4, 2)):
        with pytest.raises(InputError, match="takes two or more, and five or more"): evaluate(tmp_path/"run", features[n], progress=False)
    report = evaluate(tmp_path/"run", features[6, 2], progress=False)
    assert report.facts["images"] == 2 and write_report(report, tmp_path/"report").exists()
    convert(few(tmp_path/"one", 1, 0), tmp_path/"pickles", "pickles"); convert(tmp_path/"pickles", tmp_path/"back", dtype="fp32")
    assert torch.equal(FeatureDataset(tmp_path/"back").column("clip"), FeatureDataset(tmp_path/"one").column("clip"))
    pipe, x = Pipeline.from_pretrained(tmp_path/"run"), FeatureDataset(features[6, 2]).column("eva")
    with pytest.raises(InputError, match="no images to generate from"): pipe(x[:0])
    assert torch.allclose(torch.cat([pipe(x[:1]), pipe(x[1:2], first=1)]), pipe(x[:2]), atol=1e-4)
    record_property("provoked", 6)

@pytest.mark.fault("one and two pictures", "extract", "as many samples")
def test_few_pictures_extracted(tmp_path, towers, pictures):
    from blip3o_nb.features.extract import extract
    for n in (1, 2):
        folder = tmp_path/f"{n}"; folder.mkdir()
        for i in range(n): (folder/f"{i}.webp").write_bytes(pictures[i])
        assert len(extract(folder, tmp_path/f"set{n}", dict(zip(("clip", "eva"), towers)), progress=False)) == n

# Leaks

def census():
    "Objects that the collector knows, by kind; those of this module's own measurements apart"
    gc.collect()
    return Counter(type(o).__name__ for o in gc.get_objects())

class Gauge:
    "What this process holds, after a quarter of the work and at its end"
    def __init__(self):
        self.MB, self.files, self.threads, self.objects = [], [], [], []
        census() # the first one leaves some dozens of weak references behind, in the caches of abstract classes
    def look(self): self.objects.append(census()); self.MB.append(rss()); self.files.append(handles()); self.threads.append(threading.active_count())
    def grown(self):
        more = self.objects[-1] - self.objects[0]
        return SimpleNamespace(**{k: v[-1] - v[0] for k, v in (("MB", self.MB), ("files", self.files), ("threads", self.threads))}, tensors=more["Tensor"] + more["Parameter"], objects=sum(more.values()), most=more.most_common(5))
    def flat(self, MB, objects, record_property):
        g = self.grown(); record_property("grown", str(g))
        assert g.files <= 1 and g.threads <= 0 and g.tensors <= 2 and g.objects <= objects and g.MB < MB, (g, self.MB)

@needs_proc
@pytest.mark.fault("thousands of steps with all that a training does beside them", "train", "memory, objects, files and threads as after the first quarter")
def test_training_for_long(tmp_path, times, record_property):
    "Checkpoints, monitors, generation, the live plot; the record grows by two numbers a step and a list or two at each look of the monitors, and nothing else does"
    from fastai.callback.core import Callback
    from blip3o_nb.training import monitors
    epochs, gauge, drawn = times(8, 160), Gauge(), []
    class Look(Callback):
        order, run_valid = 99, False
        def after_epoch(self):
            if self.epoch + 1 in (epochs//4, epochs): gauge.look()
    plot = monitors.LivePlot(times(3., 10.)); plot.redraw = lambda: drawn.append(plt.close(monitors.plot_monitors(learn_of(plot).record)[0].figure)) or setattr(plot, "last", time.monotonic())
    def learn_of(cb): return cb.learn
    with patch.object(monitors, "ipython_shell", lambda: SimpleNamespace(kernel=True)):
        learn = trained(few(tmp_path/"set", 40, 8), tmp_path/"run", [Look(), plot], **times({}, dict.fromkeys(list(TINY)[1:], 0)), num_epochs=epochs, batch_size=2, checkpoint_every=30, keep=2, monitor_every=10, eval_every=2, eval_samples=4)
    assert learn.train_iter == 20*epochs and drawn and not plt.get_fignums() and len(list((tmp_path/"run/states").glob("*.pt"))) == 2
    record_property("provoked", learn.train_iter)
    gauge.flat(times(25, 60), 60 + learn.train_iter//2, record_property)

REPEATED = {"extraction": 6, "a set": 16, "a pipeline": 8, "an evaluation and its report": 3}

@needs_proc
@pytest.mark.parametrize("what", [*list(REPEATED)[:3], pytest.param(list(REPEATED)[3], marks=pytest.mark.slow)])
@pytest.mark.fault("the same again and again", "extract, FeatureDataset and feature_dls, Pipeline, evaluate and write_report", "memory, objects, files, threads and figures as after the first quarter")
def test_again_and_again(what, tmp_path, towers, pictures, times, record_property):
    from blip3o_nb.judging.evaluate import evaluate
    from blip3o_nb.features.extract import extract
    from blip3o_nb.generation.pipeline import Pipeline
    from blip3o_nb.features.loading import feature_dls
    from blip3o_nb.judging.report import write_report
    n, gauge = REPEATED[what]*times(1, 8), Gauge()
    features = few(tmp_path/"set", 24, 8)
    if what in ("a pipeline", "an evaluation and its report"): trained(features, tmp_path/"run", eval_samples=0)
    folder = tmp_path/"pictures"; folder.mkdir()
    for i, data in enumerate(pictures[:4]): (folder/f"{i}.webp").write_bytes(data)
    def act(i):
        if what == "extraction": extract(folder, tmp_path/f"out{i}", dict(zip(("clip", "eva"), towers)), progress=False)
        if what == "a set":
            dls = feature_dls(features, bs=4, device="cpu", in_memory=bool(i % 2))
            for _ in dls.train: pass
        if what == "a pipeline": (p := Pipeline.from_pretrained(tmp_path/"run"))(FeatureDataset(features).column("eva")); p(torch.randn(3, 5, 48), method="heun", steps=2)
        if what == "an evaluation and its report": write_report(evaluate(tmp_path/"run", features, progress=False), tmp_path/f"report{i}")
    for i in range(n):
        act(i)
        if i in (max(1, n//4), n - 1): gauge.look()
    assert not plt.get_fignums()
    record_property("provoked", n)
    gauge.flat(40, 40 + n, record_property)
