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

def take_over(run):
    "Copy a run's report, and draw its gallery with four pictures"
    import torch
    from blip3o_nb.files import data_path
    from blip3o_nb.judging.evaluate import text_side
    from blip3o_nb.generation.pipeline import Pipeline, nearest
    from blip3o_nb.judging.report import pictures_of
    from blip3o_nb.features.shards import FeatureDataset
    from blip3o_nb.viz import fig_to_png, gallery, use_style
    use_style()
    shutil.copy(run/"report.json", ROOT/"nbs/demo_report.json")
    pipe, held = Pipeline.from_pretrained(run/"checkpoint"), FeatureDataset(run/"features", "held_out")
    side, shown = text_side(pipe, held), pictures_of(held.keys, data_path("emoji.tar.gz"), 4)
    at = torch.tensor([held.position(k) for k in shown])
    near = lambda tokens: [[side.names[j] for j in row] for row in nearest(pipe.pool(tokens), side.texts).tolist()]
    made = torch.cat([pipe(held.rows("eva", i[None]), first=int(i)) for i in at])
    (ROOT/"nbs/images/demo_gallery.png").write_bytes(fig_to_png(gallery(list(shown.values()), [held.captions[i] for i in at], near(held.rows("clip", at)), near(made))[0, 0]))

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
