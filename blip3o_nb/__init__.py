"Flow matching between the features of two frozen vision encoders"
__version__ = "0.1.0"

_NAMES = dict(load_encoder="encoders", ShardWriter="shards", FeatureDataset="shards", read_pickle_shard="pickles", feature_dls="loading", BLIP3oDiTConfig="dit", BLIP3oDiT="dit",
              LinearPath="paths", SlerpPath="paths", sample="samplers", BLIP3oFlowMatchingLoss="losses", flow_learner="learner", Pipeline="inference", make_config="recipes", train="training")
__all__ = list(_NAMES)

def __getattr__(name): # on first use, so that importing the package loads neither torch nor fastai
    if name not in _NAMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)

def __dir__(): return [*globals(), *_NAMES]
