"""Hostile and odd input to the sources of pictures: whatever a file, a tar, a folder or a table holds, what can be read is read whole, the rest is named,
and nothing outside is touched."""
import gzip, json, os, pickle, signal, struct, subprocess, sys, tarfile, tracemalloc, warnings, zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import tarfile_samples
from blip3o_nb.files import InputError
from blip3o_nb.features.images import (FORMATS, ImageSource, MAX_BYTES, TarSource, Unreadable, decode_image,
                                       read_captions, read_images, tar_members)
@pytest.fixture(autouse=True)
def watchdog():
    "A reader that goes round in a circle fails instead of hanging"
    def stop(*_): raise BaseException("took more than 20 s")
    old = signal.signal(signal.SIGALRM, stop); signal.alarm(20)
    yield
    signal.alarm(0); signal.signal(signal.SIGALRM, old)

def encode(im, format="png", **kw): b = BytesIO(); im.save(b, format, **kw); return b.getvalue()

def noise(mode="RGB", size=(24, 16), seed=0):
    x = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 4), dtype="uint8")
    if mode == "I;16": return Image.fromarray(x[..., 0].astype("uint16")*257)
    if mode == "F": return Image.fromarray(x[..., 0].astype("float32")/255)
    return Image.fromarray(x, "RGBA" if mode in ("RGBA", "LA", "PA") else None).convert("RGB" if mode != "RGBA" else "RGBA").convert(mode if mode != "PA" else "P")

PNG = encode(noise())

class Given(ImageSource):
    def __init__(self, **files): super().__init__("given"); self._files, self.keys = files, list(files)
    def files(self, i): return {"jpg": self._files[self.keys[i]]}

def info(name, size=0, type=tarfile.REGTYPE, **kw):
    i = tarfile.TarInfo(name); i.size, i.type = size, type
    for k, v in kw.items(): setattr(i, k, v)
    return i

def make_tar(path, members, format=tarfile.GNU_FORMAT, mode="w"):
    with tarfile.open(path, mode, format=format, encoding="utf-8", errors="surrogateescape") as t:
        for m in members:
            m, data = (info(m[0], len(m[1])), m[1]) if isinstance(m, tuple) else (m, None)
            t.addfile(m, BytesIO(data) if data is not None else None)
    return path

def tree(folder): return sorted(str(p) for p in folder.rglob("*"))

# pictures

@pytest.mark.parametrize("format,modes", dict(PNG=("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), JPEG=("L", "RGB", "CMYK"), WEBP=("RGB", "RGBA"), GIF=("1", "L", "P", "RGB", "RGBA"),
                                              BMP=("1", "L", "P", "RGB", "RGBA"), TIFF=("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F")).items())
def test_modes(format, modes):
    for mode in modes:
        for size in ((24, 16), (1, 1)):
            im = decode_image(encode(noise(mode, size), format))
            assert (im.mode, im.size) == ("RGB", size), (format, mode)
        if mode in ("I;16", "F"): assert np.abs(np.asarray(im)[0, 0] - float(np.asarray(noise(mode, size))[0, 0])*255/(65535 if mode == "I;16" else 1)).max() <= 1

def test_transparency_in_a_palette_and_in_one_bit():
    p = Image.new("P", (4, 1)); p.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0]); p.putdata([0, 1, 2, 1])
    for data in (encode(p, transparency=0), encode(p, "gif", transparency=0), encode(p, transparency=bytes([0, 255, 255]))):
        assert list(map(tuple, np.asarray(decode_image(data))[0])) == [(255, 255, 255), (255, 0, 0), (0, 255, 0), (255, 0, 0)]
    one = Image.new("1", (2, 1)); one.putpixel((1, 0), 1)
    assert np.asarray(decode_image(encode(one, transparency=0)))[0].tolist() == [[255]*3]*2

@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame(format):
    red, blue = (Image.new("RGB", (8, 8), c) for c in ("red", "blue"))
    kw = {"lossless": True} if format == "WEBP" else {}
    assert decode_image(encode(red, format, save_all=True, append_images=[blue], **kw)).getpixel((4, 4)) == (255, 0, 0)

def test_phone_formats():
    exif = Image.Exif(); exif[0x0112] = 6
    assert decode_image(encode(noise(), "MPO", save_all=True, append_images=[noise(seed=1)])).size == (24, 16)
    assert decode_image(encode(noise(), "jpeg", exif=exif)).size == (16, 24)

@pytest.mark.fault("damaged EXIF block", "pictures", "the picture is read, without its orientation")
def test_damaged_exif_costs_the_orientation_only():
    exif = Image.Exif(); exif[0x0112] = 6; exif[0x010f] = "maker"; exif[0x8769] = {0x9003: "2020"}
    block = exif.tobytes(); unfit = block.replace(b"\x01\x0f\0\x02", b"\x01\x08\0\x02") # a tag of the wrong kind: it can be read, not written
    assert unfit != block
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for format in ("jpeg", "webp"):
            assert decode_image(encode(noise(), format, exif=unfit)).size == (16, 24)
            for bad in (b"?xif" + block[4:], b"Exif\0\0" + b"\xff"*40, block[:40], block[:25], block[:13] + b"\xff" + block[14:]):
                assert decode_image(encode(noise(), format, exif=bad)).size in ((24, 16), (16, 24)), bad

@pytest.mark.fault("picture cut short at any place", "pictures", "whole, or skipped")
@pytest.mark.parametrize("format", FORMATS)
def test_cut_short_is_whole_or_refused(format):
    data = encode(noise(), format); whole = np.asarray(decode_image(data))
    for n in [*range(0, len(data), max(1, len(data)//60)), *range(len(data) - 12, len(data))]:
        try: got = np.asarray(decode_image(data[:n]))
        except Exception: continue
        assert n > len(data)*.6 and np.array_equal(got, whole), f"{n} of {len(data)} bytes gave another picture" # the rest was a trailer

@pytest.mark.fault("picture with wrong bytes", "pictures", "a picture, or skipped with a reason")
@pytest.mark.parametrize("format", FORMATS)
def test_wrong_bytes_end_in_a_picture_or_a_reason(format):
    rng, data = np.random.default_rng(0), encode(noise(), format)
    broken = {}
    for n in range(150):
        b = bytearray(data)
        for at in rng.integers(0, len(b) if n % 2 else min(len(b), 80), 3): b[at] = rng.integers(256)
        broken[str(n)] = bytes(b)
    source = Given(**broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = [s.key for s in source]
    assert len(good) + len(source.skipped) == 150 and source.skipped and all("\n" not in r and "0x" not in r for r in source.skipped.values())

def bombs():
    side = 60_000
    chunk = lambda kind, d: struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))
    yield "png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    jpeg = bytearray(encode(noise(), "jpeg")); at = jpeg.index(b"\xff\xc0"); jpeg[at + 5:at + 9] = struct.pack(">HH", side, side); yield "jpeg", bytes(jpeg)
    yield "gif", encode(noise("P"), "gif").replace(struct.pack("<HH", 24, 16), struct.pack("<HH", side, side))
    bmp = bytearray(encode(noise(), "bmp")); bmp[18:26] = struct.pack("<ii", side, side); yield "bmp", bytes(bmp)
    entry = lambda tag, value: struct.pack("<HHII", tag, 4, 1, value)
    yield "tiff", b"II*\0\x08\0\0\0" + struct.pack("<H", 7) + b"".join(entry(*e) for e in ((256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (279, 99))) + bytes(4)
    big = 16_383
    vp8l = b"\x2f" + struct.pack("<I", (big - 1) | (big - 1) << 14) + bytes(20)
    yield "webp", b"RIFF" + struct.pack("<I", 4 + 8 + len(vp8l) + len(vp8l) % 2) + b"WEBPVP8L" + struct.pack("<I", len(vp8l)) + vp8l + bytes(len(vp8l) % 2)

@pytest.mark.fault("picture that says it has 60,000 x 60,000 pixels", "pictures", "skipped by its header, with less than 5 MB")
@pytest.mark.parametrize("name,data", [*bombs()], ids=lambda x: x if isinstance(x, str) else "")
def test_bombs_are_refused_by_their_header(name, data):
    tracemalloc.start()
    with pytest.raises(Unreadable, match="DecompressionBomb|decoder|not a webp"): Given(a=data)[0]
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 5e6

@pytest.mark.fault("files whose decoders would start another program", "pictures", "skipped; nothing is started")
def test_no_other_program_is_started(monkeypatch):
    def started(*a, **k): raise BaseException(f"started {a}")
    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn")): monkeypatch.setattr(module, name, started)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    source = Given(eps=eps, pdf=b"%PDF-1.4\n%%EOF", svg=b"<svg xmlns='http://www.w3.org/2000/svg'/>", html=b"<html>", ppm=b"P6 1 1 255\nabc", ico=encode(noise(), "ico"), avif=b"\0\0\0\x20ftypavif" + bytes(30))
    assert list(source) == [] and set(source.skipped.values()) == {"not a webp, jpeg, png, gif, bmp or tiff"}

@pytest.mark.fault("picture that is an archive or a script as well", "pictures", "the picture that it begins as")
def test_polyglots_are_the_picture_that_they_begin_as():
    import zipfile
    z = BytesIO()
    with zipfile.ZipFile(z, "w") as f: f.writestr("../../evil.txt", "x")
    jpeg, script = encode(noise(), "jpeg"), b"\n<script>alert(1)</script>"
    for a in (jpeg, PNG, encode(noise(), "gif"), encode(noise(), "bmp"), encode(noise(), "webp")):
        for tail in (z.getvalue(), script, jpeg): assert np.array_equal(decode_image(a), decode_image(a + tail))
    assert list(Given(zip_first=z.getvalue() + jpeg)) == []

# tars

@pytest.mark.fault("tar with links, devices, pipes, absolute names and ..", "pictures", "regular members are read; nothing is written")
def test_only_regular_members_are_read_and_nothing_is_written(tmp_path):
    (tmp_path/"in").mkdir(); (tmp_path/"secret.txt").write_text("secret")
    path = make_tar(tmp_path/"in/hostile.tar", [("../up.png", PNG), ("/abs.png", PNG), ("/abs.txt", b"mine"), info("link.png", type=tarfile.SYMTYPE, linkname="../secret.txt"),
        info("hard.png", type=tarfile.LNKTYPE, linkname="/abs.png"), info("dev.png", type=tarfile.CHRTYPE, devmajor=1, devminor=3), info("pipe.png", type=tarfile.FIFOTYPE),
        info("folder.png", type=tarfile.DIRTYPE), info("a.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), ("a.png", PNG)])
    before = tree(tmp_path)
    source = read_images(path)
    assert [(s.key, s.caption) for s in source] == [("../up", ""), ("/abs", "mine"), ("a", "")] and source.skipped == {} and tree(tmp_path) == before

def raw(name, size, type=b"0", data=b""):
    "A header with that size field, in base 256 where it is negative or large"
    b = bytearray(info(name).tobuf(tarfile.GNU_FORMAT)); b[156:157] = type
    b[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else (b"\x80" if size >= 0 else b"\xff") + (size % 256**11).to_bytes(11, "big")
    b[148:156] = b" "*8; b[148:156] = b"%06o\0 " % sum(b)
    return bytes(b) + data + bytes(-len(data) % 512)

def pax(fields, name="a.png", data=PNG, kind=b"x"):
    record = b"".join(next(r for n in range(1, 99) if len(r := b"%d %s=%s\n" % (n + len(k) + len(v), k.encode(), v)) == n + len(k) + len(v)) for k, v in fields)
    return raw("pax", len(record), kind, record) + raw(name, len(data), data=data)

END = bytes(1024)
HOSTILE = {
    "claims 2**40 bytes": raw("a.png", 2**40, data=PNG) + END, "negative size": raw("a.png", -512) + END, "negative size of another type": raw("a.png", -1024, b"Z") + END,
    "name of 2**33 bytes": raw("@", 2**33, b"L", b"x"*512) + END, "negative name": raw("@", -512, b"L") + END, "name of 10,000 bytes": raw("@", 10_000, b"L", b"x"*10_000) + raw("a.png", len(PNG), data=PNG) + END,
    "5,000 names in a row": raw("@", 2, b"L", b"ab")*5000 + END, "sparse": raw("a.png", len(PNG), b"S", PNG) + END,
    "pax size negative": pax([("size", b"-512")]) + END, "pax size beyond": pax([("size", b"99999999")]) + END, "pax of 2**17 bytes": raw("pax", 2**17, b"x", bytes(2**17)) + raw("a.png", 0) + END,
    "pax sparse 0.0": pax([("GNU.sparse.size", b"9"), ("GNU.sparse.numblocks", b"1"), ("GNU.sparse.offset", b"0"), ("GNU.sparse.numbytes", b"9")]) + END,
    "pax sparse 0.1": pax([("GNU.sparse.map", b"0,9")]) + END, "pax sparse 1.0": pax([("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")], data=b"9"*400 + b"\n") + END,
    "pax real size": pax([("GNU.sparse.realsize", b"%d" % 2**40)]) + END, "pax real size of nothing": pax([("GNU.sparse.realsize", b"x")]) + END,
    "empty": b"", "no tar": b"x"*2000, "a picture": PNG, "two in one": (raw("a.png", len(PNG), data=PNG) + END)*2}

@pytest.mark.fault("tar with impossible headers", "pictures", "refused in one line that names the file, with less than 30 MB")
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_hostile_headers_are_one_error_that_names_the_file(name, zipped, tmp_path):
    path = tmp_path/"hostile.tar"
    path.write_bytes(gzip.compress(HOSTILE[name], 1) if zipped else HOSTILE[name])
    tracemalloc.start()
    with pytest.raises(InputError, match="hostile.tar is no complete tar") as e: read_images(path)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert "\n" not in str(e.value) and peak < 30e6

@pytest.mark.fault("tar header of 60,000 digits", "pictures", "read or refused, in time")
def test_a_header_of_digits_is_parsed_in_time(tmp_path):
    (tmp_path/"a.tar").write_bytes(raw("pax", 60_000, b"x", b"9"*60_000) + raw("a.png", len(PNG), data=PNG) + END)
    try: assert read_images(tmp_path/"a.tar").keys == ["a"] # older releases of Python ignore the header
    except InputError as e: assert "no complete tar" in str(e)

def test_odd_but_harmless_pax_fields(tmp_path):
    (tmp_path/"a.tar").write_bytes(raw("g", 17, b"g", b"17 comment=hello\n") + pax([("size", b"nothing")], "empty.png", b"") + pax([("size", b"%d" % len(PNG)), ("path", "bild/ä.png".encode())]) + END)
    source = read_images(tmp_path/"a.tar")
    assert source.keys == ["empty", "bild/ä"] and [s.key for s in source] == ["bild/ä"] and source.skipped == {"empty": "an empty file"}

@pytest.mark.fault("picture of more than 256 MB in a tar", "pictures", "skipped with a reason, with less than 5 MB")
def test_a_large_member_is_neither_read_nor_held(tmp_path):
    size = MAX_BYTES + 1
    with open(tmp_path/"large.tar", "wb") as f: # a file with a hole: it takes no disk space
        f.write(raw("large.png", size)); f.seek(-(-size//512)*512, 1); f.write(raw("a.png", len(PNG), data=PNG) + END)
    tracemalloc.start()
    source = read_images(tmp_path/"large.tar")
    assert [s.key for s in source] == ["a"] and source.skipped == {"large": f"a file of more than {MAX_BYTES:,} bytes"}
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()

@pytest.mark.fault("gzip bomb", "pictures", "read through or refused, with less than 5 MB")
def test_gzip_of_zeros_takes_no_memory(tmp_path):
    zeros = gzip.compress(bytes(2**24), 1)
    (tmp_path/"zeros.tar.gz").write_bytes(zeros*8)                                                                  # an empty archive and 128 MB of zeros behind it
    (tmp_path/"large.tar.gz").write_bytes(gzip.compress(raw("a.png", 2**28 + 1024)) + zeros*16 + gzip.compress(bytes(1024) + END)) # a picture of 256 MB
    (tmp_path/"twice.tar.gz").write_bytes(gzip.compress((tmp_path/"large.tar.gz").read_bytes(), 1))
    tracemalloc.start()
    assert len(read_images(tmp_path/"zeros.tar.gz")) == 0
    source = read_images(tmp_path/"large.tar.gz")
    with pytest.raises(Unreadable, match="a file of more than"): source[0]
    with pytest.raises(InputError, match="no complete tar"): read_images(tmp_path/"twice.tar.gz")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()

@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads are counted by Linux")
def test_listing_reads_headers_only(tmp_path):
    make_tar(tmp_path/"a.tar", [(f"{i:03}.png", PNG + bytes(2**20)) for i in range(40)])
    def read(): return int(Path("/proc/self/io").read_text().split()[1])
    start = read(); source = read_images(tmp_path/"a.tar"); listed = read() - start
    assert len(source) == 40 and listed < .05*os.path.getsize(tmp_path/"a.tar")
    start = read(); source[17]
    assert read() - start < 2*2**20

ODD_NAMES = ["a/b.v2/c.png", "a/b.v2/c.txt", "A.PNG", "a.TXT", "./x.jpg", "x.seg.png", "x.jpg.txt", "__meta__/y.png", "__info__", "noext", "d.", ".hidden.png", "a b.png", "a b.json", "é.png", "t\tn.png",
             "k"*150 + ".png", "l/"*120 + "m.png", "n.jpeg", "n.png", "n.txt", "o.txt", "o.webp", "b\udce9.png", "b\udce9.txt", "__z.png", "q.__key__", "r.png"]

def reference(path):
    "What webdataset reads from end to end: [(key, {extension: bytes})]"
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in tarfile_samples([dict(url=str(path))], handler=lambda e: True)]

@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_random_access_equals_webdataset(format, mode, tmp_path):
    rng = np.random.default_rng(0)
    path = make_tar(tmp_path/"odd.tar", [(n, rng.bytes(int(rng.integers(0, 3000)))) for n in ODD_NAMES + [f"{i:03}.{e}" for i in range(30) for e in ("txt", "png", "json")]], format, mode)
    source, want = read_images(path), [(k, f) for k, f in reference(path) if set(f) & {"png", "jpg", "jpeg", "webp"}]
    want = [(k.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), f) for k, f in want]
    assert source.keys == [k for k, _ in want] and len(source) > 40
    for i in rng.permutation(len(source)).tolist() + [-1]:
        got = source.files(i)
        assert got == {e: b for e, b in want[i][1].items() if e in got} and {"txt", "json"} & set(want[i][1]) <= set(got)
    with pytest.raises(IndexError): source[len(source)]

@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_in_any_order_are_the_same_samples(mode, tmp_path):
    rng = np.random.default_rng(0)
    texts = {"txt": lambda i: f"caption {i}".encode(), "json": lambda i: b'{"caption": "other"}', "cls": lambda i: b"7"}
    members = [(f"{i:02}.{e}", encode(noise(seed=i)) if e == "png" else texts[e](i)) for i in range(12) for e in ("png", *texts)]
    for _ in range(20):
        order = [members[i] for i in rng.permutation(len(members))]
        source = read_images(make_tar(tmp_path/"a.tar", order, mode=mode))
        first = list(dict.fromkeys(n.split(".")[0] for n, _ in order))
        assert [(s.key, s.caption) for s in source] == [(k, f"caption {int(k)}") for k in first] and source.skipped == {}
        for i in rng.permutation(len(source)).tolist():
            assert source.files(i) == {e: b for n, b in order for k, e in [n.split(".")] if k == source.keys[i] and e != "cls"}

def test_keys_across_archives_lose_no_picture(tmp_path):
    pictures = [encode(noise(seed=i)) for i in range(9)]
    for n, (folder, names) in enumerate(dict(a=["0", "1", "2"], b=["0", "1", "00000/2"], c=["0", "00000/0", "2"]).items()):
        (tmp_path/folder).mkdir(); make_tar(tmp_path/folder/"00000.tar", [(f"{k}.png", pictures[3*n + i]) for i, k in enumerate(names)] + [("0.png", PNG), ("alone.txt", b"")])
    source = read_images(tmp_path/"{a,b,c}/00000.tar")
    assert [source.files(i)["png"] for i in range(9)] == pictures and len(set(source.keys)) == 9 and source.keys[:5] == ["0", "1", "2", "00000/0", "00000/1"]
    assert source.skipped == {"00000/0.png": "a second sample under this key", "00000/alone.txt": "no picture among its files"} and not set(source.skipped) & set(source.keys)
    assert read_images(tmp_path/"{a,b}/00000.tar").keys == source.keys[:6], "keys do not change when archives are added at the end"

def test_ways_to_name_archives(tmp_path, monkeypatch):
    for n in (0, 1, 2, 10): make_tar(tmp_path/f"{n:05}.tar", [(f"{n}.png", PNG)])
    def keys(path): return read_images(path).keys
    monkeypatch.chdir(tmp_path)
    assert keys("{00000..00002}.tar") == keys("0000?.tar") == keys([Path("00000.tar"), "0000[12].tar"]) == ["0", "1", "2"]
    assert keys("*.tar") == keys(tmp_path) == keys("**/*.tar") == ["0", "1", "2", "10"]
    assert keys(["00010.tar", "00001.tar"]) == ["10", "1"] and keys(["00001.tar", "*.tar"]) == ["1", "0", "2", "10"]
    Path("odd{1..2}[x].tar").write_bytes(Path("00001.tar").read_bytes())
    assert keys("odd{1..2}[x].tar") == ["1"]
    for bad in ("{00000..00003}.tar", "pipe:cat 00000.tar", "https://example.org/00000.tar", "nowhere", "{0", []):
        with pytest.raises(InputError, match="no images|unbalanced"): read_images(bad)
    (tmp_path/"void").mkdir()
    with pytest.raises(InputError, match="neither pictures nor tars"): read_images("void")
    with pytest.raises(InputError, match="no complete tar"): read_images(["void"])

@pytest.mark.fault("tar that is cut or removed while it is read", "pictures", "one line that names it")
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_that_changes_ends_the_run(mode, tmp_path):
    path = make_tar(tmp_path/"a.tar", [(f"{i}.png", np.random.default_rng(i).bytes(40_000)) for i in range(20)], mode=mode)
    source = read_images(path); data = path.read_bytes()
    path.write_bytes(data[:len(data)//2])
    with pytest.raises(InputError, match="a.tar cannot be read any more"): source[19]
    path.unlink()
    with pytest.raises(InputError, match="a.tar cannot be read any more"): pickle.loads(pickle.dumps(source))[0]

# processes and threads

@pytest.fixture
def mixed(tmp_path):
    "A plain and a gzipped archive with some bad pictures"
    files = lambda a, bad: [m for i in range(30) for m in ((f"{a}{i:02}.png", b"bad" if i % 10 == bad else encode(noise(seed=100*bad + i))), (f"{a}{i:02}.txt", f"{a} {i}".encode()))]
    make_tar(tmp_path/"0.tar", files("a", 3)); make_tar(tmp_path/"1.tar.gz", files("b", 4), mode="w:gz")
    return read_images([tmp_path/"0.tar", tmp_path/"1.tar.gz"])

def seen(s): return s.key, s.caption, s.image_hash

class Tried:
    "A map-style dataset that gives reasons instead of raising"
    def __init__(self, source): self.source = source
    def __len__(self): return len(self.source)
    def __getitem__(self, i):
        try: return seen(self.source[i])
        except Unreadable as e: return self.source.keys[i], str(e)

def test_workers_read_the_same(mixed):
    from torch.utils.data import DataLoader
    alone = [Tried(mixed)[i] for i in range(60)]
    assert sum(len(x) == 2 for x in alone) == 6 and [x for x in alone if len(x) == 3] == [seen(s) for s in mixed]
    mixed.files(59) # the archive is open when the workers are forked
    loader = iter(DataLoader(Tried(mixed), batch_size=None, num_workers=2, prefetch_factor=2))
    assert [(tuple(next(loader)), Tried(mixed)[i])[0] for i in range(60)] == alone, "workers and this process read in turns"
    batches = list(DataLoader(Tried(mixed), batch_size=7, num_workers=2, collate_fn=list, sampler=range(59, -1, -1)))
    assert sum(batches, []) == alone[::-1]

def test_spawned_workers_and_pickles(mixed):
    mixed.files(59)
    code = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print([s[i].image_hash for i in (59, 0, 31)])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    r = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(mixed), capture_output=True, env=env)
    assert r.stdout.decode().strip() == str([mixed[i].image_hash for i in (59, 0, 31)]), r.stderr.decode()

def test_threads_do_not_disturb_each_other(mixed):
    alone, order = [mixed.files(i) for i in range(60)], np.random.default_rng(0).integers(0, 60, 300).tolist()
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(mixed.files, order)) == [alone[i] for i in order]

def test_an_index_of_many_is_compact(tmp_path):
    near = [(f"{i:05}.{e}", b"x") for i in range(3000) for e in ("png", "txt")]
    for members in (near, sorted(near, key=lambda m: m[0][-3:]), sorted(near, key=lambda m: m[0][-3:], reverse=True)):
        tracemalloc.start()
        source = read_images(make_tar(tmp_path/"many.tar", members))
        held = tracemalloc.get_traced_memory()[0]; tracemalloc.stop()
        assert len(source) == 3000 and len(pickle.dumps(source)) < 3000*70 and held < 3000*500

# folders

@pytest.mark.fault("folder with pipes, loops, links out of it, names that are no text", "pictures", "skipped with a reason; the others are read")
def test_folder(tmp_path):
    root, out = tmp_path/"root", tmp_path/"out"
    for d in (root/"sub.v1/deep", out): d.mkdir(parents=True)
    out_files = {"secret.txt": b"secret", "secret.png": PNG}
    for n, b in out_files.items(): (out/n).write_bytes(b)
    for n, b in {"a.JPG": PNG, "a.txt": b"caption a", "a.png": PNG, "sub.v1/b.c.png": PNG, "sub.v1/b.c.json": b'{"text": "bc"}', "sub.v1/deep/d.tiff": encode(noise(), "tiff"), "e.png": b"", "x.png.gif": b"no", "x.png": PNG,
                 "x.jpg": PNG, ".h.png": PNG, "note.md": b""}.items(): (root/n).write_bytes(b)
    (root/".cache").mkdir(); (root/".cache/z.png").write_bytes(PNG)
    os.mkfifo(root/"fifo.png"); os.mkfifo(root/"sub.v1/b.c.txt")
    for name, to in {"out.png": out/"secret.png", "up.png": "../out/secret.png", "in.png": "a.png", "in.txt": out/"secret.txt", "broken.png": "none.png", "loop.png": "loop.png", "self": ".", "outside": out}.items(): (root/name).symlink_to(to)
    (root/"link.d").symlink_to("sub.v1")
    os.close(os.open(os.fsencode(root) + b"/f\xe9.png", os.O_CREAT)); Path(os.fsdecode(os.fsencode(root) + b"/f\xe9.png")).write_bytes(PNG)
    source = read_images(root); listed = dict(source.skipped)
    assert {s.key: s.caption for s in source} == {"a": "caption a", "f\ufffd": "", "in": "", "sub.v1/b.c": "bc", "sub.v1/deep/d": "", "x": ""}
    assert set(listed) == {"a.png", "fifo.png", "out.png", "up.png", "broken.png", "loop.png", "self", "outside", "link.d", "x.png (file)",
                           "in.txt", "sub.v1/b.c.txt"} and not set(listed) & set(source.keys)
    assert {k: v for k, v in source.skipped.items() if k not in listed} == {"e": "an empty file", "x.png": "not a webp, jpeg, png, gif, bmp or tiff"}
    assert [seen(s) for s in pickle.loads(pickle.dumps(source))] == [seen(s) for s in source]
    (root/"a.JPG").unlink(); (root/"x.jpg").unlink()
    with pytest.raises(Unreadable, match="FileNotFoundError"): source[0]
    root.rename(tmp_path/"moved")
    with pytest.raises(InputError, match="cannot be read any more"): source[1]

def test_folder_of_pictures_and_archives(tmp_path):
    (tmp_path/"a.png").write_bytes(PNG); make_tar(tmp_path/"b.tar", [("c.png", PNG)])
    source = read_images(str(tmp_path))
    assert (source.keys, source.skipped, source.path) == (["a"], {"b.tar": "an archive in a folder of pictures"}, str(tmp_path))

def test_tars_beside_what_is_not_read(tmp_path):
    make_tar(tmp_path/"A.TAR", [("a.png", PNG), ("a", b""), ("d/._a.png", b"")]); make_tar(tmp_path/"b.tar.gz", [("b.png", PNG)], mode="w:gz")
    (tmp_path/"c.zip").write_bytes(b""); (tmp_path/"logo.svg").write_bytes(b"<svg/>"); (tmp_path/"d.tar").symlink_to("nowhere")
    source = read_images(tmp_path)
    assert source.keys == ["a", "b"] and set(source.skipped) == {"A/a", "c.zip", "logo.svg", "d.tar"}
    assert read_images(tmp_path/"A.TAR").skipped == {"a (file)": "no suffix, so it belongs to no sample"}

def test_a_pipe_without_a_suffix_is_not_opened(tmp_path):
    (tmp_path/"a.png").write_bytes(PNG); os.mkfifo(tmp_path/"pipe"); (tmp_path/"out").symlink_to("/dev/zero"); (tmp_path/"numbers.csv").symlink_to("/dev/zero")
    assert read_images(tmp_path).skipped == {}

# tables

FAULTS = {"too many.csv": (b"file_name,text\na.png,x,y\n", 2), "too few.csv": (b"file_name,text\na.png,x\n\nb.png\n", 4), "quote.csv": (b'file_name,text\na.png,"x\nb.png,y\n', 3),
          "after quote.csv": (b'file_name,text\na.png,"x"y\n', 2), "no key.csv": (b"name,text\na.png,x\n", 2), "empty key.csv": (b"key,text\na,x\n,y\n", 3), "latin.csv": ("key,text\na,x\nb,é\n".encode("latin-1"), 3),
          "long.csv": (b"key,text\na," + b"x"*200_000 + b"\n", 2), "cut.jsonl": (b'{"key": "a"}\n\n{"key": "b"', 3), "list.jsonl": (b'{"key": "a"}\n["b"]\n', 2), "no key.jsonl": (b'{"text": "a"}\n', 1),
          "utf16.jsonl": ('{"key": "a"}\n'.encode("utf-16")[:-1], 1), "zero.csv": (b"key,text\na,x\nb,\0\n", 3), "deep.jsonl": (b"["*100_000, 1), "digits.jsonl": (b'{"key": ' + b"9"*5000 + b"}", 1)}

@pytest.mark.fault("table of captions with a fault", "pictures", "refused in one line with file and number of the line")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_table_has_its_line(name, tmp_path):
    data, line = FAULTS[name]
    (tmp_path/name).write_bytes(data); (tmp_path/"a.png").write_bytes(PNG)
    with pytest.raises(InputError) as e: read_images(tmp_path, captions=tmp_path/name)
    assert f"{name}, line {line}:" in str(e.value) and "\n" not in str(e.value)

def test_tables(tmp_path):
    root = tmp_path/"root"; root.mkdir()
    for k in ("a", "b", "c.v2"): (root/f"{k}.png").write_bytes(PNG)
    (root/"b.txt").write_text("beside"); (root/"metadata.csv").write_bytes(b"\xef\xbb\xbfFile_Name, label,Caption\r\na.png,1,\"first, \"\"one\"\"\"\r\nb.png,2,\r\n")
    def captions(**kw): return [s.caption for s in read_images(root, **kw)]
    assert captions() == ['first, "one"', "beside", ""]
    def table(name, text): (tmp_path/name).write_text(text); return {"captions": tmp_path/name}
    assert captions(**table("t.tsv", f"filepath\ttitle\n{root}/a.png\tabsolute, one\n./c.v2.png\ttwo\n")) == ["absolute, one", "beside", "two"]
    assert captions(**table("t.jsonl", '{"key": "a", "caption": ["x", "y"]}\n{"image": "c.v2", "text": "\\ud800"}\n')) == ["x", "beside", "\ufffd"]
    for t in (table("e.csv", ""), table("h.csv", "key,text\n"), table("o.csv", "key,text\nz,1\n"), table("n.csv", "key,label\na,1\n")):
        with pytest.raises(InputError, match="has no caption for any picture"): captions(**t)
    with pytest.raises(InputError, match="cannot read .*none.csv"): captions(captions=tmp_path/"none.csv")
    (root/"metadata.csv").write_text("file_name,label\na.png,1\n")
    assert captions() == ["", "beside", ""], "labels without captions are no fault"
    (root/"metadata.csv").unlink(); (tmp_path/"private.csv").write_text("key,text\na,secret\n"); (root/"captions.csv").symlink_to(tmp_path/"private.csv")
    assert captions() == ["", "beside", ""], "a table outside is not followed"

# Hugging Face datasets

@pytest.fixture
def hf(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path/"cache"); datasets.disable_progress_bars()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True); monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets

def test_dataset_saved_locally(hf, tmp_path):
    pictures = [encode(noise(seed=i), "jpeg") for i in range(12)]
    rows = dict(n=list(range(12)), image_id=[f"k{i % 11}" if i else None for i in range(12)], photo=[dict(bytes=b if i != 5 else b"bad", path=None) for i, b in enumerate(pictures)], url=["u"]*12, text=[["one", "two"]]*12)
    features = hf.Features(n=hf.Value("int64"), image_id=hf.Value("string"), photo=hf.Image(), url=hf.Value("string"), text=hf.List(hf.Value("string")))
    ds = hf.Dataset.from_dict(rows, features=features)
    hf.DatasetDict(train=ds, test=ds.select([3])).save_to_disk(tmp_path/"both"); ds.save_to_disk(tmp_path/"saved")
    (tmp_path/"parquet").mkdir(); ds.to_parquet(tmp_path/"parquet/train-0.parquet"); ds.select([3]).to_parquet(tmp_path/"parquet/test-0.parquet")
    for name in ("both", "saved", "parquet"):
        source = read_images(f"datasets:{tmp_path/name}")
        assert source.keys == ["00", *(f"k{i}" for i in range(1, 11)), "k0"] and [source.files(i)["image"] for i in (1, 11)] == [pictures[1], pictures[11]]
        assert [s.key for s in source] == [k for k in source.keys if k != "k5"] and source.skipped == {"k5": "not a webp, jpeg, png, gif, bmp or tiff"} and source[0].caption == "one"
        assert [seen(s) for s in pickle.loads(pickle.dumps(source))] == [seen(s) for s in source]
        if name != "saved": assert read_images(f"datasets:{tmp_path/name}#test").keys == ["k3"]
    for bad in (f"{tmp_path/'both'}#none", f"{tmp_path/'parquet'}#none", str(tmp_path/"nowhere"), "nobody/nothing"):
        with pytest.raises(InputError, match="cannot be loaded") as e: read_images(f"datasets:{bad}")
        assert "\n" not in str(e.value)
    hf.Dataset.from_dict(dict(a=[1])).save_to_disk(tmp_path/"none")
    with pytest.raises(InputError, match="no image column among a"): read_images(f"datasets:{tmp_path/'none'}")

@pytest.mark.fault("dataset whose rows name files elsewhere", "pictures", "skipped; no file outside is read")
def test_dataset_paths_stay_inside(hf, tmp_path):
    inside = tmp_path/"set"; inside.mkdir()
    for f in (inside/"in.png", tmp_path/"out.png"): f.write_bytes(PNG)
    (inside/"link.png").symlink_to(tmp_path/"out.png")
    paths = [str(inside/"in.png"), str(tmp_path/"out.png"), f"{inside}/../out.png", str(inside/"link.png"), "https://example.org/a.png", "out.png", None]
    import pyarrow as pa, pyarrow.parquet as pq
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    meta = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "key": {"dtype": "string", "_type": "Value"}}}})}
    rows = [dict(bytes=None, path=p) for p in paths] + [None]
    pq.write_table(pa.table({"image": pa.array(rows, kind), "key": list("abcdefgh")}).replace_schema_metadata(meta), inside/"train.parquet")
    (inside/"in.png").rename(inside/"in.bin"); (inside/"link.png").rename(inside/"link.bin") # or the folder would be taken for one of pictures
    source = read_images(f"datasets:{inside}")
    (inside/"in.bin").rename(inside/"in.png"); (inside/"link.bin").rename(inside/"link.png")
    assert [s.key for s in source] == ["a"] and set(source.skipped.values()) == {"no bytes, and no file of this dataset"} and len(source.skipped) == 7

def test_duplicate_rows_are_listed(hf, tmp_path):
    ds = hf.Dataset.from_dict(dict(id=[1, 2, 1], image=[dict(bytes=PNG, path="x.png")]*3, url=["u"]*3, words=["w"]*3), features=hf.Features(id=hf.Value("int64"), image=hf.Image(), url=hf.Value("string"), words=hf.Value("string")))
    ds.save_to_disk(tmp_path/"d")
    source = read_images(f"datasets:{tmp_path/'d'}")
    assert source.keys == ["1", "2"] and source.skipped == {"1 (row 2)": "a second row under this key"} and source[1].caption == "u"

def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install 'datasets>=4'"): read_images("datasets:nobody/nothing")
