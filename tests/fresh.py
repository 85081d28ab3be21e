"""Text that a notebook shows, compared with what a fresh run shows.

Images, HTML, widgets and stderr are not compared. What belongs to one run is masked (`MASKS`), numbers may
differ as two kinds of processor do (`same_number`), and a cell whose figures belong to the machine says so
with `#| machine: REASON`: of such a cell the words are compared, and neither numbers nor names of dtypes."""
import os, re
from itertools import zip_longest
from pathlib import Path
from fastcore.nbio import read_nb

ROOT = Path(__file__).parents[1]
NUMBER = r"[-+\u2212]?(?:\d+(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
BEGINS = r"(?<![A-Za-z_\d.])" # a digit within a name or a version is no number
UNITS = r"ns|\u00b5s|us|ms|s|sec|seconds?|min|minutes?|h|hours?"

MASKS = [ # (what, pattern), in this order
    ("temporary path", r"(?:/[\w.-]+)*/tmp[\w.-]*(?:/[\w.+-]+)*"),
    ("path of this checkout", re.escape(str(ROOT)) + r"(?:/[\w.+-]+)*"),
    ("address", r"\b0x[0-9a-fA-F]{6,}"),
    ("date and time", r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?(?:Z|[+-]\d\d:\d\d)?"),
    ("time of day or duration", r"\b\d+:\d\d(?::\d\d)?\b"),
    ("version of a package", r"\b\d+\.\d+\.\d+(?:[.+]\w+)*"),
    ("free space", r"(?<=free )\d[\d.,]*\s?[kMGT]?B\b"),
    ("rate", rf"{BEGINS}{NUMBER}\s?(?:\w+|[A-Z]+B)/(?:{UNITS})\b"),
    ("time", rf"{BEGINS}{NUMBER}\s?(?:{UNITS})\b"),
]
DTYPES = r"\b(?:torch\.)?(?:b?float(?:16|32)|[bf]p?f?16|fp32|half)\b"
ROUNDING = 1e-5 # numbers below it are what rounding leaves: they are all alike
TOLERANCE = .02

def masked(text):
    "`text` with what belongs to one run replaced by its name, and each run of spaces by one"
    text = re.sub(r" at 0x[0-9a-fA-F]+(?=>)", "", text) # as nbdev-clean does
    for what, pattern in MASKS:
        text = re.sub(pattern, f"<{what}>", text)
    return re.sub(r"\s+", " ", text).strip()

def pieces(text):
    "Words and numbers of `text` in turn; a number with its `%`"
    parts = re.split(rf"({BEGINS}{NUMBER}(?:\s?%)?)", text)
    return [p.strip() for p in parts]

def unit(number):
    "One of the last digit printed in `number`"
    digits, _, power = number.partition("e")
    return 10.**(int(power or 0) - len(digits.partition(".")[2]))

def same_number(a, b):
    "Whole numbers are equal; others, and percentages, to within 2 % or one of the last printed digit"
    if a == b:
        return True
    share = a.endswith("%") and b.endswith("%")
    a, b = (x.rstrip(" %").replace(",", "").replace("\u2212", "-") for x in (a, b))
    x, y = float(a), float(b)
    if not share and re.fullmatch(r"[-+]?\d+", a) and re.fullmatch(r"[-+]?\d+", b):
        return x == y
    if max(abs(x), abs(y)) < ROUNDING:
        return True
    return abs(x - y) <= max(TOLERANCE*max(abs(x), abs(y)), 1.001*max(unit(a), unit(b)))

def difference(stored, fresh, machine=False):
    "The first words or numbers that differ; with `machine` numbers and the names of dtypes do not count"
    a, b = pieces(masked(stored)), pieces(masked(fresh))
    if machine:
        a, b = ([re.sub(DTYPES, "<dtype>", w) for w in x[::2]] for x in (a, b))
    for i, (x, y) in enumerate(zip_longest(a, b, fillvalue="")):
        is_number = i % 2 and x and y and not machine
        if not (same_number(x, y) if is_number else x == y):
            return x, y

def same_text(stored, fresh, machine=False):
    "Do the two say the same?"
    return difference(stored, fresh, machine) is None

def texts(cell):
    "`(kind, text)` of each text output of a cell; what it prints to stdout is one"
    said, shown = "", []
    for o in cell.get("outputs", []):
        if o["output_type"] == "stream" and o["name"] == "stdout":
            said += "".join(o["text"])
        if o["output_type"] == "error":
            shown.append(("error", f"{o['ename']}: {o['evalue']}"))
        for kind in ("text/plain", "text/markdown"):
            if kind in o.get("data", {}):
                shown.append((kind, "".join(o["data"][kind])))
    return ([("stdout", said)] if said else []) + shown

def stale_cells(stored, fresh):
    "`(number, what differs)` of each cell of the notebook `stored` whose text is not that of its run `fresh`"
    for i, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        machine, was, now = old.directive("machine") is not None, texts(old), texts(new)
        for (kind, a), (other, b) in zip(was, now):
            first = difference(a, b, machine)
            if kind != other or first:
                yield i, f"stored {kind}:\n{a}\nfresh {other}:\n{b}\nfirst difference: {first}"
        for kind, text in was[len(now):]:
            yield i, f"stored {kind}, and nothing in a fresh run:\n{text}"
        for kind, text in now[len(was):]:
            yield i, f"nothing stored, and {kind} in a fresh run:\n{text}"

def machine_cells(nb):
    "`(number, reason)` of each cell whose figures are not compared"
    return [(i, c.directive("machine")) for i, c in enumerate(nb.cells) if c.directive("machine") is not None]

def check_fresh(path, fresh):
    "Assert that the stored text of the notebook `path` is that of the notebook `fresh`, a run of it just now"
    name = os.path.relpath(path, ROOT)
    stale = [f"{name}, cell {i}: {what}" for i, what in stale_cells(read_nb(path), read_nb(fresh))]
    store = f"store the fresh text: nbdev-test {name} --save, then nbdev-clean"
    assert not stale, "\n\n".join([*stale, store])
