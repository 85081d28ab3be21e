"""Each family of text encoders against its own library, with random weights; what a state may not
depend on; what is refused. Nothing is downloaded."""
import json, sys
from types import SimpleNamespace
import huggingface_hub, open_clip, pytest, torch, transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from blip3o_nb.files import InputError
from blip3o_nb.features.encoders import TextEncoder, load_encoder, load_text_encoder, loading, text_tower_of

TEXTS = ["red apple", "a green leaf on the old grass in the sky", "cat"]
TOL = 1e-4
SPECIAL = ["<pad>", "<s>", "<unk>", "</s>"]
WORDS = [*SPECIAL, *"a red green apple leaf on the old grass in sky cat".split()]
PART = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3)

def shaken(model, seed=0):
    "Every parameter moved from where it starts"
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += .3*torch.randn(p.shape, generator=g)/(p[0].numel()**.5 if p.ndim > 1 else 1)
    return model.eval()

def save_tokenizer(folder, form="<s> $A </s>", **kw):
    "A number a word; `form` says what is put around a text"
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(form, special_tokens=[("<s>", 1), ("</s>", 3)])
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    hf.PreTrainedTokenizerFast(tokenizer_object=t, **special | kw).save_pretrained(folder)

def saved(folder, model, form="<s> $A </s>", **kw):
    shaken(model).save_pretrained(folder)
    save_tokenizer(folder, form, **kw)
    return str(folder), model

NUMBERS = dict(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=1, eos_token_id=3)

# A folder, and what its library says of one text: hidden, normed, pooled or None

def rows(d): return hf.AutoTokenizer.from_pretrained(d)

def alone(d, text):
    "The numbers of one text, which needs no padding"
    return dict(input_ids=torch.tensor([rows(d)(text)["input_ids"]]))

def a_bert(d, **kw):
    name, m = saved(d, hf.BertModel(hf.BertConfig(max_position_embeddings=32, **PART, **NUMBERS)), **kw)
    def says(text):
        x = m(**alone(d, text)).last_hidden_state
        return x, x, None
    return name, says

def a_roberta(d, **kw):
    "Its positions count what is no padding; the head of a language model beside it, and no pooler"
    lm = hf.RobertaForMaskedLM(hf.RobertaConfig(max_position_embeddings=32, **PART, **NUMBERS))
    name, m = saved(d, lm, **kw)
    def says(text):
        x = m.roberta(**alone(d, text)).last_hidden_state
        return x, x, None
    return name, says

def a_t5(d, **kw):
    sizes = dict(d_model=48, d_kv=16, d_ff=96, num_layers=2, num_heads=3, decoder_start_token_id=0)
    config = hf.T5Config(**sizes, **NUMBERS, feed_forward_proj="gated-gelu")
    name, m = saved(d, hf.T5ForConditionalGeneration(config), "$A </s>", model_max_length=64, **kw)
    def says(text):
        seen = []
        handle = m.encoder.final_layer_norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        x = m.encoder(**alone(d, text)).last_hidden_state
        handle.remove()
        return seen[0], x, None
    return name, says

def a_bart(d, **kw):
    "An encoder and a decoder in one model, of which the encoder is taken"
    sizes = dict(d_model=48, encoder_layers=2, decoder_layers=1, encoder_attention_heads=3,
                 decoder_attention_heads=3, encoder_ffn_dim=96, decoder_ffn_dim=96,
                 max_position_embeddings=32)
    name, m = saved(d, hf.BartModel(hf.BartConfig(**sizes, **NUMBERS)), **kw)
    def says(text):
        x = m.encoder(**alone(d, text)).last_hidden_state
        return x, x, None
    return name, says

def causal(d, model, form, **kw):
    name, m = saved(d, model, form, **kw)
    def says(text):
        out = m.base_model(**alone(d, text), output_hidden_states=True)
        norm = getattr(m.base_model, "norm", None) or m.base_model.ln_f
        seen = []
        handle = norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        m.base_model(**alone(d, text))
        handle.remove()
        return seen[0], out.last_hidden_state, None
    return name, says

LAYERS = dict(**PART, num_key_value_heads=1, head_dim=16, max_position_embeddings=64)
def a_qwen3(d, **kw):
    return causal(d, hf.Qwen3ForCausalLM(hf.Qwen3Config(**LAYERS, **NUMBERS)), "$A", **kw)

def a_llama(d, **kw):
    "Without a token for padding, as Llama comes"
    config = hf.LlamaConfig(**LAYERS, **NUMBERS | dict(pad_token_id=None))
    return causal(d, hf.LlamaForCausalLM(config), "<s> $A", **kw)

def a_gpt2(d, **kw):
    sizes = dict(n_embd=48, n_layer=2, n_head=3, n_positions=32)
    return causal(d, hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **NUMBERS)), "$A", **kw)

CLIP_TEXT = dict(PART, max_position_embeddings=24)
def clip_says(d, m, projection):
    def says(text):
        out = m(**alone(d, text), output_hidden_states=True)
        pooled = out.pooler_output
        return out.hidden_states[-1], out.last_hidden_state, projection(pooled) if projection else pooled
    return says

def an_hf_clip(d, **kw):
    vision = dict(PART, image_size=32, patch_size=8)
    config = hf.CLIPConfig(text_config=CLIP_TEXT | NUMBERS, vision_config=vision, projection_dim=16)
    name, m = saved(d, hf.CLIPModel(config), **kw)
    return name, clip_says(d, m.text_model, m.text_projection)

def an_hf_clip_text(d, **kw):
    "The text half alone, as the pipelines of diffusers hold it"
    name, m = saved(d, hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP_TEXT, **NUMBERS)), **kw)
    return name, clip_says(d, m, None)

def siglip(d, kind, image_size=None, **kw):
    "It sees its padding, and pools the last position"
    text = dict(PART, max_position_embeddings=16, projection_size=48, **NUMBERS)
    vision = dict(PART, patch_size=8) | (dict(image_size=image_size) if image_size else {})
    config = getattr(hf, f"{kind}Config")(text_config=text, vision_config=vision)
    name, m = saved(d, getattr(hf, f"{kind}Model")(config), "$A </s>", **kw)
    def says(text):
        t = rows(d)
        t.padding_side = "right"
        ids = t([text], padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
        out = m.text_model(input_ids=ids, output_hidden_states=True)
        return out.hidden_states[-1], out.last_hidden_state, out.pooler_output
    return name, says

def an_hf_siglip(d, **kw): return siglip(d, "Siglip", 32, **kw)

def an_hf_siglip2(d, **kw):
    "The text half of a NaFlex SigLIP2, whose images are refused"
    return siglip(d, "Siglip2", **kw)

def open_clip_folder(d, **text):
    sizes = dict(context_length=20, vocab_size=49408, width=48, heads=3, layers=2) | text
    vision = dict(image_size=32, patch_size=8, layers=1, width=32, head_width=16)
    said = dict(model_cfg=dict(embed_dim=16, vision_cfg=vision, text_cfg=sizes, custom_text=True),
                preprocess_cfg=dict(mean=[.5]*3, std=[.5]*3, interpolation="bicubic", resize_mode="shortest"))
    (d/"open_clip_config.json").write_text(json.dumps(said))
    m = shaken(open_clip.create_model(f"local-dir:{d}", load_weights=False))
    torch.save(m.state_dict(), d/"open_clip_pytorch_model.bin")
    return str(d), m

def an_open_clip(d, **kw):
    name, m = open_clip_folder(d)
    tokenize = open_clip.get_tokenizer(f"local-dir:{d}")
    def says(text):
        ids = tokenize([text])
        x = m.text.forward_intermediates(ids, indices=1, output_fmt="NLC")["text_intermediates"][0]
        x = x[:, :ids.argmax() + 1]
        return x, m.text.ln_final(x), m.encode_text(ids)
    return name, says

ANY = [a_bert, a_roberta, a_t5, a_bart, a_qwen3, a_llama, a_gpt2, an_hf_clip, an_hf_clip_text, an_hf_siglip,
       an_hf_siglip2, an_open_clip]
CAUSAL = [a_qwen3, a_llama, a_gpt2]
PADDED = [a_bert, a_t5, *CAUSAL, an_hf_clip, an_hf_siglip]
def sides(families): return [(f, side) for f in families for side in ("left", "right")]

def close(a, b): return (a - b).abs().max().item()

@torch.no_grad()
def theirs_of(says): return [says(t) for t in TEXTS]

@pytest.mark.parametrize("family", ANY)
def test_equals_its_library(family, tmp_path):
    name, says = family(tmp_path)
    theirs = theirs_of(says)
    for at, stage in enumerate(("hidden", "normed")):
        enc = load_text_encoder(name, stage, device="cpu")
        x, lengths = enc.tokens(TEXTS)
        assert x.shape == (3, lengths.max(), enc.width)
        assert lengths.tolist() == [t[at].shape[1] for t in theirs]
        for row, n, t in zip(x, lengths, theirs):
            assert close(row[:n], t[at][0]) < TOL and t[at].std() > .05
            assert not row[n:].any()
    assert json.loads(json.dumps(enc.contract)) == enc.contract and enc.contract["layout"] == "sequence"
    assert not enc.tower.model.training and not any(p.requires_grad for p in enc.tower.model.parameters())

@pytest.mark.parametrize("family", ANY)
def test_half_precision_keeps_the_direction(family, tmp_path):
    name, says = family(tmp_path)
    for at, stage in enumerate(("hidden", "normed")):
        enc = load_text_encoder(name, stage, device="cpu", dtype="bf16")
        x, lengths = enc.tokens(TEXTS)
        assert x.dtype == torch.bfloat16
        for row, n, theirs in zip(x, lengths, theirs_of(says)):
            assert F.cosine_similarity(row[:n].float(), theirs[at][0], dim=-1).min() > .999
    if not enc.tower.pooling: return
    pooled = torch.cat([t[2] for t in theirs_of(says)])
    assert F.cosine_similarity(enc.encode_text(TEXTS).float(), pooled, dim=-1).min() > .999

@pytest.mark.parametrize("family, side", sides(PADDED))
def test_a_state_depends_on_its_text_alone(family, side, tmp_path):
    name, says = family(tmp_path, padding_side=side)
    enc = load_text_encoder(name, device="cpu")
    together, lengths = enc.tokens(TEXTS)
    for i, text in enumerate(TEXTS):
        one, n = enc.tokens([text])
        assert n == lengths[i] and close(one[0], together[i, :n]) < 1e-5
    assert close(together[0, :lengths[0]], theirs_of(says)[0][0][0]) < TOL

@pytest.mark.parametrize("family", [an_open_clip, an_hf_clip, an_hf_clip_text, an_hf_siglip])
def test_pooling_is_the_library_s_at_each_stage(family, tmp_path):
    name, says = family(tmp_path)
    pooled = torch.cat([t[2] for t in theirs_of(says)])
    for stage in ("hidden", "normed", "projected"):
        if stage == "projected" and family is an_hf_clip_text:
            with pytest.raises(InputError, match="no projected tokens"): load_text_encoder(name, stage)
            continue
        enc = load_text_encoder(name, stage, device="cpu")
        assert close(enc.encode_text(TEXTS), pooled) < TOL and enc.embed_dim == pooled.shape[1]
        assert close(enc.pool(*enc.tokens(TEXTS)), pooled) < TOL

# Further kinds: norms behind the blocks or within them, with and without weights; positions that are counted,
# learned or relative; windows; a tower beside one of images

IMAGES = dict(PART, image_size=32, patch_size=8)
FURTHER = {
    "distilbert": lambda: hf.DistilBertModel(hf.DistilBertConfig(
        dim=48, hidden_dim=96, n_layers=2, n_heads=3, max_position_embeddings=32, **NUMBERS)),
    "modernbert": lambda: hf.ModernBertModel(hf.ModernBertConfig(
        max_position_embeddings=64, cls_token_id=1, sep_token_id=3, **PART, **NUMBERS)),
    "deberta": lambda: hf.DebertaV2Model(hf.DebertaV2Config(
        max_position_embeddings=32, relative_attention=True, pos_att_type=["p2c", "c2p"], **PART, **NUMBERS)),
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(max_position_embeddings=32, **PART, **NUMBERS)),
    "opt": lambda: hf.OPTModel(hf.OPTConfig(
        hidden_size=48, ffn_dim=96, num_hidden_layers=2, num_attention_heads=3, word_embed_proj_dim=48,
        max_position_embeddings=32, **NUMBERS)),
    "gemma3": lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(sliding_window=4, **LAYERS, **NUMBERS)),
    "mistral": lambda: hf.MistralModel(hf.MistralConfig(sliding_window=4, **LAYERS, **NUMBERS)),
    "olmo": lambda: hf.OlmoModel(hf.OlmoConfig(max_position_embeddings=32, **PART, **NUMBERS)),
    "chinese clip": lambda: hf.ChineseCLIPModel(hf.ChineseCLIPConfig(
        text_config=dict(PART, max_position_embeddings=32, **NUMBERS), vision_config=IMAGES)),
}
INSIDE = ("distilbert", "deberta", "mpnet", "chinese clip") # blocks that end in a norm

@pytest.mark.parametrize("kind", FURTHER)
@torch.no_grad()
def test_further_kinds(kind, tmp_path):
    name, m = saved(tmp_path, FURTHER[kind](), padding_side="left")
    enc = load_text_encoder(name, "normed", device="cpu")
    x, lengths = enc.tokens(TEXTS)
    for i, text in enumerate(TEXTS):
        theirs = getattr(m, "text_model", m)(**alone(name, text)).last_hidden_state[0]
        assert close(x[i, :lengths[i]], theirs) < TOL and theirs.std() > .05
    assert (enc.tower.last_norm is None) == (kind in INSIDE)
    words = " ".join(["cat"]*80) # as many tokens as the model has positions
    full = load_text_encoder(name, max_length=enc.tower.most, device="cpu")
    assert full.tokens([words])[1] == enc.tower.most

@pytest.mark.parametrize("kind", ["gemma3", "mistral", "opt"])
@torch.no_grad()
def test_blocks_and_plain_norms_of_language_models(kind, tmp_path):
    "Their own hidden states, and these normalised without a gain; that of Gemma is 1 + weight"
    name, m = saved(tmp_path, FURTHER[kind]())
    theirs = m(**alone(name, TEXTS[1]), output_hidden_states=True).hidden_states
    n = theirs[0].shape[1]
    both = load_text_encoder(name, layers=[-1, -2], reduce="cat", device="cpu")
    x = both.tokens(TEXTS)[0][1, :n]
    assert both.width == 96 and close(x[:, 48:], theirs[1][0]) < TOL
    plain = load_text_encoder(name, "normed_plain", layers=[-2], device="cpu").tokens(TEXTS)[0][1, :n]
    h = theirs[1][0] - (theirs[1][0].mean(-1, keepdim=True) if kind == "opt" else 0)
    assert close(plain, h/h.square().mean(-1, keepdim=True).sqrt()) < 1e-3
    with pytest.raises(InputError, match="not pooled|no text embedding"): both.encode_text(TEXTS)
    with pytest.raises(InputError, match="from -2 to -1"): load_text_encoder(name, layers=[-3], device="cpu")
    if kind != "opt": # the last state that the library lists is normed
        normed = load_text_encoder(name, "normed", layers=[-1, -2], device="cpu").tokens(TEXTS)[0][1, :n]
        assert close(normed, (theirs[2][0] + m.norm(theirs[1][0]))/2) < TOL

def test_models_whose_blocks_end_in_a_norm_have_no_plain_tokens(tmp_path):
    name, m = a_bert(tmp_path)
    assert "has no normed_plain tokens: choose one of hidden, normed" in refused(name, stage="normed_plain")


def test_a_language_model_behind_open_clip_is_refused(tmp_path):
    "Which open_clip pools with layers of its own; so is a tower without a tokenizer"
    name, _ = a_bert(tmp_path)
    text = dict(hf_model_name=name, hf_model_pretrained=False, hf_pooler_type="mean_pooler",
                hf_proj_type="linear")
    vision = dict(image_size=32, patch_size=8, layers=1, width=32, head_width=16)
    m = open_clip.CustomTextCLIP(16, vision, text)
    with pytest.raises(InputError, match="its text tower is a HFTextEncoder"):
        text_tower_of(m, open_clip.tokenize)
    with pytest.raises(InputError, match="no tokenizer came with this model"): text_tower_of(m, None)

def test_mixing_without_a_mask_is_refused(tmp_path):
    "FNet mixes all positions, and the padding with them"
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=32)
    name, _ = saved(tmp_path, hf.FNetModel(hf.FNetConfig(**sizes, **NUMBERS)))
    assert "FNetModel takes no tokens of a text with a mask" in refused(name)

def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    name, _ = saved(tmp_path, hf.BertModel(hf.BertConfig(**PART, **NUMBERS | dict(vocab_size=10))))
    with pytest.raises(InputError, match="gives the token 1., the model knows 10: they do not belong"):
        load_text_encoder(name, device="cpu").tokens(TEXTS)

def test_pair_of_open_clip_has_one_fingerprint():
    text, image = load_text_encoder("tiny-clip", device="cpu"), load_encoder("tiny-clip", device="cpu")
    assert text.contract["fingerprint"] == image.contract["fingerprint"]
    assert close(text.encode_text(TEXTS), image.encode_text(TEXTS)) < TOL

# Text towers of open_clip in other forms: SigLIP's sees its padding and pools the last position, CoCa's adds
# a token of its own, an eos is found by its number

FORMS = {"siglip": dict(no_causal_mask=True, pool_type="last", proj_bias=True),
         "eos": dict(pool_type="eos", eos_id=49407), "first": dict(no_causal_mask=True, pool_type="first")}

@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_other_text_towers_of_open_clip(form, tmp_path):
    name, m = open_clip_folder(tmp_path, **FORMS[form])
    enc, tokenize = load_text_encoder(name, device="cpu"), open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    x, lengths = enc.tokens(TEXTS)
    all_ = m.text.forward_intermediates(tokenize(TEXTS), indices=1, output_fmt="NLC")["text_intermediates"][0]
    assert all(close(row[:n], t[:n]) < TOL for row, n, t in zip(x, lengths, all_))
    assert lengths.tolist() == ([20]*3 if form == "siglip" else [(ids != 0).sum() for ids in tokenize(TEXTS)])
    assert close(enc.encode_text(TEXTS), m.encode_text(tokenize(TEXTS))) < TOL
    if form != "siglip": return
    with pytest.raises(InputError, match="takes exactly 20 tokens"): load_text_encoder(name, max_length=10)

@torch.no_grad()
def test_a_text_tower_of_open_clip_with_the_tokenizer_of_a_language_model(tmp_path):
    "As SigLIP and SigLIP2 have one: it is fetched when text comes, here from a folder"
    save_tokenizer(tmp_path/"words")
    text = dict(context_length=16, vocab_size=len(WORDS), width=48, heads=3, layers=2, no_causal_mask=True,
                pool_type="last", proj_bias=True, hf_tokenizer_name=str(tmp_path/"words"))
    vision = dict(image_size=32, patch_size=8, layers=1, width=32, head_width=16)
    said = dict(embed_dim=16, vision_cfg=vision, text_cfg=text, custom_text=True)
    (tmp_path/"ViT-test-8-words.json").write_text(json.dumps(said))
    open_clip.add_model_config(tmp_path)
    m = shaken(open_clip.create_model("ViT-test-8-words"))
    torch.save(m.state_dict(), tmp_path/"w.pt")
    enc = load_text_encoder(f"ViT-test-8-words:{tmp_path/'w.pt'}", device="cpu")
    ids = open_clip.get_tokenizer("ViT-test-8-words")(TEXTS)
    theirs = m.text.forward_intermediates(ids, indices=1, output_fmt="NLC")["text_intermediates"][0]
    x, lengths = enc.tokens(TEXTS)
    assert lengths.tolist() == [16]*3 and close(x, theirs) < TOL
    assert close(enc.encode_text(TEXTS), m.encode_text(ids)) < TOL

@torch.no_grad()
def test_coca_has_states_and_no_pooling():
    text = dict(context_length=19, vocab_size=49408, width=48, heads=3, layers=2, embed_cls=True,
                output_tokens=True)
    vision = dict(image_size=32, patch_size=8, layers=1, width=32, head_width=16, attentional_pool=True,
                  attn_pooler_heads=2, output_tokens=True)
    more = dict(context_length=19, vocab_size=49408, width=48, heads=3, layers=1)
    m = shaken(open_clip.CoCa(16, multimodal_cfg=more, text_cfg=text, vision_cfg=vision))
    enc = TextEncoder(text_tower_of(m, open_clip.get_tokenizer("ViT-B-32")))
    x, lengths = enc.tokens(TEXTS)
    ids = open_clip.tokenize(TEXTS, 19)
    theirs = m.text.forward_intermediates(ids, indices=1, output_fmt="NLC")["text_intermediates"][0]
    assert all(close(row[:n], t[:n]) < TOL for row, n, t in zip(x, lengths, theirs))
    with pytest.raises(InputError, match="no text embedding of its own"): enc.encode_text(TEXTS)

@pytest.mark.parametrize("family", [a_bert, a_qwen3, an_hf_clip, an_open_clip])
def test_texts_are_cut_at_max_length(family, tmp_path):
    name, _ = family(tmp_path, truncation_side="left") # the end is cut whatever the tokenizer would do
    short, full = (load_text_encoder(name, max_length=n, device="cpu") for n in (5, None))
    x, lengths = short.tokens(TEXTS)
    assert lengths[1] == 5 and short.num_tokens == short.contract["max_length"] == 5
    if family in (a_qwen3, an_open_clip, an_hf_clip): # no token sees what follows, but for the end of text
        assert close(x[1, :4], full.tokens(TEXTS)[0][1, :4]) < 1e-5
    for n in (0, -1, 10**6):
        with pytest.raises(InputError, match=f"max_length {n}: this text tower takes 1 to"):
            load_text_encoder(name, max_length=n, device="cpu")

def test_a_text_without_tokens_has_one_state(tmp_path):
    name, _ = a_qwen3(tmp_path)
    x, lengths = load_text_encoder(name, device="cpu").tokens(["", "red apple"])
    assert lengths.tolist() == [1, 2] and x.isfinite().all() and x[0, 0].any()

def test_what_transformers_could_take_is_cut_at_256(tmp_path):
    config = hf.LlamaConfig(**LAYERS | dict(max_position_embeddings=4096), **NUMBERS)
    name, _ = causal(tmp_path, hf.LlamaForCausalLM(config), "$A")
    assert load_text_encoder(name, device="cpu").max_length == 256
    assert load_text_encoder(name, max_length=4096, device="cpu").num_tokens == 4096

# What is refused, each in one line

def refused(name, **kw):
    with pytest.raises(InputError) as e: load_text_encoder(name, device="cpu", **kw)
    assert "\n" not in str(e.value)
    return str(e.value)

def test_unknown_names_stages_and_texts(tmp_path):
    assert "nearest known: ViT-B-32" in refused("ViT-B-33")
    assert "unknown stage 'last': choose one of hidden, normed" in refused("tiny-clip", stage="last")
    assert "unknown dtype 'fp8'" in refused("tiny-clip", dtype="fp8")
    enc = load_text_encoder("tiny-clip", device="cpu")
    for texts in ([], "a cat", [1]):
        with pytest.raises(InputError, match="a list of at least one string"): enc.tokens(texts)
        with pytest.raises(InputError, match="a list of at least one string"): enc.encode_text(texts)
    name, _ = a_bert(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path} has no text embedding of its own"):
        load_text_encoder(name, device="cpu").encode_text(TEXTS)

def test_models_without_text(tmp_path):
    sizes = dict(PART, image_size=32, patch_size=8)
    for m in (hf.Dinov2Model(hf.Dinov2Config(**sizes)), hf.ViTModel(hf.ViTConfig(**sizes))):
        m.save_pretrained(tmp_path/type(m).__name__)
        assert "has no text tower" in refused(str(tmp_path/type(m).__name__))

@pytest.mark.fault("text encoder that brings code", "encoders", "refused in one line, not run")
def test_remote_code_is_off(tmp_path):
    (tmp_path/"modeling_own.py").write_text("raise SystemExit('it was run')")
    code = {"AutoModel": "modeling_own.Own", "AutoConfig": "modeling_own.Config"}
    said = dict(model_type="own", auto_map=code)
    (tmp_path/"config.json").write_text(json.dumps(said))
    assert "remote code is off" in refused(str(tmp_path))

@pytest.mark.fault("text encoder that lacks tensors or a tokenizer", "encoders", "one line that names it")
def test_incomplete_models(tmp_path):
    name, _ = a_bert(tmp_path)
    for f in ("tokenizer.json", "tokenizer_config.json"): (tmp_path/f).unlink()
    assert "no tokenizer came with" in refused(name)
    (tmp_path/"tokenizer.json").write_text("{}")
    assert "cannot be loaded" in refused(name) or "no tokenizer" in refused(name)
    m = hf.BertModel.from_pretrained(name)
    lacking = {k: v for k, v in m.state_dict().items() if "layer.1.output.dense.weight" not in k}
    m.save_pretrained(name, state_dict=lacking)
    save_tokenizer(tmp_path)
    assert "lacks 1 tensors, first encoder.layer.1.output.dense.weight" in refused(name)
    (tmp_path/"model.safetensors").write_bytes(b"broken")
    assert "cannot be loaded" in refused(name)

@pytest.mark.fault("hub out of reach, or without the model", "encoders", "one line that says what to do")
def test_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused("some/encoder").startswith("some/encoder is not in the cache")
    response = SimpleNamespace(headers={}, request=None)
    kinds = {"GatedRepoError": "is gated: accept", "RepositoryNotFoundError": "is not on huggingface.co"}
    for kind, said in kinds.items():
        error = getattr(huggingface_hub.errors, kind)("no", response=response)
        with pytest.raises(InputError, match=f"^some/encoder {said}"):
            with loading("some/encoder"):
                try: raise error
                except huggingface_hub.errors.HfHubHTTPError as e: raise OSError("several\nlines") from e

def test_one_s_own(tmp_path, monkeypatch):
    (tmp_path/"letters.py").write_text("""
import torch
class Own:
    takes, num_tokens, width, device = "captions", 4, 2, torch.device("cpu")
    contract = dict(model="own", layout="sequence", num_tokens=4, width=2)
    def tokens(self, texts): return torch.ones(len(texts), 4, 2), torch.full((len(texts),), 4)
class Images(Own): takes = "pixels"
class Nothing:
    tokens = None
""")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_text_encoder("python:letters:Own").tokens(["a"])[0].shape == (1, 4, 2)
    assert "takes no captions" in refused("python:letters:Images")
    assert "has no contract, num_tokens, width, device" in refused("python:letters:Nothing")
    assert "No module named" in refused("python:no_such_module:Own")
    sys.modules.pop("letters")
