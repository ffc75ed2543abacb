"""KV formats set beside each other on tasks: statistics, results, and the script itself."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tasks
import torch
from paired import bootstrap, compare, mcnemar, wilson
from results import FormatRun, Results

from kvant.engine.outputs import Choice, Response, Timings, Usage
from kvant.errors import ConfigError
from tests.benchmarks.made_up import ADD, gsm8k_rows, write_lines
from tests.engine.checkpoint import write_checkpoint

# Statistics


def test_wilson_interval():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # z² / (n + z²)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(500, 1000) == pytest.approx((0.4691, 0.5309), abs=1e-4)


def test_mcnemar_is_the_binomial_test_of_the_changes():
    assert mcnemar(0, 6) == 2 / 64
    assert mcnemar(5, 1) == mcnemar(1, 5) == 2 * (1 + 6) / 64
    assert mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1
    assert 0 < mcnemar(600, 700) < 1  # numbers beyond a float's range


def test_bootstrap_interval_is_the_normal_one_where_problems_are_many():
    low, high = bootstrap(20, 60, 400)
    spread = 1.96 * ((0.2 - 0.1**2) / 400) ** 0.5  # variance of a difference that is +1, -1 or 0
    assert (low, high) == pytest.approx((-0.1 - spread, -0.1 + spread), abs=0.005)
    assert bootstrap(20, 60, 400) == (low, high)
    assert bootstrap(0, 0, 50) == (0, 0)
    assert bootstrap(0, 1, 1) == (-1, -1)


def test_a_comparison_counts_pairs():
    before, after = (1, 1, 1, 0, 0, 1, 0, 1), (1, 0, 0, 1, 0, 0, 0, 1)
    comparison = compare(before, after)
    assert (comparison.gained, comparison.lost) == (1, 3)
    assert comparison.difference == -0.25
    assert comparison.p_value == 2 * (1 + 4) / 16
    assert comparison.interval[0] < -0.25 < comparison.interval[1]
    back = compare(after, before)
    assert (back.difference, back.gained, back.lost) == (0.25, 3, 1)


# Results


def run_with(correct: str, answers: str) -> FormatRun:
    outcomes = tuple("passed" if mark == "1" else "AssertionError" for mark in correct)
    return FormatRun("fp16", 12288, outcomes, tuple(answers), 100, 1, 4.0, {"kvant": "0", "commit": None})


@pytest.fixture
def results() -> Results:
    header = {
        "model": "m",
        "task": "gsm8k",
        "settings": {"max_tokens": 8, "stop": ["\n["]},
        "problems": ["a", "b", "c", "d"],
    }
    int4 = replace(run_with("1001", "abxy"), stored_as="int4", bytes_per_token=3456)
    return Results(header, {"auto": run_with("1101", "abcd"), "int4": int4})


def test_results_read_back_as_they_were_written(results, tmp_path):
    path = tmp_path / "results.json"
    path.write_text("an earlier state")
    results.write(path)
    assert Results.read(path) == results
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    entry = json.loads(path.read_text())["formats"]["int4"]
    assert (entry["score"], entry["n"], entry["correct"]) == (0.5, 4, [1, 0, 0, 1])
    assert entry["interval"] == pytest.approx(wilson(2, 4))
    assert entry["versus_auto"] == {
        "difference": -0.25,
        "interval": list(bootstrap(0, 1, 4)),
        "p_value": 1.0,
        "gained": 0,
        "lost": 1,
        "identical": 0.5,
    }
    assert '"correct": [1, 0, 0, 1],' in path.read_text()


def test_the_table_compares_with_16_bit(results):
    table = results.markdown().splitlines()
    assert table[0] == "m, gsm8k, 4 problems; max_tokens 8"
    assert table[-2].startswith("| `auto` (fp16) | 12,288 | 75.0% | 30.1% to 95.4% |  |")
    assert table[-1].startswith(
        "| `int4` | 3,456 | 50.0% | 15.0% to 85.0% | -25.0% | -75.0% to +0.0% | 0/1 | 1.000 | 50% | 25"
    )
    assert len({line.count("|") for line in table[2:]}) == 1


def test_without_16_bit_nothing_is_compared(results, tmp_path):
    del results.runs["auto"]
    results.write(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["formats"]["int4"]["versus_auto"] is None
    assert "50.0%" in results.markdown()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"formats": {"auto": {}}}', '{"formats": []}'])
def test_a_file_of_another_kind_is_not_taken_for_results(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="holds no results"):
        Results.read(path)


# The script


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sums(tmp_path) -> Path:
    """Problems that a test can answer: i + 1."""
    return write_lines(tmp_path / "gsm8k.jsonl", gsm8k_rows())


class FakePipeline:
    """Answers from a table: format -> one text per problem. It counts how often each format is opened."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers = answers
        self.opened: list[str] = []
        self.delay = 0.0

    def __call__(self, model: str, engine: object) -> FakePipeline:
        self.name = engine.kv_cache_dtype
        self.opened.append(self.name)
        self.memory = SimpleNamespace(plan=SimpleNamespace(name=self.name), bytes_per_token=7)
        outer = self

        class Open:
            memory = outer.memory

            def __enter__(self):
                return self

            def __exit__(self, *error: object) -> None: ...

            def stats(self):
                return SimpleNamespace(running=2, waiting=1)

            def __call__(self, prompts, sampling):
                time.sleep(outer.delay)
                return [response(text) for text in outer.answers[outer.name][: len(prompts)]]

        return Open()


def response(text: str) -> Response:
    choice = Choice(0, text, tuple(text.encode()), "length" if text.endswith("...") else "stop")
    return Response((choice,), (1,), Usage(1, len(text)), Timings(0, 0, 1, 1))


@pytest.fixture
def fake(monkeypatch) -> FakePipeline:
    right = [f"#### {i + 1}" for i in range(6)]
    spelled = [*right[:4], "That is 5", "I think..."]
    fake = FakePipeline({"auto": right, "int8": right, "int4": spelled})
    monkeypatch.setattr(tasks, "pipeline", fake)
    return fake


def command(data: Path, out: Path, *more: str) -> list[str]:
    return ["a-model", "--task", "gsm8k", "--shots", "1", "--data", str(data), "--out", str(out), *more]


def test_formats_are_scored_and_compared(fake, sums, tmp_path, capsys):
    out, table = tmp_path / "made" / "out.json", tmp_path / "tables" / "out.md"
    tasks.main(command(sums, out, "--markdown", str(table), "--answers", str(tmp_path / "answers")))
    assert fake.opened == ["auto", "int8", "int4"]
    document = json.loads(out.read_text())
    assert (document["model"], document["task"], len(document["problems"])) == ("a-model", "gsm8k", 6)
    auto, int8, int4 = (document["formats"][name] for name in ("auto", "int8", "int4"))
    assert (auto["score"], int8["score"], int4["score"]) == (1, 1, pytest.approx(5 / 6))
    assert int8["versus_auto"]["identical"] == 1
    assert int4["versus_auto"]["identical"] == pytest.approx(4 / 6)
    assert (int4["versus_auto"]["gained"], int4["versus_auto"]["lost"]) == (0, 1)
    assert int4["outcomes"] == ["passed"] * 5 + ["no number"]
    assert (int4["generated_tokens"], int4["cut_off"]) == (4 * 6 + 9 + 10, 1)
    assert set(int4["versions"]) == {"kvant", "commit", "torch", "python", "machine"}
    assert table.read_text() in capsys.readouterr().out
    answers = [json.loads(line) for line in (tmp_path / "answers" / "int4.jsonl").read_text().splitlines()]
    assert answers[5] == {"problem": "test/5", "outcome": "no number", "answer": "I think..."}


def test_a_file_is_continued_where_it_ends(fake, sums, tmp_path):
    out = tmp_path / "out.json"
    tasks.main(command(sums, out, "--kv-cache-dtype", "int4, auto"))
    first = json.loads(out.read_text())["formats"]
    with pytest.raises(SystemExit, match="--resume"):
        tasks.main(command(sums, out, "--kv-cache-dtype", "auto,int8"))
    tasks.main(command(sums, out, "--kv-cache-dtype", "auto,int8", "--resume"))
    assert fake.opened == ["int4", "auto", "int8"]
    assert {name: json.loads(out.read_text())["formats"][name] for name in first} == first
    with pytest.raises(SystemExit, match="another settings"):
        tasks.main(command(sums, out, "--resume", "--max-tokens", "9"))
    with pytest.raises(SystemExit, match="another settings, problems"):
        tasks.main(command(sums, out, "--resume", "--problems", "3"))


def test_what_was_finished_before_a_failure_is_kept(fake, sums, tmp_path):
    del fake.answers["int4"]
    with pytest.raises(KeyError):
        tasks.main(command(sums, tmp_path / "out.json"))
    assert list(Results.read(tmp_path / "out.json").runs) == ["auto", "int8"]


def test_long_batches_tell_how_far_they_are(fake, sums, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "SECONDS_BETWEEN_REPORTS", 0.01)
    fake.delay = 0.2
    tasks.main(command(sums, tmp_path / "out.json", "--kv-cache-dtype", "auto"))
    assert "auto: 2 running, 1 waiting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kv-cache-dtype", "auto,int5"], "int5"),
        (["--kv-cache-dtype", " ,"], "names no format"),
        (["--problems", "7"], "7 problems were asked for"),
        (["--shots", "3"], "3 examples"),
        (["--task", "humaneval"], "--shots: humaneval takes no worked examples"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_mistakes_are_told_before_anything_runs(fake, sums, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        tasks.main([*command(sums, tmp_path / "out.json"), *more])
    assert fake.opened == []


def test_a_real_engine_answers_in_every_format(tmp_path):
    """A random miniature knows no answer, but everything between its cache and the results is real."""
    model = write_checkpoint(tmp_path / "tiny", max_position_embeddings=1024)
    fields = {"prompt": ADD.prompt, "entry_point": "add", "test": ADD.test}
    data = write_lines(tmp_path / "data.jsonl", [{"task_id": f"made/{i}", **fields} for i in range(2)])
    out = tmp_path / "out.json"
    options = ["--data", str(data), "--out", str(out), "--max-tokens", "12", "--threads", "1"]
    tasks.main([str(model), "--task", "humaneval", "--kv-cache-dtype", "auto,int4,auto", *options])
    document = json.loads(out.read_text())
    assert document["model"] == "tiny"
    assert list(document["formats"]) == ["auto", "int4"]
    for entry in document["formats"].values():
        assert entry["correct"] == [0, 0]
        assert entry["digests"][0] == entry["digests"][1]  # the same problem twice
        assert 0 < entry["generated_tokens"] <= 24
        assert entry["seconds"] > 0
    assert document["formats"]["auto"]["stored_as"] == "fp16"
    assert document["formats"]["int4"]["bytes_per_token"] < document["formats"]["auto"]["bytes_per_token"]


@pytest.mark.slow
def test_a_real_model_solves_a_simple_problem(qwen_coder, tmp_path):
    fields = {"prompt": ADD.prompt, "entry_point": "add", "test": ADD.test}
    data = write_lines(tmp_path / "data.jsonl", [{"task_id": "made/0", **fields}])
    out = tmp_path / "out.json"
    tasks.main(
        [str(qwen_coder), "--task", "humaneval", "--kv-cache-dtype", "auto", "--data", str(data), "--out", str(out)]
    )
    assert json.loads(out.read_text())["formats"]["auto"]["score"] == 1
