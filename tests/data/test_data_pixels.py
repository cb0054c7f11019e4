"""The cache of decoded images: once in memory and once decoded, however many processes share it; gone with the last of them."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from horoyolo.data.pixels import MEMORY, NoRoom, PixelCache, Room, disk_room, memory_room, open_cache
from horoyolo.data.synthetic import write_synthetic

SHAPES = np.array([(40, 60), (64, 32), (1, 1)] * 4)
PLENTY = 2**40


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Stand-ins for image files: the cache looks at their names, sizes and times alone."""
    paths = [tmp_path / f"{i}.jpg" for i in range(len(SHAPES))]
    for path in paths:
        path.write_text(str(path))
    return paths


@pytest.fixture(params=["memory", "disk"])
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Room:
    return Room(MEMORY if request.param == "memory" else tmp_path / "cache", PLENTY, PLENTY)


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (*SHAPES[index], 3), dtype=np.uint8)


def counted(calls: list[int], index: int) -> Callable[[], np.ndarray]:
    return lambda: (calls.append(index), picture(index))[1]


def test_images_come_back_as_they_were_and_are_made_once(files: list[Path], room: Room) -> None:
    calls: list[int] = []
    first, second = (open_cache(room, files, SHAPES, "test") for _ in range(2))
    for cache in (first, second, PixelCache(first.file, SHAPES), first):
        for index in range(len(SHAPES)):
            image = cache.get(index, counted(calls, index))
            assert np.array_equal(image, picture(index))
            assert image is not None
            assert not image.flags.writeable
    assert calls == list(range(len(SHAPES)))


def test_who_comes_while_a_file_is_made_goes_on_when_it_is(files: list[Path], room: Room) -> None:
    """Of two that find it empty one makes it, and holds it from then on: the other may not wait for that to end."""
    cache = open_cache(room, files, SHAPES, "test")
    file, num_bytes = cache.file, cache.num_bytes
    del cache
    gc.collect()
    file.unlink(missing_ok=True)
    maker = os.open(file, os.O_RDWR | os.O_CREAT)
    fcntl.flock(maker, fcntl.LOCK_SH)
    opened: list[PixelCache] = []
    other = threading.Thread(target=lambda: opened.append(open_cache(room, files, SHAPES, "test")), daemon=True)
    other.start()
    time.sleep(0.1)
    assert not opened
    os.ftruncate(maker, num_bytes)
    other.join(10)
    assert opened
    assert os.path.samestat(os.fstat(maker), opened[0].file.stat())
    os.close(maker)


def test_what_cannot_be_made_is_not_kept(files: list[Path], room: Room) -> None:
    cache = open_cache(room, files, SHAPES, "test")
    assert cache.get(0, lambda: None) is None
    assert np.array_equal(cache.get(0, lambda: picture(0)), picture(0))


def test_a_damaged_image_is_made_again(files: list[Path], tmp_path: Path) -> None:
    room = Room(tmp_path / "cache", PLENTY, PLENTY)
    file = open_cache(room, files, SHAPES, "test").file
    PixelCache(file, SHAPES).get(1, lambda: picture(1))
    content = file.read_bytes()
    at = content.index(picture(1).tobytes())
    file.write_bytes(content[: at + 7] + bytes([content[at + 7] ^ 1]) + content[at + 8 :])
    calls: list[int] = []
    assert np.array_equal(open_cache(room, files, SHAPES, "test").get(1, counted(calls, 1)), picture(1))
    assert calls == [1]


def test_changed_files_other_sizes_and_other_purposes_have_caches_of_their_own(files: list[Path], tmp_path: Path) -> None:
    room = Room(tmp_path / "cache", PLENTY, PLENTY)
    names = [open_cache(room, files, SHAPES, "train").file, open_cache(room, files, SHAPES, "evaluate").file]
    names.append(open_cache(room, files, SHAPES + 1, "train").file)
    files[3].write_text("another picture")
    names.append(open_cache(room, files, SHAPES, "train").file)
    assert len(set(names)) == 4


def test_memory_is_given_back_by_the_last_to_leave_and_a_disk_cache_stays(files: list[Path], tmp_path: Path) -> None:
    first, second = (open_cache(Room(MEMORY, PLENTY, PLENTY), files, SHAPES, "test") for _ in range(2))
    kept = open_cache(Room(tmp_path / "cache", PLENTY, PLENTY), files, SHAPES, "test").file
    file = first.file
    first.abandon()  # in use: nothing happens
    del first
    gc.collect()
    assert file.exists()
    del second
    gc.collect()
    assert not file.exists()
    assert kept.exists()


def test_what_a_killed_process_left_in_memory_goes_when_the_next_one_starts(files: list[Path]) -> None:
    program = f"""
import os, signal, sys
from pathlib import Path
import numpy as np
from horoyolo.data.pixels import MEMORY, Room, open_cache
cache = open_cache(Room(MEMORY, {PLENTY}, {PLENTY}), [Path({str(files[0])!r})], np.array([(8, 8)]), "killed")
print(cache.file, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=False)
    left = Path(killed.stdout.strip())
    assert left.exists()
    cache = open_cache(Room(MEMORY, PLENTY, PLENTY), files, SHAPES, "test")
    assert not left.exists()
    assert cache.file.exists()


TRAINING = """
import os, signal, sys
from horoyolo.config import Config, override
from horoyolo.data.build import build_sampler, build_train_data
from horoyolo.data.loader import build_train_loader
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec

class Alone:
    rank = lambda self: 0
    size = lambda self: 1

if __name__ == "__main__":
    config = override(Config(img=64, batch=2), {"input.cache": "ram"}, "")
    split = scan_split(load_data_spec(sys.argv[1]), "train")
    dataset = build_train_data(config, split)
    batches = iter(build_train_loader(dataset, build_sampler(config, split, 32), Alone(), 1))
    next(batches)
    print(dataset.cache.file, dataset.cache.file.exists(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_loaders_of_a_killed_training_process_give_its_memory_back(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "set", 6)
    (tmp_path / "program.py").write_text(TRAINING)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "set" / "data.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as program:
        assert program.stdout is not None
        file, existed = program.stdout.readline().split()
    assert existed == "True"
    deadline = time.monotonic() + 20
    while Path(file).exists():
        assert time.monotonic() < deadline, "20 s after it was killed its memory is still taken"
        time.sleep(0.1)


def test_a_cache_that_would_not_fit_is_refused_before_anything_is_made(files: list[Path], tmp_path: Path) -> None:
    needed = PixelCache(tmp_path / "any", SHAPES).num_bytes
    for folder in (MEMORY, tmp_path / "cache"):
        with pytest.raises(NoRoom, match="are needed"):
            open_cache(Room(folder, needed + 50, 1000), files, SHAPES, "too large")  # a tenth of 1000 stays free
        roomy = open_cache(Room(folder, needed + 100, 1000), files, SHAPES, "too large")  # to learn its name
        made = roomy.file
        del roomy
        gc.collect()
        made.unlink(missing_ok=True)
        with pytest.raises(NoRoom):
            open_cache(Room(folder, needed + 50, 1000), files, SHAPES, "too large")
        assert not made.exists()
    with pytest.raises(NoRoom, match="pixels: "):  # more than there is, whatever the figures said
        open_cache(Room(tmp_path / "cache", 2**62, 1), files[:1], np.array([(2**24, 2**24)]), "test")
    assert not list((tmp_path / "cache").iterdir())


def test_rooms_are_of_this_machine(tmp_path: Path) -> None:
    memory = memory_room()
    assert 0 < memory.free <= memory.total
    (tmp_path / "none.txt").write_text("")
    disk = disk_room([tmp_path / "none.txt" / "below a file", tmp_path / "cache"])
    assert disk.folder == tmp_path / "cache"
    with pytest.raises(NoRoom, match="can be written to"):
        disk_room([tmp_path / "none.txt" / "below a file"])


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


SHARER = """
import sys
from pathlib import Path
import numpy as np
from horoyolo.data.pixels import MEMORY, Room, open_cache

shapes = np.array([(400, 500)] * 40)
cache = open_cache(Room(MEMORY, 2**40, 2**40), [Path("a")] * 40, shapes, sys.argv[1])
made = 0
def make():
    global made
    made += 1
    return np.full((400, 500, 3), 7, np.uint8)
total = sum(int(cache.get(i, make).sum()) for i in range(40))
print(made, total, cache.num_bytes, cache.file, flush=True)
sys.stdin.readline()
pss = use = 0
for line in open("/proc/self/smaps"):
    if line.rstrip().endswith(".pixels"):
        use = 1
    elif use and line.startswith("Pss:"):
        pss += int(line.split()[1]) * 1024
        use = 0
print(pss, flush=True)
sys.stdin.readline()
"""


def shared_by(num_processes: int, name: str) -> tuple[int, int, int]:
    """Proportional memory of the mapping summed over processes that all read all images, images made by them, bytes of the cache."""
    programs = [
        subprocess.Popen([sys.executable, "-c", SHARER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
        for _ in range(num_processes)
    ]
    answers = [ask(program).split() for program in programs]
    assert {answer[1] for answer in answers} == {str(40 * 400 * 500 * 3 * 7)}
    pss = sum(int(ask(program, "\n")) for program in programs)
    for program in programs:
        program.communicate("\n")
    assert not Path(answers[0][3]).exists()
    return pss, sum(int(answer[0]) for answer in answers), int(answers[0][2])


def ask(program: subprocess.Popen[str], question: str = "") -> str:
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write(question)
    program.stdin.flush()
    return program.stdout.readline()


def test_four_workers_take_the_memory_of_one_and_make_each_image_once(tmp_path: Path) -> None:
    alone, _, num_bytes = shared_by(1, f"{tmp_path} alone")
    together, made, _ = shared_by(4, f"{tmp_path} together")
    assert made == 40
    assert 0.99 * num_bytes <= alone <= 1.01 * num_bytes
    assert together <= 1.05 * alone
