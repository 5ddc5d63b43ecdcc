"""The shipped tokenizer, and copies of it that speak the dialects of other model families."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorica
from lorica.data.render import Renderer

NANO = Path(lorica.__file__).parent / "models" / "nano"

DIALECTS = {
    "spaced": (  # a closing token after each answer, and a blank on both sides of it
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' <|endoftext|>' }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "forgetful": (  # prints an empty thought in the last answer only, so that history changes as a chat grows
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "thinking": (  # the generation prompt opens a thought that a finished answer no longer shows
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    ),
    "amnesiac": (  # drops the first user's words once an answer follows them
        "{% for m in messages %}{% if not (m.role == 'user' and loop.first and messages | length > 2) %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "endless": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "closed": (  # everything ends in one more control token after the stop token
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
    ),
    "strict": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "tooled": (
        "{% if tools %}TOOLS {{ tools | length }}\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}[{{ call.name }}]{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer that ships with the package."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(NANO)


@pytest.fixture(scope="session")
def renderer(tokenizer: Any) -> Renderer:
    """The default renderer of the shipped tokenizer."""
    return Renderer(tokenizer)


@pytest.fixture(scope="session")
def dialect(tokenizer: Any) -> Callable[[str | None], Any]:
    """A copy of the tokenizer with another chat template, or with none."""

    def make(name: str | None) -> Any:
        other = copy.deepcopy(tokenizer)
        other.chat_template = None if name is None else DIALECTS[name]
        return other

    return make
