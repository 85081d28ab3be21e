"""Every relative link and picture in a notebook and in the README is there, heading and all."""
import json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT/"README.md", *sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(x.startswith(("_", ".")) for x in p.relative_to(ROOT/"nbs").parts))]

def text(page):
    if page.suffix == ".md": return page.read_text()
    return "\n\n".join("".join(c["source"]) for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "markdown")

def anchors(page): # as Quarto and GitHub make them
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.*)", text(page), re.M)}

def broken(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", text(page), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link): continue
        target = page.parent/path if path else page
        if not target.exists() or anchor and anchor not in anchors(target): yield link

@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page): assert not list(broken(page))

def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path/"a.md"
    page.write_text("# One heading\n[a](a.md#one-heading) [b](#one-heading) [c](b.md) [d](#two) `[e](f.md)` [g](https://example.org)")
    assert list(broken(page)) == ["b.md", "#two"]

def test_each_notebook_is_in_the_sidebar():
    listed = set(re.findall(r"[\w/]+\.ipynb", (ROOT/"nbs/sidebar.yml").read_text()))
    assert listed == {str(p.relative_to(ROOT/"nbs")) for p in PAGES[1:]}
