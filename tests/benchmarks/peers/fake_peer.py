"""A peer without a model. Its KV cache's name says how it behaves: a number is its tokens per second."""

from __future__ import annotations

import json
import os
from pathlib import Path

from protocol import Job, Timing


class FakePeer:
    def __init__(self, job: Job) -> None:
        if job.kv_cache == "unloadable":
            raise ImportError("no such library")
        print("libraries print what they like")
        self.job = job
        self.details = {"version": "1", "omp": os.environ["OMP_NUM_THREADS"]}

    def prefill(self, prompt: list[int]) -> Timing:
        return self._timing(len(prompt), {"prefill": [prompt]})

    def decode(self, prompts: list[list[int]], tokens: int) -> Timing:
        return self._timing(tokens * len(prompts), {"decode": prompts})

    def _timing(self, tokens: int, call: dict[str, list[list[int]]]) -> Timing:
        with (Path(self.job.work_dir) / "calls.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"by": self.job.kv_cache, **call}) + "\n")
        if self.job.kv_cache == "dies":
            os._exit(1)
        if self.job.kv_cache == "breaks":
            raise ValueError("no luck")
        return Timing(tokens, tokens / float(self.job.kv_cache))


def open_peer(job: Job) -> FakePeer:
    return FakePeer(job)
