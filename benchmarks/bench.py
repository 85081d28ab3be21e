"""How fast this library is, beside what a user would otherwise run and beside what the machine can do: `make bench`, or
`python benchmarks/bench.py [PART ...] [--quick] [--out FILE] [--gb 20] [--folder DIR] [--run runs/demo]`.

Parts: ceilings, startup, steps, sampling, scaling, learner, extraction, loading. They run one after the other with nothing beside them; within a part the ways take
turns, and a figure is a median. FILE gets the parts that ran, under the name of the device; the others stay, if they are this machine's. `--quick` runs every part that needs no demo on toy sizes, to see that it works."""
import argparse, importlib, json, os, sys, time
from pathlib import Path

PARTS = ("ceilings", "startup", "steps", "sampling", "scaling", "learner", "extraction", "loading")
FILE = Path(__file__).parents[1]/"nbs/experiments/performance.json"

def flat(x, name=""):
    "Figures of a part by dotted names, without the single measurements"
    if isinstance(x, dict):
        for k, v in x.items(): yield from flat(v, f"{name}{' / ' if name else ''}{k}")
    elif not isinstance(x, list): yield name, x

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0]); p.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS)); p.add_argument("--quick", action="store_true")
    p.add_argument("--out", type=Path, default=FILE); p.add_argument("--gb", type=float, default=20.); p.add_argument("--folder"); p.add_argument("--run", type=Path, default=Path("runs/demo")); p.add_argument("--device", choices=("cpu", "cuda"))
    a = p.parse_args()
    if unknown := set(a.parts) - set(PARTS): p.error(f"no part {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    if a.device == "cpu": os.environ["CUDA_VISIBLE_DEVICES"] = "" # for the library and for child processes, too
    import machine
    if a.device == "cuda" != machine.DEVICE: sys.exit("no CUDA device: run `make bench` on the CPU")
    parts = a.parts or PARTS
    if "sampling" in parts and not a.quick and not (a.run/"checkpoint").exists(): sys.exit(f"no checkpoint in {a.run}: run `make demo` first, or give its folder with --run")
    options = dict(loading=dict(gb=a.gb, folder=a.folder), sampling=dict(run=a.run))
    for part in parts:
        begun = time.perf_counter()
        r = machine.ceilings(3 if a.quick else 9) if part == "ceilings" else importlib.import_module(part).main(a.quick, **options.get(part, {}))
        print(f"\n{part} ({time.perf_counter() - begun:.0f} s)", *[f"  {k:76} {v:.4g}" if isinstance(v, float) else f"  {k:76} {v}" for k, v in flat(r)], sep="\n", flush=True)
        record = json.loads(a.out.read_text()) if a.out.exists() else {}
        if record.get(machine.DEVICE, {}).get("about") != (about := machine.about()): record[machine.DEVICE] = {"about": about} # another machine's figures are no company
        record[machine.DEVICE][part] = r
        a.out.write_text(json.dumps(record, indent=1) + "\n")

if __name__ == "__main__": main()
