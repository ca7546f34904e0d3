"""`mm chat CKPT`: talk to a model, or give it one prompt."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmcli.chat_commands import Settings
    from mmcore.generation.conversation import Conversation

def chat(
    checkpoint: Annotated[str, typer.Argument(
        metavar="CKPT",
        help="A run folder (its newest whole checkpoint), a training checkpoint, or an exported folder.",
    )],
    prompt: Annotated[str | None, typer.Option(help="Answer this and end.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message, for models trained on conversations.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token; 1 draws as trained.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw only from the so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw only from the likeliest tokens of this total.")] = 0.95,
    seed: Annotated[int | None, typer.Option(
        help="Another seed, other words. By default 0 for a prompt, and drawn anew for a conversation.",
    )] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    without: Annotated[str | None, typer.Option(
        help="Memories to knock out: long_term, short_term, contextual (v1), persistent; several with commas.",
    )] = None,
    tokenizer: Annotated[str | None, typer.Option(
        metavar="FILE", help="A tokenizer's file or folder, for a checkpoint without one.",
    )] = None,
    dtype: Annotated[str | None, typer.Option(help="Format of the weights: float32, bfloat16, float16, int8.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: text, ids, statistics.")] = False,
) -> None:
    """Talk to a model. Its memories go on from turn to turn; a base model continues your text.

    With --prompt, or text on standard input, it answers once and ends.

    \b
    Examples:
      mm chat runs/quickstart
      echo "Once upon a time" | mm chat runs/stories --temperature 0.7
    """
    from mmcli.terminal import tolerate_narrow_encodings
    from mmcore.checkpoint.resolve import resolve_checkpoint
    from mmcore.errors import ConfigError

    tolerate_narrow_encodings()
    interactive = prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if interactive and as_json:
        raise ConfigError("--json answers one prompt: give it with --prompt, or on standard input")
    resolve_checkpoint(checkpoint, on_skip=lambda _: None, verify=False)  # before anybody types a prompt for nothing
    text = None if interactive else _given_text(prompt)
    from mmcli.chat_commands import Settings  # torch comes with it: a bad prompt is refused before

    settings = Settings(temperature, top_k, top_p, max_new_tokens, seed or 0).checked()
    conversation = _open(checkpoint, system, without, dtype, device, tokenizer)
    if interactive:
        _talk(conversation, checkpoint, settings, fixed_seed=seed is not None)
    else:
        _answer_once(conversation, text, settings, as_json)


def _given_text(prompt: str | None) -> str:
    """The one prompt. Raises ConfigError where it is empty, and DataError where it is not UTF-8."""
    from mmcore.errors import ConfigError, DataError

    if prompt is None:
        if sys.stdin.isatty():
            print("reading the prompt from the keyboard; Ctrl-D ends it", file=sys.stderr)
        data = sys.stdin.buffer.read()
        try:
            prompt = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input is not UTF-8 (byte {error.start:,}): convert it first, as with iconv"
            ) from None
        prompt = prompt.removesuffix("\n").removesuffix("\r")  # as $(...) does; it would end a text to continue
    if not prompt:
        raise ConfigError("the prompt is empty: give text with --prompt, or on standard input")
    return prompt


def _open(
    checkpoint: str, system: str | None, without: str | None, dtype: str | None, device: str,
    tokenizer: str | None = None,
) -> Conversation:
    import torch

    import mmcore
    from mmcli.terminal import names_in, tell_of_slow_kernels
    from mmcore.checkpoint.load import weight_format
    from mmcore.generation.conversation import Conversation
    from mmcore.generation.engine import generate
    from mmcore.kernels.allocator import keep_pages

    chosen = None if dtype is None else weight_format(dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = mmcore.load_model(checkpoint, dtype=chosen, device=device, without=names_in(without))
    if device == "cpu":
        keep_pages()
        tell_of_slow_kernels(device)
    conversation = Conversation(model, mmcore.load_tokenizer(checkpoint, tokenizer), system)
    # Kernels are built at their first use, 1 to 20 s on a new machine, which would count as reading speed.
    for _ in generate(model, [0, 0], max_new_tokens=2, stop_ids=()):
        pass
    return conversation


def _answer_once(conversation: Conversation, text: str, settings: Settings, as_json: bool) -> None:
    from mmcli.chat_screen import long_context
    from mmcli.terminal import clean

    pieces = []
    for piece in conversation.say(text, settings.max_new_tokens, settings.sampling):
        pieces.append(piece)
        if not as_json:
            print(clean(piece), end="", flush=True)
    print(_as_json(conversation, "".join(pieces), settings) if as_json else "", flush=True)
    if notice := long_context(conversation):
        print(notice, file=sys.stderr)


def _as_json(conversation: Conversation, text: str, settings: Settings) -> str:
    from dataclasses import asdict

    session = conversation.session
    values = {
        "text": text,
        "ids": conversation.answer_ids,
        "ended": conversation.ended,
        "mode": "base" if conversation.template is None else "chat",
        "settings": asdict(settings),
        "stats": session.stats.as_dict() | {"tokens_remembered": session.length, "state_bytes": session.state_bytes},
    }
    return json.dumps(values).replace("\x7f", "\\u007f")  # json escapes all other control characters itself


def _talk(conversation: Conversation, checkpoint: str, settings: Settings, fixed_seed: bool) -> None:
    from mmcli.chat_input import LineEditor, history_path
    from mmcli.chat_screen import Screen
    from mmcli.terminal import clean_line, dim

    model = conversation.session.model
    count = sum(parameter.numel() for parameter in model.parameters())
    history = history_path()
    print(f"{clean_line(checkpoint)}: {model.config.model_type}, {count / 1e6:,.1f} M parameters, trained with "
          f"{model.config.max_position_embeddings:,} tokens of context")
    if conversation.template is None:
        print("This is a base model: it continues what you write, and Enter alone lets it go on.")
    notes = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves"
    if history is None:
        notes += "; what you type is not kept, for its file cannot be written"
    print(dim(notes, sys.stdout))
    Screen(conversation, settings, LineEditor(history), fixed_seed).run()
