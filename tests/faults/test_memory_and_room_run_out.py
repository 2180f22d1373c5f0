"""Memory, room or permission is lacking for real: exit code 5 and one line, and no output."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from arena import COMMANDS, STAGING, Arena, Job, said, told, tree
from checkpoint_folders import write_adapter, write_base
from hurts import Hurt

LEFT = (1 << 16, 1 << 18, 1 << 20, 1 << 30)
ROOT = Path(__file__).parents[2]


def unshares() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode == 0


private_mounts = pytest.mark.skipif(not unshares(), reason="this system lets nobody mount in a space of their own")


@pytest.fixture
def large(arena: Arena) -> Job:
    """A merge of a base with 24 MiB, two thirds of it in a tensor that is changed."""
    base, adapter = arena.inputs / "large", arena.inputs / "to large"
    sizes = {"a.q_proj.weight": (2048, 4096), "b.weight": (1024, 4096)}
    torch.manual_seed(5)
    write_base(base, {name: torch.randn(shape).bfloat16() for name, shape in sizes.items()}, config={})
    factors = {"a.q_proj.lora_A.weight": torch.randn(4, 4096), "a.q_proj.lora_B.weight": torch.randn(2048, 4)}
    write_adapter(adapter, factors, target_modules=["q_proj"])
    argv = ["merge", str(base), str(adapter), str(arena.out)]
    arena.clear()
    assert arena.zygote.run(argv).code == 0
    job = Job(argv, None, tree(arena.out))
    arena.before = tree(arena.inputs)
    return job


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_that_has_little_memory_ends_well_or_says_so(arena: Arena, name: str) -> None:
    assert {run_within(arena, arena.jobs[name], left) for left in LEFT} == {0, 5}


@pytest.mark.slow
def test_a_run_that_has_any_memory_ends_well_or_says_so(arena: Arena) -> None:
    for name in COMMANDS:
        assert {run_within(arena, arena.jobs[name], left) for left in (*range(1 << 15, 1 << 23, 1 << 16), 1 << 30)} == {
            0,
            5,
        }


def run_within(arena: Arena, job: Job, left: int) -> int:
    """The exit code of a run that has so many bytes of memory left."""
    arena.reset(job)
    done = arena.zygote.run(job.argv, Hurt(memory_bytes=left))
    if done.code == 0:
        assert arena.judge(job) == "new"
        return 0
    told(done)
    arena.tally["errors injected"] += 1
    assert arena.judge(job) == ("old" if job.old else "absent")
    assert arena.strays() <= {STAGING}
    arena.rerun(job)
    return done.code


@pytest.mark.parametrize(("size", "code"), [(200, 5), (450, 5), pytest.param(1800, 0, marks=pytest.mark.slow)])
def test_the_real_command_line_with_little_memory_ends_well_or_says_so(arena: Arena, size: int, code: int) -> None:
    assert real_run_within(arena, size) == code


@pytest.mark.slow
def test_the_real_command_line_with_any_memory_ends_well_or_says_so(arena: Arena) -> None:
    assert {real_run_within(arena, size) for size in (*range(100, 900, 40), *range(900, 1300, 8))} == {0, 5}


def real_run_within(arena: Arena, mebibytes: int) -> int:
    """The exit code of the command line in so much address space."""
    job = arena.jobs["overwrite"]
    arena.reset(job)
    command = f"ulimit -v {mebibytes * 1024}; exec {sys.executable} -m surgery " + " ".join(job.argv)
    done = subprocess.run(["sh", "-c", command], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in {0, 5}, (mebibytes, done)
    assert len(said(done.stderr)) == (done.returncode == 5), (mebibytes, done)
    assert arena.judge(job) == ("old" if done.returncode else "new")
    arena.tally["errors injected"] += done.returncode != 0
    return done.returncode


@pytest.mark.parametrize("size", [300, 450, 500, 560, 1000, 3000, 5000])
def test_a_file_that_may_not_grow_so_large_is_an_error(arena: Arena, size: int) -> None:
    for name in COMMANDS:
        job = arena.jobs[name]
        arena.reset(job)
        done = arena.zygote.run(job.argv, Hurt(limits=(("RLIMIT_FSIZE", size),)))
        if done.code == 0:
            assert size >= max(map(len, job.new.values()))
            continue
        assert "File too large" in told(done)
        arena.tally["errors injected"] += 1
        assert arena.judge(job) == ("old" if job.old else "absent")
        arena.rerun(job)


@private_mounts
@pytest.mark.parametrize(
    ("room", "lack"),
    [
        ("nr_inodes=6", "No space left on device"),
        pytest.param("size=1m", "25,166,034 bytes are needed", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_an_error_and_with_room_a_rerun_ends_the_work(
    tmp_path: Path, arena: Arena, large: Job, room: str, lack: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    code, listed, hashed = tmp_path / "code", tmp_path / "listed", tmp_path / "hashed"
    merge = " ".join([sys.executable, "-m", "surgery", "merge", *(f"'{one}'" for one in large.argv[1:3])])
    script = f"""
        mount -t tmpfs -o {room} none {disk}
        {merge} {disk}/out; echo $? > {code}; test ! -e {disk}/out || exit 99
        mount -o remount,size=64m,nr_inodes=1k {disk}
        {merge} {disk}/out && ls -A {disk} > {listed}; cd {disk}/out && sha256sum * > {hashed}
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], check=False, capture_output=True, text=True, cwd=ROOT)
    assert code.read_text() == "5\n", done
    (line,) = said(done.stderr)
    assert line.startswith("surgery: ")
    assert lack in line
    assert listed.read_text() == "out\n"
    wanted = {name: hashlib.sha256(data).hexdigest() for name, data in large.new.items()}
    assert {line.split()[1]: line.split()[0] for line in hashed.read_text().splitlines()} == wanted
    arena.tally["errors injected"] += 1


@private_mounts
def test_a_read_only_disk_is_an_error_before_any_work(arena: Arena) -> None:
    job = arena.jobs["overwrite"]
    arena.reset(job)
    script = f"""
        mount --bind {arena.floor} {arena.floor} && mount -o remount,ro,bind {arena.floor} || exit 99
        exec {sys.executable} -m surgery {" ".join(job.argv)}
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 5, done
    (line,) = said(done.stderr)
    assert "Read-only file system" in line
    assert arena.judge(job) == "old"
    assert arena.strays() == set()
    arena.tally["errors injected"] += 1


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written_is_an_error(arena: Arena) -> None:
    job = arena.jobs["fresh"]
    arena.reset(job)
    arena.floor.chmod(0o555)
    try:
        assert "Permission denied" in told(arena.zygote.run(job.argv))
    finally:
        arena.floor.chmod(0o755)
    assert arena.strays() == set()
    arena.tally["errors injected"] += 1


def test_a_folder_where_nothing_can_be_made_is_an_error(arena: Arena) -> None:
    told(arena.zygote.run([*arena.jobs["fresh"].argv[:-1], "/proc/self/out"]))
    arena.tally["errors injected"] += 1
