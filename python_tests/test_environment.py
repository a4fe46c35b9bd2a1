"""What the machine allows this process: cores and memory, on the files of cgroups of both versions."""

import os

import pytest

from rlekf_ext.environment import _left_in_cgroups, usable_cores

FILES = {
    "v1": (
        "1:cpuset:/\n4:cpu,cpuacct:/job/step\n",
        "cpu",
        {"cpu.cfs_quota_us": "{quota}", "cpu.cfs_period_us": "100000"},
    ),
    "v2": ("0::/job/step\n", "", {"cpu.max": "{quota} 100000"}),
}


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.fixture(params=FILES)
def cgroups(request, tmp_path):
    """A function that writes the quota (µs in 100 ms) of each cgroup; returns where they are, and of which this is."""
    own, kind, files = FILES[request.param]
    (tmp_path / "own").write_text(own)

    def write(**quotas):
        for place, quota in quotas.items():
            folder = tmp_path / "root" / kind / {"all": "", "job": "job", "step": "job/step"}[place]
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text.format(quota=quota) + "\n")
        return tmp_path / "root", tmp_path / "own"

    return write


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ({}, 8),
        ({"step": 300000}, 3),
        ({"step": 390000}, 3),
        ({"step": 50000}, 1),
        ({"step": 1600000}, 8),
        ({"step": 600000, "job": 200000}, 2),
        ({"all": 400000}, 4),  # in a container: its own group is the root that it sees
    ],
)
def test_quotas_of_all_cgroups_count(cgroups, quotas, cores):
    assert usable_cores(*cgroups(**quotas)) == cores


@pytest.mark.parametrize("none", ["max", "-1", "", "x y z"])
def test_no_quota(cgroups, none):
    assert usable_cores(*cgroups(step=none, job=500000)) == 5


def test_no_cgroups(tmp_path):
    assert usable_cores(tmp_path, tmp_path / "absent") == 8


@pytest.mark.parametrize(("processes", "cores"), [(1, 6), (2, 3), (4, 1), (16, 1)])
def test_processes_of_torchrun_share_the_cores(cgroups, monkeypatch, processes, cores):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert usable_cores(*cgroups(step=600000)) == cores


@pytest.mark.parametrize(
    ("own", "folder", "names"),
    [
        ("0::/job\n", "", ("memory.max", "memory.current", "inactive_file")),
        ("2:memory:/job\n", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_memory_left_in_cgroups(tmp_path, own, folder, names):
    limit, used, cached = names
    (tmp_path / "own").write_text(own)
    for group, most in (("", 900), ("job", 500)):
        place = tmp_path / "root" / folder / group
        place.mkdir(parents=True, exist_ok=True)
        for name, text in ((limit, most), (used, 100), ("memory.stat", f"anon 5\n{cached} 30")):
            (place / name).write_text(f"{text}\n")
    assert list(_left_in_cgroups(tmp_path / "root", tmp_path / "own")) == [430, 830]
