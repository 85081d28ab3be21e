"What every part of the benchmark shares: the device, a clock, turns in which the ways take their measurements, and what this machine can do at best."
import json, os, platform, statistics, sys, time
import torch, torch.nn.functional as F
from blip3o_nb.training.optimisation import has_bf16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)

def now():
    if DEVICE == "cuda": torch.cuda.synchronize()
    return time.perf_counter()

def seconds(f):
    begun = now(); f()
    return now() - begun

def turns(ways, n, warm=1):
    "Seconds of each way, `name -> list` (or list of tuples where a way times its own parts): all take a turn, then all again, so that what the machine does meanwhile meets all of them"
    took = {k: [] for k in ways}
    for r in range(warm + n):
        for k in (list(ways) if r % 2 else list(ways)[::-1]):
            t = ways[k]()
            if r >= warm: took[k].append(t)
    return took

def median(xs): return statistics.median(xs)
def spread(xs): return (max(xs) - min(xs))/median(xs)

def product(dtype, n=2048, k=768, m=3072, of="answer"):
    "A way that multiplies two matrices of the sizes of a feed-forward layer (for its `answer`, or for the gradient of its `inputs` or `weights`): seconds for one operation"
    x, w, g = (torch.randn(*s, device=DEVICE).to(DTYPES[dtype]) for s in ((n, k), (m, k), (n, m)))
    multiply, repeat = dict(answer=lambda: F.linear(x, w), inputs=lambda: g @ w, weights=lambda: g.mT @ x)[of], 1 if DEVICE == "cpu" else 50
    def way():
        begun = now()
        for _ in range(repeat): multiply()
        return (now() - begun)/(repeat*2*n*k*m)
    return way

def copy(nbytes=2**28):
    "A way that copies within memory: seconds for a byte, reading and writing counted"
    a, b = (torch.empty(nbytes, dtype=torch.uint8, device=DEVICE).fill_(1) for _ in range(2))
    return lambda: seconds(lambda: b.copy_(a))/(2*nbytes)

def about():
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine()) if sys.platform == "linux" else platform.machine()
    return dict(device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
                python=platform.python_version(), bf16_in_hardware=has_bf16(DEVICE))

def ceilings(n=9):
    "What this machine can do: operations a second of a matrix product in each dtype, bytes a second of a copy"
    t = turns({**{f"matrix product, {d}": product(d) for d in DTYPES}, **{f"for the gradient of {of}, {d}": product(d, of=of) for of in ("inputs", "weights") for d in DTYPES}, "square matrix product, fp32": product("fp32", 2048, 2048, 2048), "copy": copy()}, n, warm=2)
    return {k: dict(rate=1/median(v), spread=spread(v)) for k, v in t.items()}

def in_child(file, *args, env=None):
    "What `python file --child args` prints last, as JSON: for what needs a process of its own"
    import subprocess
    r = subprocess.run([sys.executable, file, "--child", *map(str, args)], capture_output=True, text=True, env={**os.environ, **(env or {})})
    if r.returncode: sys.exit(r.stderr)
    return json.loads(r.stdout.splitlines()[-1])
