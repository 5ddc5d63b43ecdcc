"""A model directory's tokenizer, read without transformers: what the renderer of conversations needs, and no more.

In: a directory with `tokenizer.json` (and, for conversations, a chat template). Out: an object that
`lorica.data.render.Renderer` takes, so that a prompt has the tokens that it had in training. Refuses to know requests.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from lorica.core.errors import FormatError, MissingError
from lorica.data.turns import sound

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class FileTokenizer:
    """Has what `lorica.data.template.Tokenizer` asks for. Raises MissingError, FormatError."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.fast = _read(self.directory)
        config = _config(self.directory)
        self.special = {name: token for name in SPECIAL if (token := _content(config.get(name))) is not None}
        self.chat_template = _template(self.directory, config)
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")
        self.added_tokens_decoder: dict[int, Any] = self.fast.get_added_tokens_decoder()

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = False) -> list[int]:
        """Token ids of a text. Raises DataError for half of a surrogate pair."""
        return list(self.fast.encode(sound(text, "The text"), add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Any, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False) -> str:
        """The text of token ids."""
        return str(self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool = False, add_generation_prompt: bool = False, tools: Any = None
    ) -> str:
        """A conversation as the chat template prints it. Raises jinja2.TemplateError where it refuses."""
        return _compiled(self.chat_template or "").render(
            messages=conversation,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self.special,
        )

    def _id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.fast.token_to_id(token)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training masks; what is inside is printed as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """The template with the blanks, filters and functions that chat templates are written for, in a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: dt.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is; jinja2's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _read(directory: Path) -> Tokenizer:
    file = directory / FILE
    if not file.is_file():
        raise MissingError("This model has no tokenizer.json beside it, so the server cannot read or write its text.")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise FormatError(f"{file} cannot be read: {str(error).splitlines()[0].rstrip('.')}.") from None


def _config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise FormatError(f"{file} is not JSON.") from None
    return config if isinstance(config, dict) else {}


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    """A file of its own comes first; a list of named templates gives its `default`."""
    file = directory / TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    given = config.get("chat_template")
    if isinstance(given, list):
        given = next((entry.get("template") for entry in given if entry.get("name") == "default"), None)
    return given if isinstance(given, str) and given else None


def _content(token: Any) -> str | None:
    """A special token's text; some files write it as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
