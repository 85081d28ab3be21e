"Flow matching between the features of frozen encoders"
import sys
from importlib import import_module
__version__ = "0.1.0"

_NAMES = { # room -> the public names that it holds, which are imported on first use: torch and fastai come with them
    "files": "InputError",
    "core": "Task TASKS Layout is_held_out seed_everything toy_features",
    "options": "TrainingConfig make_config read_config",
    "flow.paths": "LinearPath SlerpPath PathSample",
    "flow.samplers": "sample",
    "flow.losses": "BLIP3oFlowMatchingLoss",
    "network.dit": "BLIP3oDiT BLIP3oDiTConfig",
    "network.nextdit": "NextDiT",
    "features.images": "read_images",
    "features.encoders": "load_encoder load_text_encoder",
    "features.shards": "FeatureDataset ShardWriter",
    "features.loading": "Normalizer as_dls feature_dls tensor_dls",
    "features.extract": "extract online_dls",
    "training.learner": "FlowLearner flow_learner",
    "generation.pipeline": "Pipeline save_checkpoint write_samples",
    "generation.pixels": "Decoder decoder_learner pixel_dls",
    "generation.public_decoders": "load_public_decoder",
    "judging.baselines": "",
    "judging.evaluate": "evaluate",
    "judging.report": "write_report",
    "runs.runs": "train",
    "earlier.pickles": "convert read_pickle_shard",
}
_ROOM_OF = {name: room for room, names in _NAMES.items() for name in names.split()}
__all__ = list(_ROOM_OF)

_MOVED = { # module, or name in a module, of earlier versions -> where it is now
    "adapters": "flow.samplers", "attention": "network.attention", "baselines": "judging.baselines",
    "cli": "commands.cli", "cli_eval": "commands.cli", "command": "commands.command",
    "convert": "earlier.pickles", "distributed": "runs.distributed", "dit": "network.dit",
    "download": "earlier.programs", "encoders": "features.encoders", "evaluate": "judging.evaluate",
    "extract": "features.extract", "images": "features.images", "inference": "generation.pipeline",
    "learner": "training.learner", "likelihood": "flow.samplers", "loading": "features.loading",
    "losses": "flow.losses", "metrics": "judging.metrics", "monitors": "training.monitors",
    "nextdit": "network.nextdit", "online": "features.extract", "optimisation": "training.optimisation",
    "paths": "flow.paths", "pickles": "earlier.pickles", "pictures": "features.images",
    "recipes": "options", "report": "judging.report", "resume": "runs.resume", "rope": "network.attention",
    "samplers": "flow.samplers", "shards": "features.shards", "times": "flow.paths",
    "towers": "features.encoders", "trackers": "training.monitors", "validation": "runs.runs",
    "widgets": "generation.widgets", "training": "runs.runs",
}

def _moved(name):
    "Where a module of earlier versions is now, or what was imported from the module `training`; None for others"
    old, _, attribute = name.partition(".")
    if name in _MOVED and name != "training": return _MOVED[name]
    if old == "training" and attribute and attribute not in ("learner", "monitors", "optimisation"):
        return _MOVED["training"]

class _Moved:
    "Names the new place of a module that is imported by its old name"
    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, rest = name.partition(".")
        new = _moved(rest) if package == __name__ else None
        if new: raise ImportError(f"{name} is now {__name__}.{new}: import from there", name=name)

sys.meta_path.append(_Moved)

def __getattr__(name):
    if name == "make_config": import_module(".earlier.programs", __name__) # which adds earlier recipes
    if name in _ROOM_OF: return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)
    if not name.startswith("_") and _moved(name): raise ImportError(f"{__name__}.{name} is now {__name__}.{_moved(name)}: import from there")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

def __dir__(): return [*globals(), *_ROOM_OF]
