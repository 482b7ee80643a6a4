"""`rast generate`: continues text."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from rast.cli import common
from rast.streaming import TextStreamer

if TYPE_CHECKING:
    from rast.loading import Tokenizer
    from rast.outputs import GenerateOutput


@common.loads_models()
def generate(
    load: common.Load,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text; may be given several times.")
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", metavar="PATH", help="File with one prompt; - is standard input."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages: apply the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message for --chat.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option()] = None,
    max_length: Annotated[int | None, typer.Option()] = None,
    min_new_tokens: Annotated[int | None, typer.Option()] = None,
    min_length: Annotated[int | None, typer.Option()] = None,
    do_sample: Annotated[
        bool | None, typer.Option("--do-sample/--no-do-sample", help="Draw, or take the best.")
    ] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option(help="0: off.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    num_return_sequences: Annotated[int | None, typer.Option(help="Samples for each prompt.")] = None,
    eos_token_id: Annotated[list[int] | None, typer.Option(metavar="ID", help="May be given several times.")] = None,
    suppress_tokens: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Never drawn; may be given several times.")
    ] = None,
    bad_words_ids: Annotated[str | None, typer.Option(help="JSON list of lists of ids.")] = None,
    stop_strings: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="May be given several times.")] = None,
    max_time: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    transfer_start: Annotated[int | None, typer.Option(help="New tokens from the base alone first.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: from the system; shown at the end.")] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Show text as it comes. Default: on a terminal.")
    ] = None,
    as_json: common.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary.")] = False,
) -> None:
    """Continue text from --prompt, --file or standard input.

    Options that are not given come from the base's generation_config.json, then from transformers' defaults.
    """
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "min_new_tokens": min_new_tokens,
        "min_length": min_length,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "num_return_sequences": num_return_sequences,
        "eos_token_id": eos_token_id or None,
        "suppress_tokens": suppress_tokens or None,
        "bad_words_ids": None if bad_words_ids is None else _json("--bad-words-ids", bad_words_ids),
        "stop_strings": stop_strings or None,
        "max_time": max_time,
        "transfer_start": transfer_start,
        "seed": seed,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if system is not None and not chat:
        raise ValueError("--system needs --chat")
    texts = _read_prompts(prompt, file)
    model = load()
    if model.tokenizer is None:
        raise ValueError(f"{model.roles['base']} has no tokenizer, so text cannot be turned into token ids")
    ids = [_encode(model.tokenizer, text, chat, system) for text in texts]

    one = len(ids) * options.get("num_return_sequences", 1) == 1
    if stream and (as_json or not one):
        raise ValueError("--stream is for one sequence as text: one prompt, one sample, no --json")
    if stream is None:
        stream = one and not as_json and sys.stdout.isatty()
    streamer = TextStreamer(model.tokenizer, skip_prompt=True) if stream else None
    start = time.monotonic()
    with common.sequence_progress(not stream and not quiet) as report:
        out: GenerateOutput = model.generate(
            ids, streamer=streamer, progress=report, return_dict_in_generate=True, **options
        )
    seconds = time.monotonic() - start

    if as_json:
        typer.echo(json.dumps(_as_dict(texts, model.tokenizer, out, seconds), ensure_ascii=False))
    elif not stream:
        _print_texts(model.tokenizer, out, len(texts))
    if not quiet:
        n = int(out.new_lengths.sum())
        rate = f"{n / seconds:.1f} tokens/s" if seconds else ""
        reasons = ", ".join(sorted(set(out.finish_reason)))
        typer.echo(f"{n} tokens in {seconds:.2f} s ({rate}), seed {out.seed}, finish: {reasons}", err=True)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


def _read_prompts(prompts: list[str] | None, files: list[Path] | None) -> list[str]:
    """All prompts; a file's last line feed is not part of its prompt."""
    texts = list(prompts or [])
    if not texts and not files:
        if sys.stdin.isatty():
            raise ValueError("no prompt: use --prompt, --file, or standard input")
        files = [Path("-")]
    for path in files or []:
        try:
            text = sys.stdin.read() if path == Path("-") else path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        texts.append(text.removesuffix("\n"))
    return texts


def _encode(tokenizer: Tokenizer, text: str, chat: bool, system: str | None) -> np.ndarray[Any, np.dtype[np.int32]]:
    if not chat:
        return tokenizer.encode(text)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)


def _print_texts(tokenizer: Tokenizer, out: GenerateOutput, n_prompts: int) -> None:
    rows = out.new_tokens()
    n_samples = len(rows) // n_prompts
    for i, row in enumerate(rows):
        if len(rows) > 1:
            typer.echo(f"--- prompt {i // n_samples + 1}, sample {i % n_samples + 1} ({out.finish_reason[i]})")
        typer.echo(tokenizer.decode(row))


def _as_dict(texts: list[str], tokenizer: Tokenizer, out: GenerateOutput, seconds: float) -> dict[str, Any]:
    rows = out.new_tokens()
    n_samples = len(rows) // len(texts)
    results = [
        {
            "prompt": texts[i // n_samples],
            "sample": i % n_samples,
            "text": tokenizer.decode(row),
            "token_ids": row.tolist(),
            "finish_reason": out.finish_reason[i],
            "logprob": float(np.nansum(out.logprob[i])),
            "base_logprob": float(np.nansum(out.base_logprob[i])),
            "transfer_kl": float(np.nansum(out.transfer_kl[i])),
        }
        for i, row in enumerate(rows)
    ]
    n = int(out.new_lengths.sum())
    return {"results": results, "seed": out.seed, "n_new_tokens": n, "seconds": seconds}
