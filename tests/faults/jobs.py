"""Commands of this package in forks of one process that has imported everything: they start at once, and can be killed, stopped or starved. Run with a folder; orders come as lines of JSON."""
import json, os, random, resource, signal, sys, time, warnings
from pathlib import Path

def prepare(root):
    "What the commands work on"
    from blip3o_nb.core import toy_features
    from blip3o_nb.features.shards import ShardWriter
    t = toy_features(240, grid=2, clip_dim=12, eva_dim=16)
    with ShardWriter(root/"features", {"clip": {"model": "toy-clip"}, "eva": {"model": "toy-eva"}}, "fp32", shard_size=12) as w: w.add_batch(t["keys"], {"clip": t["clip"], "eva": t["eva"]}, t["captions"], [""]*240)

TRAIN = "--hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1 --batch-size 16 --num-epochs 4 --checkpoint-every 4 --eval-samples 8 --monitor-every 3 --device cpu"
JOBS = { # name -> command line; {out} is what it writes
    "extraction": "blip3o_extract --out {out} --limit 60 --shard-size 6 --bs 6 --device cpu",
    "training": "blip3o_train --embeddings-dir {root}/features --output-dir {out} " + TRAIN,
    "conversion to pickles": "blip3o_convert {root}/features {out} --to pickles --shard-size 6",
    "conversion to shards": "blip3o_convert {root}/pickles {out} --to shards --shard-size 6",
    "evaluation": "blip3o_eval {root}/checkpoint --embeddings-dir {root}/features --out {out} --bs 2 --samples 2",
}

def contents(out):
    "What a job has made, without what tells time"
    from blip3o_nb.files import read_json
    files = {p.relative_to(out).as_posix(): p for p in sorted(Path(out).rglob("*")) if p.is_file() and not p.relative_to(out).parts[0].startswith((".", "states", "log"))}
    if "flow.json" in files: files = {n: files[n] for n in ("model.safetensors", "config.json", "normalizers.safetensors", "result.json")}
    if "report.json" in files: files = {n: files[n] for n in ("report.json", "report.csv")}
    if "converted.json" in files and "manifest.json" in files:
        from blip3o_nb.features.shards import FeatureDataset
        ds = FeatureDataset(out); order = sorted(range(len(ds)), key=ds.keys.__getitem__) # a resumed conversion has other shards
        return [(ds.keys[i], ds.captions[i], *(x.tolist() for x in ds.stored(("clip", "eva"), [i]))) for i in order]
    if any(n.endswith(".pkl") for n in files): # torch writes addresses into its bytes
        from blip3o_nb.earlier.pickles import read_pickle_shard
        return {n: str(read_pickle_shard(p)) if n.endswith(".pkl") else p.read_bytes() for n, p in files.items()}
    return {n: p.read_bytes() if n != "report.json" else str(read_json(p)["rows"]) for n, p in files.items()}

class Forks:
    def __init__(self, root):
        import matplotlib; matplotlib.use("agg")
        import blip3o_nb.commands.cli, blip3o_nb.commands.cli, blip3o_nb.runs.runs, blip3o_nb.judging.evaluate, blip3o_nb.judging.report, blip3o_nb.features.extract, blip3o_nb.features.encoders, blip3o_nb.earlier.pickles, blip3o_nb.training.monitors, blip3o_nb.training.monitors # noqa: all that a job loads
        warnings.simplefilter("ignore")
        self.root, self.known, self.programs = root, {}, {n: getattr(m, n) for m in (blip3o_nb.commands.cli, blip3o_nb.commands.cli) for n in dir(m) if n.startswith("blip3o_")}
    def start(self, job, out, before=None, more="", **env):
        line = JOBS[job].format(out=out, root=self.root).split() + more.split()
        if pid := os.fork(): return pid
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(f"{out}.said", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2); os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.environ.update(env)
            if before: before()
            sys.argv = line; self.programs[line[0]](); code = 0
        except SystemExit as e: code = e.code or 0
        except BaseException: import traceback; traceback.print_exc(); code = 70
        finally:
            sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
    def end(self, pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    def after(self, pid, seconds, sig=signal.SIGKILL):
        "Send a signal after so many seconds; how the process ended, and whether it got it"
        until = time.time() + seconds
        while time.time() < until:
            if (done := os.waitpid(pid, os.WNOHANG))[0]: return os.waitstatus_to_exitcode(done[1]), False
            time.sleep(.002)
        os.kill(pid, sig)
        return self.end(pid), True
    def said(self, out): return Path(f"{out}.said").read_text()
    def whole(self, job):
        "The result of a run that is left alone, and how long it takes"
        if job not in self.known:
            out, start = self.root/f"whole {job}".replace(" ", "-"), time.time()
            if code := self.end(self.start(job, out)): raise RuntimeError(f"{job}: {code} {self.said(out)}")
            self.known[job] = contents(out), time.time() - start
        return self.known[job]
    def again(self, job, out):
        "What is wrong with the result of the same command, left alone"
        code, whole = self.end(self.start(job, out)), self.whole(job)[0]
        if code: return [f"afterwards {code}: {self.said(out)[-500:]}"]
        now = contents(out)
        return [] if now == whole else [f"{out.name} differs: {[k for k in whole if now.get(k) != whole[k]] if isinstance(whole, dict) else ''}"]
    def line(self, out, code, may=(1, 2)):
        "What is wrong with how a command ended: it may say one line"
        said = self.said(out); last = said.replace("\r", "\n").strip().splitlines()[-1:]
        return [f"exit code {code}: {said[-2000:]}"] if code not in may or "Traceback" in said or not last or len(last[0]) > 700 else []

def name(job, what, n=0): return f"{job} {what} {n}".replace(" ", "-")

def stopped(forks, job, times, sig):
    "Stop a job at random moments, `times` times, going on in the same folder until it is done, then in a new one"
    took, rng, stops, runs, wrong, n = forks.whole(job)[1], random.Random(job), 0, 0, [], 0
    while stops < times and runs < 6*times + 12:
        out, here = forks.root/name(job, sig, n), 0; n += 1
        while stops < times and here < 6:
            code, got = forks.after(forks.start(job, out), took*(.05 + rng.random()), sig); runs += 1
            if not got: took *= .8; break # the machine has become faster
            stops += 1; here += 1
            if sig == signal.SIGINT and code: wrong += forks.line(out, code, (130,))
        wrong += forks.again(job, out)
    return dict(provoked=stops, wrong=wrong)

def starved(forks, job, times):
    "No file may grow past some size, as on a disk that is full"
    forks.whole(job)
    wrong, sizes = [], sorted(p.stat().st_size for p in (forks.root/f"whole {job}".replace(" ", "-")).rglob("*") if p.is_file())
    for n in range(times):
        limit, out = max(1, int(sizes[-1]*(n + .5)/times)), forks.root/name(job, "starved", n)
        def before(): sys.stderr = open(os.open(f"/proc/self/fd/{w}", os.O_WRONLY), "w"); os.dup2(w, 2); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        r, w = os.pipe(); pid = forks.start(job, out, before); os.close(w)
        with open(r) as f: said = f.read()
        code = forks.end(pid); Path(f"{out}.said").write_text(said)
        wrong += [f"{limit} bytes: {x}" for x in (*(forks.line(out, code, (0, 1)) if code else []), *forks.again(job, out))]
    return dict(provoked=times, wrong=wrong)

def _no_privilege():
    "Permissions count for this process, whoever it belongs to"
    import ctypes
    class Head(ctypes.Structure): _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
    ctypes.CDLL(None).capset(ctypes.byref(Head(0x20080522, 0)), (ctypes.c_uint32*6)())

def read_only(forks, job):
    "The folder cannot be written: at the start, and when a part is there"
    wrong, took = [], forks.whole(job)[1]
    for n, seconds in enumerate((0, took*.6)):
        out = forks.root/name(job, "read-only", n); out.mkdir()
        stopped = not n or forks.after(forks.start(job, out), seconds)[1] # or it had ended, with all written
        folders = [out, *(p for p in out.rglob("*") if p.is_dir())]; modes = [p.stat().st_mode for p in folders]
        before = sorted(p.relative_to(out) for p in out.rglob("*"))
        for p in folders: p.chmod(0o555)
        code = forks.end(forks.start(job, out, _no_privilege))
        for p, m in zip(folders, modes): p.chmod(m)
        wrong += (forks.line(out, code, (1,)) if stopped or code else []) + ([] if before == sorted(p.relative_to(out) for p in out.rglob("*")) else ["the folder changed"]) + forks.again(job, out)
    return dict(provoked=2, wrong=wrong)

def doubled(forks, job, times):
    "The same command twice at the same time, into one folder"
    wrong = []
    for n in range(times):
        out = forks.root/name(job, "doubled", n)
        pids = [forks.start(job, out), forks.start(job, out)]
        codes = [forks.end(p) for p in pids]
        for c in codes: wrong += forks.line(out, c) if c else []
        wrong += forks.again(job, out)
    return dict(provoked=times, wrong=wrong)

def vanished(forks, job):
    "A shard of the features is gone"
    import shutil
    out, line, wrong = forks.root/name(job, "vanished"), JOBS[job], []
    features = shutil.copytree(forks.root/"features", forks.root/name(job, "features")); (features/"clip"/"shard-00004.safetensors").unlink()
    JOBS[job] = line.replace("{root}/features", str(features))
    try: code = forks.end(forks.start(job, out))
    finally: JOBS[job] = line
    wrong = forks.line(out, code) + ([] if "shard-00004.safetensors" in forks.said(out) else [f"not named: {forks.said(out)}"])
    return dict(provoked=1, wrong=wrong + forks.again(job, out))

def clocks(forks, job):
    "The clock runs backwards, and what a killed run left is from 1970 or 2100"
    wrong, took = [], forks.whole(job)[1]
    def backwards(): now, real = time.time(), time.time; time.time = lambda: 2*now - real() - 86400
    for n, year in enumerate((0, 2**32)):
        out = forks.root/name(job, "clock", n)
        forks.after(forks.start(job, out), took*.7)
        for p in out.rglob("*"): os.utime(p, (year, year))
        code = forks.end(forks.start(job, out, backwards))
        wrong += ([f"exit code {code}: {forks.said(out)[-500:]}"] if code else []) + forks.again(job, out)
    return dict(provoked=2, wrong=wrong)

def _children(pid): return [int(s[0]) for f in Path("/proc").glob("[0-9]*/stat") if (s := _stat(f)) and int(s[3]) == pid]
def _stat(f):
    try: return f.read_text().replace(") ", " ").split()
    except OSError: return None

def worker_dies(forks, times):
    "One of the processes that read pictures is killed"
    wrong, job, killed = [], "extraction", 0
    for n in range(times):
        out = forks.root/name(job, "worker", n)
        pid, until = forks.start(job, out, more="--num-workers 2"), time.time() + 30
        while time.time() < until and not (workers := [c for c in _children(pid)]): time.sleep(.002)
        time.sleep(.02*n)
        if workers:
            try: os.kill(workers[-1], signal.SIGKILL); killed += 1
            except ProcessLookupError: pass
        code = forks.end(pid)
        wrong += (forks.line(out, code, (1,)) if code else []) + forks.again(job, out)
    return dict(provoked=killed, wrong=wrong)

def rank_hangs(forks):
    "One of two processes of a training stops answering"
    import socket
    with socket.socket() as s: s.bind(("localhost", 0)); port = s.getsockname()[1]
    out, job = forks.root/"rank", "training"
    def start(port, **kw): return [forks.start(job, out if not r else forks.root/"rank1", more=f"--output-dir {out} --batch-size 8 --ddp-timeout 6", RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r), MASTER_ADDR="localhost", MASTER_PORT=str(port)) for r in range(2)]
    pids, until = start(port), time.time() + 60
    while time.time() < until and len(list((out/"states").glob("*.pt"))) < 2: time.sleep(.01)
    os.kill(pids[1], signal.SIGSTOP)
    begun = time.time(); code = forks.end(pids[0]); took = time.time() - begun
    os.kill(pids[1], signal.SIGKILL); os.waitpid(pids[1], 0)
    wrong = forks.line(out, code, (1,)) + ([] if took < 20 else [f"{took:.0f} s"])
    codes = [forks.end(p) for p in start(port + 1)]
    return dict(provoked=1, wrong=wrong + ([f"afterwards {codes} {forks.said(out)[-500:]}"] if any(codes) else []), seconds=took)

def serve(root):
    root = Path(root); prepare(root); forks = Forks(root)
    for job, out in (("training", "checkpoint"), ("conversion to pickles", "pickles")): assert forks.end(forks.start(job, root/out)) == 0, forks.said(root/out)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try: answer = globals()[order.pop("do")](forks, **order)
        except Exception as e: import traceback; answer = dict(error=traceback.format_exc()[-1500:])
        print(json.dumps(answer), flush=True)

if __name__ == "__main__": serve(sys.argv[1])
