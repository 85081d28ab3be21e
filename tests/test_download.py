"""What a hub, a network or a folder can do to a download: it ends in one line, nothing wrong stands under a file's name, and what has arrived is not asked for again."""
import hashlib, io, json, os, re, signal, socket, struct, tarfile, threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep
from types import SimpleNamespace
from urllib.parse import unquote
import numpy as np
import pytest
from huggingface_hub import constants
from blip3o_nb.files import InputError
from blip3o_nb.earlier.programs import download, list_tars
from blip3o_nb.features.images import read_images

REPO, TOKEN, A, B = "someone/pictures", "hf_secretsecretsecret", "a"*40, "b"*40

def tar_of(seed, size=300_000):
    b = io.BytesIO()
    with tarfile.open(fileobj=b, mode="w") as t:
        i = tarfile.TarInfo(f"{seed}.jpg"); i.size = size; t.addfile(i, io.BytesIO(np.random.default_rng(seed).bytes(size)))
    return b.getvalue()

def sha(data): return hashlib.sha256(data).hexdigest()

def not_arrived(connection):
    "Bytes that were sent and have not reached the other side, which a reset would take back; only Linux tells"
    with suppress(ImportError, OSError):
        import fcntl, termios
        return struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]
    return sleep(.2)

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def do_GET(self):
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        path = unquote(path)
        hub.asked.append(SimpleNamespace(path=path, host=self.headers["Host"], token=self.headers.get("Authorization"), range=self.headers.get("Range")))
        kind = "resolve" if "/resolve/" in path or path.startswith("/cdn/") else "tree" if "/tree/" in path else "info"
        if kind in hub.fail:
            status, headers, body = hub.fail[kind]
            return self.answer(status, body, headers)
        if kind == "info": return self.answer(200, json.dumps({"id": REPO, "sha": path.rpartition("/revision/")[2] if "/revision/" in path else hub.main}).encode())
        if kind == "tree":
            entries = [dict(type="directory", path="sub", oid="0"*40)]
            for p, d in hub.commits[path.rpartition("/tree/")[2]].items():
                entries.append(dict(type="file", path=p, size=len(d), oid="0"*40, **({"lfs": dict(size=len(d), oid=sha(d), pointerSize=130)} if p not in hub.plain else {})))
            at = int(query.rpartition("cursor=")[2]) if "cursor=" in query else 0
            more = {"Link": f'<{hub.url}{path}?cursor={at + 4}>; rel="next"'} if at + 4 < len(entries) else {}
            return self.answer(200, json.dumps(entries[at:at + 4]).encode(), more)
        if hub.cdn and not path.startswith("/cdn/"): return self.answer(302, b"", {"Location": f"{hub.cdn}/cdn{path}?Signature=signed"})
        commit, _, name = path.rpartition("/resolve/")[2].partition("/")
        data = hub.swap.get(name, hub.commits[commit][name])
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0"))) if hub.ranges else 0
        body, how = data[start:], hub.cuts.pop(0) if hub.cuts else None
        hub.sent.append((name, start))
        if how is None: return self.answer(206 if start else 200, body)
        self.send_response(206 if start else 200); self.send_header("Content-Length", len(body)); self.end_headers()
        n, end = how
        self.wfile.write(body[:n]); self.close_connection = True
        if callable(end): end(lambda: self.wfile.write(body[n:]))
        if end == "reset":
            while not_arrived(self.connection): sleep(.01)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)); self.rfile.close(); self.connection.close()
    def answer(self, status, body, headers={}):
        self.send_response(status)
        for k, v in {**headers, "Content-Length": len(body)}.items(): self.send_header(k, v)
        self.end_headers(); self.wfile.write(body)

class Server(ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, *args): pass

@pytest.fixture
def hub():
    h = SimpleNamespace(main=A, commits={A: {"README.md": b"page", **{f"{n:05d}.tar": tar_of(n) for n in range(6)}}}, plain={"README.md"}, fail={}, cdn="", swap={}, cuts=[], ranges=True, sent=[], asked=[])
    server = Server(("127.0.0.1", 0), Handler); server.hub = h
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    h.port, h.url = server.server_port, f"http://127.0.0.1:{server.server_port}"
    yield h
    server.shutdown(); server.server_close()

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "No waiting between attempts; a token in the environment; a test that goes round in a circle fails"
    monkeypatch.setattr("time.sleep", lambda s: sleep(min(s, .01)))
    monkeypatch.setenv("HF_TOKEN", TOKEN); monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    def stop(*_): raise BaseException("took more than 200 s")
    old = signal.signal(signal.SIGALRM, stop); signal.alarm(200)
    yield
    signal.alarm(0); signal.signal(signal.SIGALRM, old)

def get(hub, out, **kw): return download(REPO, out, endpoint=hub.url, progress=False, **{"yes": True, **kw})
def whole(hub, out, commit=A): return {p: (out/p).read_bytes() == d for p, d in hub.commits[commit].items() if (out/p).exists()}
def parts(out): return {p.name.split(".tar")[0]: p.stat().st_size for p in (out/".download").rglob("*.part")}

# the command

def test_earlier_command(hub, tmp_path, monkeypatch):
    "`python src/data_hand/download_data.py` has no options: the default dataset, into data/ and its name"
    from blip3o_nb.commands.cli import blip3o_download
    for k in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"): monkeypatch.setattr(constants, k, getattr(constants, k).replace(constants._HF_DEFAULT_ENDPOINT, hub.url))
    monkeypatch.chdir(tmp_path); monkeypatch.setattr("sys.argv", ["blip3o_download", "--yes"])
    blip3o_download()
    assert set(whole(hub, tmp_path/"data/BLIP3o-Pretrain-Short-Caption").values()) == {True}
    assert {r.path.split("/api/datasets/")[1].split("/re")[0] for r in hub.asked if "/api/datasets/" in r.path} >= {"BLIP3o/BLIP3o-Pretrain-Short-Caption"}

# the connection

@pytest.mark.fault("connection reset", "downloading", "one line; the next run goes on at the byte")
def test_reset_resumes_in_the_next_run(hub, tmp_path):
    hub.cuts = [(200_000, "reset"), (0, "reset")]
    with pytest.raises(InputError, match="no connection to 127.0.0.1, or it broke .*: check network and proxy; the same command goes on"): get(hub, tmp_path, n=1)
    kept = parts(tmp_path)["00000"]
    assert whole(hub, tmp_path) == {} and 0 < kept <= 200_000
    get(hub, tmp_path, n=1)
    assert hub.sent[-1] == ("00000.tar", kept) and whole(hub, tmp_path) == {"00000.tar": True} and parts(tmp_path) == {}

@pytest.mark.fault("connection closed early", "downloading", "goes on at the byte")
def test_closed_early_goes_on_in_the_same_run(hub, tmp_path):
    hub.cuts = [(100_000, "close"), (50_000, "close"), (1, "reset")]
    get(hub, tmp_path, n=1)
    assert hub.sent == [("00000.tar", 0), ("00000.tar", 100_000), ("00000.tar", 150_000), ("00000.tar", 150_001)] and whole(hub, tmp_path) == {"00000.tar": True}

@pytest.mark.fault("connection closed early, by a server without ranges", "downloading", "starts over; the file is whole")
def test_server_without_ranges(hub, tmp_path):
    hub.cuts, hub.ranges = [(100_000, "close")], False
    get(hub, tmp_path, n=1)
    assert [r.range for r in hub.asked if "resolve" in r.path] == [None, "bytes=100000-"] and whole(hub, tmp_path) == {"00000.tar": True}

@pytest.mark.fault("server that falls silent", "downloading", "one line; what has arrived stays")
def test_silence(hub, tmp_path, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    hub.cuts = [(0, lambda rest: over.wait(150))]*9 # silent for as long as it takes, also where it is asked again
    with pytest.raises(InputError, match="(Read|Connect)Timeout"): get(hub, tmp_path, n=1)
    over.set()
    hub.cuts = []
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 100)
    hub.fail["resolve"] = (206, {}, b"")
    with pytest.raises(InputError, match="nothing comes of 00000.tar after 0 of"): get(hub, tmp_path, n=1)

@pytest.mark.fault("killed before the last rename", "downloading", "nothing is asked for again")
def test_part_complete_but_not_renamed(hub, tmp_path):
    data = hub.commits[A]["00000.tar"]
    (tmp_path/".download").mkdir(); (tmp_path/f".download/00000.tar.{sha(data)}.part").write_bytes(data)
    get(hub, tmp_path, n=1)
    assert hub.sent == [] and whole(hub, tmp_path) == {"00000.tar": True}

@pytest.mark.fault("connections broken, several files at a time", "downloading", "all whole")
def test_many_at_a_time(hub, tmp_path):
    hub.cuts = [(n, "close") for n in (10_000, 20_000, 30_000, 40_000, 50_000)]
    get(hub, tmp_path, workers=4)
    assert whole(hub, tmp_path) == {f"{n:05d}.tar": True for n in range(6)}
    sums = dict(l.split("  ")[::-1] for l in (tmp_path/".download/SHA256SUMS").read_text().splitlines())
    assert sums == {p: sha(d) for p, d in hub.commits[A].items() if p.endswith(".tar")}
    assert len(hub.sent) == 11 and get(hub, tmp_path, yes=False) and len(hub.sent) == 11 # nothing to fetch, nothing to ask

@pytest.fixture
def arrival(monkeypatch):
    "`event` is set when 100,000 bytes of a file have arrived that has more to come; `stop` is what the download sets to end"
    from blip3o_nb.earlier import programs as module
    seen, fetch = SimpleNamespace(event=threading.Event(), over=threading.Event(), stop=None), module.fetch
    def watched(url, part, size, stop, progress):
        seen.stop = stop
        def note(n):
            progress(n)
            have[0] += n
            if have[0] == 100_000: seen.event.set()
        have = [0]
        fetch(url, part, size, stop, note)
    monkeypatch.setattr(module, "fetch", watched)
    yield seen
    seen.over.set()

@pytest.mark.fault("interrupt while nothing comes", "downloading", "stops; what has arrived stays")
def test_interrupt_while_nothing_comes(hub, tmp_path, monkeypatch, arrival):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    def interrupt(rest):
        arrival.event.wait(150)
        os.kill(os.getpid(), signal.SIGINT)
        arrival.over.wait(150)
    hub.cuts = [(100_000, interrupt)]
    with pytest.raises(KeyboardInterrupt): get(hub, tmp_path, n=1)
    arrival.over.set()
    assert hub.sent == [("00000.tar", 0)] and parts(tmp_path) == {"00000": 100_000} # no further attempt

@pytest.mark.fault("interrupt", "downloading", "stops; the next run goes on")
def test_interrupt(hub, tmp_path, arrival):
    def interrupt(rest):
        arrival.event.wait(150)
        os.kill(os.getpid(), signal.SIGINT)
        arrival.stop.wait(150)
        rest()
    hub.cuts = [None, (100_000, interrupt)]
    with pytest.raises(KeyboardInterrupt): get(hub, tmp_path, n=3, workers=1)
    assert whole(hub, tmp_path) == {"00000.tar": True} and 100_000 <= parts(tmp_path)["00001"] < 200_000
    before = len(hub.sent)
    get(hub, tmp_path, n=3)
    assert len(whole(hub, tmp_path)) == 3 and all(whole(hub, tmp_path).values()) and not [s for s in hub.sent[before:] if s[0] == "00000.tar" or s == ("00001.tar", 0)]

# what the hub says

@pytest.mark.parametrize("kind,status,code,message", [
    ("info", 403, "GatedRepo", "someone/pictures is gated: accept its terms on its page at 127.0.0.1, then log in with `hf auth login`, or set HF_TOKEN"),
    ("info", 401, "RepoNotFound", "shows no dataset repository someone/pictures: check the name; if it is private, log in"),
    ("info", 401, "", r"refuses access to someone/pictures \(401\): log in"),
    ("info", 404, "RevisionNotFound", "has no revision 'v9': leave --revision out"),
    ("info", 403, "", r"refuses access to someone/pictures \(403\)"),
    ("tree", 500, "", "answers 500 for someone/pictures: try again later"),
    ("resolve", 401, "", "refuses access|shows no dataset repository"),
    ("resolve", 403, "GatedRepo", "is gated"),
    ("resolve", 404, "EntryNotFound", "answers 404"),
    ("resolve", 429, "", "answers 429"),
    ("resolve", 503, "", "answers 503"),
])
@pytest.mark.fault("refusals by the hub", "downloading", "one line that says what to do; no token in it")
def test_refusals(hub, tmp_path, capfd, kind, status, code, message):
    hub.fail[kind] = (status, {"X-Error-Code": code, "X-Error-Message": f"no {TOKEN}"} if code else {}, f"<html>{TOKEN}</html>".encode())
    if kind != "resolve": hub.commits["v9"] = {}
    with pytest.raises(InputError, match=message) as e: get(hub, tmp_path/"out", revision="v9" if kind == "info" else None, n=1)
    assert "\n" not in str(e.value) and TOKEN not in str(e.value) + "".join(capfd.readouterr()) and not list(tmp_path.rglob("*.tar"))

@pytest.mark.fault("a server that is no hub", "downloading", "one line")
@pytest.mark.parametrize("kind", ["info", "tree"])
@pytest.mark.parametrize("body", [b"<html>log in to this network</html>", b"[]", b'{"error": 1}', b"[1]"])
def test_no_hub(hub, tmp_path, kind, body):
    hub.fail[kind] = (200, {}, body)
    with pytest.raises(InputError, match="does not answer as a Hugging Face hub does|has no file like"): get(hub, tmp_path)

@pytest.mark.fault("redirect to another host", "downloading", "the token is not sent there, nor printed")
def test_token_stays_with_the_hub(hub, tmp_path, capfd):
    hub.cdn, hub.cuts = f"http://localhost:{hub.port}", [(100_000, "close")]
    get(hub, tmp_path, n=1)
    assert whole(hub, tmp_path) == {"00000.tar": True}
    assert {r.token for r in hub.asked if r.host.startswith("127")} == {f"Bearer {TOKEN}"} and {r.token for r in hub.asked if r.host.startswith("localhost")} == {None}
    assert [r.range for r in hub.asked if r.path.startswith("/cdn/")] == [None, "bytes=100000-"]
    assert TOKEN not in "".join(capfd.readouterr()) and not any(TOKEN.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    hub.fail["resolve"] = (403, {}, b""); hub.cdn = ""
    with pytest.raises(InputError) as e: get(hub, tmp_path, n=2)
    assert "Signature" not in str(e.value) and "http" not in str(e.value)

@pytest.mark.fault("no network", "downloading", "one line")
def test_offline(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="offline mode is on"): get(hub, tmp_path)
    assert hub.asked == []

@pytest.mark.fault("file names that lead out of the folder", "downloading", "refused in one line; nothing is written")
@pytest.mark.parametrize("name", ["../x.tar", "a/../../x.tar", "/etc/x.tar", "a\\..\\x.tar", ".download/state.json.tar", "a\nb.tar"])
def test_hostile_names(hub, tmp_path, name):
    hub.commits[A] = {name: tar_of(0)}
    with pytest.raises(InputError, match="not written to a disk"): get(hub, tmp_path/"out")
    assert list(tmp_path.iterdir()) == []

# the contents

@pytest.mark.fault("file with other bytes than its checksum", "downloading", "removed, one line; asked for again by the next run")
def test_wrong_contents(hub, tmp_path):
    right = hub.commits[A]["00001.tar"]
    for wrong, message in ((right[:-1] + b"x", "a wrong checksum"), (right + bytes(10**7), f"[0-9,]+ in place of {len(right):,} bytes")):
        hub.swap["00001.tar"] = wrong
        with pytest.raises(InputError, match=f"00001.tar arrived with {message}.* and was removed") as e: get(hub, tmp_path, pattern="00001.tar")
        assert "place" not in str(e.value) or int(re.search("with ([0-9,]+)", str(e.value))[1].replace(",", "")) < 10**6 # it is not read to an end that never comes
        assert whole(hub, tmp_path) == {} and parts(tmp_path) == {}
    hub.swap.clear()
    assert get(hub, tmp_path, pattern="00001.tar") == [tmp_path/"00001.tar"] and whole(hub, tmp_path) == {"00001.tar": True}

@pytest.mark.fault("repository that changes in between", "downloading", "one commit, or one line")
def test_commits_are_not_mixed(hub, tmp_path):
    hub.cuts = [None, (100_000, "reset"), (0, "reset")]
    with pytest.raises(InputError): get(hub, tmp_path, n=3, workers=1)
    hub.commits[B] = {p: d[::-1] for p, d in hub.commits[A].items()}; hub.main = B
    with pytest.raises(InputError, match=f"was begun with commit {A} of someone/pictures, and revision {B} is {B}"): get(hub, tmp_path, revision=B)
    get(hub, tmp_path, n=3)
    assert whole(hub, tmp_path) == {f"{n:05d}.tar": True for n in range(3)}
    get(hub, tmp_path/"new", n=3)
    assert whole(hub, tmp_path/"new", B) == {f"{n:05d}.tar": True for n in range(3)}
    hub.fail["info"] = (404, {"X-Error-Code": "RevisionNotFound"}, b"")
    with pytest.raises(InputError, match=f"has no revision '{A}': .*from a commit that is gone, use another --out"): get(hub, tmp_path, n=3)

@pytest.mark.fault("other files under the same names", "downloading", "one line; they are left alone")
def test_files_from_elsewhere(hub, tmp_path):
    (tmp_path/"00000.tar").write_bytes(hub.commits[A]["00000.tar"])
    get(hub, tmp_path, n=2)
    assert [n for n, _ in hub.sent] == ["00001.tar"] and len((tmp_path/".download/SHA256SUMS").read_text().splitlines()) == 2
    for wrong in (b"mine", bytes(len(hub.commits[A]["00002.tar"]))):
        (tmp_path/"00002.tar").write_bytes(wrong)
        with pytest.raises(InputError, match="00002.tar is there and is not the file of this name"): get(hub, tmp_path)
        assert (tmp_path/"00002.tar").read_bytes() == wrong
    right, sent = (tmp_path/"00001.tar").read_bytes(), len(hub.sent)
    for times in (True, False): # a file that was listed and has other bytes by now; without the list of times, as earlier versions left it
        if not times: (tmp_path/".download/TIMES").unlink()
        (tmp_path/"00001.tar").write_bytes(right[:-1] + b"x")
        with pytest.raises(InputError, match="00001.tar is there and is not the file of this name"): get(hub, tmp_path, n=2)
        (tmp_path/"00001.tar").write_bytes(right)
        get(hub, tmp_path, n=2)
        assert len(hub.sent) == sent and len((tmp_path/".download/SHA256SUMS").read_text().splitlines()) == 2
    (tmp_path/"00002.tar").unlink(); (tmp_path/".download/SHA256SUMS").write_bytes(b"\xff half a li")
    get(hub, tmp_path, n=3)
    assert len(whole(hub, tmp_path)) == 3 and all(whole(hub, tmp_path).values())

@pytest.mark.fault("tar that is none", "downloading", "one line that names it")
def test_check(hub, tmp_path):
    hub.commits[A]["00000.tar"] = hub.commits[A]["00000.tar"][:1000] # as its authors left it
    get(hub, tmp_path, n=1)
    with pytest.raises(InputError, match="00000.tar is no complete tar.*leave it out with --pattern"): get(hub, tmp_path, n=1, check=True)
    assert get(hub, tmp_path, pattern=["00001.tar", "00003.tar"], check=True) == [tmp_path/"00001.tar", tmp_path/"00003.tar"]

def test_folders_and_plain_files(hub, tmp_path, capsys):
    hub.commits[A] = {f"sub [{n}]/{i}.tar": tar_of(10*n + i, 2000) for n in range(2) for i in range(2)} | {"top.tar": tar_of(99, 2000)}
    hub.plain = set(hub.commits[A]) # the hub has no SHA-256 of these
    paths = get(hub, tmp_path/"new [data]")
    line = capsys.readouterr().out.splitlines()[-1]
    assert all(whole(hub, tmp_path/"new [data]").values()) and len(paths) == 5
    assert line == f"complete, 5 file(s): blip3o_extract --images '{tmp_path}/new [[]data]/**/*.tar'"
    assert sorted(read_images(line.split("'")[1]).keys) == sorted(read_images(tmp_path/"new [data]").keys) and len(read_images(tmp_path/"new [data]")) == 5

# before anything is fetched

@pytest.mark.parametrize("kw,message", [(dict(yes=False), "no terminal to ask on, so nothing was downloaded: give --yes"), (dict(n=0), "above zero"), (dict(workers=0), "above zero"),
                                        (dict(pattern="*.zip"), r"no file like \*.zip: it has 00000.tar, 00001.tar, 00002.tar, 00003.tar and 3 more"),
                                        (dict(pattern=["00000.tar", "no.tar"]), "no file like no.tar")])
def test_nothing_is_fetched(hub, tmp_path, monkeypatch, kw, message):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(InputError, match=message): get(hub, tmp_path/"out", **kw)
    assert hub.sent == [] and list(tmp_path.iterdir()) == []

@pytest.mark.parametrize("answer", ["y", "Yes", "", "n", "yep", EOFError])
def test_question(hub, tmp_path, monkeypatch, capsys, answer):
    def ask(_):
        assert hub.sent == [] and "6 file(s), 1.84MB, 00000.tar to 00005.tar" in capsys.readouterr().out
        if answer is EOFError: raise EOFError
        return answer
    monkeypatch.setattr("builtins.input", ask); monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    if answer in ("y", "Yes"): assert len(get(hub, tmp_path/"out", yes=False)) == 6
    else:
        with pytest.raises(InputError, match="not confirmed"): get(hub, tmp_path/"out", yes=False)
        assert hub.sent == [] and list(tmp_path.iterdir()) == []

@pytest.mark.fault("less free space than it takes", "downloading", "one line before anything is downloaded")
def test_space(hub, tmp_path, monkeypatch):
    size = len(hub.commits[A]["00000.tar"])
    hub.cuts = [(200_000, "reset"), (0, "reset")]
    with pytest.raises(InputError): get(hub, tmp_path, n=1)
    rest, asked = size - parts(tmp_path)["00000"], len(hub.sent)
    for free in (rest - 1, rest): # a part that is there needs no space again
        monkeypatch.setattr("shutil.disk_usage", lambda p: SimpleNamespace(free=free))
        if free == rest: get(hub, tmp_path, n=1)
        else:
            with pytest.raises(InputError, match="to download and .* free at .*: choose fewer files"): get(hub, tmp_path, n=1)
            assert len(hub.sent) == asked

def test_places(hub, tmp_path, monkeypatch):
    (tmp_path/"file").write_text("")
    with pytest.raises(InputError, match="cannot write .*choose another --out"): get(hub, tmp_path/"file")
    get(hub, tmp_path/"out", n=1)
    with pytest.raises(InputError, match="holds files of someone/pictures: use another --out for someone/else"): download("someone/else", tmp_path/"out", endpoint=hub.url, yes=True)
    (tmp_path/"out/.download/state.json").write_text("{")
    with pytest.raises(InputError, match="cannot read .*state.json"): get(hub, tmp_path/"out")

@pytest.mark.fault("two processes, one folder", "downloading", "one works, the other ends in one line")
def test_one_process_a_folder(hub, tmp_path):
    seen = []
    def second(_):
        try: get(hub, tmp_path, n=1)
        except InputError as e: seen.append(str(e))
    hub.cuts = [(100_000, second)]
    get(hub, tmp_path, n=1)
    assert re.match("another process downloads to this folder: wait for it, or delete .*lock if there is none", seen[0]) and whole(hub, tmp_path) == {"00000.tar": True}

def test_list(hub):
    commit, files = list_tars(REPO, endpoint=hub.url)
    assert (commit, files) == (A, [(p, len(d), sha(d)) for p, d in sorted(hub.commits[A].items()) if p.endswith(".tar")]) # over two pages
    assert hub.sent == [] and list_tars(REPO, pattern="README.md", endpoint=hub.url)[1] == [("README.md", 4, None)]
