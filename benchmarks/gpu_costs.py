"""What a step of the CUDA backend must move and compute: an analytic model, not a measurement.

    python benchmarks/gpu_costs.py > docs/gpu-costs.md

Bytes follow the launchers of kernels/kernels.h, argument by argument: every array that a kernel must read or write,
once. tests/cuda/test_costs.py compares those of our own kernels with the transactions counted under emulation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from textwrap import fill

BLOCK_TOKENS = 32
CHUNK, MAX_CHUNKS = 256, 64  # of split attention: positions at least, and how many at most
SHORT_SEGMENT = 8  # rows of a segment that the kernel for decoding takes
QUERIES = 64  # of a block of the kernel for prefill: rows times heads of a group
UNIT, RECORD_BYTES = 512, 48  # of the transfer's sweep: ids, and what it notes of them
DRAW_BYTES, DRAWN_BYTES = 72, 24  # rast_draw, rast_drawn
LOGITS_BYTES = 128 << 20  # that one call of the transfer step reads at most
FINISH_WARPS = 8  # of the block that finishes an output of the transfer
COUNTER_BYTES = 4 << 10  # of the transfer's counters of blocks
SECTOR = 32  # bytes: the least that device memory reads or writes
SMALL_BYTES, SMALL_OPERATIONS = 64 << 20, 1 << 34  # of products that are batched, at most
SCRATCH_BYTES = 64 << 20  # that split attention has for partial results at most
BLAS_BYTES = {8: 8 << 20, 9: 32 << 20}  # workspace of cuBLAS, each stream, by major compute capability
POINTER_BYTES = 8 << 16  # of each stream's table of pointers for batched products
KEPT_BYTES = 256 << 20  # left free for code and graphs
ROWS, SEQUENCES = 512, 64  # of a step at most, by default
DRAFTS, DRAFT_BYTES = 12, 128 << 20  # of a sequence, and of all drafts' logits, at most


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
    major: int  # of the compute capability


@dataclass(frozen=True)
class Launch:
    """One kernel, or one call of cuBLAS, of a step."""

    op: str
    read: int  # bytes of device memory, each once
    written: int
    flops: int
    again: int = 0  # bytes that are asked for once more, and that a cache has
    cublas: bool = False
    large: bool = False  # a product that is not batched with others of its shape

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written

    def batched(self, n: int) -> Launch:
        """The same for n models of equal shapes, as one launch."""
        return replace(self, read=n * self.read, written=n * self.written, flops=n * self.flops, again=n * self.again)


QWEN_1_5B = Net("Qwen2.5-1.5B", 28, 1536, 12, 2, 8960, 151936, tied=True)
QWEN_7B = Net("Qwen2.5-7B", 28, 3584, 28, 4, 18944, 152064, tied=False)
QWEN_14B = Net("Qwen2.5-14B", 48, 5120, 40, 8, 13824, 152064, tied=False)
QWEN_32B = Net("Qwen2.5-32B", 64, 5120, 40, 8, 27648, 152064, tied=False)
LLAMA_8B = Net("Llama-3.1-8B", 32, 4096, 32, 8, 14336, 128256, tied=False, qkv_bias=False)
LLAMA_70B = Net("Llama-3.1-70B", 80, 8192, 64, 8, 28672, 128256, tied=False, qkv_bias=False)
TRIOS = ((QWEN_7B, QWEN_1_5B), (QWEN_14B, QWEN_1_5B), (QWEN_32B, QWEN_7B), (LLAMA_70B, LLAMA_8B))
DEVICES = (
    Device("A100 80 GB", 2.039e12, 312e12, 80e9, 8),
    Device("H100", 3.35e12, 989e12, 80e9, 9),
    Device("H200", 4.8e12, 989e12, 141e9, 9),
)


def bucket(n: int) -> int:
    """The capacity that the engine gives n rows, outputs or tokens: graphs are kept by capacities."""
    return 1 << (n - 1).bit_length()


def embed(rows: int, net: Net) -> Launch:
    """Rows of the table, to float32; every warp, which has 128 values, looks up its token."""
    looked_up = 2 * SECTOR * rows * ceil(net.hidden / 128)
    return Launch("embed", rows * (net.hidden * net.act + 4), rows * net.hidden * 4, 0, again=looked_up)


def norm(rows: int, dim: int, group: int, act: int, *, add: bool) -> Launch:
    """RMSNorm of float32 rows; with `add`, the residual stream is read, added to and written back."""
    values = rows * dim
    return Launch(
        "norm",
        values * (8 if add else 4) + group * act,
        values * (act + (4 if add else 0)),
        values * (5 if add else 4),
        again=(values - group) * act,
    )


def product(what: str, rows: int, out: int, in_: int, act: int) -> Launch:
    """A cuBLAS product: weights and inputs of `act` bytes, float32 results."""
    flops = 2 * rows * out * in_
    large = act * in_ * out > SMALL_BYTES or flops > SMALL_OPERATIONS
    return Launch(f"product, {what}", act * in_ * (out + rows), 4 * rows * out, flops, cublas=True, large=large)


def together(launch: Launch, n: int) -> list[Launch]:
    """n of the same that do not wait for each other."""
    return [launch] * n if launch.large else [launch.batched(n)]


def bias(rows: int, out: int, act: int) -> Launch:
    """Added in place to the float32 results of a product."""
    return Launch("bias", 4 * rows * out + act * out, 4 * rows * out, rows * out, again=act * out * (rows - 1))


def rope_kv(rows: int, net: Net) -> Launch:
    """Rotates q in place; k, rotated, and v go to the cache. Rows of sequences of different lengths.

    A token's K lies in pieces of 16 bytes among those of other tokens, so that half of each sector is written. Each
    warp, which has 256 values, looks up its row, reads its angles in two turns that touch the same sectors, and for
    the cache finds the block.
    """
    q, kv = net.heads * net.head_dim, net.kv_heads * net.head_dim
    keys = kv * net.act * (SECTOR // 16)
    table = 4 * net.head_dim * rows
    looked_up = 2 * SECTOR * rows * (ceil((q + 2 * kv) / 256) + ceil(2 * kv / 256))
    return Launch(
        "rope_kv",
        rows * 4 * (q + 2 * kv) + table,
        rows * (4 * q + keys + net.act * kv),
        rows * 3 * (q + kv),
        again=table * (2 * ceil((q + kv) / 256) - 1) + looked_up,
    )


def attention(contexts: list[int], net: Net) -> Iterator[Launch]:
    """Decoding: one row a sequence, whose keys and values the heads of a group read together.

    Long contexts are split over blocks, which leave float32 partial results that a second kernel merges. A pass that
    could hold long segments, going by its capacity, launches the kernel for these too; it finds none.
    """
    q, kv = net.heads * net.head_dim, net.kv_heads * net.head_dim
    keys, rows = sum(contexts), len(contexts)
    most, chunk = bucket(max(contexts)), CHUNK
    while ceil(most / chunk) > MAX_CHUNKS:
        chunk *= 2
    tables = 4 * sum(ceil(context / BLOCK_TOKENS) for context in contexts)
    read, out = 2 * net.act * kv * keys + 4 * q * rows + tables, net.act * q * rows
    if most <= chunk:
        yield Launch("attention", read, out, 4 * q * keys)
    else:
        chunks = sum(ceil(context / chunk) for context in contexts)
        partial = 4 * net.heads * (net.head_dim + 2) * chunks
        yield Launch("attention", read, partial, 4 * q * keys, again=4 * q * (chunks - rows))
        # both warps read a chunk's maximum and sum for themselves, and what says which rows are theirs
        again = SECTOR * net.heads * ((6 + 2 * ceil(net.head_dim / 64)) * chunks + 10 * rows)
        yield Launch("merge", partial, out, 2 * q * chunks, again=again)
    if bucket(rows) > SHORT_SEGMENT:
        yield Launch("prefill", 4 * (rows + 2), 0, 0)


def prefill(before: int, rows: int, net: Net) -> Launch:
    """Attention of one segment's rows behind `before` keys on tensor cores: each tile of queries reads its keys.

    Outputs are stored in half sectors, two after each other.
    """
    q, kv, group = net.heads * net.head_dim, net.kv_heads * net.head_dim, net.heads // net.kv_heads
    ends = [
        before + (min(end, rows * group) - 1) // group + 1 for end in range(QUERIES, rows * group + QUERIES, QUERIES)
    ]
    keys = before + rows
    return Launch(
        "prefill",
        2 * net.act * kv * keys + 4 * q * rows,
        net.act * q * rows,
        4 * q * sum(range(before + 1, keys + 1)),
        again=2 * net.act * kv * (sum(ends) - keys) + net.act * q * rows,
    )


def glu(rows: int, net: Net) -> Launch:
    """silu(gate) * up."""
    return Launch("glu", 8 * rows * net.inter, net.act * rows * net.inter, 6 * rows * net.inter)


def gather(outs: int, net: Net) -> Launch:
    """The rows that need logits, with the last layer's output added."""
    return Launch("gather", 8 * outs * net.hidden, 4 * outs * net.hidden, outs * net.hidden)


def saved(outs: int, vocab: int) -> Launch:
    """Logits that were kept from drafting, to their place among the others; every warp looks up the row."""
    return Launch("saved", 4 * outs * vocab + 4 * outs, 4 * outs * vocab, 0, again=SECTOR * outs * ceil(vocab / 32))


def copy_blocks(blocks: int, net: Net) -> Launch:
    """KV blocks of all layers, when sequences that shared one part."""
    moved = blocks * BLOCK_TOKENS * net.kv_token_bytes
    return Launch("copy_blocks", moved, moved, 0)


def convert(n: int, from_bytes: int, to_bytes: int) -> Launch:
    """Weights of another type than the activations', once, when they are loaded."""
    return Launch("convert", n * from_bytes, n * to_bytes, 0)


def transfer(outs: int, vocab: int, terms: int) -> Launch:
    """Greedy or plain sampling: a sweep that reads every term's logits once, and what it noted, by the last block."""
    records = RECORD_BYTES * outs * ceil(vocab / UNIT)
    options = outs * (DRAW_BYTES + 4 * terms)
    logits = 4 * outs * vocab * terms
    # five fields of each record are read one after the other, and all warps of an output read its options
    fields = outs * ceil(vocab / UNIT) * (5 * SECTOR - RECORD_BYTES)
    again = fields + SECTOR * outs * FINISH_WARPS * (3 + terms)
    written = records + outs * (DRAWN_BYTES + SECTOR)  # and a counter of blocks, read and written
    return Launch("transfer", logits + options + records, written, outs * vocab * (2 * terms + 8), again=again)


def combine(nets: list[Net], outs: int) -> Iterator[Launch]:
    """Products with the heads and the transfer step, in pieces that its room for logits holds (ops.c)."""
    vocab, outs = nets[0].vocab, bucket(outs)
    piece = max(LOGITS_BYTES // (4 * len(nets) * ceil(vocab / 4) * 4), 1)
    for first in range(0, outs, piece):
        n = min(piece, outs - first)
        heads = Counter((min(net.vocab, vocab), net.hidden, net.act) for net in nets)
        for shape, same in heads.items():  # those of equal shapes together, if that is all outputs
            head = product("head", n, *shape)
            yield from together(head, same) if n == outs else [head] * same
        yield transfer(n, vocab, len(nets))


def forward(net: Net, contexts: list[int], n_models: int = 1) -> Iterator[Launch]:
    """The launches of csrc/model/forward.c for a decode step, one row a sequence, of models of equal shapes."""
    for launch in forward_one(net, contexts):
        yield from together(launch, n_models)


def forward_one(net: Net, contexts: list[int]) -> Iterator[Launch]:
    """The same, of one model."""
    rows, q, kv = len(contexts), net.heads * net.head_dim, net.kv_heads * net.head_dim
    capacity = bucket(rows)
    yield embed(rows, net)
    for layer in range(net.layers):
        yield norm(rows, net.hidden, net.hidden, net.act, add=layer > 0)
        if q == kv:
            yield from together(product("q, k and v", capacity, q, net.hidden, net.act), 3)
        else:
            yield product("q", capacity, q, net.hidden, net.act)
            yield from together(product("k and v", capacity, kv, net.hidden, net.act), 2)
        if net.qkv_bias:
            yield from (bias(rows, out, net.act) for out in (q, kv, kv))
        yield rope_kv(rows, net)
        yield from attention(contexts, net)
        yield product("o", capacity, net.hidden, q, net.act)
        yield norm(rows, net.hidden, net.hidden, net.act, add=True)
        yield from together(product("gate and up", capacity, net.inter, net.hidden, net.act), 2)
        yield glu(rows, net)
        yield product("down", capacity, net.hidden, net.inter, net.act)
    yield gather(rows, net)
    yield norm(rows, net.hidden, net.hidden, net.act, add=False)


def streams(base: Net, small: Net, contexts: list[int]) -> tuple[list[Launch], list[Launch], list[Launch]]:
    """A decode step of a trio: the base's pass, the pair's beside it, and the transfer after both."""
    after = combine([base, small, small], len(contexts))
    return list(forward(base, contexts)), list(forward(small, contexts, 2)), list(after)


def step(base: Net, small: Net, contexts: list[int]) -> list[Launch]:
    """All of that."""
    return [launch for stream in streams(base, small, contexts) for launch in stream]


def seconds(launches: list[Launch], device: Device) -> float:
    """The least time: each launch takes what its bytes or its arithmetic take, whichever is more, and nothing else."""
    return sum(max(launch.bytes / device.bandwidth, launch.flops / device.flops) for launch in launches)


LAUNCH_SECONDS = 2e-6  # an assumption: a node of a replayed graph takes about so long, however little it does
CONTEXT = 1024
MEMORY_CONTEXT = 32768  # that the workspace is made for
BATCHES = (1, 32)


def table(header: list[str], rows: list[list[str]]) -> str:
    """As Markdown; the first column to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paragraph(text: str) -> str:
    """Filled to the width of a page."""
    return fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def activations(net: Net, n_models: int, context: int, rows: int, outs: int) -> int:
    """Buffers of the models of one shape (forward.c), their table of angles, and partial results of attention."""
    q, kv, f, act = net.heads * net.head_dim, net.kv_heads * net.head_dim, 4, net.act
    row = net.hidden * (2 * f + act) + q * (f + act) + 2 * kv * f + net.inter * (2 * f + act)
    chunks = min(ceil(bucket(context) / CHUNK), MAX_CHUNKS)
    partial = n_models * rows * net.heads * (net.head_dim + 2) * f * chunks if chunks > 1 else 0
    return (
        n_models * (rows * row + outs * net.hidden * (f + act))
        + context * net.head_dim * f
        + min(partial, SCRATCH_BYTES)
    )


def workspace(nets: list[Net], major: int, context: int, rows: int = ROWS, sequences: int = SEQUENCES) -> int:
    """What is allocated at load for the largest step: for models of each shape, a stream, and for the transfer."""
    outs, vocab = rows + sequences, nets[0].vocab
    shapes = Counter(nets)
    total = sum(activations(net, n, context, rows, outs) for net, n in shapes.items())
    total += len(shapes) * (BLAS_BYTES[major] + POINTER_BYTES) + 4 * sequences + DRAWN_BYTES * outs
    logits = 4 * (ceil(vocab / 4) * 4)
    found = ceil(vocab / UNIT) * (RECORD_BYTES + 4 * UNIT + 4 * UNIT // 128 + 8 * len(nets))
    total += max(min(LOGITS_BYTES, outs * len(nets) * logits), len(nets) * logits)
    return total + COUNTER_BYTES + found * min(outs, max(LOGITS_BYTES // logits, 1))


def on_demand(vocab: int, sequences: int = SEQUENCES) -> int:
    """What requests may ask for besides: rows of logits, those of drafts, histories and masks."""
    row = 4 * vocab
    return row * (sequences + min(DRAFT_BYTES // row, DRAFTS * sequences)) + 2 * sequences * 4 * ceil(vocab / 32)


def memory_table() -> str:
    """What has to be on the device before the first token."""
    rows = []
    for base, small in TRIOS:
        stored = base.stored_bytes + 2 * small.stored_bytes
        per_token = base.kv_token_bytes + 2 * small.kv_token_bytes
        room = []
        for device in DEVICES:
            work = workspace([base, small, small], device.major, MEMORY_CONTEXT)
            left = device.memory - stored - work - KEPT_BYTES - on_demand(base.vocab)
            room.append(
                f"{left / per_token / 1e3:.0f} thousand" if left > 0 else f"{ceil(stored / device.memory)} devices"
            )
        work = workspace([base, small, small], 9, MEMORY_CONTEXT)
        sizes = [f"{stored / 1e9:.1f} GB", f"{work / 1e9:.2f} GB", f"{per_token / 1e3:.0f} kB"]
        rows.append([f"{base.name} + 2 × {small.name}", *sizes, *room])
    header = ["models", "weights", "workspace", "KV a token", *(f"tokens of KV on {d.name}" for d in DEVICES)]
    return table(header, rows)


def step_table(batch: int) -> str:
    """Bytes, operations and launches of a decode step, and the least time for them."""
    rows = []
    for base, small in TRIOS:
        contexts = [CONTEXT] * batch
        launches = step(base, small, contexts)
        alone = [*forward(base, contexts), *combine([base], batch)]
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
                " + ".join(str(len(stream)) for stream in streams(base, small, contexts)),
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


def other_table(net: Net, device: Device) -> str:
    """Kernels that a plain decode step does not have."""
    rows = []
    for what, launch in (
        ("attention of 512 tokens behind 512, a layer", prefill(512, 512, net)),
        ("a copied KV block, all layers", copy_blocks(1, net)),
        ("an output's logits, kept from drafting", saved(1, net.vocab)),
        ("a float32 matrix of the MLP, converted", convert(net.hidden * net.inter, 4, 2)),
    ):
        by_bytes, by_flops = launch.bytes / device.bandwidth, launch.flops / device.flops
        bound = "memory" if by_bytes >= by_flops else "arithmetic"
        times = [f"{1e6 * time:.2f} µs" for time in (by_bytes, by_flops)]
        rows.append(
            [f"{launch.op}: {what}", f"{launch.bytes / 1e6:.1f} MB", f"{launch.again / 1e6:.1f} MB", *times, bound]
        )
    return table(["kernel", "bytes", "from the cache", "by bytes", "by operations", "bound by"], rows)


def page() -> str:
    """The whole document."""
    base, small = TRIOS[0]
    sheets = "; ".join(f"{d.name} {d.bandwidth / 1e12:.2f} TB/s, {d.flops / 1e12:.0f} TFLOP/s" for d in DEVICES)
    of_base, of_pair, after = (len(stream) for stream in streams(base, small, [CONTEXT]))
    longest = max(of_base, of_pair) + after
    parts = [
        "# What a step costs on a GPU",
        paragraph(f"""
            A model of the CUDA backend, not a measurement: `python benchmarks/gpu_costs.py` computes it from the
            shapes of the models, the arrays that each kernel takes (`kernels/kernels.h`) and the data sheets'
            bandwidth and bf16 speed ({sheets}). All is bfloat16, with float32 activations between kernels where the
            op table says so. The bytes of our own kernels and the number of launches agree with what is counted
            under emulation (`tests/cuda/test_costs.py`)."""),
        "## Memory",
        paragraph(f"""
            Weights as stored; what a step of {ROWS} rows and {SEQUENCES} sequences of up to {MEMORY_CONTEXT} tokens
            needs (activations, cuBLAS's workspace, partial results of attention, logits), made at load; and how many
            tokens of keys and values fit beside them and what is left free: {KEPT_BYTES >> 20} MiB for code and graphs,
            and for requests {on_demand(base.vocab) / 1e6:.0f} MB (a row of logits for each sequence, those of drafts).
            What the context itself takes, some hundreds of MB, is not in the table: the backend sees what is free
            beside it."""),
        memory_table(),
        "## A decode step",
        paragraph(f"""
            Every sequence has {CONTEXT} tokens of context. Bytes are those that device memory reads and writes.
            Launches: the base's pass + the pair's, which runs beside it on a stream of its own, expert and antiexpert
            as one pass + the products with the heads and the transfer, after both. Products of equal shapes that do
            not wait for each other (of keys and values, of gate and up, of expert and antiexpert) are one call of
            cuBLAS, which counts as one, though it may launch several kernels; but not where each has more than {
            SMALL_BYTES >> 20
        } MiB of weights or {SMALL_OPERATIONS / 1e9:.0f} G operations, beside which a launch
            is little. For each device the most
            tokens a second that bandwidth and arithmetic allow, all sequences together, and in brackets for the base
            alone; – where one device is too small."""),
    ]
    for batch in BATCHES:
        parts += [f"Batch {batch}:", step_table(batch)]
    parts += [
        "## Kernel by kernel",
        paragraph(f"""
            {base.name} + 2 × {small.name} on an {DEVICES[1].name}. A kernel is called bound by latency where its
            bytes and operations take less than {1e6 * LAUNCH_SECONDS:.0f} µs, about what a node of a replayed graph
            costs by itself. The longest way through the step has {longest} nodes, which by that figure take {
            1e3 * LAUNCH_SECONDS * longest:.1f} ms. Long contexts are split over blocks, whose partial results `merge`
            puts together; `prefill` is launched where a pass has more than {SHORT_SEGMENT} rows, and finds nothing to
            do."""),
    ]
    for batch in BATCHES:
        parts += [f"Batch {batch}:", kernel_table(base, small, batch, DEVICES[1])]
    parts += [
        "## Other kernels",
        paragraph(f"""
            Of {base.name} on an {DEVICES[1].name}. Tiles of queries read the same keys and values one after the
            other, mostly from the cache."""),
        other_table(base, DEVICES[1]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
