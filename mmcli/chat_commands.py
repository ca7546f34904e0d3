"""The settings of a conversation and the commands that begin with a slash, without a terminal."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from mmcore.errors import ConfigError
from mmcore.generation.requests import check_length
from mmcore.generation.sampling import Sampling

COMMANDS = {
    "/help": "this table",
    "/set": "show the settings, or change them: /set temperature=0.7 top_k=40",
    "/why": "what each head read before the last token; /why N: before the Nth from the end",
    "/stats": "speed of reading and answering, tokens remembered, memory",
    "/reset": "forget everything said",
    "/save": "keep the conversation, the memories and the settings: /save FILE",
    "/load": "go on with a saved conversation: /load FILE",
    "/exit": "leave (as Ctrl-D)",
}
_ALIASES = {"/quit": "/exit", "/?": "/help"}


@dataclass(frozen=True)
class Settings:
    """What `/set` and the options change."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    max_new_tokens: int = 256
    seed: int = 0

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)

    def checked(self) -> Settings:
        """These settings. Raises ConfigError where one is out of range."""
        check_length(self.max_new_tokens)
        _ = self.sampling
        return self

    @classmethod
    def saved(cls, values: Any) -> Settings:
        """The settings of a saved conversation; one that is not among them is as by default. Raises ConfigError."""
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or not values.keys() <= set(known):
            raise ConfigError(f"they are {values!r}, and may be {', '.join(known)}: load it with the mm that saved it")
        return cls(**values).checked()

    def changed(self, assignments: str) -> Settings:
        """With `name=value` words applied. Raises ConfigError, naming the word and the remedy."""
        values = {}
        for word in assignments.split():
            name, equals, text = word.partition("=")
            name = name.replace("-", "_")
            known = {field.name: field for field in dataclasses.fields(self)}
            if name not in known:
                raise ConfigError(f"there is no setting {name}: {_suggestion(name, list(known))}")
            if not equals or not text:
                raise ConfigError(f"{word} sets nothing: write {name}={getattr(self, name)}")
            values[name] = _parse(name, text, str(known[name].type))
        return dataclasses.replace(self, **values).checked()

    def __str__(self) -> str:
        pairs = dataclasses.asdict(self).items()
        return " ".join(f"{name}={'none' if value is None else value}" for name, value in pairs)


def parse_command(line: str) -> tuple[str, str] | None:
    """A line's command and what follows it, or None where the line is text.

    A command is one line that begins with a slash; two slashes begin a text with one. Raises ConfigError for a
    command that does not exist.
    """
    if not line.startswith("/") or line.startswith("//") or "\n" in line.strip():
        return None
    name, _, rest = line.strip().partition(" ")
    name = _ALIASES.get(name, name)
    if name not in COMMANDS:
        raise ConfigError(f"there is no command {name}: {_suggestion(name, list(COMMANDS))}")
    return name, rest.strip()


def text_of(line: str) -> str:
    """What is said with a line that is no command."""
    return line[1:] if line.startswith("//") else line


def _suggestion(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"


def _parse(name: str, text: str, kind: str) -> float | int | None:
    if text.lower() in ("none", "off") and "None" in kind:
        return None
    try:
        return float(text) if kind.startswith("float") else int(text)
    except ValueError:
        what = "a number" if kind.startswith("float") else "a whole number"
        raise ConfigError(f"{name} is {text!r}: it must be {what}{', or none' if 'None' in kind else ''}") from None
