"""Exported folders for the tests of mmcore.hf."""

from __future__ import annotations

from pathlib import Path

import torch

from mmcore.checkpoint.convert import convert_checkpoint
from mmcore.checkpoint.formats import write_exported
from mmcore.data import CHAT_TEMPLATE, Tokenizer, train_sentencepiece
from tests.helpers.models import tiny

SCRIPTS = (
    "All human beings are born free and equal in dignity and rights.",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "Zażółć gęślą jaźń; naïve façade – “quotes” … e\u0301 versus é",
    "🎉👩‍👩‍👧‍👦 ❤️ 🇫🇷 and \U0001f9ff",
    "def f(x):\n\treturn {'a': x ** 2}  # two  spaces\r\n\n\n    if x != 3: pass\n",
    "  odd\u00a0white\u3000space\u200b \t \n \u2028 end  ",
    "\x00\x01\x1b[31mred\x7f\x85\ufeff",
    "\u2581 the \u2581\u2581 character of sentencepiece",
    "aaaaaaaaaaaaaaaa bababababab 12345678901234567890 <unk> <0x41> |||",
    "",
    " ",
)


def trained_tokenizer(pieces: int = 700) -> Tokenizer:
    """A sentencepiece tokenizer that knows some words of each script and must spell the rest in bytes."""
    tokenizer = train_sentencepiece([text * 3 for text in SCRIPTS[:9]] + [Path(__file__).read_text("utf-8")], pieces)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def export_mosaic(folder: Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32, **changes):
    """A small lively mosaic, and its exported folder as `mm convert --to hf` writes it."""
    model = tiny(vocab_size=tokenizer.vocab_size, **changes)
    first = folder.parent / f"{folder.name}-first"
    ends = [tokenizer.eos_id, tokenizer.special("<|eot_id|>")]
    write_exported(first, model.config, model.state_dict(), tokenizer_files=tokenizer.files(),
                   extra={"bos_token_id": tokenizer.bos_id, "eos_token_id": ends})  # fmt: skip
    convert_checkpoint(first, folder, dtype=dtype)
    return model
