"""The widgets in a real JupyterLab in a real browser, and flows on the sphere.

A control that is moved changes the figure, and to what the control says."""
import importlib.util, inspect, json, os, re, secrets, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [m for m in ("jupyterlab", "playwright") if not importlib.util.find_spec(m)]
MISSING += [] if BROWSER else ["a Chromium"]

def small(folder, task):
    "Toy features of twelve images, random weights, and encoders that read captions by their letters"
    import torch
    from blip3o_nb.core import get_task, named_generator, toy_features
    from blip3o_nb.network.dit import BLIP3oDiT, BLIP3oDiTConfig
    from blip3o_nb.generation.pipeline import Pipeline
    from blip3o_nb.features.loading import Normalizer
    from blip3o_nb.features.shards import FeatureDataset, ShardWriter
    class ToyEncoder:
        device = "cpu"
        def pool(self, tokens): return tokens[:, 0, :32]
        def encode_text(self, texts):
            return torch.stack([torch.randn(32, generator=named_generator(*sorted(t))) for t in texts])
    toy, task = toy_features(12), get_task(task)
    with ShardWriter(folder, {n: {"model": f"toy-{n}"} for n in ("clip", "eva")}) as w:
        w.add_batch(toy["keys"], {"clip": toy["clip"], "eva": toy["eva"]}, toy["captions"], [""]*12)
    ds = FeatureDataset(folder)
    torch.manual_seed(0)
    sizes = dict(num_tokens=17, clip_embedding_size=32, eva_embedding_size=48, task=task.name)
    network = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model = BLIP3oDiT(BLIP3oDiTConfig(**network, **sizes, prediction_type="sample", cond_dropout=.1))
    for p in model.parameters(): torch.nn.init.normal_(p, std=.2) # as made, it answers nothing but zero
    sides = (task.target_norm, task.target), (task.cond_norm, task.cond)
    pipe = Pipeline(model, task, *(Normalizer(mode, ds.stats(name)) for mode, name in sides), ds.contract)
    pipe.encoders = dict.fromkeys((task.target, task.cond), ToyEncoder())
    return pipe, ds

class Colours:
    "A stranger's decoder: an image in one colour, by three channels of the mean token"
    def pictures(self, tokens): return tokens.mean(1)[:, :3, None, None].sigmoid().expand(-1, 3, 8, 8)

NAMES = "conditioning_mixer, path_explorer, shard_browser"
FIRST = (inspect.getsource(small), inspect.getsource(Colours), "pipe, ds = small('features', 'clip_generation')",
         f"from blip3o_nb.generation.widgets import {NAMES}")
CELLS = ["\n".join(FIRST), "shard_browser(ds)", "path_explorer(pipe, ds)",
         "conditioning_mixer(pipe, ds, decoder=Colours())"]

def until(what, seconds, ready):
    end = time.time() + seconds
    while not (got := ready()):
        assert time.time() < end, f"{what} took more than {seconds} s"
        time.sleep(.1)
    return got

def notebook(cells):
    "A notebook of these cells, as JSON"
    def cell(source):
        return dict(cell_type="code", id=secrets.token_hex(4), metadata={}, execution_count=None, outputs=[],
                    source=source.strip())
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    return json.dumps(dict(cells=[*map(cell, cells)], metadata=kernel, nbformat=4, nbformat_minor=5))

def write_settings(settings):
    "JupyterLab asks nothing of the user, and shows all cells at once"
    told = {"apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
            "notebook-extension/tracker": dict(windowingMode="none")}
    for name, value in told.items():
        f = settings/"@jupyterlab"/f"{name}.jupyterlab-settings"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(value))

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def start_lab(home, port, token):
    "A JupyterLab that keeps all it writes in `home` and asks nothing of the network"
    own = {"IPYTHONDIR": "ipython", "JUPYTERLAB_SETTINGS_DIR": "settings",
           "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
           **{f"JUPYTER_{d}_DIR": d.lower() for d in ("CONFIG", "DATA", "RUNTIME")}}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **{k: str(home/v) for k, v in own.items()}}
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={home/'work'}",
               f"--IdentityProvider.token={token}", "--LabApp.extension_manager=readonly",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (home/"log").open("w") as out:
        return subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=home/"work", env=env,
                                stdout=out, stderr=subprocess.STDOUT)

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address of a notebook in a JupyterLab of its own"
    home, port, token = tmp_path_factory.mktemp("lab"), free_port(), secrets.token_hex(16)
    (home/"work").mkdir()
    (home/"work"/"widgets.ipynb").write_text(notebook(CELLS))
    write_settings(home/"settings")
    server = start_lab(home, port, token)
    base, headers = f"http://127.0.0.1:{port}", {"Authorization": f"token {token}"}
    def api(path, method="GET"):
        request = urllib.request.Request(f"{base}/api/{path}", method=method, headers=headers)
        return urllib.request.urlopen(request, timeout=5)
    def up():
        assert server.poll() is None, (home/"log").read_text()
        try: return api("status")
        except OSError: return None
    try:
        until("starting JupyterLab", 60, up)
        yield f"{base}/lab/tree/widgets.ipynb?token={token}"
    finally:
        try: api("shutdown", "POST") # with its kernels
        except OSError: pass
        try: server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()

PIXELS = """async img => {
    await img.decode()
    const c = document.createElement('canvas'); c.width = img.naturalWidth; c.height = img.naturalHeight
    c.getContext('2d').drawImage(img, 0, 0)
    return c.toDataURL()
}"""

class Widget:
    "One of the widgets in the page"
    def __init__(self, page, n): self.page, self.cell = page, page.locator(".jp-CodeCell").nth(n)
    @property
    def img(self): return self.cell.locator("img.widget-image")
    @property
    def note(self): return self.cell.locator("[role=status]")
    def pixels(self): return self.img.evaluate(PIXELS)
    def slider(self, name):
        return self.cell.locator(".widget-slider").filter(has=self.page.get_by_text(name, exact=True))
    def handle(self, name): return self.slider(name).locator(".noUi-handle")
    def says(self, text):
        from playwright.sync_api import expect
        expect(self.note).to_contain_text(re.compile(text), timeout=30_000)
    def changes(self, act, text):
        "Something that is done changes the figure, to one that says `text`"
        before = self.pixels()
        assert not re.search(text, self.note.inner_text())
        act()
        self.says(text)
        until("a new figure", 10, lambda: self.pixels() != before)

@pytest.fixture(scope="module")
def page(lab):
    from playwright.sync_api import TimeoutError, sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport=dict(width=1200, height=1000))
        page.route(lambda url: not url.startswith("http://127.0.0.1"), lambda route: route.abort())
        page.goto(lab, timeout=60_000)
        # before the kernel is idle, JupyterLab forgets what is to be run
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
        page.locator(".jp-CodeCell .cm-content").first.click(timeout=60_000)
        for _ in CELLS: page.keyboard.press("Shift+Enter")
        for n in range(1, len(CELLS)):
            cell = Widget(page, n).cell.locator(".jp-OutputArea-output")
            cell.wait_for(timeout=180_000)
            try: Widget(page, n).img.wait_for(timeout=20_000)
            except TimeoutError: raise AssertionError(cell.all_inner_texts())
        yield page
        browser.close()

needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")

@needs_browser
def test_browser_shows_another_sample(page):
    w = Widget(page, 1)
    w.says("1 of 12")
    w.changes(lambda: (w.handle("sample").focus(), page.keyboard.press("ArrowRight")), "2 of 12")
    field = w.cell.locator("input[type=text]")
    w.changes(lambda: (field.fill("toy0-00005"), field.press("Enter")), "key toy0-00005, 6 of 12")
    before = w.pixels()
    field.fill("nobody")
    field.press("Enter")
    w.cell.locator("[role=alert]").get_by_text("no key 'nobody'").wait_for(timeout=10_000)
    assert w.pixels() == before

@needs_browser
def test_time_is_dragged(page):
    w = Widget(page, 2)
    handle, track = w.handle("t"), w.slider("t").locator(".noUi-target")
    w.says("nearest at t = 0.50")
    def drag():
        handle.scroll_into_view_if_needed()
        box, line = handle.bounding_box(), track.bounding_box()
        page.mouse.move(box["x"] + box["width"]/2, box["y"] + box["height"]/2)
        page.mouse.down()
        for share in (.6, .7, .8, .9, 1.1):
            page.mouse.move(line["x"] + share*line["width"], line["y"] + line["height"]/2)
        page.mouse.up()
    w.changes(drag, r"nearest at t = 1\.00")
    w.changes(lambda: (w.handle("steps").focus(), page.keyboard.press("ArrowRight")), "euler, 5 steps, NFE 5")
    def press(): return w.handle("guidance").focus(), page.keyboard.press("ArrowRight")
    w.changes(press, r"NFE 10, guidance 1\.5")

@needs_browser
def test_weight_is_moved(page):
    w = Widget(page, 3)
    w.says("nearest at weight 0.50")
    def press(): return w.handle("weight of B").focus(), page.keyboard.press("ArrowRight")
    w.changes(press, "A: 40%; B: 60%; nearest at weight 0.60")

def test_flow_on_the_sphere(tmp_path):
    "The trace stays on the sphere and ends where the pipeline does; the straight line cuts inside"
    import torch
    from blip3o_nb.generation.widgets import follow, ways
    pipe, ds = small(tmp_path/"features", "eva_denoising")
    trace = follow(pipe, ds[3], "heun", 3, seed=1, points=11)
    assert trace.about == "heun, 3 steps, NFE 5"
    for x in (trace.xt, trace.x1): assert (x.norm(dim=-1) - 1).abs().max() < 1e-5
    made = pipe(ds[3][pipe.task.cond][None], seed=1, method="heun", steps=3)
    assert torch.allclose(trace.xt[-1:], made, atol=1e-5)
    w = {name: x.norm(dim=-1) for name, x in ways(trace).items()}
    assert (w["great circle (slerp)"] - 1).abs().max() < 1e-5 and w["straight line"][5].max() < .9

def test_a_strangers_decoder_shows_images(tmp_path):
    "One that is given, or the pipeline's own; one that reads other tokens is refused before anything is drawn"
    import torch
    from blip3o_nb.files import InputError
    from blip3o_nb.generation.widgets import conditioning_mixer, follow, path_explorer, pictures_of, plot_strips
    pipe, ds = small(tmp_path/"features", "eva_denoising")
    assert pictures_of(pipe) is None and "flow, t" not in path_explorer(pipe, ds).note.value
    trace = follow(pipe, ds[3], "euler", 4, points=5)
    made = pictures_of(pipe, Colours())(trace.x1)
    assert torch.allclose(made, Colours().pictures(pipe.target_norm.decode(trace.x1)), atol=1e-6)
    pipe.decoder = Colours()
    for box, name, value, says in ((path_explorer(pipe, ds), "t", .9, "flow, t = 0.90"),
                                   (conditioning_mixer(pipe, ds), "weight of B", .8, "weight 0.80")):
        control = next(c for c in box.controls.values() if c.description == name)
        before = box.image.value.tobytes()
        control.value = value
        assert says in box.note.value and box.image.value.tobytes() != before
    axs = plot_strips({"flow": pipe}, ds[3], steps=4)
    shown = torch.stack([torch.tensor(ax.images[0].get_array()).movedim(2, 0) for ax in axs[1, :5]])
    assert axs.shape == (2, 6) and torch.allclose(shown, made, atol=1e-5)
    other = Colours()
    other.contract = {"model": "another"}
    for widget in (path_explorer, conditioning_mixer):
        with pytest.raises(InputError, match="the decoder reads tokens of model 'another'"):
            widget(pipe, ds, decoder=other)
