"""The ledger of a run, a line an update, and the proof that each position of each epoch was used exactly once.

Lines are only ever added. An update that was done again, because its worker died with it or a run went on from an earlier checkpoint, has a later
line that takes back its first one and all that came after it: what stands at the end is what the weights have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from horoyolo.config import InputError

FILE = "ledger.csv"
SPANS_SHOWN = 5


@dataclass(frozen=True)
class Update:
    """A line of the ledger: an update and the part of its epoch's order that it used, positions ``first`` up to and without ``stop``."""

    since: int  # global batches before the update's first
    step: int  # global batches up to its last
    update: int  # updates done by then
    epoch: int
    first: int
    stop: int
    of: int  # positions of the epoch
    workers: int
    skipped: int  # 1: left out by all workers, since its gradient was not finite

    def line(self) -> str:
        """The line of the file, with its end."""
        return ",".join(map(str, astuple(self))) + "\n"


COLUMNS = [field.name for field in fields(Update)]
HEADER = ",".join(COLUMNS) + "\n"


@dataclass(frozen=True)
class Span:
    """Positions of one epoch, ``first`` up to and without ``stop``."""

    epoch: int
    first: int
    stop: int

    def __str__(self) -> str:
        return f"epoch {self.epoch}: {self.first} to {self.stop - 1}"


@dataclass(frozen=True)
class Account:
    """What a ledger says."""

    updates: int
    images: int
    finished_epochs: int
    unfinished_epoch: tuple[int, int, int] | None  # epoch, positions used, positions it has
    missing: list[Span]  # positions that no update used
    double: list[Span]  # positions that more than one did
    redone_updates: int  # lines taken back
    redone_images: int
    skipped_updates: int  # left out by all workers
    skipped_images: int
    fewest_workers: int
    most_workers: int
    unreadable_lines: int

    @property
    def exact(self) -> bool:
        """Whether each position of finished epochs, and of the last one as far as it went, was used exactly once."""
        return not self.missing and not self.double

    def lines(self) -> list[str]:
        """The account in words."""
        workers = str(self.most_workers) if self.fewest_workers == self.most_workers else f"{self.fewest_workers} to {self.most_workers}"
        lines = [f"{self.updates} updates, {self.images} images, {workers} workers; {self.finished_epochs} epochs finished"]
        if self.unfinished_epoch:
            epoch, used, of = self.unfinished_epoch
            lines.append(f"epoch {epoch} is not finished: {used} of {of} positions so far")
        for count, images, what in (
            (self.redone_updates, self.redone_images, "taken back and done again"),
            (self.skipped_updates, self.skipped_images, "left out by all workers: the gradient was not finite"),
        ):
            if count:
                lines.append(f"{count} updates ({images} images) {what}")
        if self.unreadable_lines:
            lines.append(f"{self.unreadable_lines} lines can't be read")
        for spans, what in ((self.missing, "used by no update"), (self.double, "used more than once")):
            if spans:
                named = "; ".join(map(str, spans[:SPANS_SHOWN])) + (f"; and {len(spans) - SPANS_SHOWN} more" if len(spans) > SPANS_SHOWN else "")
                lines.append(f"{sum(span.stop - span.first for span in spans)} positions {what}: {named}")
        lines.append("each position was used exactly once" if self.exact else "NOT exact")
        return lines

    def as_json(self) -> dict[str, Any]:
        """The account as plain values, with the verdict."""
        return asdict(self) | {"exact": self.exact}


def parse_line(line: str) -> Update | None:
    """The update of a line; None for one that was torn."""
    values = line.removesuffix("\n").split(",")
    if len(values) != len(COLUMNS) or not all(value.isdecimal() for value in values):
        return None
    return Update(*map(int, values))


def read_account(path: Path) -> Account:
    """What the ledger at ``path`` says (InputError: not there, not a ledger, empty)."""
    try:
        header, *lines = path.read_text(errors="replace").splitlines() or [""]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a run folder with a {FILE} is wanted") from None
    if header + "\n" != HEADER:
        raise InputError(f"{path}: not a ledger: its first line is not {HEADER.strip()!r}")
    updates = [parse_line(line) for line in lines if line]
    known = [update for update in updates if update is not None]
    if not known:
        raise InputError(f"{path}: no update in it yet")
    return account(known, unreadable_lines=len(updates) - len(known))


def standing(updates: Iterable[Update]) -> list[Update]:
    """The updates that were not taken back by a later one."""
    kept: list[Update] = []
    for update in updates:
        while kept and kept[-1].step > update.since:
            kept.pop()
        kept.append(update)
    return kept


def account(updates: list[Update], unreadable_lines: int = 0) -> Account:
    """What ``updates``, at least one, in the order of the file, say together."""
    kept = standing(updates)
    skipped = [update for update in kept if update.skipped]
    by_epoch = {epoch: list(found) for epoch, found in groupby(sorted(kept, key=lambda update: (update.epoch, update.first)), lambda u: u.epoch)}
    last = max(by_epoch)
    missing: list[Span] = []
    double: list[Span] = []
    finished, unfinished = 0, None
    for epoch in range(last + 1):
        found = by_epoch.get(epoch, [])
        num_positions = max((update.of for update in found), default=kept[-1].of)
        used, gaps, overlaps = _covered(epoch, found)
        if epoch == last and used < num_positions:
            unfinished = (epoch, used, num_positions)
        else:
            finished += 1
            gaps += [Span(epoch, used, num_positions)] if used < num_positions else []
        missing += gaps
        double += overlaps
    images = _images(kept)
    return Account(
        updates=len(kept),
        images=images,
        finished_epochs=finished,
        unfinished_epoch=unfinished,
        missing=missing,
        double=double,
        redone_updates=len(updates) - len(kept),
        redone_images=_images(updates) - images,
        skipped_updates=len(skipped),
        skipped_images=_images(skipped),
        fewest_workers=min(update.workers for update in kept),
        most_workers=max(update.workers for update in kept),
        unreadable_lines=unreadable_lines,
    )


def _covered(epoch: int, updates: list[Update]) -> tuple[int, list[Span], list[Span]]:
    """How far ``updates`` of an epoch, sorted by ``first``, reach, what they leave out before, and what they have twice."""
    reach = 0
    gaps: list[Span] = []
    overlaps: list[Span] = []
    for update in updates:
        if update.first > reach:
            gaps.append(Span(epoch, reach, update.first))
        elif update.first < min(reach, update.stop):
            overlaps.append(Span(epoch, update.first, min(reach, update.stop)))
        reach = max(reach, update.stop)
    return reach, gaps, overlaps


def _images(updates: Iterable[Update]) -> int:
    return sum(update.stop - update.first for update in updates)


def lines_from(text: str) -> Iterator[Update]:
    """The whole updates in a part of a ledger."""
    yield from (update for line in text.splitlines() if (update := parse_line(line)) is not None)
