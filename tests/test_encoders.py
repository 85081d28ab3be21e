"""Each family of encoders against its own library: reduced towers always, the full architectures with `pytest -m slow -n 0`, all with random weights."""
import http.server, json, logging, threading, types
import huggingface_hub, open_clip, pytest, timm, torch, transformers
import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from blip3o_nb.core import layout_of
from blip3o_nb.files import InputError
from blip3o_nb.features.encoders import Encoder, load_encoder, tower_of

TEXTS = ["a red apple", "frog"]
TOL = 1e-4

# Remote code with the parts, the options and the habits of EVA-CLIP-8B's: positions in buffers that are not saved, initialisation by `.data.normal_`
EVA_CLIP = '''
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

class PartConfig(PretrainedConfig):
    def __init__(self, use_rms_norm=False, post_layernorm=False, **kw): super().__init__(**kw); self.use_rms_norm, self.post_layernorm = use_rms_norm, post_layernorm

class EvaConfig(PretrainedConfig):
    model_type = "clip"
    def __init__(self, text_config=None, vision_config=None, projection_dim=16, **kw):
        super().__init__(**kw)
        self.text_config, self.vision_config, self.projection_dim = PartConfig(**(text_config or {})), PartConfig(**(vision_config or {})), projection_dim

class RMSNorm(nn.Module):
    def __init__(self, d): super().__init__(); self.weight = nn.Parameter(torch.ones(d))
    def forward(self, x): return self.weight*(x*torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

def norm(c): return RMSNorm(c.hidden_size) if c.use_rms_norm else nn.LayerNorm(c.hidden_size, eps=1e-6)

class Layer(nn.Module):
    def __init__(self, c):
        super().__init__(); d = c.hidden_size
        self.heads, self.post_layernorm, self.layer_norm1, self.layer_norm2 = c.num_attention_heads, c.post_layernorm, norm(c), norm(c)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = nn.Linear(d, d), nn.Linear(d, d, bias=False), nn.Linear(d, d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, c.intermediate_size), nn.GELU(), nn.Linear(c.intermediate_size, d))
    def attend(self, x, mask):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        a = q @ k.mT*q.shape[-1]**-.5
        return self.out_proj(((a if mask is None else a + mask).softmax(-1) @ v).transpose(1, 2).flatten(2))
    def forward(self, x, mask=None):
        for f, n in ((lambda y: self.attend(y, mask), self.layer_norm1), (self.mlp, self.layer_norm2)): x = x + (n(f(x)) if self.post_layernorm else f(n(x)))
        return x

class Layers(nn.Module):
    def __init__(self, c): super().__init__(); self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
    def forward(self, x, mask=None):
        for f in self.layers: x = f(x, mask)
        return x

class Embeddings(nn.Module):
    def __init__(self, n, d):
        super().__init__(); self.position_embedding = nn.Embedding(n, d)
        self.register_buffer("position_ids", torch.arange(n).expand(1, -1), persistent=False)

class VisionEmbeddings(Embeddings):
    def __init__(self, c):
        super().__init__((c.image_size//c.patch_size)**2 + 1, c.hidden_size)
        self.class_embedding, self.patch_embedding = nn.Parameter(torch.randn(c.hidden_size)), nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size)
    def forward(self, x):
        x = self.patch_embedding(x).flatten(2).mT
        return torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.position_embedding(self.position_ids)

class TextEmbeddings(Embeddings):
    def __init__(self, c): super().__init__(c.max_position_embeddings, c.hidden_size); self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
    def forward(self, ids): return self.token_embedding(ids) + self.position_embedding(self.position_ids[:, :ids.shape[1]])

class EvaBase(PreTrainedModel):
    config_class, base_model_prefix, _keys_to_ignore_on_load_missing = EvaConfig, "clip", ["position_ids"]
    def _init_weights(self, m):
        if isinstance(m, TextEmbeddings): m.token_embedding.weight.data.normal_(std=.02); m.position_embedding.weight.data.normal_(std=.02)
        if isinstance(m, nn.Linear) and m.bias is not None: m.bias.data.zero_()

class Vision(EvaBase):
    def __init__(self, c): super().__init__(c); self.embeddings, self.encoder, self.post_layernorm = VisionEmbeddings(c), Layers(c), norm(c)
    def forward(self, pixel_values=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        x = self.encoder(self.embeddings(pixel_values))
        out = x, self.post_layernorm(x[:, 0])
        return BaseModelOutputWithPooling(*out) if return_dict else out

class Text(EvaBase):
    def __init__(self, c): super().__init__(c); self.embeddings, self.encoder, self.final_layer_norm = TextEmbeddings(c), Layers(c), norm(c)
    def forward(self, ids):
        x = self.embeddings(ids)
        x = self.final_layer_norm(self.encoder(x, torch.full((ids.shape[1],)*2, torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)))
        return x[torch.arange(len(ids)), ids.argmax(-1)]

class EvaModel(EvaBase):
    def __init__(self, config):
        super().__init__(config); v, t, e = config.vision_config, config.text_config, config.projection_dim
        self.text_model, self.vision_model = Text(t), Vision(v)
        self.visual_projection, self.text_projection = nn.Linear(v.hidden_size, e, bias=False), nn.Linear(t.hidden_size, e, bias=False)
        self.logit_scale = torch.tensor(100.)
        self.post_init()
    def encode_image(self, pixel_values=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        return self.visual_projection(self.vision_model(pixel_values=pixel_values, return_dict=return_dict)[1])
    def encode_text(self, input_ids=None, attention_mask=None, position_ids=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        return self.text_projection(self.text_model(input_ids))
'''

@pytest.fixture(autouse=True)
def code_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.getbasetemp()/"modules"))

def shaken(model, seed=0):
    "Every parameter moved from where it starts: a norm without effect or a head of zeros would hide a mistake"
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.data += .3*torch.randn(p.shape, generator=g)/(p[0].numel()**.5 if p.ndim > 1 else 1)
    return model.eval()

def add_arch(folder, name, **vision):
    (folder/f"{name}.json").write_text(json.dumps(dict(embed_dim=16, vision_cfg=dict(image_size=32, patch_size=8, layers=2, width=48, head_width=16) | vision,
        text_cfg=dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1))))
    open_clip.add_model_config(folder)

def save_tokenizer(folder):
    chars = [c for c in map(chr, range(33, 127))]
    words = [*chars, *(c + "</w>" for c in chars), "<|startoftext|>", "<|endoftext|>"]
    transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(folder)
    return dict(vocab_size=len(words), max_position_embeddings=24, bos_token_id=len(words)-2, eos_token_id=len(words)-1, pad_token_id=len(words)-1)

# What a library itself gives: hidden tokens, image embeddings, text embeddings
def open_clip_says(m, x, texts, arch):
    ids = open_clip.get_tokenizer(arch)(texts)
    out = m.visual.forward_intermediates(x, indices=1, output_fmt="NLC", output_extra_tokens=True)
    return torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], 1), m.encode_image(x), m.encode_text(ids)

def timm_says(m, x, texts, arch):
    patches, cls = m.visual.trunk.forward_intermediates(x, indices=1, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)[0]
    return torch.cat([cls, patches], 1), m.encode_image(x), m.encode_text(open_clip.get_tokenizer(arch)(texts))

def hf_says(m, x, ids):
    return m.vision_model(pixel_values=x, output_hidden_states=True).hidden_states[-1], m.get_image_features(pixel_values=x).pooler_output, m.get_text_features(**ids).pooler_output

def eva_says(m, x, ids): return m.vision_model(pixel_values=x, return_dict=True).last_hidden_state, m.encode_image(x), m.encode_text(ids["input_ids"])

def a_vit(d, **kw):
    add_arch(d, "ViT-test-8")
    m = shaken(open_clip.create_model("ViT-test-8"))
    torch.save(dict(state_dict=m.state_dict()), d/"vit.pt")
    return load_encoder(f"ViT-test-8:{d/'vit.pt'}", device="cpu", **kw), lambda x: open_clip_says(m, x, TEXTS, "ViT-test-8")

def an_eva02(d, **kw):
    add_arch(d, "EVA02-test-12", image_size=96, timm_model_name="eva02_nano_patch12_96", timm_pool="token", timm_proj=None)
    m = shaken(open_clip.create_model("EVA02-test-12"))
    save_file(m.state_dict(), d/"eva.safetensors")
    return load_encoder(f"EVA02-test-12:{d/'eva.safetensors'}", device="cpu", **kw), lambda x: timm_says(m, x, TEXTS, "EVA02-test-12")

def a_clip(d, **kw):
    part = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3)
    m = shaken(transformers.CLIPModel(transformers.CLIPConfig(projection_dim=16, vision_config=dict(part, image_size=32, patch_size=8), text_config=part | save_tokenizer(d))))
    m.save_pretrained(d); transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(d)
    ids = transformers.AutoTokenizer.from_pretrained(d)(TEXTS, padding=True, return_tensors="pt")
    return load_encoder(str(d), device="cpu", **kw), lambda x: hf_says(m, x, ids)

def eva_folder(d, **vision):
    "A folder as the hub's, and the model that was saved in it"
    (d/"modeling_eva.py").write_text(EVA_CLIP)
    cls = get_class_from_dynamic_module("modeling_eva.EvaModel", str(d))
    part = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3)
    m = shaken(cls(cls.config_class(text_config=part | save_tokenizer(d), vision_config=dict(part, image_size=32, patch_size=8) | vision)))
    m.save_pretrained(d)
    said = json.loads((d/"config.json").read_text()) | dict(dtype="float16", auto_map={"AutoConfig": "modeling_eva.EvaConfig", "AutoModel": "modeling_eva.EvaModel"})
    (d/"config.json").write_text(json.dumps(said)) # a type that the checkpoint does not have must not round it
    return m, transformers.AutoTokenizer.from_pretrained(d)(TEXTS, padding=True, return_tensors="pt")

def an_eva_clip(d, use_rms_norm=False, post_layernorm=False, **kw):
    m, ids = eva_folder(d, use_rms_norm=use_rms_norm, post_layernorm=post_layernorm)
    return load_encoder(str(d), device="cpu", trust_remote_code=True, **kw), lambda x: eva_says(m, x, ids)

def an_eva_clip_18b(d, **kw): return an_eva_clip(d, True, True, **kw)

FAMILIES = [a_vit, an_eva02, a_clip, an_eva_clip, an_eva_clip_18b]

def differences(enc, says, n=2):
    "Largest difference from the library of hidden tokens, image embeddings and text embeddings"
    x = torch.randn(n, 3, *[enc.tower.image_size]*2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): theirs = says(x)
    ours = enc.tokens(x), enc.pool(enc.tokens(x)), enc.encode_text(TEXTS)
    assert all(a.shape == b.shape and b.abs().max() > .05 for a, b in zip(ours, theirs))
    return [(a - b).abs().max().item() for a, b in zip(ours, theirs)]

@pytest.mark.parametrize("family", FAMILIES)
def test_equals_its_library(family, tmp_path):
    enc, says = family(tmp_path)
    assert max(differences(enc, says)) < TOL
    x = torch.randn(2, 3, *[enc.tower.image_size]*2)
    with torch.no_grad(): _, image, _ = says(x)
    for stage in ("normed", "projected"):
        e = Encoder(enc.tower, stage)
        assert e.pools_exactly and (e.pool(e.tokens(x)) - image).abs().max() < TOL
    assert json.loads(json.dumps(enc.contract)) == enc.contract

def pixels_of_library(family, d):
    "What the library itself makes of an image"
    if family in (a_vit, an_eva02):
        arch = "ViT-test-8" if family is a_vit else "EVA02-test-12"
        return open_clip.create_model_and_transforms(arch)[2]
    side = {"shortest_edge": 32}
    own = transformers.CLIPImageProcessor(size=side, crop_size=32) # of EVA-CLIP-8B: that of its example
    return lambda image: own(images=image, return_tensors="pt")["pixel_values"][0]

@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_those_of_the_library(family, tmp_path):
    enc, _ = family(tmp_path)
    assert torch.equal(enc.preprocess(PHOTO), pixels_of_library(family, tmp_path)(PHOTO))

@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_keeps_the_direction(family, dtype, tmp_path):
    half, says = family(tmp_path, dtype=dtype)
    x = torch.randn(2, 3, *[half.tower.image_size]*2)
    with torch.no_grad(): hidden, image, text = says(x)
    for ours, theirs in ((half.tokens(x), hidden), (half.pool(half.tokens(x)), image), (half.encode_text(TEXTS), text)):
        assert str(ours.dtype) == f"torch.{half.contract['dtype']}"
        assert torch.nn.functional.cosine_similarity(ours.float(), theirs, dim=-1).min() > .999

@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_equals_its_library(family, tmp_path):
    "One graph for the blocks of a tower, a second one for all other batch sizes"
    torch.compiler.reset(); counters.clear()
    enc, says = family(tmp_path, compile=True)
    for n in (4, 3, 5): assert max(differences(enc, says, n)[:2]) < TOL
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]

@pytest.mark.fault("encoder that brings code", "encoders", "refused in one line; run only when asked for by name, and said in the log")
def test_remote_code_is_off_and_says_so(tmp_path, caplog):
    eva_folder(tmp_path)
    with pytest.raises(InputError, match="remote code is off.*trust_remote_code=True"): load_encoder(str(tmp_path))
    with pytest.raises(InputError, match="has no revisions"): load_encoder(str(tmp_path), trust_remote_code=True, revision="0"*40)
    with pytest.raises(InputError, match="git ls-remote https://huggingface.co/BAAI/EVA-CLIP-8B HEAD"): load_encoder("BAAI/EVA-CLIP-8B", trust_remote_code=True, revision="0"*39)
    assert not caplog.records
    load_encoder(str(tmp_path), device="cpu", trust_remote_code=True)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [f"running the Python code in the folder {tmp_path}, modeling_eva.EvaModel"]

@pytest.mark.fault("encoder that lacks tensors", "encoders", "refused in one line that names the first")
def test_incomplete_remote_checkpoint_is_refused(tmp_path):
    m, _ = eva_folder(tmp_path)
    m.save_pretrained(tmp_path, state_dict={k: v for k, v in m.state_dict().items() if "token_embedding" not in k})
    c = tmp_path/"config.json"; c.write_text(json.dumps(json.loads(c.read_text()) | dict(auto_map={"AutoModel": "modeling_eva.EvaModel"})))
    with pytest.raises(InputError, match="lacks 1 tensors, first text_model.embeddings.token_embedding.weight"): load_encoder(str(tmp_path), trust_remote_code=True)

class Hub(http.server.BaseHTTPRequestHandler):
    "The part of the Hugging Face hub that downloads use, over one folder at one commit"
    folder, commit, asked, refuses = None, "", [], None
    def do_GET(self):
        self.asked.append(self.path)
        if self.refuses:
            code, why = self.refuses
            self.send_response(code)
            for k, v in {"X-Error-Code": why, "X-Error-Message": "no", "Content-Length": "0"}.items(): self.send_header(k, v)
            return self.end_headers()
        repo, _, rest = self.path.split("?")[0].partition("/resolve/")
        rev, _, name = rest.partition("/")
        file = self.folder/name
        if repo != "/some/eva" or rev != self.commit or not file.is_file():
            self.send_response(404); self.send_header("X-Error-Code", "EntryNotFound"); self.send_header("X-Repo-Commit", self.commit); self.send_header("Content-Length", "0"); return self.end_headers()
        data = file.read_bytes()
        self.send_response(200)
        for k, v in {"ETag": f'"{name}{len(data)}"', "X-Repo-Commit": self.commit, "Content-Length": str(len(data))}.items(): self.send_header(k, v)
        self.end_headers()
        if self.command == "GET": self.wfile.write(data)
    do_HEAD = do_GET
    def log_message(self, *args): pass

@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    "A hub of this machine in place of huggingface.co"
    where = server + "/{repo_id}/resolve/{revision}/{filename}"
    for k, v in dict(ENDPOINT=server, HUGGINGFACE_CO_URL_TEMPLATE=where, HF_HUB_CACHE=str(tmp_path/"hub"),
                     HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True).items():
        monkeypatch.setattr(f"huggingface_hub.constants.{k}", v)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server) # which keeps what it saw at first
    for k in ("http_proxy", "https_proxy", "all_proxy"):
        for name in (k, k.upper()): monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()

@pytest.mark.fault("hub that refuses a model", "encoders", "one line that says what to do, for each library")
@pytest.mark.parametrize("refuses, said", [((403, "GatedRepo"), "is gated: accept its terms"),
                                           ((404, "RepoNotFound"), "is not on huggingface.co, or is private")])
@pytest.mark.parametrize("name", ["some/eva", "timm:vit_small_patch16_dinov3.lvd1689m", "ViT-B-16-SigLIP2/webli"])
def test_a_hub_that_refuses(name, refuses, said, hub, monkeypatch):
    monkeypatch.setattr(Hub, "refuses", refuses)
    with pytest.raises(InputError, match=f"^{name} {said}") as e: load_encoder(name, device="cpu")
    assert "\n" not in str(e.value)

@pytest.mark.fault("hub that has moved on since its code was read", "encoders", "the code of the pinned commit is run, and no other")
def test_remote_code_of_a_hub_is_run_at_the_pinned_commit(tmp_path, hub, caplog):
    model = tmp_path/"model"; model.mkdir()
    m, ids = eva_folder(model)
    Hub.folder, Hub.commit, Hub.asked = model, "0123456789abcdef"*2 + "01234567", []
    enc = load_encoder("some/eva", device="cpu", trust_remote_code=True, revision=Hub.commit)
    assert max(differences(enc, lambda x: eva_says(m, x, ids))) < TOL
    assert (enc.contract["revision"], enc.contract["weights"], enc.contract["remote_code"]) == (Hub.commit, "hub", "modeling_eva.EvaModel")
    assert f"running the Python code of some/eva, modeling_eva.EvaModel, at revision {Hub.commit}" in caplog.messages
    files = [p for p in Hub.asked if "/resolve/" in p]
    assert any(p.endswith("modeling_eva.py") for p in files) and all(f"/resolve/{Hub.commit}/" in p for p in files), files

@pytest.mark.parametrize("name", ["EVA02-E-14-plus", "EVA-CLIP-8B"])
def test_largest_towers_on_meta(name, tmp_path):
    "The towers that do not fit here, without numbers: widths, token counts, layouts"
    (tmp_path/"modeling_eva.py").write_text(EVA_CLIP)
    with torch.device("meta"):
        if name == "EVA-CLIP-8B":
            cls = get_class_from_dynamic_module("modeling_eva.EvaModel", str(tmp_path))
            text = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, vocab_size=49408, max_position_embeddings=77)
            vision = dict(hidden_size=4096, intermediate_size=20480, num_hidden_layers=32, num_attention_heads=32, image_size=224, patch_size=14, use_rms_norm=True)
            model = cls(cls.config_class(text_config=text, vision_config=vision, projection_dim=1280))
        else: model = open_clip.create_model(name, device="meta")
        tower = tower_of(model)
        width, embed = {"EVA02-E-14-plus": (1792, 1024), "EVA-CLIP-8B": (4096, 1280)}[name]
        for stage, layout, shape in (("hidden", "cls_patch", (257, width)), ("hidden", "patch_only", (256, width)), ("projected", "grid_64", (64, embed)), ("normed", "grid_16", (16, width))):
            e = Encoder(tower, stage, layout)
            assert (e.num_tokens, e.width, e.embed_dim) == (*shape, embed)

@pytest.mark.slow
@pytest.mark.parametrize("arch", ["ViT-L-14", "EVA02-L-14"])
def test_full_size_of_open_clip(arch):
    enc = load_encoder(arch, device="cpu")
    shaken(enc.tower.model)
    d = differences(enc, lambda x: (open_clip_says if arch == "ViT-L-14" else timm_says)(enc.tower.model, x, TEXTS, arch), 1)
    print(arch, d)
    assert max(d) < TOL and (enc.num_tokens, enc.width, enc.embed_dim) == (257, 1024, 768)

@pytest.mark.slow
def test_full_size_of_transformers(tmp_path):
    "The values of openai/clip-vit-large-patch14's config.json"
    tok = save_tokenizer(tmp_path)
    text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=768)
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="quick_gelu", layer_norm_eps=1e-5, image_size=224, patch_size=14, projection_dim=768)
    m = shaken(transformers.CLIPModel(transformers.CLIPConfig(projection_dim=768, vision_config=vision, text_config=text | tok | dict(vocab_size=49408, max_position_embeddings=77))))
    m.save_pretrained(tmp_path); transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
    enc = load_encoder(str(tmp_path), device="cpu")
    d = differences(enc, lambda x: hf_says(m, x, ids), 1)
    print("openai/clip-vit-large-patch14", d)
    assert max(d) < TOL and (enc.num_tokens, enc.width, enc.embed_dim) == (257, 1024, 768)

# Families without CLIP's form: towers of vision alone, and towers that pool with attention

PART = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (23, 31, 3), "uint8")).resize((620, 460), Image.Resampling.BICUBIC)

def narrow(name, monkeypatch):
    "timm's architecture of that name with two blocks of width 48, its own preprocessing and its own size"
    entry = timm.models.model_entrypoint(name)
    def build(pretrained=False, **kw): return entry(pretrained=pretrained, **dict(embed_dim=48, depth=2, num_heads=3) | kw)
    monkeypatch.setitem(timm.models._registry._model_entrypoints, name.partition(".")[0], build)

def timm_own_says(m, x):
    out = m.forward_intermediates(x, indices=1, output_fmt="NLC", return_prefix_tokens=m.num_prefix_tokens > 0, intermediates_only=True)[0]
    hidden = torch.cat([out[1], out[0]], 1) if m.num_prefix_tokens else out
    pooled = m(x) if m.num_classes and not timm.data.infer_imagenet_subset(m) else m.forward_head(m.forward_features(x), pre_logits=True)
    return hidden, m.forward_features(x), pooled, None

def a_timm(name, **own):
    def family(d, monkeypatch, size=None, **kw):
        narrow(name, monkeypatch)
        m = shaken(timm.create_model(name))
        torch.save(m.state_dict(), d/"w.pt")
        data = timm.data.resolve_model_data_config(m)
        if size:
            m = timm.create_model(name, img_size=size, pretrained=True, pretrained_cfg_overlay=dict(file=str(d/"w.pt"), num_classes=m.num_classes)).eval()
            data["input_size"] = (3, size, size)
        pixels = timm.data.create_transform(**data, is_training=False)
        return load_encoder(f"timm:{name}:{d/'w.pt'}", device="cpu", size=size, **kw), lambda x: timm_own_says(m, x), pixels
    family.__name__ = f"timm_{name}"
    return family

def an_open_clip_timm(name, timm_name, pool, proj, size):
    def family(d, monkeypatch, size=None, **kw):
        narrow(timm_name, monkeypatch)
        add_arch(d, name, image_size=own_size, timm_model_name=timm_name, timm_pool=pool, timm_proj=proj)
        c = json.loads((d/f"{name}.json").read_text())
        (d/f"{name}.json").write_text(json.dumps(c | dict(embed_dim=48, custom_text=True)))
        open_clip.add_model_config(d)
        torch.save(dict(state_dict=shaken(open_clip.create_model(name)).state_dict()), d/"w.pt")
        m, _, pixels = open_clip.create_model_and_transforms(name, pretrained=str(d/"w.pt"), force_image_size=size)
        m.eval()
        says = lambda x: (*timm_own_says(m.visual.trunk, x)[:2], m.encode_image(x), m.encode_text(open_clip.get_tokenizer(name)(TEXTS)))
        return load_encoder(f"{name}:{d/'w.pt'}", device="cpu", size=size, **kw), says, pixels
    own_size, family.__name__ = size, f"open_clip_{name}"
    return family

def an_hf(cls, config, processor, text=False):
    "A model of transformers, of `config(folder)`, in a folder with its image processor"
    def family(d, monkeypatch, size=None, **kw):
        m = shaken(getattr(transformers, cls)(config(d)))
        m.save_pretrained(d)
        processor().save_pretrained(d)
        p = transformers.AutoImageProcessor.from_pretrained(d)
        vision = getattr(m, "vision_model", m)
        more = dict(interpolate_pos_encoding=True) if cls.startswith(("CLIP", "Siglip", "ViTMAE")) else {}
        if cls.startswith("ViTMAE"): m.config.mask_ratio = 0.
        def says(x):
            if cls.startswith("ViTMAE"): more["noise"] = torch.arange((x.shape[-1]//8)**2).expand(len(x), -1)
            out = vision(pixel_values=x, output_hidden_states=True, **more)
            pooled = getattr(out, "pooler_output", None)
            if cls.startswith("ViTMAE"): pooled = out.last_hidden_state[:, 0]
            if cls == "Aimv2Model": pooled = m.get_image_features(pixel_values=x).pooler_output
            ids = text and transformers.AutoTokenizer.from_pretrained(d)(TEXTS, return_tensors="pt", truncation=True,
                padding="max_length" if cls == "SiglipModel" else True, max_length=24)
            ids = dict(input_ids=ids["input_ids"]) if cls == "SiglipModel" else ids
            normed = out.last_hidden_state if not cls.startswith("CLIP") else vision.post_layernorm(out.last_hidden_state)
            return out.hidden_states[-1], normed, pooled, m.get_text_features(**ids).pooler_output if text else None
        def pixels(image):
            if not size: return p(images=image, return_tensors="pt")["pixel_values"][0]
            crop = dict(crop_size={"height": size, "width": size}) if getattr(p, "do_center_crop", False) else {}
            to = {"shortest_edge": round(size*36/32)} if "shortest_edge" in p.size and p.size["shortest_edge"] == 36 else {"height": size, "width": size}
            return p(images=image, return_tensors="pt", size=to if crop == {} or "shortest_edge" in to else {"shortest_edge": size}, **crop)["pixel_values"][0]
        return load_encoder(str(d), device="cpu", size=size, **kw), says, pixels
    family.__name__ = f"transformers_{cls}"
    return family

SQUARE = dict(image_size=32, patch_size=8)
side = {"height": 32, "width": 32}
T = transformers
HF = {"Dinov2Model": an_hf("Dinov2Model", lambda d: T.Dinov2Config(**PART, image_size=56, patch_size=8), lambda: T.BitImageProcessor(size={"shortest_edge": 36}, crop_size=side, image_mean=[.485, .456, .406], image_std=[.229, .224, .225])),
    "Dinov2WithRegistersModel": an_hf("Dinov2WithRegistersModel", lambda d: T.Dinov2WithRegistersConfig(**PART, image_size=56, patch_size=8), lambda: T.BitImageProcessor(size={"shortest_edge": 36}, crop_size=side, image_mean=[.485, .456, .406], image_std=[.229, .224, .225])),
    "DINOv3ViTModel": an_hf("DINOv3ViTModel", lambda d: T.DINOv3ViTConfig(**PART, **SQUARE, num_register_tokens=4), lambda: T.DINOv3ViTImageProcessor(size=side)),
    "SiglipVisionModel": an_hf("SiglipVisionModel", lambda d: T.SiglipVisionConfig(**PART, **SQUARE), lambda: T.SiglipImageProcessor(size=side)),
    "SiglipModel": an_hf("SiglipModel", lambda d: T.SiglipConfig(vision_config=PART | SQUARE, text_config=PART | save_tokenizer(d)), lambda: T.SiglipImageProcessor(size=side), True),
    "ViTMAEModel": an_hf("ViTMAEModel", lambda d: T.ViTMAEConfig(**PART, **SQUARE), lambda: T.ViTImageProcessor(size=side)),
    "CLIPVisionModel": an_hf("CLIPVisionModel", lambda d: T.CLIPVisionConfig(**PART, **SQUARE), lambda: T.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)),
    "Aimv2VisionModel": an_hf("Aimv2VisionModel", lambda d: T.Aimv2VisionConfig(**PART, **SQUARE, use_head=False, is_native=True), lambda: T.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)),
    "Aimv2Model": an_hf("Aimv2Model", lambda d: T.Aimv2Config(projection_dim=16, vision_config=PART | SQUARE | dict(use_head=True), text_config=PART | save_tokenizer(d)), lambda: T.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), True)}

TIMM = {n: a_timm(n) for n in ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224",
    "vit_pe_core_base_patch16_224", "aimv2_large_patch14_224", "vit_base_patch16_224.mae", "vit_base_patch16_clip_224.openai")}
# open_clip fetches a tokenizer for any name with "siglip" in it
OPEN_CLIP = {"ViT-test-16-Sig": an_open_clip_timm("ViT-test-16-Sig", "vit_base_patch16_siglip_224", "map", "none", 224),
             "PE-test-16": an_open_clip_timm("PE-test-16", "vit_pe_core_base_patch16_224", "map", None, 224)}
OTHERS = [*HF.values(), *TIMM.values(), *OPEN_CLIP.values()]

@pytest.fixture(params=OTHERS, ids=lambda f: f.__name__)
def other(request): return request.param

def pixels_of(enc, n=2): return torch.randn(n, 3, *[enc.tower.image_size]*2, generator=torch.Generator().manual_seed(1))

def agrees(enc, says, x):
    "Hidden and normed tokens, image and text embeddings are those of the library; what is missing is refused"
    with torch.no_grad(): hidden, normed, image, text = says(x)
    for stage, theirs in (("hidden", hidden), ("normed", normed)):
        e = Encoder(enc.tower, stage)
        ours = e.tokens(x)
        assert ours.shape == theirs.shape and theirs.abs().max() > .05
        if stage == "normed" and enc.tower.pooling == "mean_first": continue # timm: the norm comes after its mean
        assert (ours - theirs).abs().max() < TOL
    for stage in enc.tower.stages:
        e = Encoder(enc.tower, stage)
        if image is None: assert not e.pools_exactly; continue
        assert e.pools_exactly and (e.pool(e.tokens(x)) - image).abs().max() < TOL
    if image is None:
        with pytest.raises(InputError, match="has no pooling of its own"): enc.pool(enc.tokens(x))
    if text is not None: assert (enc.encode_text(TEXTS) - text).abs().max() < TOL
    else:
        with pytest.raises(InputError, match="has no text tower"): enc.encode_text(TEXTS)

def test_other_families_equal_their_library(other, tmp_path, monkeypatch):
    enc, says, pixels = other(tmp_path, monkeypatch)
    agrees(enc, says, pixels_of(enc))
    assert torch.equal(enc.preprocess(PHOTO), pixels(PHOTO)) and enc.preprocess(PHOTO).shape[-1] == enc.contract["image_size"]
    assert json.loads(json.dumps(enc.contract)) == enc.contract
    have = layout_of(enc.num_tokens, enc.contract.get("prefix"))
    assert (have.prefix, have.grid) == (enc.tower.prefix, enc.contract["grid"]) and have.grid > 1
    assert Encoder(enc.tower, layout="patch_only").num_tokens == have.grid**2

def test_other_families_in_half_precision(other, tmp_path, monkeypatch):
    half, says, _ = other(tmp_path, monkeypatch, dtype="bf16")
    x = pixels_of(half)
    with torch.no_grad(): hidden, normed, image, text = says(x)
    pairs = [(half.tokens(x), hidden)]
    if image is not None: pairs.append((half.pool(half.tokens(x)), image))
    if text is not None: pairs.append((half.encode_text(TEXTS), text))
    if half.tower.pooling != "mean_first": pairs.append((Encoder(half.tower, "normed").tokens(x), normed))
    for ours, theirs in pairs:
        assert torch.nn.functional.cosine_similarity(ours.float(), theirs, dim=-1).min() > .999

def test_other_families_at_another_size(other, tmp_path, monkeypatch):
    "Positions are interpolated as the library does it; where it does not, that is said"
    if other is HF["Aimv2Model"]:
        with pytest.raises(InputError, match="positions of Aimv2Model are for 32 pixels: leave size out"): other(tmp_path, monkeypatch, size=48)
        return
    own = other(tmp_path, monkeypatch)[0].tower
    with pytest.raises(InputError, match=f"no multiple of a patch of {own.patch}: choose size={6*own.patch}"): other(tmp_path, monkeypatch, size=5*own.patch + 1)
    enc, says, pixels = other(tmp_path, monkeypatch, size=5*own.patch)
    assert (enc.contract["size"], enc.contract["image_size"], enc.contract["grid"]) == (5*own.patch, 5*own.patch, 5)
    agrees(enc, says, pixels_of(enc))
    assert torch.equal(enc.preprocess(PHOTO), pixels(PHOTO))

def test_another_size_of_clip_and_eva(tmp_path, monkeypatch):
    "The families of before: open_clip's ViT, EVA02 and transformers' CLIP"
    for name, make in (("vit", a_vit), ("eva", an_eva02), ("hf", a_clip)):
        (d := tmp_path/name).mkdir()
        enc = make(d, size=48)[0]
        x = pixels_of(enc)
        with torch.no_grad():
            if name == "hf": theirs = T.CLIPModel.from_pretrained(d).get_image_features(pixel_values=x, interpolate_pos_encoding=True).pooler_output
            else:
                arch, file = enc.contract["model"].split(":")
                theirs = open_clip.create_model(arch, pretrained=file, force_image_size=48).eval().encode_image(x)
        assert (enc.pool(enc.tokens(x)) - theirs).abs().max() < TOL and enc.contract["image_size"] == enc.contract["size"] == 48

@pytest.mark.parametrize("reduce", ["mean", "cat"])
def test_several_blocks_equal_the_library(other, reduce, tmp_path, monkeypatch):
    enc, _, _ = other(tmp_path, monkeypatch)
    e, x = Encoder(enc.tower, "hidden", layers=[-1, -2], reduce=reduce), pixels_of(enc)
    one, two = (Encoder(enc.tower, layers=[i]).tokens(x) for i in (-1, -2))
    assert (one - two).abs().max() > .01 and torch.equal(one, enc.tokens(x))
    assert torch.allclose(e.tokens(x), (one + two)/2 if reduce == "mean" else torch.cat([one, two], -1), atol=1e-6)
    assert e.tokens(x).shape[1:] == (e.num_tokens, e.width) and (e.contract["layers"], e.contract["reduce"]) == ([-1, -2], reduce)
    with pytest.raises(InputError, match="a tower pools its last block alone"): e.pool(e.tokens(x))
    if isinstance(enc.tower.model, timm.models.VisionTransformer):
        m = enc.tower.model
        assert (two[:, m.num_prefix_tokens:] - m.forward_intermediates(x, indices=[0], output_fmt="NLC", intermediates_only=True)[0]).abs().max() < TOL

@pytest.mark.parametrize("kind, cls", [("dinov2", "Dinov2WithRegisters"), ("siglip2", "SiglipVision"), ("mae", "ViTMAE")])
def test_plain_tokens_are_what_an_rae_encodes(kind, cls, tmp_path, monkeypatch):
    from diffusers import AutoencoderRAE
    if not hasattr(T.SiglipVisionModel(T.SiglipVisionConfig(**PART)), "vision_model"): # where this diffusers looks for the final norm
        monkeypatch.setattr(T.SiglipVisionModel, "vision_model", property(lambda self: self), raising=False)
    rae = AutoencoderRAE(kind, 64, 8, 2, decoder_hidden_size=48, decoder_num_hidden_layers=1, decoder_num_attention_heads=3, decoder_intermediate_size=48,
                         patch_size=8, encoder_input_size=64).eval()
    config = type(rae.encoder.config)(**rae.encoder.config.to_dict())
    m = shaken(getattr(transformers, f"{cls}Model")(config))
    norm = m.post_layernorm if kind == "siglip2" else m.layernorm
    assert (norm.weight - 1).abs().max() > .1
    lacks = rae.encoder.load_state_dict(m.state_dict(), strict=False)
    assert not lacks.missing_keys and all("layernorm" in k for k in lacks.unexpected_keys) and len(lacks.unexpected_keys) == 2
    m.save_pretrained(tmp_path)
    side = {"height": 64, "width": 64}
    transformers.ViTImageProcessor(size=side, image_mean=[.485, .456, .406], image_std=[.229, .224, .225]).save_pretrained(tmp_path)
    enc = load_encoder(str(tmp_path), "normed_plain", "patch_only", device="cpu", size=64)
    image = PHOTO.resize((64, 64))
    raw = torch.tensor(np.array(image)).permute(2, 0, 1)[None]/255
    with torch.no_grad(): z = rae.encode(raw).latent                                                    # [1, D, 8, 8]
    ours = enc.tokens(enc.preprocess(image)[None])                                                      # [1, 64, D]
    assert z.abs().max() > 1 and (ours - z.flatten(2).mT).abs().max() < TOL

@pytest.mark.fault("checkpoint of another model", "encoders", "refused in one line that names what does not fit")
def test_wrong_pairs_of_tower_and_checkpoint(tmp_path, monkeypatch):
    narrow("vit_small_patch14_dinov2", monkeypatch)
    narrow("vit_small_patch14_reg4_dinov2", monkeypatch)
    m = timm.create_model("vit_small_patch14_dinov2", img_size=70)
    torch.save(m.state_dict(), tmp_path/"small.pt")
    with pytest.raises(InputError, match="does not fit vit_small_patch14_dinov2: its pos_embed is"): load_encoder(f"timm:vit_small_patch14_dinov2:{tmp_path/'small.pt'}")
    torch.save(timm.create_model("vit_small_patch14_dinov2").state_dict(), tmp_path/"small.pt")
    with pytest.raises(InputError, match="small.pt cannot be loaded: "): load_encoder(f"timm:vit_small_patch14_reg4_dinov2:{tmp_path/'small.pt'}")
    with pytest.raises(InputError, match="no tokens can be taken from ResNet"): load_encoder("timm:resnet18")

@pytest.mark.fault("checkpoint of another size of CLIP", "encoders", "refused in one line that names it")
def test_wrong_pairs_of_open_clip_and_transformers(tmp_path):
    add_arch(tmp_path, "ViT-test-8")
    add_arch(tmp_path, "ViT-test-16", patch_size=16)
    torch.save(open_clip.create_model("ViT-test-16").state_dict(), tmp_path/"other.pt")
    lines = [f"ViT-test-8:{tmp_path/'other.pt'}"]
    (d := tmp_path/"clip").mkdir()
    a_clip(d)
    said = json.loads((d/"config.json").read_text())
    said["vision_config"]["hidden_size"] = 96
    (d/"config.json").write_text(json.dumps(said))
    (d := tmp_path/"dino").mkdir()
    config = T.Dinov2Config(**PART, image_size=56, patch_size=8)
    T.Dinov2Model(config).save_pretrained(d)
    T.BitImageProcessor(size={"shortest_edge": 36}, crop_size=32).save_pretrained(d)
    state = load_file(d/"model.safetensors")
    save_file({k: v for k, v in state.items() if k != "layernorm.weight"}, d/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="dino lacks 1 tensors, first layernorm.weight"): load_encoder(str(d), device="cpu")
    for name in (*lines, str(tmp_path/"clip")):
        with pytest.raises(InputError, match="cannot be loaded|does not fit") as e: load_encoder(name, device="cpu")
        assert "\n" not in str(e.value)

@pytest.mark.fault("model of the hub without an adapter", "encoders", "refused by name before its weights are asked for")
def test_models_without_tokens_are_refused_by_name(tmp_path):
    for model, why in ((T.Siglip2Config(vision_config=PART, text_config=PART | dict(vocab_size=99)), "Siglip2Model is a NaFlex model, of images of any shape: choose a SigLIP2 of a fixed resolution"),
                       (T.BertConfig(), "no tokens can be taken from BertModel")):
        (d := tmp_path/model.model_type).mkdir()
        model.save_pretrained(d) # without weights
        with pytest.raises(InputError, match=why): load_encoder(str(d))

@pytest.mark.fault("hub that cannot be reached, or lets nobody in", "encoders", "refused in one line")
@pytest.mark.parametrize("name", ["facebook/dinov3-vits16-pretrain-lvd1689m", "timm:vit_small_patch16_dinov3.lvd1689m"])
def test_no_network_is_one_line(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=f"^{name} is not in the cache, and ") as e: load_encoder(name)
    assert "\n" not in str(e.value)

@pytest.mark.fault("tokenizer that has to be fetched, and no network", "encoders", "tokens are taken without it; text is refused in one line")
def test_a_tokenizer_of_the_hub_is_fetched_when_text_comes(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    add_arch(tmp_path, "ViT-test-8-hub")
    c = json.loads((tmp_path/"ViT-test-8-hub.json").read_text())
    c["text_cfg"]["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP2"
    (tmp_path/"ViT-test-8-hub.json").write_text(json.dumps(c))
    open_clip.add_model_config(tmp_path)
    enc = load_encoder("ViT-test-8-hub", device="cpu")
    assert enc.tokens(pixels_of(enc)).shape == (2, 17, 48)
    with pytest.raises(InputError, match="the tokenizer of ViT-test-8-hub is not in the cache"): enc.encode_text(TEXTS)

def test_two_towers_of_different_preprocessing_in_one_pass(tmp_path, monkeypatch):
    from blip3o_nb.features.extract import extract
    (tmp_path/"images").mkdir(); (tmp_path/"m").mkdir()
    for i in range(3): PHOTO.rotate(90*i).save(tmp_path/f"images/{i}.png")
    dino, siglip = HF["Dinov2WithRegistersModel"](tmp_path/"m", monkeypatch)[0], TIMM["vit_base_patch16_siglip_224"](tmp_path, monkeypatch)[0]
    ds = extract(str(tmp_path/"images"), tmp_path/"out", dict(dino=dino, siglip=siglip), dtype="fp32")
    assert ds.shape("dino") == (21, 48) and ds.layout("dino").prefix == 5 and ds.layout("dino").grid == 4 and ds.layout("siglip").prefix == 0
    i = ds.keys.index("0")
    for c, e in (("dino", dino), ("siglip", siglip)): assert (ds.rows(c, torch.tensor([i]))[0] - e.tokens(e.preprocess(PHOTO)[None])[0]).abs().max() < TOL
    stated = {k: (dino.contract.get(k), siglip.contract.get(k)) for k in ("mean", "interpolation", "resize_mode", "image_size", "resize_to")}
    assert stated["image_size"] == (32, 224) and stated["resize_to"] == (36, 248) and stated["mean"] == ([.485, .456, .406], [.5]*3)

def test_a_pipeline_loads_the_encoder_that_its_contract_states(tmp_path, monkeypatch):
    from blip3o_nb.generation.pipeline import Pipeline, check_contract
    dino = HF["Dinov2WithRegistersModel"](tmp_path, monkeypatch, size=40, stage="normed_plain", layout="patch_only", layers=[-2, -1], reduce="cat")[0]
    pipe = types.SimpleNamespace(encoders={}, contract={"dino": dino.contract}, device="cpu")
    pipe.use = lambda **new: pipe.encoders.update(new)
    again = Pipeline.encoder(pipe, "dino")
    assert again.contract == dino.contract and again.width == 96 and torch.equal(again.tokens(pixels_of(dino)), dino.tokens(pixels_of(dino)))
    with pytest.raises(InputError, match="with layers"): check_contract(dino.contract, dino.contract | dict(layers=[-1, -2]), "dino", "this")

@pytest.mark.slow
@pytest.mark.parametrize("family", [HF["SiglipVisionModel"], HF["DINOv3ViTModel"], HF["ViTMAEModel"], TIMM["vit_small_patch14_reg4_dinov2"], TIMM["vit_pe_core_base_patch16_224"]], ids=lambda f: f.__name__)
def test_other_families_compiled(family, tmp_path, monkeypatch):
    torch.compiler.reset(); counters.clear()
    enc, says, _ = family(tmp_path, monkeypatch, compile=True)
    for n in (4, 3): agrees(enc, says, pixels_of(enc, n))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]

def test_same_pixels_only_where_the_crop_is_the_same(tmp_path, monkeypatch):
    from blip3o_nb.features.extract import same_pixels
    c = HF["Dinov2Model"](tmp_path, monkeypatch)[0].contract
    assert same_pixels(c, dict(c)) and not same_pixels(c, {k: v for k, v in c.items() if k != "resize_to"}) and not same_pixels(c, c | dict(processor="ViTImageProcessor"))
