"""What a step of the CUDA backend must move and compute: an analytic model, not a measurement.

    python benchmarks/gpu_costs.py > docs/gpu-costs.md

Bytes follow the launchers of kernels/kernels.h, argument by argument: every array that a kernel must read or write,
once. tests/cuda/test_costs.py compares those of our own kernels with the transactions counted under emulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from textwrap import fill

BLOCK_TOKENS = 32
SECTOR = 32  # bytes: the unit in which device memory is read and written
DRAWN_BYTES = 24  # rast_drawn


@dataclass(frozen=True)
class Net:
    """The shape of a model, stored and computed with in `act` bytes a value."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inter: int
    vocab: int
    tied: bool
    qkv_bias: bool = True
    head_dim: int = 128
    act: int = 2

    @property
    def weight_bytes(self) -> int:
        """All matrices that a step reads, the head included, the embedding table not."""
        return self.act * (self.layers * self.layer_parameters + self.vocab * self.hidden)

    @property
    def layer_parameters(self) -> int:
        """Of one layer's matrices."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * q + 2 * kv + 3 * self.inter)

    @property
    def stored_bytes(self) -> int:
        """What the weights take on the device."""
        return self.weight_bytes + (0 if self.tied else self.act * self.vocab * self.hidden)

    @property
    def kv_token_bytes(self) -> int:
        """KV cache of one token."""
        return 2 * self.act * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Device:
    """Data-sheet figures of one GPU, SXM versions, without sparsity."""

    name: str
    bandwidth: float  # bytes/s
    flops: float  # bf16 with float32 accumulation, 1/s
    memory: float  # bytes


@dataclass(frozen=True)
class Launch:
    """One kernel of a step."""

    op: str
    read: int
    written: int
    flops: int
    cublas: bool = False

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written


QWEN_1_5B = Net("Qwen2.5-1.5B", 28, 1536, 12, 2, 8960, 151936, tied=True)
QWEN_7B = Net("Qwen2.5-7B", 28, 3584, 28, 4, 18944, 152064, tied=False)
QWEN_14B = Net("Qwen2.5-14B", 48, 5120, 40, 8, 13824, 152064, tied=False)
QWEN_32B = Net("Qwen2.5-32B", 64, 5120, 40, 8, 27648, 152064, tied=False)
LLAMA_8B = Net("Llama-3.1-8B", 32, 4096, 32, 8, 14336, 128256, tied=False, qkv_bias=False)
LLAMA_70B = Net("Llama-3.1-70B", 80, 8192, 64, 8, 28672, 128256, tied=False, qkv_bias=False)
TRIOS = ((QWEN_7B, QWEN_1_5B), (QWEN_14B, QWEN_1_5B), (QWEN_32B, QWEN_7B), (LLAMA_70B, LLAMA_8B))
DEVICES = (
    Device("A100 80 GB", 2.039e12, 312e12, 80e9),
    Device("H100", 3.35e12, 989e12, 80e9),
    Device("H200", 4.8e12, 989e12, 141e9),
)


def embed(rows: int, net: Net) -> Launch:
    """Rows of the table, to float32."""
    return Launch("embed", rows * (net.hidden * net.act + 4), rows * net.hidden * 4, 0)


def norm(rows: int, dim: int, group: int, act: int, *, add: bool) -> Launch:
    """RMSNorm of float32 rows; with `add`, the residual stream is read, added to and written back."""
    values = rows * dim
    return Launch(
        "norm", values * (8 if add else 4) + group * act, values * (act + (4 if add else 0)), values * (5 if add else 4)
    )


def product(rows: int, out: int, in_: int, act: int) -> Launch:
    """A cuBLAS product: weights and inputs of `act` bytes, float32 results."""
    return Launch("product", act * in_ * (out + rows), 4 * rows * out, 2 * rows * out * in_, cublas=True)


def bias(rows: int, out: int, act: int) -> Launch:
    """Added in place to the float32 results of a product."""
    return Launch("bias", 4 * rows * out + act * out, 4 * rows * out, rows * out)


def rope_kv(rows: int, net: Net) -> Launch:
    """Rotates q in place; k, rotated, and v go to the cache."""
    q, kv = net.heads * net.head_dim, net.kv_heads * net.head_dim
    table = 4 * net.head_dim * rows
    return Launch("rope_kv", rows * 4 * (q + 2 * kv) + table, rows * (4 * q + 2 * net.act * kv), rows * 3 * (q + kv))


def attention(contexts: list[int], net: Net) -> Launch:
    """Decoding: one row a sequence, which reads all its keys and values once for the heads of a group."""
    q, kv = net.heads * net.head_dim, net.kv_heads * net.head_dim
    keys, rows = sum(contexts), len(contexts)
    tables = 4 * sum(ceil(context / BLOCK_TOKENS) for context in contexts)
    return Launch("attention", 2 * net.act * kv * keys + 4 * q * rows + tables, net.act * q * rows, 4 * q * keys)


def glu(rows: int, net: Net) -> Launch:
    """silu(gate) * up."""
    return Launch("glu", 8 * rows * net.inter, net.act * rows * net.inter, 6 * rows * net.inter)


def gather(outs: int, net: Net) -> Launch:
    """The rows that need logits, with the last layer's output added."""
    return Launch("gather", 8 * outs * net.hidden, 4 * outs * net.hidden, outs * net.hidden)


def transfer(outs: int, vocab: int, terms: int) -> Launch:
    """Greedy or plain sampling: every term's logits once."""
    return Launch("transfer", 4 * outs * vocab * terms, outs * DRAWN_BYTES, outs * vocab * (2 * terms + 8))


def forward(net: Net, contexts: list[int]) -> Iterator[Launch]:
    """The launches of csrc/model/forward.c for a decode step, one row a sequence, and the product with the head."""
    rows, q, kv = len(contexts), net.heads * net.head_dim, net.kv_heads * net.head_dim
    yield embed(rows, net)
    for layer in range(net.layers):
        yield norm(rows, net.hidden, net.hidden, net.act, add=layer > 0)
        for out in (q, kv, kv):
            yield product(rows, out, net.hidden, net.act)
            if net.qkv_bias:
                yield bias(rows, out, net.act)
        yield rope_kv(rows, net)
        yield attention(contexts, net)
        yield product(rows, net.hidden, q, net.act)
        yield norm(rows, net.hidden, net.hidden, net.act, add=True)
        yield product(rows, net.inter, net.hidden, net.act)
        yield product(rows, net.inter, net.hidden, net.act)
        yield glu(rows, net)
        yield product(rows, net.hidden, net.inter, net.act)
    yield gather(rows, net)
    yield norm(rows, net.hidden, net.hidden, net.act, add=False)
    yield product(rows, net.vocab, net.hidden, net.act)


def step(base: Net, small: Net, contexts: list[int]) -> list[Launch]:
    """A decode step of base, expert and antiexpert."""
    nets = (base, small, small)
    launches = [launch for net in nets for launch in forward(net, contexts)]
    return [*launches, transfer(len(contexts), base.vocab, len(nets))]


def seconds(launches: list[Launch], device: Device) -> float:
    """The least time: each launch takes what its bytes or its arithmetic take, whichever is more, and nothing else."""
    return sum(max(launch.bytes / device.bandwidth, launch.flops / device.flops) for launch in launches)


LAUNCH_SECONDS = 2e-6  # an assumption: a node of a replayed graph takes about so long, however little it does
CONTEXT = 1024
BATCHES = (1, 32)


def table(header: list[str], rows: list[list[str]]) -> str:
    """As Markdown; the first column to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paragraph(text: str) -> str:
    """Filled to the width of a page."""
    return fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def memory_table() -> str:
    """What has to be on the device before the first token."""
    rows = []
    for base, small in TRIOS:
        stored = base.stored_bytes + 2 * small.stored_bytes
        per_token = base.kv_token_bytes + 2 * small.kv_token_bytes
        room = []
        for device in DEVICES:
            left = device.memory * 0.95 - stored
            room.append(
                f"{left / per_token / 1e3:.0f} thousand" if left > 0 else f"{ceil(stored / device.memory)} devices"
            )
        rows.append([f"{base.name} + 2 × {small.name}", f"{stored / 1e9:.1f} GB", f"{per_token / 1e3:.0f} kB", *room])
    header = ["models", "weights", "KV a token", *(f"tokens of KV on {d.name}" for d in DEVICES)]
    return table(header, rows)


def step_table(batch: int) -> str:
    """Bytes, operations and launches of a decode step, and the least time for them."""
    rows = []
    for base, small in TRIOS:
        contexts = [CONTEXT] * batch
        launches = step(base, small, contexts)
        alone = [*forward(base, contexts), transfer(batch, base.vocab, 1)]
        bounds = []
        for device in DEVICES:
            fits = base.stored_bytes + 2 * small.stored_bytes < device.memory
            rate, of_base = batch / seconds(launches, device), batch / seconds(alone, device)
            bounds.append(f"{rate:.0f} ({of_base:.0f})" if fits else "–")
        rows.append(
            [
                f"{base.name} + 2 × {small.name}",
                f"{sum(launch.bytes for launch in launches) / 1e9:.1f} GB",
                f"{sum(launch.flops for launch in launches) / 1e9:.0f} G",
                str(len(launches)),
                *bounds,
            ]
        )
    return table(["models", "bytes", "operations", "launches", *(d.name for d in DEVICES)], rows)


def kernel_table(base: Net, small: Net, batch: int, device: Device) -> str:
    """Where the bytes of a step are, and what bounds each kernel."""
    launches = step(base, small, [CONTEXT] * batch)
    total = sum(launch.bytes for launch in launches)
    rows = []
    for op in dict.fromkeys(launch.op for launch in launches):
        mine = [launch for launch in launches if launch.op == op]
        moved = sum(launch.bytes for launch in mine)
        by_bytes, by_flops = moved / device.bandwidth, sum(launch.flops for launch in mine) / device.flops
        bound = "memory" if by_bytes >= by_flops else "arithmetic"
        if max(by_bytes, by_flops) / len(mine) < LAUNCH_SECONDS:
            bound = "latency"
        rows.append(
            [
                f"{op} (cuBLAS)" if mine[0].cublas else op,
                str(len(mine)),
                f"{moved / 1e6:.1f} MB",
                f"{moved / total:.1%}",
                f"{1e6 * by_bytes / len(mine):.2f} µs",
                f"{1e6 * by_flops / len(mine):.2f} µs",
                bound,
            ]
        )
    return table(["kernel", "launches", "bytes", "share", "each, by bytes", "each, by operations", "bound by"], rows)


def page() -> str:
    """The whole document."""
    base, small = TRIOS[0]
    sheets = ", ".join(f"{d.name} {d.bandwidth / 1e12:.2f} TB/s, {d.flops / 1e12:.0f} TFLOP/s" for d in DEVICES)
    launches = len(step(base, small, [CONTEXT]))
    parts = [
        "# What a step costs on a GPU",
        paragraph(f"""
            A model of the CUDA backend, not a measurement: `python benchmarks/gpu_costs.py` computes it from the
            shapes of the models, the arrays that each kernel takes (`kernels/kernels.h`) and the data sheets'
            bandwidth and bf16 speed ({sheets}). All is bfloat16, with float32 activations between kernels where the
            op table says so. The bytes of our own kernels agree with the transactions counted under emulation
            (`tests/cuda/test_costs.py`)."""),
        "## Memory",
        "Weights as stored, and how many tokens of keys and values fit beside them (5 % of the device left free).",
        memory_table(),
        "## A decode step",
        paragraph(f"""
            Every sequence has {CONTEXT} tokens of context. Bytes are read and written; launches as the forward pass
            makes them, each network by itself. For each device the most tokens a second that bandwidth and
            arithmetic allow, all sequences together, and in brackets for the base alone; – where one device is too
            small."""),
    ]
    for batch in BATCHES:
        parts += [f"Batch {batch}:", step_table(batch)]
    parts += [
        "## Kernel by kernel",
        paragraph(f"""
            {base.name} + 2 × {small.name} on an {DEVICES[1].name}. A kernel is called bound by latency where its
            bytes and operations take less than {1e6 * LAUNCH_SECONDS:.0f} µs, about what a node of a replayed graph
            costs by itself. Those {launches} nodes one after the other would add {
            1e3 * LAUNCH_SECONDS * launches:.1f} ms to a step."""),
    ]
    for batch in BATCHES:
        parts += [f"Batch {batch}:", kernel_table(base, small, batch, DEVICES[1])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
