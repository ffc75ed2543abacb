"""How much memory there is, on systems that say it in different ways."""

from __future__ import annotations

import os

import pytest

from kvant.cache import memory

GIB = 2**30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Say what the system reports: MemAvailable in bytes and the cgroup's files; None is not there."""

    def say(available: int | None, limit: str | None = None, used: int | None = None) -> None:
        monkeypatch.setattr(memory, "_meminfo", lambda key: {"MemAvailable": available}[key])
        monkeypatch.setattr(memory, "_CGROUP", tmp_path)
        for name, value in (("memory.max", limit), ("memory.current", used)):
            if value is not None:
                (tmp_path / name).write_text(f"{value}\n")

    return say


def test_without_a_cgroup_it_is_what_the_system_estimates(system):
    system(5 * GIB)
    assert memory.available_memory() == 5 * GIB


@pytest.mark.parametrize(("limit", "used", "expected"), [(4, 1, 3), (100, 1, 5), (4, 6, 0)])
def test_a_cgroups_limit_counts_where_it_is_nearer(system, limit, used, expected):
    system(5 * GIB, str(limit * GIB), used * GIB)
    assert memory.available_memory() == expected * GIB


def test_a_cgroups_file_pages_that_can_be_dropped_count_as_free(system, tmp_path):
    system(50 * GIB, str(4 * GIB), 3 * GIB)
    (tmp_path / "memory.stat").write_text(f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file {GIB}\n")
    assert memory.available_memory() == 3 * GIB


def test_a_cgroup_without_a_limit_limits_nothing(system):
    system(5 * GIB, "max", GIB)
    assert memory.available_memory() == 5 * GIB


def test_where_nobody_says_it_is_all_there_is(system):
    system(None)
    assert memory.available_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_this_machine_has_some():
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.available_memory() <= physical
