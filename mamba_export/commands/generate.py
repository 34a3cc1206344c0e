"""mamba-export generate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mamba_export.commands.console import Console, common_options, runtime_options, size
from mamba_export.errors import UsageError

if TYPE_CHECKING:
    from mamba_export.runtime.generate import Prompt
    from mamba_export.runtime.stream import Generation, TextStream


@click.command("generate", short_help="Write text with a bundle.")
@click.argument("bundle", type=click.Path())
@click.option("-p", "--prompt", "prompts", multiple=True, help="Text to continue; several make a batch.")
@click.option("-f", "--prompt-file", "files", multiple=True, type=click.Path(), help="File with a prompt; - is stdin.")
@click.option("--tokens", "token_lists", multiple=True, help="A prompt as token ids: 12,7,300.")
@click.option("-n", "--max-tokens", default=128, show_default=True, type=click.IntRange(0), help="New tokens a prompt.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, help="Keep the k most likely tokens; 0 keeps all.")
@click.option("--top-p", default=1.0, help="Keep the most likely tokens up to this probability.")
@click.option("--min-p", default=0.0, help="Keep tokens at least this fraction as likely as the likeliest.")
@click.option("--repetition-penalty", default=1.0, help="Above 1 discourages tokens seen before.")
@click.option("--seed", type=int, help="Of the draws, to repeat them.")
@click.option("--stop", multiple=True, help="End the text before this string.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token.")
@click.option("--echo", is_flag=True, help="Print the prompt too.")
@click.option("--chunk", default=512, show_default=True, type=click.IntRange(1), help="Longest piece of prefill.")
@click.option("--step-only", is_flag=True, help="Never load the prefill graph; implies --low-memory.")
@click.option("--low-memory", is_flag=True, help="Read weights where they lie in the file; slower steps.")
@click.option("--save-state", type=click.Path(), help="Keep the conversation in this file.")
@click.option("--load-state", type=click.Path(), help="Go on from a file of --save-state.")
@runtime_options
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@common_options
def command(
    console: Console,
    bundle: str,
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    token_lists: tuple[str, ...],
    echo: bool,
    save_state: str | None,
    load_state: str | None,
    runtime: str,
    plugin: str | None,
    device: str,
    threads: int | None,
    low_memory: bool,
    **options: Any,
) -> None:
    """Continue a prompt, greedily unless --temperature is given. The text goes to stdout as it is made.

    \b
    Examples:
      mamba-export generate out/tiny --prompt "def read_file(path):"
      mamba-export generate out/tiny -p "import os" -n 64 --temperature 0.8 --top-p 0.95 --seed 1
      mamba-export generate out/tiny -p "Once" --save-state talk.state
      mamba-export generate out/tiny --load-state talk.state --prompt " upon"
    """
    from mamba_export.bundle import Bundle
    from mamba_export.runtime import state_file
    from mamba_export.runtime.generate import open_runner, stream
    from mamba_export.runtime.sampling import Sampling

    names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "seed")
    sampling = Sampling(**{name: options.pop(name) for name in names})
    texts: list[Prompt] = [*prompts, *map(_read_prompt, files), *map(_parse_tokens, token_lists)]
    opened = Bundle(bundle)
    source = opened.manifest.checkpoint.get("sha256", "")
    resume = state_file.load_state(load_state, opened.spec, source) if load_state else None
    if not texts and resume is None:
        texts = [_read_prompt("-")]
    run = stream(
        open_runner(opened, device, threads, low_memory or options["step_only"], runtime, plugin),
        texts,
        sampling=sampling,
        resume=resume,
        keep_state=save_state is not None,
        progress=console,
        **options,
    )
    _print_stream(run, console, [text if isinstance(text, str) and echo else "" for text in texts])
    result = run.result()
    _summary(console, result)
    if save_state and result.snapshot is not None:
        written = state_file.save_state(save_state, result.snapshot, opened.spec, source)
        console.line("wrote", f"{save_state} ({size(written)}) · next: --load-state {save_state}")
    rows = [{**row.__dict__, "row": i} for i, row in enumerate(result.rows)]
    console.result({"bundle": bundle, "rows": rows, "timings": result.timings.to_dict(), "state": save_state})


def _read_prompt(path: str) -> str:
    if path == "-" and sys.stdin.isatty():
        raise UsageError("there is no prompt", "give one with --prompt, --prompt-file or --tokens, or on stdin")
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{'stdin' if path == '-' else path} is not UTF-8 text") from error


def _parse_tokens(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"'{text}' is not a list of token ids", "like this: --tokens 12,7,300") from error


def _print_stream(run: TextStream, console: Console, echoed: list[str]) -> None:
    """One row is printed as it is made; a batch row by row, each when it is complete."""
    if console.as_json:
        for _ in run:
            pass
        return
    batch = len(run.rows)
    ends_line = True
    if batch == 1 and echoed:
        print(echoed[0], end="", flush=True)
    for piece in run:
        if batch > 1 or (piece.token_id is None and not piece.text):
            continue
        # Without a tokenizer the token ids are the result.
        text = piece.text if run.has_text else f"{piece.token_id} "
        print(text, end="", flush=True)
        ends_line = text.endswith("\n") if text else ends_line
    if batch == 1:
        print("" if ends_line else "\n", end="", flush=True)
        return
    for i, row in enumerate(run.rows):
        shown = row.text if run.has_text else " ".join(map(str, row.token_ids))
        print(f"── {i + 1} ──\n{echoed[i] if echoed else ''}{shown}", flush=True)


def _summary(console: Console, result: Generation) -> None:
    timings = result.timings
    made = sum(len(row.token_ids) for row in result.rows)
    parts = [f"{timings.prompt_tokens} prompt tokens in {timings.prompt_seconds:.2f} s"]
    if made:
        parts.append(f"{made} tokens")
    if timings.decode_seconds:
        parts.append(f"{timings.tokens_per_second:.1f} tokens/s")
    parts.append("ended by " + ", ".join(sorted({row.finish_reason for row in result.rows})))
    console.line("generate", " · ".join(parts))
