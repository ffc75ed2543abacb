"""The GPU benchmark on a CPU: all of it on miniatures, its resuming, budget, checks, tuning and report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

from gpu import (
    attention,
    case,
    correctness,
    correctness_engine,
    correctness_kv,
    engine,
    run_all,
    session,
    svg,
    tune,
)
from gpu.checks import compare
from gpu.lengths import Lengths, chat_lengths
from gpu.machine import Machine
from gpu.report import write_report
from gpu.results import Results, latest
from gpu.shapes import CONFIGS, linear_shapes, spec_of
from gpu.targets import targets
from gpu.timing import Timing, rotated
from gpu.view import View
from kvant.kernels.ops import Ops
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.triton.launch import Config
from kvant.kernels.triton.tuning import Tuning

SCRIPT = Path(run_all.__file__)


def machine(ops: Ops | None = None) -> Machine:
    return Machine(torch.device("cpu"), "cpu test", ops or ReferenceOps(), small=True)


def run(out: Path, *options: str) -> str:
    """The script's output, run as on the day but small."""
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--small", *options]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_run_goes_on_where_the_last_one_stopped(tmp_path):
    """One stage, as the script runs it; all of them in the test that is slow."""
    assert "ceilings/copy" in run(tmp_path, "--only", "ceilings")
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["name"].split("/")[0] for line in lines] == ["environment", *["ceilings"] * 3]
    (tmp_path / "results.jsonl").write_text("".join(lines[:-1]))
    assert "0 of 0 cases" in run(tmp_path, "--only", "ceilings", "--match", "engine")
    again = run(tmp_path, "--only", "ceilings")
    assert "ceilings/copy" not in again
    assert "ceilings/int8" in again
    assert "miniature shapes" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_all_stages_run(tmp_path):
    run(tmp_path, "--jobs", "2")
    names = [record["name"] for record in records(tmp_path)]
    assert len(names) == len(set(names))
    wrong = [r for r in records(tmp_path) if "error" in r or r.get("figures", {}).get("right") is False]
    assert not wrong
    assert {record["stage"] for record in records(tmp_path)} == {"environment", *case.STAGES}


def test_without_time_nothing_is_begun(tmp_path):
    start = time.monotonic()
    run(tmp_path, "--budget-minutes", "0.01")
    assert time.monotonic() - start < 30
    assert "nothing was measured" in (tmp_path / "report.md").read_text()


def fake_process(tmp_path: Path, code: str, deadline: float) -> bool:
    """What the script makes of a process that says it is at a case, and then does something."""
    current = {"name": f"linear/{code}", "stage": "linear", "tags": {}, "card": "c", "start": time.time()}
    head = f"import json, pathlib, sys, time; current = {current!r}; place = pathlib.Path({str(tmp_path)!r})\n"
    head += "def at(limit): (place / 'current.json').write_text(json.dumps({**current, 'limit': limit}))\n"
    return run_all.watch([sys.executable, "-c", head + code], tmp_path / "current.json", "r", deadline, True)


def test_what_crashes_or_hangs_becomes_a_result(tmp_path):
    far = time.time() + 60
    assert not fake_process(tmp_path, "at(1e12); sys.exit(3)", far)
    assert not fake_process(tmp_path, "at(0); time.sleep(60)", far)
    assert [record["error"].split(":")[0] for record in records(tmp_path)] == [
        "its process ended with status 3",
        "it hung",
    ]
    assert len(Results(tmp_path).of_run("r")) == 2


def test_the_deadline_ends_it_without_a_result(tmp_path):
    assert fake_process(tmp_path, "at(1e12); time.sleep(60)", time.time() + 1)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_session_goes_on_where_another_was_stopped(tmp_path, monkeypatch):
    results, here = Results(tmp_path), machine()
    cases = [case.Case("linear", {"rows": rows}, lambda machine: {"us": 1.0}) for rows in (1, 2, 3)]
    cases.insert(0, case.Case("linear", {"what": "prepare"}, lambda machine: {}, lasting=False))

    def fails(machine: Machine) -> dict:
        raise ValueError("no")

    cases.append(case.Case("linear", {"rows": 4}, fails))
    for one in cases:
        session._measure(one, here, results, "run 1")
    with results.path.open("a") as file:
        file.write('{"name": "linear/5", "sta')  # the power went
    assert [c.name for c in session.left_to_do(cases, results, here, "run 1", ())] == []
    assert [c.name for c in session.left_to_do(cases, results, here, "run 2", ())] == ["linear/prepare", "linear/4"]
    assert len(session.left_to_do(cases, results, here, "run 2", ("linear",))) == 5
    assert len(session.left_to_do(cases, results, here, "run 2", (), changed=True)) == 2
    monkeypatch.setattr("gpu.results.code_digest", lambda stage: "other code")
    assert len(session.left_to_do(cases, results, here, "run 2", (), changed=True)) == 5
    other = Machine(here.device, "another card", here.ops, small=True)
    assert len(session.left_to_do(cases, results, other, "run 2", ())) == 5


def test_cases_have_names_of_their_own():
    for small in (True, False):
        names = [one.name for one in session.all_cases(small)]
        assert len(names) == len(set(names))
        assert session.all_cases(small)[0].stage == "correctness"


def test_shapes_are_those_of_the_models():
    """Bytes of the weights in 16 bit, as the checkpoints have them."""
    sizes = {"llama-2-7b": 13.48, "llama-2-13b": 26.03, "qwen-7b": 15.44, "internlm2.5-7b": 15.47, "llama-3-8b": 16.06}
    for model in CONFIGS:
        spec = spec_of(model, small=False)
        *body, head = linear_shapes(spec)
        size = 2 * (len(spec.layers) * sum(shape.n * shape.k for shape in body) + 2 * head.n * head.k)
        assert size / 1e9 == pytest.approx(sizes[model], abs=0.01)


class Wrong(ReferenceOps):
    """Small mistakes, such as kernels make."""

    def linear(self, x, weight, bias=None):
        out = super().linear(x, weight, bias)
        out[:, -1] *= 1.2
        return out

    def attention(self, q, cache, batch, shape):
        shorter = tuple(max(length - 1, 1) for length in batch.context_lens)
        return super().attention(q, cache, type(batch)(**{**_fields(batch), "context_lens": shorter}), shape)

    def rope_write_kv(self, q, k, v, rotary, cache, batch):
        q = super().rope_write_kv(q, k, v, rotary, cache, batch)
        next(iter(cache.planes.values()))[-1] = 0
        return q

    def sample(self, logits, params):
        return logits.argmax(-1)


def _fields(batch):
    return {name: getattr(batch, name) for name in type(batch).__dataclass_fields__}


@pytest.mark.parametrize("op", ["linear", "attention", "rope_write_kv", "sample", "engine"])
def test_the_checks_see_small_mistakes(op):
    makers = (correctness, correctness_kv, correctness_engine)
    cases = [c for maker in makers for c in maker.cases(True) if c.tags["op"] == op]
    cases = [c for c in cases if c.tags.get("format") in (None, "fp16", "int4", "w4")]
    assert all(one.run(machine())["right"] for one in cases)
    assert not any(one.run(machine(Wrong()))["right"] for one in cases)


def test_what_a_kernel_leaves_out_is_seen():
    truth = torch.ones(4, 64)

    def forgetful() -> torch.Tensor:
        out = torch.empty(4, 64)
        out[:, :-1] = 1
        return out

    assert not compare(machine(), forgetful, truth, 0.1, 0.1)["right"]
    assert compare(machine(), lambda: torch.ones(4, 64), truth, 0.1, 0.1)["right"]


def test_copies_are_of_their_own_memory():
    class Card(Machine):
        l2_bytes = 1000

    card = Card(torch.device("cpu"), "card", ReferenceOps(), small=True)
    scene = attention.filled_scene(card, "int4", attention.Heads(4, 2, 32), [(69, 1), (3, 2)])
    copies = rotated(card, scene, 500)
    assert len(copies) == 6
    planes = {plane.untyped_storage().data_ptr() for copy in copies for plane in copy.cache.planes.values()}
    assert len(planes) == 6  # the planes of one still lie in one piece
    for copy in copies:
        out = card.ops.attention(torch.ones(3, 4, 32), copy.cache, copy.batch, attention.AttentionShape(4, 2, 32, 0.2))
        assert out.isfinite().all()


def fake_kernel() -> ModuleType:
    """A kernel module that can be tuned: wrong with one candidate, impossible with another."""
    module = ModuleType("kvant.kernels.triton.fake")
    module.ran = []

    def run(x: torch.Tensor, config: Config | None = None) -> torch.Tensor:
        config = config or module.default(len(x))
        module.ran.append(config.num_warps)
        if config.num_warps == 16:
            raise RuntimeError("out of resources")
        return x + (config.num_warps == 8)

    module.run = run
    module.key = lambda m: f"m{m}"
    module.default = lambda m: Config({"BLOCK": m})
    module.candidates = lambda m: [module.default(m), *(Config({"BLOCK": m}, num_warps=n) for n in (2, 8, 16))]
    return module


def test_tuning_takes_the_fastest_that_is_right(tmp_path, monkeypatch):
    module, here = fake_kernel(), machine()
    here.small = False  # all candidates
    default = module.default
    times = {1: 9.0, 2: 5.0, 4: 10.0}
    monkeypatch.setattr(tune, "tunable_modules", lambda: [module])

    def measure(machine: Machine, calls: list, seconds: float) -> Timing:
        calls[0]()
        return Timing(times[module.ran[-1]], 0.0, True)

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "TABLES", tmp_path / "kept")
    work = tune.Workload([lambda: module.run(torch.ones(3))], 1)
    one = case.Case("tuning", {"op": "fake"}, lambda machine: tune.tuned(lambda _: work, machine))
    session._measure(one, here, Results(tmp_path), "r")
    assert module.default is default
    (found,) = records(tmp_path)[0]["figures"]["kernels"]
    assert (found["key"], found["us"], found["default_us"], found["failed"]) == ("m3", 5.0, 10.0, 2)
    table = Tuning.read(tmp_path / "tuned" / "cpu-test.json")
    assert table.lookup("fake", "m3") == Config({"BLOCK": 3}, num_warps=2)
    assert not (tmp_path / "kept").exists()  # a CPU's configurations are of no use to anyone
    assert tune.tuned(lambda _: work, here) == {"kernels": []}  # known by now


def test_what_is_chosen_by_name_is_compiled_first_all_the_same():
    compiling, *chosen = session.matching(tune.cases(small=False), "w4/256$")
    assert compiling.name == "tuning/compile"
    assert chosen
    assert all(case.name.endswith("w4/256") for case in chosen)


def test_workers_that_compile_share_the_candidates(monkeypatch):
    module = fake_kernel()
    work = tune.Workload([lambda: module.run(torch.ones(3))], 1)

    def fails(machine: Machine) -> tune.Workload:
        raise RuntimeError("no room")

    monkeypatch.setattr(tune, "tunable_modules", lambda: [module])
    monkeypatch.setattr(
        tune,
        "points",
        lambda small: [({}, fails), ({"op": "a"}, lambda machine: work), ({"op": "b"}, lambda machine: work)],
    )
    for index in range(2):
        tune.compile_share(index, 2, set(), "")
    assert module.ran == [4, 4, 8, 4, 4, 2, 16, 4]  # the default first at each point, then one's share at the first
    module.ran.clear()
    tune.compile_share(0, 2, {("fake", "m3")}, "")
    assert module.ran == [4, 4]
    module.ran.clear()
    tune.compile_share(0, 2, {("fake", "m3")}, "tuning/b")  # what is not to be measured is not compiled
    assert module.ran == [4]


def record(stage: str, figures: dict, card: str = "NVIDIA H200", **tags: object) -> dict:
    name = "/".join([stage, *map(str, tags.values())])
    head = {"name": name, "stage": stage, "tags": tags, "card": card, "small": False, "run": "r", "seconds": 1.0}
    return {**head, "figures": figures} if figures else {**head, "error": "it broke | badly"}


def call(us: float, size: float) -> dict:
    return {"us": us, "spread": 0.0, "graph": True, "bytes": size, "flops": 0, "rate": "bf16"}


def made_up() -> list[dict]:
    """A card of 4 TB/s that meets half of the targets."""
    step = {"model": "llama-2-7b", "step": "decode 64x4096"}
    memory = {"what": "memory", "model": "qwen-7b", "batch": 100, "new": 1024}
    served = {"requests_per_second": 3.0, "requests": 9, "pool_tokens": 8192, "preemptions": 0}
    chats = {"what": "throughput", "model": "llama-2-7b", "weights": "w4", "pool_gib": 4}
    wrong = {"right": False, "error": 0.5, "worst": 2.0, "repeatable": False, "wrong": ["17"]}
    alone = {"what": "decode", "model": "llama-2-7b", "weights": "w4", "kv": "bf16"}
    return [
        record("environment", {"torch": "2.11", "triton": "3.6", "commit": "abc"}),
        record("ceilings", {"per_second": 4e12, "us": 1.0}, what="copy"),
        record("correctness", wrong, op="linear", format="w4"),
        record("attention", call(2000.0, 4e9), **step, format="bf16"),
        record("attention", call(1000.0, 4e9), **step, format="bf16"),
        record("attention", call(500.0, 1e9), **step, format="int8"),
        record("attention", call(500.0, 1e9), **step, format="int4"),
        record("linear", call(10.0, 2e7), model="llama-2-7b", layer="qkv", format="w4", rows=1),
        record("linear", call(8.0, 2e7), model="llama-2-7b", layer="qkv", format="cublas", rows=1),
        record("engine", {"output_tokens_per_second": 100.0, **served}, **chats, kv="bf16"),
        record("engine", {"output_tokens_per_second": 160.0, **served}, **chats, kv="int8"),
        record("engine", {"peak_bytes": 45e9}, **memory, weights="bf16", kv="int8"),
        record("engine", {}, **memory, weights="w4", kv="int4"),
        record("engine", {"tokens_per_second": 900.0, "read_bytes": 4e9}, **alone),
    ]


def test_the_report_says_what_is_met_missed_and_not_measured(tmp_path):
    results = Results(tmp_path)
    for one in made_up():
        results.append(one)
    write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    for line in (
        "Llama-2-7B: 16 bit, of the copy bandwidth | ≥ 80% | 100% | met |",
        "Llama-2-7B: int8 beside our 16 bit | ≥ 1.8x | 2x | met |",
        "Llama-2-7B: int4 beside our 16 bit | ≥ 3x | 2x | missed |",
        "Llama-3-8B: int4 beside our 16 bit | ≥ 3x | not measured | not measured |",
        "Llama-2-7B, batch 1: of the bandwidth | ≥ 80% | not measured | not measured |",
        "the worst of all shapes and batches | ≥ 1x | 0.8x | missed |",
        "prompt 1, 512 new | ≥ 850 tok/s | 900 tok/s | met |",
        "Llama-2-7B: int8 beside our 16 bit | ≥ 1.5x | 1.6x | met |",
        "int8 KV, bf16 weights | ≤ 46 GB | 45 GB | met |",
        "int4 KV, w4 weights | ≤ 24 GB | not measured | not measured |",
        "| linear | 1 | **linear w4** (17) | 0.5 | 1 |",
        "it broke / badly",
        "torch 2.11, triton 3.6, commit abc",
        "![attention](nvidia-h200-attention.svg)",
        "![memory](nvidia-h200-memory.svg)",
        "![throughput](nvidia-h200-throughput.svg)",
    ):
        assert line in page
    (document,) = json.loads((tmp_path / "report.json").read_text())
    assert [t["verdict"] for t in document["targets"]].count("met") == 5
    assert len(document["records"]) == len(made_up()) - 1
    assert "<svg" in (tmp_path / "nvidia-h200-attention.svg").read_text()


def test_figures_of_two_cards_are_not_mixed():
    views = View.each([*made_up(), record("ceilings", {"per_second": 3e12}, "NVIDIA H100", what="copy")])
    assert [(view.card, view.ceiling("copy")) for view in views] == [("NVIDIA H200", 4e12), ("NVIDIA H100", 3e12)]
    assert all(target.figure is None for target in targets(views[1]))


def test_an_error_does_not_replace_a_figure():
    good, bad = record("linear", call(1.0, 1.0), rows=1), record("linear", {}, rows=1)
    assert latest([good, bad]) == [good]
    assert latest([bad, good]) == [good]


def test_pictures_hold_all_series():
    picture = svg.lines("a < b", {"one": [(1, 2.0), (16, 4.0)], "two": [(1, 1.0)]}, "rows", "%")
    assert picture.count("<polyline") == 2
    assert "a &lt; b" in picture
    ElementTree.fromstring(picture)
    assert svg.bars("t", [("x", 1.0), ("y", 0.0)], "%", 2.0).count("<rect") == 3


def test_chats_have_the_lengths_they_should():
    lengths = chat_lengths(4000)
    assert lengths == chat_lengths(4000)
    assert sum(one.prompt for one in lengths) / 4000 == pytest.approx(161, rel=0.12)
    assert sum(one.output for one in lengths) / 4000 == pytest.approx(338, rel=0.12)
    assert min(one.prompt for one in lengths) >= 4
    assert max(one.output for one in lengths) <= 1024


def test_serving_while_requests_wait_leaves_nothing_behind():
    here = machine()
    made = engine._make(here, engine.Setup("llama-2-7b", "w4", "int8"))
    core = engine.core_of(here, made.model, "int8", [Lengths(3, 9)] * 2)
    served = engine.run_requests(core, [Lengths(3, 20)] * 5, while_queued=True)
    assert 0 < served.tokens < 100
    assert not core.has_work()
    whole = engine.run_requests(core, [Lengths(3, 4)] * 5)
    assert (whole.tokens, whole.finished) == (20, 5)


def test_what_targets_need_comes_before_the_rest():
    order = [one for one in session.all_cases(small=False) if one.stage not in case.FIRST]
    wanted = [one.target for one in order]
    assert wanted == sorted(wanted, reverse=True)
    count = {stage: sum(one.target for one in order if one.stage == stage) for stage in case.STAGES}
    assert (count["attention"], count["linear"], count["engine"]) == (6, 16, 6)
