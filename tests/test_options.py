"""Each default is said once: it is the same in Python, in `--help` and in a configuration."""
import inspect, os, re, subprocess, sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
import pytest
from blip3o_nb.core import toy_features
from blip3o_nb.features.loading import feature_dls
from blip3o_nb.features.shards import ShardWriter
from blip3o_nb.flow.paths import path_dict
from blip3o_nb.options import EncoderOptions, FlowOptions, OptimiserOptions, RunOptions, TrainingConfig
from blip3o_nb.options import make_config, read_config
from blip3o_nb.runs.runs import learner_of, loaders, model_of
from blip3o_nb.training.learner import flow_learner

BIN = Path(sys.executable).parent
BEFORE = """
recipe = ""
training_mode = ""
max_shards = 0
max_samples = 0
overfit_test_size = 0
hidden_size = 0
head_width = 0
path = ""
sigma_max = 0.0
shift = 0.0
loss_space = ""
velocity_scale = 0.0
learning_rate = 0.0
valid_samples = 0
batch_size = 32
tracker = ""
device = ""
"""

def function(name):
    module, _, path = name.partition(":")
    f = import_module(f"blip3o_nb.{module}")
    for part in path.split("."): f = getattr(f, part)
    return inspect.unwrap(f)

def defaults(f):
    found = {k: p.default for k, p in inspect.signature(f).parameters.items()}
    return {k: v for k, v in found.items() if v is not inspect.Parameter.empty}

FLOW_LEARNER = dict(
    times="noise_schedule", shift="shift", min_noise_level="min_noise_level",
    max_noise_level="max_noise_level", cls_weight="cls_weight", objective="objective", lr="learning_rate",
    wd="weight_decay", ema="ema",
    clip="max_grad_norm", accumulate="gradient_accumulation_steps", precision="precision",
    gradient_checkpointing="gradient_checkpointing", compile="compile", seed="seed")
SOLVER = dict(method="method", steps="steps")
PYTHON = { # function -> its parameters, as the options call them
    "training.learner:flow_learner": FLOW_LEARNER,
    "flow.samplers:sample": SOLVER, "generation.pipeline:Pipeline": SOLVER,
    "generation.pipeline:save_checkpoint": SOLVER,
    "runs.runs:GenerationCallback": dict(SOLVER, n="eval_samples", every="eval_every"),
    "features.loading:feature_dls": dict(bs="batch_size", share="eval_split", layout="training_mode",
                                         num_workers="num_workers", max_samples="max_samples", seed="seed"),
    "features.loading:tensor_dls": dict(bs="batch_size")}

@pytest.mark.parametrize("name", PYTHON)
def test_a_default_of_python_is_that_of_the_options(name):
    own, config = defaults(function(name)), TrainingConfig()
    for k, option in PYTHON[name].items(): assert own[k] == getattr(config, option), k

def test_the_betas_of_adam_are_those_of_the_options():
    betas = defaults(function("training.learner:flow_learner"))["betas"]
    assert betas == (OptimiserOptions.adam_beta1, OptimiserOptions.adam_beta2)

PROGRAMS = { # program -> the functions that it calls, whose parameters have the same names
    "blip3o_extract": ("features.extract:extract", "features.encoders:load_encoder"),
    "blip3o_eval": ("judging.evaluate:evaluate",), "blip3o_sample": ("generation.pipeline:write_samples",),
    "blip3o_convert": ("earlier.pickles:convert",), "blip3o_download": ("earlier.programs:download",)}
OTHER = {"judging.evaluate:evaluate": {"out"}, # of parts, there
         "earlier.pickles:convert": {"to"},    # found by what there is, in a shell
         "features.encoders:load_encoder": {"dtype"}} # of the towers, `precision` in a shell

@pytest.mark.parametrize("program", PROGRAMS)
def test_a_default_of_a_command_is_that_of_the_function(program):
    shell, compared = defaults(function(f"commands.cli:{program}")), 0
    for name in PROGRAMS[program]:
        for k, v in defaults(function(name)).items():
            if k in shell and k not in OTHER.get(name, ()):
                compared += 1
                assert (shell[k] or None) == (v or None), (name, k)
    assert compared

def test_commands_take_their_defaults_from_the_options():
    def program(name): return defaults(function(f"commands.cli:blip3o_{name}"))
    extract, judge, demo = program("extract"), program("eval"), program("demo")
    assert {k: extract[k] for k in ("stage", "layout")} == vars(EncoderOptions())
    assert judge["embeddings_dir"] == extract["out"] == RunOptions.embeddings_dir
    assert [demo[k] for k in ("epochs", "bs", "lr", "cls_weight")] == [None]*4 # the recipe's
    assert (FlowOptions.method, FlowOptions.steps, FlowOptions.sigma_min) == ("euler", 4, 1e-4)
    assert OptimiserOptions.batch_size == 64 and make_config("demo").batch_size == 32

def shown_by_help(program):
    "Option -> its default, as `--help` prints it"
    wide = {**os.environ, "COLUMNS": "200"}
    r = subprocess.run([BIN/program, "--help"], capture_output=True, text=True, env=wide)
    assert r.returncode == 0, r.stderr
    options = re.split(r"\n  (?=--)", r.stdout)
    found = {re.match(r"--[\w-]+", o)[0]: re.search(r"\(default: (.*?)\)", o, re.S) for o in options[1:]}
    return {k[2:].replace("-", "_"): m and m[1] for k, m in found.items()}

def test_help_of_a_training_prints_the_defaults_of_the_options():
    shown = shown_by_help("blip3o_train")
    assert len(fields(TrainingConfig)) > 60
    for f in fields(TrainingConfig): assert shown[f.name] == str(f.default), f.name

@pytest.mark.parametrize("program", [*PROGRAMS, "blip3o_demo"])
def test_help_prints_the_defaults_of_the_program(program):
    shown, own = shown_by_help(program), defaults(function(f"commands.cli:{program}"))
    compared = [k for k in shown if k in own]
    assert compared
    for k in compared: assert shown[k] == str(own[k]), k

def test_an_empty_configuration_is_the_defaults(tmp_path):
    (tmp_path/"config.toml").write_text("")
    assert make_config(**read_config(tmp_path/"config.toml")) == TrainingConfig()

def test_a_configuration_of_an_earlier_version_reads_as_before(tmp_path):
    "A zero or an empty text stood for what was not given"
    (tmp_path/"config.toml").write_text(BEFORE)
    config = make_config(**read_config(tmp_path/"config.toml"))
    assert config == make_config(batch_size=32, shift=None, valid_samples=None, recipe=None)

def test_a_training_has_the_path_that_python_gives(tmp_path):
    "Size and rest of the noise are parameters of a path, which both ways make alike"
    toy, contract = toy_features(100), {"clip": {"model": "toy-clip"}, "eva": {"model": "toy-eva"}}
    with ShardWriter(tmp_path/"set", contract, dtype="fp32") as w:
        w.add_batch(toy["keys"], {c: toy[c] for c in contract}, toy["captions"], [""]*100)
    for task in ("clip_generation", "eva_reproduction", "eva_denoising"):
        c = make_config(embeddings_dir=str(tmp_path/"set"), task=task, model_size="nano", batch_size=16)
        dls = loaders(c, tmp_path/"set")
        learn = learner_of(c, dls, model_of(c, dls), progress=False)
        python = flow_learner(feature_dls(tmp_path/"set", task, bs=16), model_of(c, dls), progress=False)
        assert path_dict(learn.flow.path) == path_dict(python.flow.path)
