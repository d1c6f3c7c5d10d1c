"""The tightest of the control groups around a process counts, with what it can give up, and with the swap that it allows."""

import pytest

from lib_lora_guard.memory.control_groups import ControlGroups, Rooms

GB = 1 << 30
NO_LIMIT_1 = 9223372036854771712
"""What version 1 shows for "no limit" where pages have 4 KB."""

FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
SWAP = {
    1: ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
    2: ("memory.swap.max", "memory.swap.current"),
}


def group(folder, limit, usage, cache, version, swap=None):
    limit_file, usage_file, cache_name = FILES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_file).write_text(f"{limit}\n", encoding="utf-8")
    (folder / usage_file).write_text(f"{usage}\n", encoding="utf-8")
    (folder / "memory.stat").write_text(f"anon 1\n{cache_name} {cache}\nodd\n", encoding="utf-8")
    for name, number in zip(SWAP[version], swap or (), strict=False):
        (folder / name).write_text(f"{number}\n", encoding="utf-8")


def groups(tmp_path, membership):
    file = tmp_path / "cgroup"
    file.write_text(membership, encoding="utf-8")
    return ControlGroups(tmp_path, file)


def test_version_2_counts_page_cache_as_free(tmp_path):
    group(tmp_path / "a" / "b", 8 * GB, 6 * GB, GB, 2)
    assert groups(tmp_path, "0::/a/b\n").rooms().ram == 3 * GB


def test_the_tightest_group_on_the_way_up_counts(tmp_path):
    group(tmp_path / "a" / "b", 8 * GB, 2 * GB, 0, 2)
    group(tmp_path / "a", 9 * GB, 8 * GB, 0, 2)
    assert groups(tmp_path, "0::/a/b\n").rooms().ram == GB


@pytest.mark.parametrize("membership", ["0::/a\n", "nonsense\n", "", "4:memory:/a\n"])
def test_a_control_group_without_a_limit_limits_nothing(tmp_path, membership):
    group(tmp_path / "a", "max", 2 * GB, 0, 2)
    group(tmp_path / "memory" / "a", NO_LIMIT_1, 2 * GB, 0, 1, swap=(NO_LIMIT_1, 2 * GB))
    assert groups(tmp_path, membership).rooms(GB) == Rooms(None, None)


def test_outside_linux_there_are_no_groups(tmp_path):
    assert ControlGroups(tmp_path, tmp_path / "no file").rooms(GB) == Rooms(None, None)


def test_version_1_inside_a_container_sees_its_group_as_the_root(tmp_path):
    group(tmp_path / "memory", 4 * GB, 3 * GB, GB // 2, 1)
    found = groups(tmp_path, "5:devices:/docker/x\n4:memory:/docker/x\n0::/\n")
    assert found.rooms().ram == GB + GB // 2


def test_a_group_over_its_limit_leaves_nothing(tmp_path):
    group(tmp_path / "memory" / "a", 4 * GB, 5 * GB, 0, 1)
    (tmp_path / "memory" / "a" / "memory.stat").unlink()
    assert groups(tmp_path, "4:cpu,memory:/a\n").rooms(0) == Rooms(0, 0)


@pytest.mark.parametrize(
    ("swap", "machine", "expected"),
    [
        (None, 7, 2),
        (("max",), 7, 9),
        ((3 * GB, GB), 7, 4),
        ((3 * GB, GB), 1, 3),
        ((0, 0), 7, 2),
        ((GB, 3 * GB), 7, 2),
        ((3 * GB,), 7, 2),
        (("max",), 0, 2),
    ],
    ids=[
        "the group does not tell",
        "no limit but the machine's swap",
        "the group's",
        "the machine has less",
        "none allowed",
        "above its limit",
        "half told",
        "a machine without swap",
    ],
)
def test_version_2_limits_swap_by_itself(tmp_path, swap, machine, expected):
    group(tmp_path / "a", 8 * GB, 6 * GB, 0, 2, swap)
    assert groups(tmp_path, "0::/a\n").rooms(machine * GB) == Rooms(2 * GB, expected * GB)


@pytest.mark.parametrize(
    ("swap", "machine", "expected"),
    [(None, 7, 3), ((9 * GB, 7 * GB), 7, 3), ((12 * GB, 7 * GB), 7, 6), ((NO_LIMIT_1, 7 * GB), 7, 10)],
    ids=["the group does not tell", "hardly any", "RAM and swap together", "no limit but the machine's swap"],
)
def test_version_1_limits_ram_and_swap_together(tmp_path, swap, machine, expected):
    group(tmp_path / "memory" / "a", 8 * GB, 6 * GB, GB, 1, swap)
    assert groups(tmp_path, "4:memory:/a\n").rooms(machine * GB) == Rooms(3 * GB, expected * GB)


def test_the_tightest_group_may_be_another_one_with_swap(tmp_path):
    group(tmp_path / "a", 10 * GB, 5 * GB, 0, 2, (0, 0))
    group(tmp_path / "a" / "b", 8 * GB, 6 * GB, 0, 2, ("max",))
    assert groups(tmp_path, "0::/a/b\n").rooms(7 * GB) == Rooms(2 * GB, 5 * GB)


def test_limits_are_read_each_time_and_places_once(tmp_path):
    group(tmp_path / "a", 8 * GB, 6 * GB, 0, 2)
    found = groups(tmp_path, "0::/a\n")
    (tmp_path / "cgroup").unlink()
    group(tmp_path / "a", 8 * GB, 3 * GB, 0, 2)
    assert found.rooms().ram == 5 * GB
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    assert found.rooms() == Rooms(None, None)
