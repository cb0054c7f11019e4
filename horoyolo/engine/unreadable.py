"""Images that can't be used: how many a run puts up with, and how all workers come to know of those that vanish while it lasts."""

from __future__ import annotations

import logging
import re
from typing import Any

from horoyolo.config import InputError
from horoyolo.data.scan import ScanReport, shorten
from horoyolo.distributed.comm import Comm

log = logging.getLogger("horoyolo")


class Unreadable:
    """Training images that could not be read any more, the same set on all workers. Each is shown as grey, without boxes, whoever meets it."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def has_news(self, failed: list[str]) -> bool:
        """Whether this worker met one that is not known yet."""
        return not self.files.issuperset(failed)

    def agree(self, failed: list[str], comm: Comm) -> None:
        """Tells all workers of what this one met; every worker calls it when any has news."""
        news = {file for files in comm.allgather_object(sorted(set(failed) - self.files)) for file in files} - self.files
        self.files |= news
        if comm.rank() == 0:
            log.warning("%d images can't be read any more and are shown as grey, without boxes: %s", len(news), shorten(sorted(news)))

    def state_dict(self) -> dict[str, Any]:
        """The files, sorted."""
        return {"files": sorted(self.files)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        self.files = set(state["files"])


def check_share(report: ScanReport, most: float) -> None:
    """Raises InputError where more than a share of ``most`` of a split's images are unreadable or have labels that are."""
    of_labels = {re.sub(r"(:\d+)? \([^()]*\)$", "", found) for found in (*report.corrupt, *report.out_of_range)}  # without line and reason
    bad = [*report.corrupt_images, *sorted(of_labels)]
    num_images = report.images + len(report.corrupt_images)
    if len(bad) > most * num_images:
        raise InputError(
            f"{report.split}: {len(bad)} of {num_images} images or their labels are corrupt ({shorten(bad)}); "
            f"max_bad_share = {most:g} is the largest share that is trained on; horoyolo data check lists them all"
        )
