"""Extraction under kill -9, with two ranks and on a full disk: the set ends as that of one undisturbed run, byte for byte. And the seeds' own commands."""
import json, os, random, resource, signal, subprocess, sys, time
from pathlib import Path
import pytest

PICTURES, RUN = 68, dict(shard_size=16, bs=8, progress=False)

def files(folder):
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

def shards(out): return [p for p in out.rglob("shard-*.safetensors")] if out.exists() else []

# What a killed process had just done, as its folder shows it. The samples of a number are listed, then each column gets
# its shard, which is written in the writer's own folder and then named, and then its entry.
MOMENTS = {
    "the writer's folder is there": lambda d: any(d.glob(".writing-*")),
    "samples are listed": lambda d: (d/"samples/part-00001.json").exists(),
    "a shard is being written": lambda d: any(d.glob(".writing-*/.shard-00001*")),
    "a shard has its name": lambda d: (d/"clip/shard-00002.safetensors").exists(),
    "a shard of one column has its entry": lambda d: (d/"clip/shard-00001.json").exists(),
    "the last shard has its entry": lambda d: (d/f"eva/shard-{PICTURES//16:05d}.json").exists(),
    "what was skipped is being listed": lambda d: any(d.glob(".writing-*/.skipped.json*")),
}

class Driver:
    "Forks processes that extract, and kills them; in a process of its own, which uses one thread so that it may fork"
    def __init__(self, root):
        from blip3o_nb.files import data_path
        from blip3o_nb.features.encoders import load_encoder
        from blip3o_nb.features.images import read_images
        self.root, self.report, self.pictures = root, {}, root/"pictures"
        self.encoders = {n: load_encoder(f"tiny-{n}", device="cpu") for n in ("clip", "eva")}
        shipped = read_images(data_path("emoji.tar.gz"))
        self.pictures.mkdir()
        for i in range(PICTURES):
            data = b"broken" if i % 30 == 7 else shipped.files(i)["webp"]
            (self.pictures/f"{i:03d}.webp").write_bytes(data)
    def start(self, out, rank=0, world=1, columns=("clip", "eva"), **kw):
        from blip3o_nb.features.extract import extract
        if pid := os.fork(): return pid
        code = 1
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
            sys.stdout = open(os.devnull, "w")
            extract(self.pictures, out, {c: self.encoders[c] for c in columns}, **RUN, **kw)
            code = 0
        finally: os._exit(code)
    def kill_when(self, pid, moment, limit=60):
        "Whether it was killed before it ended"
        begun = time.time()
        while time.time() - begun < limit:
            if os.waitpid(pid, os.WNOHANG)[0]: return False
            try: now = moment()
            except FileNotFoundError: now = False # a folder that goes while it is looked at
            if now:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return True
        raise TimeoutError
    def finish(self, *pids): return [os.waitpid(p, 0)[1] for p in pids]
    def compare(self, name, out, killed=None, **kw):
        "Go on in a folder, and compare it with that of an undisturbed run"
        left = len(shards(out))
        again = self.finish(self.start(out, **kw))[0]
        self.report[name] = dict(killed=killed, left=left, again=again, same=files(out) == files(self.root/"whole"))
    def single(self):
        begun = time.time()
        assert self.finish(self.start(self.root/"whole")) == [0]
        took, rng = time.time() - begun, random.Random(0)
        moments = {**MOMENTS, **{f"at {s:.2f} of the time": s for s in sorted(rng.uniform(.3, .95) for _ in range(3))}}
        for k, (name, m) in enumerate(moments.items()):
            out, begun = self.root/f"killed{k}", time.time()
            def now(): return m(out) if callable(m) else time.time() - begun > m*took
            self.compare(name, out, self.kill_when(self.start(out, num_workers=2*(k % 2)), now))
        out = self.root/"often" # one folder, killed again and again
        kills = sum(self.kill_when(self.start(out), (out/f"eva/shard-{n:05d}.safetensors").exists) for n in range(4))
        self.compare("four times in one folder", out, kills == 4)
    def columns(self):
        "A column that is added: alone, killed, and beside another process"
        out = self.root/"added"
        assert self.finish(self.start(out, columns=["eva"])) == [0]
        first = files(out)
        for n in range(3):
            killed = self.kill_when(self.start(out, columns=["clip"]), (out/f"clip/shard-{n:05d}.json").exists)
            kept = all(files(out).get(k) == v for k, v in first.items())
            self.report[f"a column is added, killed at {n}"] = dict(killed=killed and kept)
        self.compare("a column is added, killed three times", out, columns=["clip"])
        self.report["the first column"] = dict(same=all(files(out)[k] == v for k, v in first.items()))
        out = self.root/"at once"
        assert self.finish(*(self.start(out, columns=[c]) for c in self.encoders)) == [0, 0]
        self.report["two columns at once"] = dict(same=files(out) == files(self.root/"whole"))
        out = self.root/"one of two columns"
        pids = [self.start(out, columns=[c]) for c in self.encoders]
        killed = self.kill_when(pids[1], (out/"eva/shard-00001.json").exists)
        self.finish(pids[0])
        self.compare("one of two columns dies", out, killed, columns=["eva"])
    def ranks(self):
        out = self.root/"two"
        assert self.finish(self.start(out, 0, 2), self.start(out, 1, 2)) == [0, 0]
        self.report["two ranks"] = dict(same=files(out) == files(self.root/"whole"))
        out = self.root/"one_dies"
        pids = [self.start(out, r, 2) for r in range(2)]
        killed = self.kill_when(pids[1], (out/"eva/shard-00001.json").exists)
        self.finish(pids[0])
        self.compare("one rank of two dies, one process takes over", out, killed)

def driver(root):
    d = Driver(root)
    for part in (d.single, d.columns, d.ranks): part()
    (root/"report.json").write_text(json.dumps(d.report))

@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("extract")
    r = subprocess.run([sys.executable, __file__, str(root)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                       capture_output=True, text=True, timeout=400)
    assert r.returncode == 0, r.stderr[-2000:]
    return json.loads((root/"report.json").read_text())

@pytest.mark.slow # test_kills has a shorter one
@pytest.mark.fault("kill -9 at chosen moments: samples, staging, shard, entry, an added column, one process of two",
                   "extraction", "the same files, byte for byte")
def test_killed_at_any_moment_and_resumed_the_set_is_the_same(report, record_property):
    kills = {k: v for k, v in report.items() if "left" in v}
    record_property("provoked", sum(bool(v["killed"]) for v in kills.values()))
    assert not {k: v for k, v in kills.items() if v["again"] or not v["same"]}
    assert sum(bool(v["killed"]) for v in kills.values()) >= 6, kills # the others ended before their moment came
    lasting = ("the writer's folder is there", "samples are listed", "a shard has its name")
    assert all(kills[m]["killed"] for m in lasting), kills
    assert len({v["left"] for v in kills.values() if v["killed"]}) > 2 # they died at different places

@pytest.mark.slow # 3_features/08_extract adds columns in one process
def test_a_column_is_added_and_the_others_stay(report):
    killed = [v["killed"] for k, v in report.items() if k.startswith("a column is added, killed at")]
    assert any(killed) and report["the first column"]["same"] and report["two columns at once"]["same"], report

@pytest.mark.slow # test_torchrun_splits_the_work compares with one process, too
def test_two_ranks_make_the_set_of_one(report): assert report["two ranks"]["same"]

@pytest.mark.fault("a full disk", "extraction", "one line; what is complete stays usable, and it goes on")
def test_a_full_disk_keeps_what_is_complete(tmp_path, encoders, pictures):
    from blip3o_nb.files import InputError
    from blip3o_nb.features.extract import extract
    from blip3o_nb.features.shards import FeatureDataset
    whole = extract(pictures, tmp_path/"whole", encoders, **RUN)
    size = (tmp_path/"whole"/"clip"/"shard-00000.safetensors").stat().st_size
    extract(pictures, tmp_path/"full", encoders, limit=16, **RUN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size//2, hard))
    try:
        with pytest.raises(InputError, match="free some space"): extract(pictures, tmp_path/"full", encoders, **RUN)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert FeatureDataset(tmp_path/"full").keys == whole.keys[:16] and FeatureDataset(tmp_path/"full").verify() == 2
    extract(pictures, tmp_path/"full", encoders, **RUN)
    assert FeatureDataset(tmp_path/"full").keys == whole.keys

@pytest.fixture(scope="module")
def encoders():
    from blip3o_nb.features.encoders import load_encoder
    return {n: load_encoder(f"tiny-{n}", device="cpu") for n in ("clip", "eva")}

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from blip3o_nb.files import data_path
    from blip3o_nb.features.images import read_images
    shipped, folder = read_images(data_path("emoji.tar.gz")), tmp_path_factory.mktemp("pictures")
    for i in range(48): (folder/f"{i:03d}.webp").write_bytes(shipped.files(i)["webp"]); (folder/f"{i:03d}.txt").write_bytes(shipped.files(i)["txt"])
    return folder

def test_a_reader_that_dies_while_the_towers_work_is_one_line(tmp_path, encoders, pictures, monkeypatch):
    import multiprocessing
    from blip3o_nb.files import InputError
    from blip3o_nb.features.extract import extract
    def tokens(pixels): # torch's signal handler raises here, not where the next batch is asked for
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL); time.sleep(20)
    monkeypatch.setattr(encoders["clip"], "tokens", tokens)
    with pytest.raises(InputError, match="fewer num_workers"): extract(pictures, tmp_path/"out", encoders, num_workers=1, **RUN)

def test_a_reader_that_dies_while_a_thread_starts_is_one_line(monkeypatch):
    import _thread, threading
    from blip3o_nb.files import InputError
    from blip3o_nb.core import reading_ahead
    go, gone, said = threading.Event(), threading.Event(), []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: said.append(str(u.exc_value))) # which prints
    def start(bootstrap, args): # the thread is there, and not yet in the books, when the handler raises
        def later():
            go.wait(10)
            try: bootstrap(*args)
            finally: gone.set()
        _thread.start_new_thread(later, ())
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    monkeypatch.setattr(threading, "_start_new_thread", start)
    with pytest.raises(InputError, match="fewer num_workers"), reading_ahead():
        try: threading.Thread(target=print).start()
        finally: go.set(); assert gone.wait(10); time.sleep(.1)
    assert said == []

def run(monkeypatch, capsys, program, *args):
    "A console program, in this process"
    from blip3o_nb.commands import cli
    monkeypatch.setattr(sys, "argv", [program, *map(str, args)])
    getattr(cli, program)()
    return capsys.readouterr().out

SEED_COMMANDS = { # as printed in the documents; the name of the script is ours, folders and pictures are the test's
    "seed 0, with CLS": ('blip3o_extract --output_dir {out} --training_mode cls_patch --batch_size 32', 65),
    "seed 0, patches": ('blip3o_extract --output_dir {out} --training_mode patch_only --batch_size 64', 64),
    "seed 1, by default": ('blip3o_extract --chunked_embeddings_dir {out}', 65),
    "seed 1, with CLS": ('blip3o_extract --include_cls --chunked_embeddings_dir {out}', 65),
    "seed 3": ('blip3o_extract --input_dir {pictures} --output_dir {out} --batch_size 32', 65)}

@pytest.mark.parametrize("name", SEED_COMMANDS)
def test_seed_command(name, tmp_path, pictures, monkeypatch, capsys):
    from blip3o_nb.features.shards import FeatureDataset
    line, tokens = SEED_COMMANDS[name]
    program, *args = line.format(out=tmp_path/"out", pictures=pictures).split()
    if "--input_dir" not in args: args += ["--images", pictures] # the seeds' script had its pictures written into it
    said = run(monkeypatch, capsys, program, *args)
    ds = FeatureDataset(tmp_path/"out")
    assert len(ds) == 48 and tuple(ds.shape("clip")) == (tokens, 192) and tuple(ds.shape("eva")) == (tokens, 256)
    assert ("means of patches" in said) == (tokens == 64) and ds.captions[0]

def test_seed_2_grid_embeddings(tmp_path, pictures, monkeypatch, capsys):
    from blip3o_nb.earlier.pickles import read_pickle_shard
    from blip3o_nb.features.shards import FeatureDataset
    run(monkeypatch, capsys, "blip3o_extract", "--images", pictures, "--stage", "projected", "--layout", "grid_64", "--out", tmp_path/"out")
    run(monkeypatch, capsys, "blip3o_convert", tmp_path/"out", tmp_path/"out"/"blip3o_grid_embeddings.pkl", "--to", "grid_pickle")
    made = read_pickle_shard(tmp_path/"out"/"blip3o_grid_embeddings.pkl")
    assert made["clip"].shape == made["eva"].shape == (48, 64, 128) and made["clip"].equal(FeatureDataset(tmp_path/"out").column("clip"))

def test_torchrun_splits_the_work(tmp_path, encoders, pictures):
    "Two processes, three columns: the shipped pair, and a DINOv2 with registers of random weights"
    import torch, transformers
    from blip3o_nb.features.encoders import load_encoder
    from blip3o_nb.features.extract import extract
    from blip3o_nb.features.shards import FeatureDataset
    small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14)
    transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**small)).save_pretrained(tmp_path/"dino")
    transformers.BitImageProcessor(size={"shortest_edge": 56}, crop_size=56).save_pretrained(tmp_path/"dino")
    towers = {"clip": "tiny-clip", "eva": "tiny-eva", "dino": str(tmp_path/"dino")}
    args = ["--images", pictures, "--layout", "cls_patch", "--bs", "8", "--shard-size", "16", "--device", "cpu"]
    for name, model in towers.items(): args += ["--encoder", f"{name}={model}"]
    programs = Path(sys.executable).parent
    launch = [programs/"torchrun", "--nproc-per-node", "2", "--no-python", programs/"blip3o_extract"]
    r = subprocess.run([*launch, "--out", tmp_path/"two", *args], env={**os.environ, "OMP_NUM_THREADS": "1"},
                       capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    extract(pictures, tmp_path/"one", encoders | {"dino": load_encoder(towers["dino"], device="cpu")}, **RUN)
    one, two = FeatureDataset(tmp_path/"one"), FeatureDataset(tmp_path/"two")
    assert files(one.folder).keys() == files(two.folder).keys() and one.keys == two.keys
    for column in ("eva", "dino"): # the processes ran with another number of threads
        assert torch.cosine_similarity(one.column(column), two.column(column), dim=-1).min() > .99999

def online(root):
    "Run by each of two processes: a training on images of which some cannot be read, with validation by generation"
    import torch
    from blip3o_nb.core import ranks, seed_everything
    from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
    from blip3o_nb.runs.distributed import DistributedCallback, everyone, processes
    from blip3o_nb.features.encoders import load_encoder
    from blip3o_nb.training.learner import flow_learner
    from blip3o_nb.features.extract import online_dls
    from blip3o_nb.runs.runs import GenerationCallback
    with processes("cpu"):
        dls = online_dls(root/"pictures", {"clip": load_encoder("tiny-clip", device="cpu"), "eva": load_encoder("tiny-eva", device="cpu")}, bs=4, num_workers=1)
        seed_everything(0)
        model = BLIP3oDiT(BLIP3oDiTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                          num_tokens=65, clip_embedding_size=192, eva_embedding_size=256))
        learn = flow_learner(dls, model, precision="fp32", progress=False, cbs=[DistributedCallback(), GenerationCallback(n=8)])
        learn.fit(2)
        weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()]).double()
        all_ = everyone([weights.tolist(), sorted(dls.skipped), learn.record["valid_loss"], learn.record["gen_cosine"]])
        if ranks()[0] == 0: (root/"online.json").write_text(json.dumps(all_))

@pytest.mark.fault("images that cannot be read", "training without stored features, two processes", "it goes on without them, the processes in step")
def test_two_processes_train_online_without_the_unreadable(tmp_path, pictures):
    (tmp_path/"pictures").mkdir()
    for i, f in enumerate(sorted(pictures.glob("*.webp"))): (tmp_path/"pictures"/f.name).write_bytes(b"broken" if i % 7 == 2 else f.read_bytes())
    r = subprocess.run([Path(sys.executable).parent/"torchrun", "--standalone", "--nproc-per-node", "2", __file__, tmp_path, "online"],
                       env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    (w0, bad0, valid0, gen0), (w1, bad1, valid1, gen1) = json.loads((tmp_path/"online.json").read_text())
    assert w0 == w1 and (valid0, gen0) == (valid1, gen1) and all(x == x for x in (*w0, *valid0, *gen0)) # none is NaN
    assert len({*bad0, *bad1}) >= 4, (bad0, bad1)

if __name__ == "__main__": (online if "online" in sys.argv else driver)(Path(sys.argv[1]))
