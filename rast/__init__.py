"""RAST: decoding with logits = base + Σ λ · (expert − antiexpert).

import rast

model = rast.RastForCausalLM.from_pretrained("large-base", expert="small-tuned", antiexpert="small-base")
ids = model.tokenizer.encode("What is 17 · 23?")
out = model.generate(ids, max_new_tokens=64)
print(model.tokenizer.decode(out[0]))
"""

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
