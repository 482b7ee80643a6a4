"""RAST: decoding with logits = base + Σ λ · (expert − antiexpert).

import rast

model = rast.RastForCausalLM.from_pretrained("large-base", expert="small-tuned", antiexpert="small-base")
ids = model.tokenizer.encode("What is 17 · 23?")
out = model.generate(ids, max_new_tokens=64)
print(model.tokenizer.decode(out[0]))
"""

TYPE_CHECKING = False  # importing typing takes longer than all else here
if TYPE_CHECKING:
    from rast.batching import Request
    from rast.demo import load_demo
    from rast.modeling import RastForCausalLM, TransferPair
    from rast.outputs import ForwardOutput, GenerateOutput, Sample, ScoreOutput

__version__ = "0.1.0"

__all__ = [
    "ForwardOutput",
    "GenerateOutput",
    "RastForCausalLM",
    "Request",
    "Sample",
    "ScoreOutput",
    "TransferPair",
    "__version__",
    "load_demo",
]

# Where the names are. They are imported when first used: the command line must be able to catch Ctrl-C before that.
_HOMES = {
    "ForwardOutput": "rast.outputs",
    "GenerateOutput": "rast.outputs",
    "RastForCausalLM": "rast.modeling",
    "Request": "rast.batching",
    "Sample": "rast.outputs",
    "ScoreOutput": "rast.outputs",
    "TransferPair": "rast.modeling",
    "load_demo": "rast.demo",
}
_MODULES = frozenset({"demo", "streaming"})  # that are there after `import rast`


def __getattr__(name: str) -> object:
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"rast.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'rast' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
