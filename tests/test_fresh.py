"""What counts as the same text of a notebook, and what does not; and that a stale notebook fails."""
import pytest
from fastcore.nbio import mk_cell, mk_display, mk_result, mk_stream, new_nb, write_nb
from conftest import Server
from fresh import check_fresh, difference, same_text, stale_cells

def notebook(*outputs, source="show()"):
    return new_nb([mk_cell(source, outputs=list(outputs))])

def stale(a, b, **kw):
    return list(stale_cells(notebook(*a, **kw), notebook(*b, **kw)))

TMP = "/" + "tmp" # no path of a machine stands in the tree

SAME = {
    "seconds": ("took 12.3 s", "took 9 s"),
    "minutes": ("2 minutes in all", "11 minutes in all"),
    "rate": ("41.2 samples/s, 3.5 it/s, 1.2 GFLOP/s", "80 samples/s, 11 it/s, 0.9 GFLOP/s"),
    "temporary path": (f"wrote {TMP}/tmpab12cd_/run/a.bin", f"wrote /var{TMP}/tmpxyz/run/a.bin"),
    "address": ("<A object at 0x7f00aa00>", "<A object>"),
    "date": ("on 2026-01-02 at 10:11:12", "on 2027-12-31 at 23:59:01"),
    "version": ("torch 2.15.0+cu130", "torch 2.16.1"),
    "free space": ("to download 5.05MB; free 67.6GB", "to download 5.05MB; free 9.1GB"),
    "last digit": ("loss 0.123", "loss 0.124"),
    "two per cent": ("loss 104.2", "loss 102.9"),
    "share": ("28 % of them", "29 % of them"),
    "what rounding leaves": ("off by 3.1e-07", "off by 0.0"),
    "width of a column": ("| a |   1.0 |", "| a | 1.0 |"),
    "sign of a number that is nearly zero": ("-0.00", "0.00"),
}
UNLIKE = {
    "word": ("the flow wins", "the flow loses"),
    "number": ("loss 0.123", "loss 0.128"),
    "count": ("1,000 samples", "1,001 samples"),
    "share": ("28 % of them", "30 % of them"),
    "sign": ("cosine 0.5", "cosine -0.5"),
    "one number more": ("[1, 2]", "[1, 2, 3]"),
    "name with a digit": ("clip_l14", "clip_l16"),
    "power": ("1.5e-03", "1.5e-04"),
    "unit": ("took 3 s", "took 3 kB"),
}

@pytest.mark.parametrize("a, b", SAME.values(), ids=SAME)
def test_same(a, b):
    assert same_text(a, b) and same_text(b, a)

@pytest.mark.parametrize("a, b", UNLIKE.values(), ids=UNLIKE)
def test_unlike(a, b):
    assert not same_text(a, b) and not same_text(b, a)

def test_the_first_difference_is_told():
    assert difference("loss 0.5 after 3 steps", "loss 0.7 after 4 steps") == ("0.5", "0.7")
    assert difference("one [1, 2]", "one [1]") == (",", "]")

def test_outputs_are_compared_one_by_one():
    a, b = mk_stream("stdout", "one\n"), mk_result(text_plain="2", text_markdown="**2**")
    assert not stale([a, b], [a, b])
    assert not stale([a], [mk_stream("stdout", ["o", "ne\n"])]) # as lines, or in two pieces
    assert "nothing in a fresh run" in stale([a, b], [a])[0][1]
    assert "nothing stored" in stale([a], [a, b])[0][1]
    assert stale([b], [mk_result(text_plain="2", text_markdown="**3**")])[0][0] == 0

def test_what_is_not_compared():
    bar, image = mk_stream("stderr", "50%|##  | 1/2"), dict(image_png="abc", text_html="<p>1")
    assert not stale([bar], [])
    assert not stale([mk_display(**image)], [mk_display(**image | dict(image_png="xyz", text_html="<p>2"))])

def test_figures_of_the_machine():
    "Numbers and dtypes may differ, words may not"
    a, b, c = (mk_stream("stdout", s) for s in ("bf16 has 3 of 4", "fp32 has 1 of 4", "fp32 had 1 of 4"))
    assert stale([a], [b])
    assert not stale([a], [b], source="#| machine: the dtype is that of the processor\nshow()")
    assert stale([a], [c], source="#| machine: the dtype is that of the processor\nshow()")

def test_a_stale_notebook_fails(tmp_path):
    "Through nbdev, as every notebook runs; the stored file stays as it is"
    path, cells = tmp_path/"nbs/a.ipynb", ["print('was')", "#| eval: false\nprint('is')"]
    path.parent.mkdir()
    (tmp_path/"pyproject.toml").write_text('[project]\nname = "a"\nversion = "1"\n[tool.nbdev]\n')
    write_nb(new_nb([mk_cell(c, outputs=[mk_stream("stdout", "is\n")]) for c in cells]), path)
    before, server = path.read_bytes(), Server(tmp_path, libraries="os")
    code, said, fresh = server.run(path)
    assert code == 0 and "Success" in said, said
    with pytest.raises(AssertionError) as e:
        check_fresh(path, fresh)
    for words in ("a.ipynb, cell 0: stored stdout:\nis", "fresh stdout:\nwas", "--save"):
        assert words in str(e.value)
    assert "cell 1" not in str(e.value) and path.read_bytes() == before
    path.write_text(path.read_text().replace("'was'", "'is'"))
    check_fresh(path, server.run(path)[2])
    path.write_text(path.read_text().replace("print('is')", "1/0", 1))
    code, said, fresh = server.run(path)
    assert code and "ZeroDivisionError" in said
    server.close()
