"""`kvant chat` in front of a pipeline that repeats what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvant.config import EngineConfig, SamplingParams


def test_one_answer_on_stdout_and_nothing_else(kvant, pipes):
    result = kvant("chat", "model.gguf", "-q", "hello")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "1:hello\n", "")
    assert pipes[0].model == "model.gguf"
    assert pipes[0].closed
    assert pipes[0].closed_streams == 1


def test_the_question_from_a_pipe(kvant, pipes):
    assert kvant("chat", "-q", "-", input="a\nb\n").stdout == "1:a\nb\n\n"
    result = kvant("chat", "-q", "-", input=" \n")
    assert result.exit_code == 1
    assert "question is empty" in result.stderr


def test_statistics_go_to_stderr(kvant, pipes):
    result = kvant("chat", "-q", "hi", "--stats")
    assert result.stdout == "1:hi\n"
    assert (
        "7 tokens read (3 of them from the cache), 2 written at 2.5 tokens/s, the first after 0.25 s" in result.stderr
    )
    assert "KV cache int4: 1 MiB" in result.stderr


def test_without_flags_the_model_decides(kvant, pipes):
    kvant("chat", "-q", "hi")
    assert pipes[0].engine == EngineConfig()
    assert pipes[0].asked == [([{"role": "user", "content": "hi"}], pipes[0].default_sampling)]
    kvant("chat", input="")
    assert pipes[1].sessions[0].sampling == pipes[1].default_sampling
    assert pipes[1].sessions[0].system is None


def test_every_flag_arrives(kvant, pipes):
    flags = (
        "--system Be-brief. --temperature 0 --top-p 0.5 --top-k 3 --min-p 0.125 --max-tokens 9 --repetition-penalty 1.5"
        " --presence-penalty 0.25 --frequency-penalty 0.75 --stop a --stop b"
        " --dtype bfloat16 --kv-cache-dtype int4 --kv-cache-dtype-skip-layers 0,1 --kv-cache-dtype-skip-layers -1"
        " --kv-cache-policy p.json --quantization-param-path scales --max-model-len 512"
        " --max-num-seqs 2 --max-num-batched-tokens 64 --block-size 16 --kv-cache-memory 50%"
        " --no-enable-prefix-caching --threads 1 --device cpu --seed 7"
    )
    result = kvant("chat", *flags.split(), input="hi\n")
    assert result.exit_code == 0, result.output
    assert pipes[0].engine == EngineConfig(
        dtype="bfloat16",
        kv_cache_dtype="int4",
        kv_cache_dtype_skip_layers=(0, 1, -1),
        kv_cache_policy=Path("p.json"),
        quantization_param_path=Path("scales"),
        max_model_len=512,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        block_size=16,
        kv_cache_memory=0.5,
        enable_prefix_caching=False,
        num_threads=1,
        device="cpu",
        seed=7,
    )
    assert pipes[0].sessions[0].system == "Be-brief."
    assert pipes[0].sessions[0].sampling == SamplingParams(
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.125,
        max_tokens=9,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=0.75,
        stop=("a", "b"),
    )


def test_other_ways_to_size_the_cache(kvant, pipes):
    kvant("chat", "-q", "hi", "--quant-policy", "8", "--num-kv-blocks", "5")
    assert pipes[0].engine == EngineConfig(kv_cache_dtype="int8", num_kv_blocks=5)
    kvant("chat", "-q", "hi", "--kv-cache-memory", "2GiB")
    assert pipes[1].engine.kv_cache_memory == 2 * 2**30


def test_each_flag_has_a_twin_in_the_environment(kvant, pipes):
    twins = {
        "KVANT_MODEL": "m",
        "KVANT_KV_CACHE_DTYPE": "int8",
        "KVANT_KV_CACHE_DTYPE_SKIP_LAYERS": "0, 20-23,sliding_window",
        "KVANT_KV_CACHE_POLICY": "p.json",
        "KVANT_QUANTIZATION_PARAM_PATH": "scales",
        "KVANT_THREADS": "3",
        "KVANT_ENABLE_PREFIX_CACHING": "0",
        "KVANT_TEMPERATURE": "0.5",
        "KVANT_SYSTEM": "s",
    }
    kvant("chat", "-q", "hi", "--threads", "2", env=twins)
    made = pipes[0]
    assert made.model == "m"
    assert made.engine == EngineConfig(
        kv_cache_dtype="int8",
        kv_cache_dtype_skip_layers=(0, "20-23", "sliding_window"),
        kv_cache_policy=Path("p.json"),
        quantization_param_path=Path("scales"),
        num_threads=2,
        enable_prefix_caching=False,
    )
    (messages, sampling) = made.asked[0]
    assert sampling.temperature == 0.5
    assert messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--dtype", "int3"], "dtype='int3' is unknown"),
        (["--quant-policy", "5"], "quant_policy=5 is unknown"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--kv-cache-dtype-skip-layers", "0,first"], "kv_cache_dtype_skip_layers: 'first' names no layers"),
        (["--kv-cache-memory", "lots"], "kv_cache_memory='lots' is not a size"),
    ],
)
def test_bad_values_are_one_clean_line(kvant, pipes, flags, complaint):
    result = kvant("chat", "-q", "hi", *flags)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {complaint}")
    assert result.stderr.count("\n") == 1


def test_a_conversation_keeps_its_history_until_reset(kvant, pipes):
    result = kvant("chat", input="one\n\n  two  \n/reset\nthree\n/exit\nfour\n")
    assert result.stdout == "1:one\n2:two\n1:three\n"
    assert "/help tells the commands" in result.stderr
    assert pipes[0].closed


def test_the_end_of_the_input_ends_a_conversation(kvant, pipes):
    result = kvant("chat", input="last line without its newline")
    assert (result.exit_code, result.stdout) == (0, "1:last line without its newline\n")


def test_messages_of_several_lines(kvant, pipes):
    kvant("chat", input='"""one\n  two\n"""\n"""three"""\n"""never\nclosed')
    assert pipes[0].sessions[0].heard == ["one\n  two", "three", "never\nclosed"]


def test_commands(kvant, pipes):
    result = kvant("chat", input="/help\n/nonsense\n/usr/bin is a path\n")
    assert "/reset  forget the conversation" in result.stderr
    assert "/nonsense is not a command" in result.stderr
    assert pipes[0].sessions[0].heard == ["/usr/bin is a path"]


def test_an_interrupt_stops_the_answer_and_nothing_more(kvant, pipes):
    result = kvant("chat", input="interrupt\ngo on\n")
    assert (result.exit_code, result.stdout) == (0, "1:\n2:go on\n")
    assert "(stopped)" in result.stderr
    assert pipes[0].closed_streams == 2


def test_a_message_that_cannot_be_answered_does_not_end_the_conversation(kvant, pipes):
    result = kvant("chat", input="too long\ngo on\n")
    assert (result.exit_code, result.stdout) == (0, "2:go on\n")
    assert "error: the prompt has 9000 tokens (/reset forgets the conversation)" in result.stderr
    alone = kvant("chat", "-q", "too long")
    assert (alone.exit_code, alone.stdout, alone.stderr) == (1, "", "error: the prompt has 9000 tokens\n")


def test_an_interrupt_ends_a_single_answer(kvant, pipes):
    assert kvant("chat", "-q", "interrupt").exit_code == 130
    assert pipes[0].closed
