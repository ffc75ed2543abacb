"""The commands as a user runs them, with a small model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest

KVANT = [sys.executable, "-c", "from kvant.cli.main import main; main()"]
SMALL = ["--max-model-len", "2048", "--kv-cache-memory", "64MiB", "--block-size", "16"]
GREEDY = ["--temperature", "0"]
QUESTION = "What is the capital of France? Answer briefly."


def test_one_answer(smollm2):
    command = [*KVANT, "chat", str(smollm2), *SMALL, *GREEDY, "-q", "-", "--max-tokens", "24", "--stats"]
    done = subprocess.run(command, input=QUESTION, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tokens/s" not in done.stdout
    assert re.search(r"\d+ written at [\d.]+ tokens/s", done.stderr)
    assert "KV cache" in done.stderr


def test_a_conversation_remembers(smollm2):
    command = [*KVANT, "chat", str(smollm2), *SMALL, *GREEDY, "--max-tokens", "16", "--stats"]
    turns = "My name is Ada.\nWhat is my name?\n/reset\nWhat is my name?\n"
    done = subprocess.run(command, input=turns, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    read = [int(count) for count in re.findall(r"(\d+) tokens read", done.stderr)]
    assert len(read) == 3
    assert read[1] > read[0]
    assert read[2] < read[1]


def test_ctrl_c_stops_the_answer_and_not_the_program(smollm2):
    command = [*KVANT, "chat", str(smollm2), *SMALL, *GREEDY, "--stats"]
    with running(command) as process:
        process.stdin.write("Write a very long story about the sea, with many chapters.\n")
        process.stdin.flush()
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.stdin.write("Say hi.\n")
        process.stdin.close()
        said = process.stderr.read()
        assert process.wait(timeout=60) == 0
        assert "(stopped)" in said
        assert said.count("written at") == 1
        assert "Traceback" not in said


@pytest.mark.slow
def test_ctrl_c_ends_a_single_answer_with_130(smollm2):
    command = [*KVANT, "chat", str(smollm2), *SMALL, *GREEDY, "-q", "Write a very long story about the sea."]
    with running(command) as process:
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_server_that_is_told_to_stop_finishes_what_it_began(smollm2, stop):
    with running([*KVANT, "serve", str(smollm2), *SMALL, "--port", "0", "--served-model-name", "tiny"]) as process:
        base = wait_for_url(process)
        client = openai.OpenAI(base_url=base, api_key="unused", max_retries=0)
        stream = client.completions.create(
            model="tiny", prompt="Once upon a time", max_tokens=40, stream=True, extra_body={"ignore_eos": True}
        )
        pieces = [next(stream)]
        process.send_signal(stop)
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{base}/models")
        pieces += stream
        assert pieces[-1].choices[0].finish_reason == "length"
        client.close()
        assert process.wait(timeout=30) == 0


@pytest.mark.slow
def test_a_server_cuts_off_what_takes_too_long(smollm2):
    command = [
        *KVANT,
        "serve",
        str(smollm2),
        *SMALL,
        "--port",
        "0",
        "--drain-seconds",
        "1",
        "--served-model-name",
        "tiny",
    ]
    with running(command) as process:
        base = wait_for_url(process)
        body = {"prompt": "Once upon a time", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{base}/completions", json=body, timeout=60) as response:
            events = response.iter_lines()
            assert json.loads(next(events).removeprefix("data: "))["object"] == "text_completion"
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            with pytest.raises(httpx.RemoteProtocolError):
                list(events)
        assert process.wait(timeout=30) == 0
        assert time.monotonic() - began < 20


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process with pipes, killed in the end if it still runs.

    It hears Ctrl-C as on a terminal, also where the tests run in the background of a shell, which has it ignored.
    """
    options = {
        "env": os.environ | {"PYTHONUNBUFFERED": "1"},
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, **options, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_url(process: subprocess.Popen[str]) -> str:
    """The address that `kvant serve` tells once the model is loaded, as soon as it answers."""
    for line in process.stderr:
        if found := re.search(r"at (http://\S+)", line):
            break
    else:
        pytest.fail("the server ended before it listened")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{found[1]}/models").raise_for_status()
        except httpx.ConnectError:
            time.sleep(0.05)
        else:
            return found[1]
    pytest.fail("the server never answered")
