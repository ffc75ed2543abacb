"""llama.cpp through llama-cpp-python's low-level API: one llama_decode a step, greedy argmax in numpy.

The model is requantized to Q4_0 once, and kept in the work directory. Each number and length of sequences has a context
of its own, so that attention never sees another point's tokens. A prompt is prefilled once: later calls remove what was
generated after it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from points import ROUNDED
from protocol import Job, PeerError, Timing

N_BATCH, N_UBATCH = 2048, 512
KV_TYPES = {
    "f16": llama_cpp.GGML_TYPE_F16,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
}


class LlamaCppPeer:
    """One model, and a context for each shape that was asked for."""

    def __init__(self, job: Job) -> None:
        llama_cpp.llama_backend_init()
        path = _requantized(job)
        self._job = job
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise PeerError(f"llama.cpp cannot load {path}; remove it, so that it is made anew")
        self._contexts: dict[tuple[int, int, int], _Context] = {}
        size = llama_cpp.llama_model_size(self._model)
        self.details: Mapping[str, Any] = {
            "version": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode(),
            "weights": "Q4_0",
            "weights_bytes": size,
            "bits_per_weight": round(8 * size / llama_cpp.llama_model_n_params(self._model), 3),
            "flash_attention": True,
            "n_batch": N_BATCH,
            "n_ubatch": N_UBATCH,
        }

    def prefill(self, prompt: list[int]) -> Timing:
        """From the call to the first token."""
        context = self._context(len(prompt), 1, 0)
        context.clear()
        started = perf_counter()
        context.compute(prompt, 0)
        return Timing(len(prompt), perf_counter() - started)

    def decode(self, prompts: list[list[int]], tokens: int) -> Timing:
        """One batch a step, with a token of each sequence."""
        context = self._context(len(prompts[0]), len(prompts), tokens)
        ids = context.hold(prompts)
        started = perf_counter()
        for step in range(tokens):
            ids = context.step(ids, len(prompts[0]) + step)
        return Timing(tokens * len(prompts), perf_counter() - started)

    def _context(self, length: int, sequences: int, tokens: int) -> _Context:
        key = (length, sequences, tokens)
        if key not in self._contexts:
            room = -(-(length + tokens) // ROUNDED) * ROUNDED
            self._contexts[key] = _Context(self._model, self._job, room, sequences)
        return self._contexts[key]


class _Context:
    """A llama_context and its batch.

    Args:
        room: tokens a sequence may have.
    """

    def __init__(self, model: Any, job: Job, room: int, sequences: int) -> None:
        self._prompts: list[list[int]] = []
        self._first: list[int] = []
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._context = llama_cpp.llama_init_from_model(model, _context_params(job, room, sequences))
        if not self._context:
            raise PeerError(f"llama.cpp makes no context of {sequences} sequences of {room} tokens; its log says why")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(max(N_BATCH, sequences), 0, 1)

    def clear(self) -> None:
        """Forget everything."""
        llama_cpp.llama_memory_clear(self._memory, False)
        self._prompts = []

    def hold(self, prompts: list[list[int]]) -> list[int]:
        """Hold these prompts and nothing after them; gives the first token of each one's output."""
        if self._prompts != prompts:
            self.clear()
            self._first = [self.compute(prompt, sequence) for sequence, prompt in enumerate(prompts)]
            self._prompts = prompts
        for sequence, prompt in enumerate(prompts):
            if not llama_cpp.llama_memory_seq_rm(self._memory, sequence, len(prompt), -1):
                raise PeerError("llama.cpp cannot remove tokens from this model's cache")
        return self._first

    def compute(self, prompt: list[int], sequence: int) -> int:
        """Prefill a prompt; gives its first output token."""
        for start in range(0, len(prompt), N_BATCH):
            for row, token in enumerate(prompt[start : start + N_BATCH]):
                self._set(row, token, start + row, sequence, wanted=start + row == len(prompt) - 1)
            self._run(min(N_BATCH, len(prompt) - start))
        return int(self._logits(1)[0].argmax())

    def step(self, ids: Sequence[int], position: int) -> list[int]:
        """Compute one token of each sequence, all at one position; gives the next ones."""
        for sequence, token in enumerate(ids):
            self._set(sequence, token, position, sequence, wanted=True)
        self._run(len(ids))
        following: list[int] = self._logits(len(ids)).argmax(axis=1).tolist()
        return following

    def _set(self, row: int, token: int, position: int, sequence: int, *, wanted: bool) -> None:
        batch = self._batch
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = wanted

    def _run(self, count: int) -> None:
        self._batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise PeerError(f"llama_decode gave {status}; its log says why")

    def _logits(self, rows: int) -> NDArray[np.float32]:
        """Of the batch's tokens that wanted them, [rows, vocab_size]. Waits until they are computed."""
        pointer = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (rows, self._vocab_size))


def _context_params(job: Job, room: int, sequences: int) -> Any:
    """Each sequence keeps a stream of its own (kv_unified off): attention reads no other sequence's tokens."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = room * sequences, sequences, False
    params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
    params.n_outputs_max = sequences
    params.n_threads = params.n_threads_batch = job.threads
    params.type_k = params.type_v = KV_TYPES[job.kv_cache]
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return params


def _requantized(job: Job) -> Path:
    """The model in Q4_0, made where it is missing or older than the model."""
    source, target = Path(job.model), job.q4_0
    if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
        return target
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = job.threads, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    fresh = target.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(fresh).encode(), ctypes.byref(params)):
        raise PeerError(f"llama.cpp cannot quantize {source}; its log says why")
    return fresh.replace(target)


def open_peer(job: Job) -> LlamaCppPeer:
    """Load the model, requantized."""
    return LlamaCppPeer(job)
