"""Text to tokens and back: bytes, or the tokenizer and chat template of a Hugging Face folder."""

from __future__ import annotations

import datetime
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxmoe.checkpoint import CheckpointError
from jaxmoe.models._generation import SEPARATOR


class Text(Protocol):
    """What turns text into tokens and back.

    Attributes:
      start: the token that stands before a document; None if there is none.
      stop: the tokens that end a text.
    """

    start: int | None
    stop: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text to continue."""

    def encode_document(self, document: bytes) -> list[int]:
        """The tokens of a whole text in UTF-8 and no others, not even `start`."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; U+FFFD for bytes that are no UTF-8."""


class ByteText:
    """The tokens of a byte-level model: UTF-8.

    >>> ByteText().encode("né"), ByteText().decode([110, 195, 169])
    ([110, 195, 169], 'né')
    """

    start: int | None = SEPARATOR
    stop = frozenset([SEPARATOR])

    def encode(self, text: str) -> list[int]:
        """The bytes; an empty text is a separator, which starts a document."""
        return list(text.encode()) or [SEPARATOR]

    def encode_document(self, document: bytes) -> list[int]:
        """The bytes."""
        return list(document)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the bytes."""
        return bytes(tokens).decode(errors="replace")


class Tokenizer:
    """The tokenizer, stop tokens and chat template of a Hugging Face folder.

    >>> text = Tokenizer("Qwen3-30B-A3B-NVFP4")                                # doctest: +SKIP
    >>> text.encode_chat([{"role": "user", "content": "Hi!"}])                 # doctest: +SKIP

    Args:
      folder: with tokenizer.json; tokenizer_config.json, special_tokens_map.json,
        chat_template.jinja, generation_config.json and config.json are read if they are there.

    A document starts after the token that these files call `bos_token` or `bos_token_id`, and where
    they name none, after one that ends texts (as in EleutherAI's lm-evaluation-harness).

    Raises:
      CheckpointError: if tokenizer.json is missing or damaged.
      ModuleNotFoundError: if the extra "text" is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(path, "missing; without it, only tokens can be generated from")
        try:
            self._tokenizer = _need("tokenizers").Tokenizer.from_file(str(path))
        except ModuleNotFoundError:
            raise
        except Exception as error:  # what the library raises has no type of its own
            raise CheckpointError(path, f"is no tokenizer: {error}") from error
        config = _json(folder / "tokenizer_config.json")
        special = {**_json(folder / "special_tokens_map.json"), **config}
        self._special = {
            name: token["content"] if isinstance(token, Mapping) else token
            for name, token in special.items()
            if name.endswith("_token") and isinstance(token, str | Mapping)
        }
        self._template: str | None = None
        if (file := folder / "chat_template.jinja").is_file():
            self._template = file.read_text(encoding="utf-8")
        elif isinstance(given := config.get("chat_template"), list):
            named = {entry["name"]: entry["template"] for entry in given}
            self._template = named.get("default")
        else:
            self._template = given
        configs = [_json(folder / name) for name in ("generation_config.json", "config.json")]

        def ids(kind: str) -> list[int]:
            """What the files say, the tokenizer's own word first."""
            found: list[Any] = [self._tokenizer.token_to_id(self._special.get(f"{kind}_token", ""))]
            for values in configs:
                key = f"{kind}_token_id"
                value = values.get(key, (values.get("text_config") or {}).get(key))
                found += value if isinstance(value, list) else [value]
            return [token for token in found if token is not None]

        self.stop = frozenset(ids("eos"))
        self.start: int | None = next(iter([*ids("bos"), *ids("eos")]), None)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can be called."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with what the tokenizer puts around one."""
        return self._tokenizer.encode(text).ids

    def encode_document(self, document: bytes) -> list[int]:
        """The tokens of a whole text in UTF-8 and no others, not even `start`."""
        return self._tokenizer.encode(document.decode(), add_special_tokens=False).ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]], **values: Any) -> list[int]:
        """The tokens of a conversation, up to where the model's answer begins.

        Args:
          messages: each with "role" and "content".
          values: further variables of the template, e.g. `enable_thinking=False` for Qwen3.

        Raises:
          ValueError: if there is no template, or it refuses the messages.
        """
        if self._template is None:
            raise ValueError("the folder has no chat template; use encode instead")
        sandbox = _need("jinja2.sandbox")
        jinja = _need("jinja2")

        def refuse(message: str) -> None:
            raise ValueError(f"the chat template refuses the messages: {message}")

        # The settings and functions that chat templates are written for.
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        variables = {"messages": messages, "add_generation_prompt": True, **self._special, **values}
        try:
            text = environment.from_string(self._template).render(**variables)
        except jinja.TemplateError as error:
            raise ValueError(f"the chat template cannot be rendered: {error}") from error
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self._tokenizer.decode(list(tokens))


class TextStream:
    """Turns tokens into text as they come, in whole characters.

    >>> stream = TextStream(ByteText())
    >>> [stream.push([110]), stream.push([195]), stream.push([169]), stream.end()]
    ['n', '', 'é', '']
    """

    def __init__(self, text: Text):
        self._text = text
        self._tokens: list[int] = []
        self._shown = 0  # tokens whose text is out; they stay, since decoding looks at neighbours
        self._before = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is complete with these tokens."""
        self._tokens += tokens
        new = self._new()
        if not new or new.endswith("\ufffd"):
            return ""
        self._before, self._shown = self._shown, len(self._tokens)
        return new

    def end(self) -> str:
        """What is left, complete or not."""
        return self._new()

    def _new(self) -> str:
        known = self._text.decode(self._tokens[self._before : self._shown])
        return self._text.decode(self._tokens[self._before :])[len(known) :]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(path, f"is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(path, f"must hold a JSON object, got {type(values).__name__}")
    return values


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'text needs {error.name}, which is not installed; pip install "jaxmoe[text]"',
            name=error.name,
        ) from error
