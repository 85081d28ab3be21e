"""What ships with the package: every image with a source and a licence, every file with a checksum, all of it small."""
import json, tarfile
from collections import Counter
import pytest
from blip3o_nb.core import is_held_out
from blip3o_nb.features.images import read_images
from blip3o_nb.files import data_path, sha256_file

LICENCES = {"noto": "Apache-2.0", "fluent": "MIT", "twemoji": "CC-BY-4.0"}
DATA = data_path(".")

@pytest.fixture(scope="module")
def about():
    with tarfile.open(DATA/"emoji.tar.gz") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    images = {n.removesuffix(".webp") for n in files if n.endswith(".webp")}
    assert set(files) == {f"{k}{e}" for k in images for e in (".webp", ".txt", ".json")}
    return {k: json.loads(files[f"{k}.json"]) for k in sorted(images)}

def test_every_image_has_source_and_licence(about):
    for key, a in about.items():
        assert a.get("source") and a.get("hand") in LICENCES, f"{key}: no source"
        assert a.get("licence") == LICENCES[a["hand"]], f"{key}: licence {a.get('licence')}"
        assert a["hand"] in key

def test_sources_are_named():
    text = (DATA/"emoji-SOURCES.txt").read_text()
    lines = {l.split()[0]: l for l in text.splitlines() if l[:1].isalpha()}
    says = {"noto": "Apache License 2.0", "fluent": "MIT License", "twemoji": "CC-BY 4.0"}
    for hand, licence in says.items(): assert licence in lines[hand]

def test_parts_and_kinds(about):
    kinds = Counter(a.get("kind", "flow") for a in about.values())
    assert kinds["drawing"] >= 500 and set(kinds) == {"flow", "drawing", "concept", "combination"}
    for key, a in about.items(): assert is_held_out(key) == ("kind" in a) == (a["part"] == "held out")

def test_every_file_is_listed():
    "A list of checksums beside each file that has one, and no file besides"
    for sums in DATA.rglob("SHA256SUMS"):
        listed = dict(reversed(l.split()) for l in sums.read_text().splitlines())
        there = {p.name for p in sums.parent.iterdir() if p.is_file()} - {"SHA256SUMS", "emoji-SOURCES.txt"}
        assert there == set(listed)
        for name, sha in listed.items(): assert sha256_file(sums.parent/name) == sha

def test_small_and_captioned():
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) < 25e6
    source = read_images(DATA/"emoji.tar.gz")
    assert len(source) > 4000 and all(source[i].caption for i in range(0, len(source), 50))
