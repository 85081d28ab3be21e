"""README.md from nbs/index.ipynb, without Quarto: prose, visible code, and what the stored outputs show."""
import re
from pathlib import Path
from fastcore.nbio import read_nb

def cell_markdown(c):
    if c.cell_type == "markdown": return [c.source]
    hidden = re.search(r"#\|\s*(hide|echo:\s*false|default_exp|export)", c.source)
    code = [] if hidden else [f"```python\n{c.source}\n```"]
    shown = [] if re.search(r"#\|\s*hide\b", c.source) else [o.get("data", {}).get("text/markdown") for o in c.get("outputs", [])]
    return code + ["".join(s) for s in shown if s]

if __name__ == "__main__":
    root = Path(__file__).parent
    text = "\n\n".join(s for c in read_nb(root/"nbs/index.ipynb").cells for s in cell_markdown(c))
    text = re.sub(r"\]\((images/)", r"](nbs/\1", text)
    (root/"README.md").write_text("<!-- made from nbs/index.ipynb by readme.py: edit the notebook -->\n\n" + text.strip() + "\n", encoding="utf-8")
