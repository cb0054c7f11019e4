"""Decoded images in a file that all processes of a host map: each image is decoded once, by whoever needs it first, and kept once.

In memory (/dev/shm) the file lives as long as any training process holds it; on a disk it stays and serves the next run.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import socket
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from horoyolo.data.decode import Image
from horoyolo.data.host_memory import memory_bytes

FORMAT = "horoyolo pixels 1"  # change it with how images are decoded or stored
MEMORY = Path("/dev/shm")
FREE_SHARE = 0.1  # of a host's memory or disk that a cache leaves free
ABANDON_TRIES = 10  # a tenth of a second apart
RETRY_S = 0.01  # between looks at a file that another process is about to make
GIGABYTE = 1e9


class NoRoom(Exception):
    """A cache would not fit, or can't be made; the message says why."""


@dataclass(frozen=True)
class Room:
    """A place for caches and the bytes that may be used there."""

    folder: Path
    free: int
    total: int

    def check(self, needed: int) -> None:
        """Raises NoRoom when so many bytes would leave less than a tenth free."""
        usable = self.free - int(FREE_SHARE * self.total)
        if needed > usable:
            raise NoRoom(f"{needed / GIGABYTE:.2f} GB are needed, {max(usable, 0) / GIGABYTE:.2f} GB of {self.folder} may be used")


class PixelCache:
    """Images of known sizes by their number. Opened by a training process (`open_cache`), and by name in its loader processes.

    A checksum tells each image that was written whole; what is torn or damaged is made again.
    """

    def __init__(self, file: Path, shapes_hw: np.ndarray) -> None:
        self.file = file
        self.shapes_hw = shapes_hw
        sizes = shapes_hw.astype(np.int64).prod(axis=1) * 3
        first = -(-4 * len(sizes) // mmap.PAGESIZE) * mmap.PAGESIZE  # behind the checksums
        self._offsets = first + np.concatenate([[0], np.cumsum(sizes)])
        self._descriptor: int | None = None
        self._met: np.ndarray | None = None  # (n,) bool: this process has checked the image

    def __reduce__(self) -> tuple[type, tuple[Path, np.ndarray]]:
        return type(self), (self.file, self.shapes_hw)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return int(self._offsets[-1])

    def get(self, index: int, make: Callable[[], Image | None]) -> Image | None:
        """An image (H, W, 3), read-only; made and kept where it is met for the first time on this host. None where ``make`` gives none."""
        if self._met is None and not self._map():
            return make()
        assert self._met is not None
        height, width = (int(side) for side in self.shapes_hw[index])
        view = self._bytes[self._offsets[index] : self._offsets[index + 1]].reshape(height, width, 3)
        if not self._met[index]:
            with self._locked(index):
                if not self._checksums[index] or self._checksums[index] != _checksum(view):
                    image = make()
                    if image is None:
                        return None
                    view[:] = image
                    self._checksums[index] = _checksum(view)
            self._met[index] = True
        view.flags.writeable = False
        return view

    def abandon(self) -> None:
        """Removes the file if no training process holds it any more: for loader processes whose parent was killed.

        The kernel closes the files of a killed process one by one: the news of its end may come before its hold is gone.
        """
        for _ in range(ABANDON_TRIES):
            if self.file.parent != MEMORY or not self.file.exists():
                return
            _remove_unused(self.file)
            time.sleep(0.1)

    def _map(self) -> bool:
        try:
            self._descriptor = os.open(self.file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            whole = mmap.mmap(self._descriptor, self.num_bytes)
        except (OSError, ValueError):  # gone: then images are decoded as they come
            return False
        self._bytes = np.frombuffer(whole, np.uint8)
        self._checksums = np.frombuffer(whole, np.uint32, len(self.shapes_hw))
        self._met = np.zeros(len(self.shapes_hw), bool)
        return True

    @contextlib.contextmanager
    def _locked(self, index: int) -> Iterator[None]:
        """One process at a time makes an image; the kernel frees the lock of one that dies. Entering also orders memory between processes."""
        assert self._descriptor is not None
        with contextlib.suppress(OSError):  # a file system without locks: then two may make the same image
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, index)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, index)


def open_cache(room: Room, files: Sequence[Path], shapes_hw: np.ndarray, purpose: str) -> PixelCache:
    """The cache of these files at these sizes (n, 2) for one purpose, new or as another process of this host made it. Raises NoRoom."""
    in_memory = room.folder == MEMORY
    name = f"horoyolo-{os.getuid()}-{_key(files, shapes_hw, purpose)}.pixels"
    # On a shared disk each host has a file of its own: what one host maps, another does not see change.
    cache = PixelCache(room.folder / (name if in_memory else f"{socket.gethostname()}-{name}"), shapes_hw)
    if in_memory:
        for file in MEMORY.glob(f"horoyolo-{os.getuid()}-*.pixels"):
            if file != cache.file:
                _remove_unused(file)
    try:
        room.folder.mkdir(parents=True, exist_ok=True)
        while not _held(cache, room):
            pass  # the last one to use it removed it just now
    except OSError as error:
        raise NoRoom(f"{cache.file}: {error.strerror}") from None
    return cache


def memory_room() -> Room:
    """What this host's memory, and the limit of its control group, leave for caches. Raises NoRoom where there is no /dev/shm."""
    try:
        free, total = memory_bytes()
        shm = os.statvfs(MEMORY)
    except OSError as error:
        raise NoRoom(f"{error.filename}: {error.strerror}") from None
    return Room(MEMORY, min(free, shm.f_bavail * shm.f_frsize), total)


def disk_room(folders: Sequence[Path]) -> Room:
    """What the first of these folders that can be written to has free. Raises NoRoom when none can."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                disk = os.statvfs(folder)
                return Room(folder, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)
    raise NoRoom(f"none of {', '.join(map(str, folders))} can be written to")


def _held(cache: PixelCache, room: Room) -> bool:
    """Opens a cache's file, making it where it isn't whole, and holds it for this process' life; False when it was removed meanwhile."""
    descriptor = os.open(cache.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise NoRoom(f"{cache.file} belongs to somebody else")
        while not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            # Who waited for an exclusive lock could wait for ever: whoever made the file holds it from then on.
            _flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_size == cache.num_bytes:
                break
            _flock(descriptor, fcntl.LOCK_UN)
            time.sleep(RETRY_S)
        if os.fstat(descriptor).st_size != cache.num_bytes:
            try:
                room.check(cache.num_bytes)
                os.ftruncate(descriptor, 0)
                os.posix_fallocate(descriptor, 0, cache.num_bytes)  # now, with an error, not at some later write, with a signal
            except BaseException:
                cache.file.unlink(missing_ok=True)
                raise
        _flock(descriptor, fcntl.LOCK_SH)
        if not cache.file.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(cache.file)):
            os.close(descriptor)
            return False
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    weakref.finalize(cache, _let_go, descriptor, cache.file)
    return True


def _let_go(descriptor: int, file: Path) -> None:
    """The end of a process' hold on a cache's file; the last one removes it from memory."""
    os.close(descriptor)
    if file.parent == MEMORY:
        _remove_unused(file)


def _remove_unused(file: Path) -> None:
    """Removes a file that no process holds."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
    except OSError:
        pass  # in use
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int) -> bool:
    """Whether the lock is held; some network file systems have none, where it counts as held."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _checksum(pixels: np.ndarray) -> int:
    return zlib.crc32(pixels.data) or 1  # 0 is an image that isn't there


def _key(files: Sequence[Path], shapes_hw: np.ndarray, purpose: str) -> str:
    """A hash that changes with any file's name, size or time of change, and with the sizes asked for."""
    digest = hashlib.sha256(f"{FORMAT}\0{purpose}\0".encode())
    for file in files:
        try:
            status = os.stat(file)
            digest.update(f"{file}\0{status.st_size} {status.st_mtime_ns}\0".encode())
        except OSError:
            digest.update(f"{file}\0-\0".encode())
    digest.update(shapes_hw.astype("<i4").tobytes())
    return digest.hexdigest()[:24]
