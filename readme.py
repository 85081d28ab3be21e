"""README.md from nbs/index.ipynb, without Quarto: prose, visible code, and what the stored outputs show.

Figures of other notebooks that the index shows are taken from their stored outputs.
`python readme.py runs/demo` first takes the figures and the gallery of that run over into nbs/, for the index to show."""
import base64, re, shutil, sys
from pathlib import Path
from fastcore.nbio import read_nb

ROOT = Path(__file__).parent
FIGURES = { # name in nbs/images -> notebook, and how the cell begins that draws it
    "two_answers": ("tutorials/your_features", "pipe, held, train ="),
    "when_a_flow": ("experiments/baselines", "fig, axs = plt.subplots(1, 2, figsize=(7.2, 2.6), dpi=110)")}

def take_figure(name, notebook, begins):
    "Write the figure that a cell of a notebook has stored"
    [cell] = [c for c in read_nb(ROOT/f"nbs/{notebook}.ipynb").cells if c.source.startswith(begins)]
    [png] = [o["data"]["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    (ROOT/f"nbs/images/{name}.png").write_bytes(base64.b64decode("".join(png)))

CANDIDATES, SHOWN, COLUMNS = 100, 6, 8 # new drawings whose captions are the candidates of the gallery; shown there, and as images

def drawn_at_random(held, source):
    "Positions of some held-out images that are new drawings of known things"
    import json, torch
    kinds = {k: json.loads(source.files(i)["json"]).get("kind") for i, k in enumerate(source.keys)}
    new = [i for i, k in enumerate(held.keys) if kinds[k] == "drawing"]
    order = torch.randperm(len(new), generator=torch.Generator().manual_seed(0))[:CANDIDATES]
    return torch.tensor(new)[order]

def draw_pictures(run, held, at, made, source):
    "Draw some held-out images beside what the decoder makes of their real and of generated tokens"
    import torch
    from blip3o_nb.generation.pipeline import Pipeline
    from blip3o_nb.generation.pixels import PixelRows
    from blip3o_nb.viz import fig_to_png, show_images
    other = Pipeline.from_pretrained(run/"regression", decoder="tiny-clip")
    real = PixelRows(held, source, other.encoder("clip")).rows(at)/255
    by_other = torch.cat([other(held.rows("eva", i[None])) for i in at])
    drawn = [other.decode(t) for t in (held.rows("clip", at), made, by_other)]
    rows = ["image", "real tokens", "flow", "regression"]
    axs = show_images(torch.cat([real, *drawn]), ncols=len(at), size=.92, rows=rows)
    (ROOT/"nbs/images/demo_pictures.png").write_bytes(fig_to_png(axs[0].figure, 150))

def take_over(run):
    "Take a run's report, draw its gallery, and count how many first captions in it are right"
    import torch
    from blip3o_nb.features.images import read_images
    from blip3o_nb.features.shards import FeatureDataset
    from blip3o_nb.files import data_path, read_json, write_json
    from blip3o_nb.generation.pipeline import Pipeline, nearest
    from blip3o_nb.viz import fig_to_png, gallery, use_style
    use_style()
    pipe, held = Pipeline.from_pretrained(run/"checkpoint"), FeatureDataset(run/"features", "held_out")
    source = read_images(data_path("emoji.tar.gz"))
    at = drawn_at_random(held, source)
    captions = [held.captions[i] for i in at]
    texts = pipe.embed_texts(captions)
    def near(tokens): return [[captions[j] for j in row] for row in nearest(pipe.pool(tokens), texts).tolist()]
    made = torch.cat([pipe(held.rows("eva", i[None]), first=int(i)) for i in at])
    by_real, by_made = near(held.rows("clip", at)), near(made)
    def right(rows): return sum(row[0] == own for row, own in zip(rows, captions))
    report = read_json(run/"report.json")
    report["gallery"] = dict(images=len(captions), real=right(by_real), generated=right(by_made))
    write_json(ROOT/"nbs/demo_report.json", report)
    draw_pictures(run, held, at[:COLUMNS], made[:COLUMNS], source)
    images = [source[source.keys.index(held.keys[i])].image for i in at[:SHOWN]]
    axs = gallery(images, captions[:SHOWN], by_real[:SHOWN], by_made[:SHOWN])
    (ROOT/"nbs/images/demo_gallery.png").write_bytes(fig_to_png(axs[0, 0]))

def cell_markdown(c):
    if c.cell_type == "markdown": return [c.source]
    hidden = re.search(r"#\|\s*(hide|echo:\s*false|default_exp|export)", c.source)
    code = [] if hidden else [f"```python\n{c.source}\n```"]
    shown = [] if re.search(r"#\|\s*hide\b", c.source) else [o.get("data", {}).get("text/markdown") for o in c.get("outputs", [])]
    return code + ["".join(s) for s in shown if s]

if __name__ == "__main__":
    if len(sys.argv) > 1: take_over(Path(sys.argv[1]))
    for name, where in FIGURES.items(): take_figure(name, *where)
    text = "\n\n".join(s for c in read_nb(ROOT/"nbs/index.ipynb").cells for s in cell_markdown(c))
    text = re.sub(r"\]\((images/|\d+_|tutorials/|experiments/|assets/|glossary|contributing|reliability)", r"](nbs/\1", text)
    (ROOT/"README.md").write_text("<!-- made from nbs/index.ipynb by readme.py: edit the notebook -->\n\n" + text.strip() + "\n", encoding="utf-8")
