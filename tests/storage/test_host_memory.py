import pytest

from zero_sft.storage import host_memory


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_the_smallest_room_of_version_2(tmp_path):
    """A job's group in a parent without a limit, and with the cache counted as free."""
    job = tmp_path / "system.slice" / "job_7"
    write(job / "step_0", memory__max="max", memory__current=90, memory__stat="anon 90\ninactive_file 0")
    write(job, memory__max=1000, memory__current=700, memory__stat="anon 500\ninactive_file 200\nactive_file 0")
    write(tmp_path / "system.slice", memory__max=5000, memory__current=900, memory__stat="inactive_file 0")
    own = tmp_path / "own"
    own.write_text("0::/system.slice/job_7/step_0\n")
    assert sorted(host_memory._cgroup_rooms(own, tmp_path)) == [500, 4100]


def test_version_1(tmp_path):
    group = tmp_path / "memory" / "slurm" / "job_7"
    write(group, memory__limit_in_bytes=1000, memory__usage_in_bytes=700, memory__stat="cache 1\ntotal_inactive_file 50")
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/slurm/job_7\n4:memory:/slurm/job_7\n")
    assert host_memory._cgroup_rooms(own, tmp_path) == [350]


@pytest.mark.parametrize("text", ["", "0::/\n", "0::/nowhere\n", "what is this\n"])
def test_no_limit(tmp_path, text):
    own = tmp_path / "own"
    own.write_text(text)
    assert host_memory._cgroup_rooms(own, tmp_path) == []
    assert host_memory._cgroup_rooms(tmp_path / "missing", tmp_path) == []
    assert host_memory.available_bytes() > 0
