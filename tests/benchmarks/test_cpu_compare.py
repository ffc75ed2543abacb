"""kvant beside its peers on a CPU: points, protocol, statistics, and the script itself with made-up peers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import compare
import points
import pytest
from machine import describe_machine
from peers.kvant_peer import KvantPeer, while_all_decode
from points import PeerKind, Point, Scale, Variant, parse_variants
from protocol import Job, PeerError, Timing, Worker
from report import Figures, Group, Ratio, Report, ratio

from kvant.errors import ConfigError
from tests.engine.checkpoint import write_checkpoint

WORKER = Path(compare.__file__).with_name("worker.py")


def job_for(kv_cache: str, work_dir: Path, model: str = "none.gguf") -> Job:
    return Job(model, kv_cache, 1, str(work_dir), max_length=64, max_sequences=2, cache_tokens=1024)


@pytest.fixture
def fake_peers(monkeypatch):
    """worker.py finds `peers.fake_peer` here, beside the real peers."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def worker(fake_peers, tmp_path):
    with Worker([sys.executable, str(WORKER), "fake_peer"], threads=3, log=tmp_path / "log") as worker:
        yield worker


# Points


@pytest.mark.parametrize("name", ["decode@0", "decode@2048", "decode@0x8", "prefill@256"])
def test_a_point_is_named_as_it_is_parsed(name):
    assert Point.parse(name).name == name


@pytest.mark.parametrize("name", ["", "decode", "decode@", "decode@1x0", "prefill@0", "prefill@8x2", "decode@-1"])
def test_what_is_no_point(name):
    with pytest.raises(ConfigError, match="is no point"):
        Point.parse(name)


def test_a_prompt_leaves_room_for_the_output():
    assert Point("decode", 0).prompt_tokens(32, 8192) == 1
    assert Point("decode", 2048).prompt_tokens(32, 8192) == 2048
    assert Point("decode", 8192).prompt_tokens(32, 8192) == 8192 - 33
    with pytest.raises(ConfigError, match="context has 4096 tokens"):
        Point("decode", 8192).prompt_tokens(32, 4096)


def test_prompts_are_known_to_the_cache_only_where_decoding_is_timed():
    decode, prefill = Point("decode", 9, 3), Point("prefill", 9)
    assert decode.prompts(9, 50, 1, 0) == decode.prompts(9, 50, 2, 0)
    assert prefill.prompts(9, 50, 1, 0) != prefill.prompts(9, 50, 2, 0)
    assert prefill.prompts(9, 50, 1, 0) == prefill.prompts(9, 50, 1, 0)
    first, second, third = decode.prompts(9, 50, 1, 0)
    assert first != second != third
    assert {len(first), len(third)} == {9}
    assert all(0 <= token < 50 for token in first)


def test_variants():
    assert parse_variants(["kvant:int4", "llama.cpp"]) == [
        Variant("kvant", "int4"),
        *(Variant("llama.cpp", kv_cache) for kv_cache in ("f16", "q8_0", "q4_0")),
    ]
    assert parse_variants(["kvant", "kvant:int4"]) == parse_variants(["kvant"])
    for wrong in (["vllm"], ["kvant:q8_0"]):
        with pytest.raises(ConfigError, match="llama.cpp: f16, q8_0, q4_0"):
            parse_variants(wrong)
    with pytest.raises(ConfigError, match="no peer"):
        parse_variants([])


def test_a_slow_peer_does_less():
    slow = Variant("transformers", "fp32")
    assert slow.tokens(32) == 8
    assert slow.tokens(4) == 4
    assert not slow.takes(Point("decode", 8192))
    assert slow.takes(Point("decode", 2048))


def test_a_job_has_room_for_all_points():
    scale = Scale((Point("decode", 0, 8), Point("decode", 500), Point("prefill", 100)), 31, vocab_size=9, context=512)
    job = scale.job("m.gguf", Variant("kvant", "int4"), 2, "w")
    assert (job.max_length, job.max_sequences) == (512, 8)
    assert job.cache_tokens == 2 * (8 * 256 + 512 + 256)


# Statistics


def test_ratio_pairs_repeats():
    assert ratio([2, 9, 8], [1, 3, 2]) == Ratio(3, 2, 4)
    with pytest.raises(ValueError, match="shorter|longer"):
        ratio([1, 2], [1])


def test_the_reference_is_the_fastest_of_llama_cpp_by_its_median():
    rates = {"llama.cpp:f16": [9.0, 1, 1], "llama.cpp:q8_0": [2.0, 2, 2], "kvant:int4": [2.0, 4, 3], "other:x": [99.0]}
    figures = Figures(Point("decode", 0), 1, rates)
    assert figures.reference == "llama.cpp:q8_0"
    assert figures.ratios == {"kvant:int4": Ratio(1.5, 1, 2)}
    assert Figures(Point("decode", 0), 1, {"kvant:int4": [1.0]}).ratios == {}


def test_tables():
    rates = {"kvant:int4": [30.0, 40.0], "llama.cpp:f16": [20.0, 20.0]}
    figures = [Figures(Point("decode", 0, 8), 1, rates), Figures(Point("prefill", 64), 64, {"kvant:int4": [1234.5]})]
    group = Group("m", 2, figures, details={}, failed={"openvino:u8": "is not here"}, load_average=(0, 1))
    text = Report({"cpu": "a CPU"}, None, {"repeats": 2}, [group]).markdown()
    assert "## m, 2 threads" in text
    assert "| tokens/s | kvant:int4 | llama.cpp:f16 |" in text
    assert "| decode at 0, 8 sequences | 35 | 20 |" in text
    assert "| prefill of 64 | 1234 |  |" in text
    assert "| decode at 0, 8 sequences | llama.cpp:f16 | 1.75 (1.50 to 2.00) |" in text
    assert "| prefill of 64 |  |  |" in text
    assert "Left out: openvino:u8: is not here" in text


def test_only_steps_that_decode_every_sequence_count():
    assert while_all_decode([[1.0, 2.0, 4.0]]) == Timing(2, 3.0)
    late = [[1.0, 2.0, 3.0, 4.0], [2.5, 3.0, 4.0, 5.0]]
    assert while_all_decode(late) == Timing(4, 1.5)
    with pytest.raises(PeerError, match="--tokens"):
        while_all_decode([[1.0, 2.0], [3.0, 4.0]])


# The protocol


def test_a_worker_answers_and_its_prints_do_not_matter(worker, tmp_path):
    assert worker.load(job_for("8", tmp_path)) == {"version": "1", "omp": "3"}
    assert worker.prefill([1, 2, 3, 4]) == Timing(4, 0.5)
    assert worker.decode([[1], [2]], 4) == Timing(8, 1.0)
    worker.close()
    assert (tmp_path / "log").read_text() == "libraries print what they like\n"
    with pytest.raises(PeerError, match="ended with status 0"):
        worker.prefill([1])


def test_an_error_is_told_and_the_worker_goes_on(worker, tmp_path):
    with pytest.raises(PeerError, match="nothing is loaded"):
        worker.prefill([1])
    with pytest.raises(PeerError, match="ImportError: no such library"):
        worker.load(job_for("unloadable", tmp_path))
    worker.load(job_for("breaks", tmp_path))
    with pytest.raises(PeerError, match="ValueError: no luck"):
        worker.decode([[1]], 2)
    assert "no luck" in (tmp_path / "log").read_text()


def test_a_worker_that_dies_is_an_error(worker, tmp_path):
    worker.load(job_for("dies", tmp_path))
    with pytest.raises(PeerError, match="ended with status 1; .*log may say why"):
        worker.decode([[1]], 2)


def test_kvant_as_a_peer(tmp_path):
    model = write_checkpoint(tmp_path / "model", intermediate_size=64)
    peer = KvantPeer(job_for("int8", tmp_path, str(model)))
    assert peer.prefill(list(range(40))).tokens == 40
    timing = peer.decode([[1] * 20, [2] * 20], 5)
    assert 2 * 3 <= timing.tokens <= 2 * 5  # less where the sequences did not start in the same step
    assert timing.seconds > 0
    assert "int8" in peer.details["cache"]


def test_kvant_decodes_up_to_the_end_of_the_context(tmp_path):
    model = write_checkpoint(tmp_path / "model", intermediate_size=64)
    point = Point("decode", 512)
    scale = Scale((point,), tokens=5, vocab_size=259, context=512)
    peer = KvantPeer(scale.job(str(model), Variant("kvant", "int4"), 1, str(tmp_path)))
    prompts = point.prompts(scale.prompt_tokens(point), scale.vocab_size, 1, seed=0)
    assert peer.decode(prompts, 5).tokens == 5


# The script


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    kinds = {
        "kvant": PeerKind("fake_peer", ("30", "breaks")),
        "llama.cpp": PeerKind("fake_peer", ("10", "20", "dies", "unloadable")),
        "short": PeerKind("fake_peer", ("5",), max_tokens=1, max_length=8),
    }
    monkeypatch.setattr(points, "PEERS", kinds)
    monkeypatch.setattr(compare, "SETTLE_SECONDS", 0)
    model = write_checkpoint(tmp_path / "model")
    (tmp_path / "work").mkdir()
    compare.main([str(model), "--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "out.json"), *options])


def test_compare(fake_peers, tmp_path, monkeypatch, capsys):
    table = tmp_path / "tables" / "t.md"
    options = ["--points", "decode@16,prefill@8", "--threads", "2", "--repeats", "2", "--markdown", str(table)]
    run(tmp_path, monkeypatch, "--peers", "kvant,llama.cpp,short", *options)

    document = json.loads((tmp_path / "out.json").read_text())
    [group] = document["groups"]
    assert (group["model"], group["threads"]) == ("model", 2)
    decode, prefill = group["figures"]
    assert decode["tokens_per_second"] == {"kvant:30": [30, 30], "llama.cpp:10": [10, 10], "llama.cpp:20": [20, 20]}
    assert prefill["medians"] == {"kvant:30": 30, "llama.cpp:10": 10, "llama.cpp:20": 20, "short:5": 5}
    assert decode["reference"] == "llama.cpp:20"
    assert decode["ratios"] == {"kvant:30": {"median": 1.5, "min": 1.5, "max": 1.5}}
    assert set(group["failed"]) == {"kvant:breaks", "llama.cpp:dies", "llama.cpp:unloadable"}
    assert group["details"]["kvant:30"]["omp"] == "2"
    assert document["settings"]["tokens"] == 32
    assert table.read_text() == capsys.readouterr().out.removesuffix("\n")


def test_peers_are_asked_in_turn_with_the_same_prompts(fake_peers, tmp_path, monkeypatch):
    options = ["--points", "decode@4x2,prefill@8", "--threads", "1", "--repeats", "2"]
    run(tmp_path, monkeypatch, "--peers", "kvant:30,llama.cpp:10,llama.cpp:20", *options)

    calls = [json.loads(line) for line in (tmp_path / "work" / "calls.jsonl").read_text().splitlines()]
    turns = [["30", "10", "20"], ["10", "20", "30"], ["20", "30", "10"]]
    assert [call["by"] for call in calls] == [name for turn in turns for _ in ("decode", "prefill") for name in turn]
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    decode, prefill = rounds[0::2], rounds[1::2]
    assert len({json.dumps(call["decode"]) for turn in decode for call in turn}) == 1
    for turn in prefill:
        assert len({json.dumps(call["prefill"]) for call in turn}) == 1
    assert len({json.dumps(turn[0]["prefill"]) for turn in prefill}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--points", "decode@4096", "--peers", "kvant"], "context has 512 tokens"),
        (["--points", " , "], "--points names none"),
        (["--peers", "vllm"], "is no peer"),
    ],
)
def test_what_cannot_be_is_told_at_once(tmp_path, monkeypatch, options, message):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, monkeypatch, *options)
    assert not (tmp_path / "out.json").exists()


def test_results_are_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "out.json").write_text("{}")
    with pytest.raises(SystemExit, match="exists; name another"):
        run(tmp_path, monkeypatch)
    assert (tmp_path / "out.json").read_text() == "{}"


@pytest.mark.parametrize("numbers", ["", "0", "1,x"])
def test_threads_are_numbers(tmp_path, monkeypatch, capsys, numbers):
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "--threads", numbers)
    assert "--threads" in capsys.readouterr().err


def test_quick_is_a_set_of_smaller_defaults(monkeypatch):
    monkeypatch.setattr(
        compare, "inspect_model", lambda path: SimpleNamespace(vocab_size=9, max_position=256, layers=())
    )
    monkeypatch.setattr(compare, "locate", lambda path: path)
    args = compare._parser().parse_args(["m.gguf", "--quick", "--repeats", "7", "--work-dir", "w", "--out", "o"])
    plans = compare._plans(args)
    assert [plan.threads for plan in plans] == [1, 2]
    assert (plans[0].repeats, plans[0].scale.tokens) == (7, 4)
    assert [point.name for point in plans[0].scale.points] == compare.QUICK_POINTS.split(",")


def test_the_machine_has_a_name():
    machine = describe_machine()
    assert machine["cpus"] >= 1
    assert machine["memory_gib"] > 0
