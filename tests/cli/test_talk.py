"""`lorica sample` and `lorica chat`: answers on stdout, from pipes and files, repeatable."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.client.local import Service
from lorica.data.render import Renderer
from lorica.models import load
from lorica.sampling.params import SamplingParams

from .conftest import Run, lorica

Ask = Callable[..., Any]
SHORT = ("--max-tokens", "8")


def directly(prompt: str) -> str:
    backbone = load("nano")
    renderer = Renderer(backbone.tokenizer)
    params = SamplingParams(max_tokens=8, stop_ids=tuple(renderer.stop_ids))
    tokens = renderer.prompt([{"role": "user", "content": prompt}])
    return renderer.parse(Service(backbone).sampling_client().sample([tokens], params)[0].tokens)[0]


def test_an_answer_is_what_the_client_samples(run: Run, ask: Ask) -> None:
    expected = directly("wake me at 7")
    assert run("sample", "--prompt", "wake me at 7", *SHORT).stdout == f"{expected}\n"
    assert run("sample", *SHORT, stdin="wake me at 7\n").stdout == f"{expected}\n"
    (found,) = ask("sample", "--prompt", "wake me at 7", *SHORT)["samples"]
    assert found["text"] == expected
    assert 0 < found["tokens"] <= 8
    assert found["logprob"] < 0


def test_a_seed_repeats_a_sample_and_another_one_changes_it(ask: Ask, small: str) -> None:
    def draw(seed: int) -> list[str]:
        options = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.99", "--seed", seed, "--max-tokens", "20")
        asked = ask("sample", "--model", small, "--prompt", "a", "--prompt", "a", *options)
        return [s["text"] for s in asked["samples"]]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1]


def test_a_data_file_is_answered_with_what_it_expects_beside(ask: Ask, run: Run, rows: Path) -> None:
    found = ask("sample", "--data", rows, "-n", 3, *SHORT)["samples"]
    assert [s["expected"] for s in found] == ["alarm 0", "alarm 1", "alarm 2"]
    assert [s["prompt"][0]["content"] for s in found] == ["wake me at 0", "wake me at 1", "wake me at 2"]
    text = run("sample", "--data", rows, "-n", 2, *SHORT).stdout
    assert text.startswith("> wake me at 0\n")
    assert "\n> wake me at 1\n" in text


def test_an_adapter_changes_the_answer_and_is_named_in_the_result(ask: Ask, adapter: Path) -> None:
    found = ask("sample", "--adapter", adapter, "--prompt", "wake me at 3", *SHORT)
    assert found["adapters"] == [str(adapter)]
    base = ask("sample", "--prompt", "wake me at 3", *SHORT)
    assert found["samples"][0]["logprob"] != base["samples"][0]["logprob"]


def test_a_stop_text_ends_the_answer(ask: Ask) -> None:
    (whole,) = ask("sample", "--prompt", "one two three", "--temperature", 1, "--max-tokens", 24)["samples"]
    middle = whole["text"][len(whole["text"]) // 2 :][:3]
    (cut,) = ask("sample", "--prompt", "one two three", "--temperature", 1, "--max-tokens", 24, "--stop", middle)[
        "samples"
    ]
    assert cut["text"] == whole["text"].partition(middle)[0]


def test_raw_text_is_continued_without_the_template(ask: Ask) -> None:
    raw = ask("sample", "--raw", "--prompt", "Once upon a time", *SHORT)["samples"][0]
    assert raw["logprob"] != ask("sample", "--prompt", "Once upon a time", *SHORT)["samples"][0]["logprob"]


def test_nothing_to_answer_is_wrong_usage(run: Run, rows: Path) -> None:
    assert run("sample", stdin="").exit_code == 2
    assert run("sample", "--prompt", "a", "--data", rows).exit_code == 2


def test_chat_answers_each_line_and_remembers(ask: Ask, run: Run) -> None:
    lines = "hello\nand you?\n"
    said = run("chat", *SHORT, stdin=lines).stdout
    found = ask("chat", *SHORT, stdin=lines)["messages"]
    assert [m["role"] for m in found] == ["user", "assistant"] * 2
    assert said == "".join(f"{m['content']}\n" for m in found if m["role"] == "assistant")
    assert found[1]["content"] == directly("hello")


def test_chat_reset_forgets_and_exit_leaves(ask: Ask) -> None:
    found = ask("chat", *SHORT, stdin="hello\n/reset\nhello\n\n/exit\nnever read\n")["messages"]
    assert len(found) == 4
    assert found[:2] == found[2:]
    single = ask("chat", "--single", *SHORT, stdin="hello\nhello\n")["messages"]
    assert single == found


def test_chat_says_what_it_does_not_know(run: Run) -> None:
    result = run("chat", *SHORT, stdin="/help\n")
    assert result.exit_code == 0
    assert "/reset or /exit" in result.stderr
    assert result.stdout == ""


@pytest.mark.slow
def test_ctrl_c_in_a_chat_exits_with_130_and_no_traceback(tmp_path: Path) -> None:
    process = lorica("chat", *SHORT, cwd=tmp_path, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "error: Interrupted."
