"""The factor that keeps small gradients within the range of fp16."""

from __future__ import annotations

from typing import Any

GROW_AFTER = 2000  # updates
LARGEST = 2.0**24


class LossScale:
    """A power of two by which the loss is multiplied: halved when a gradient overflows, doubled after many updates without (Micikevicius et al.
    2018, "Mixed Precision Training", section 3.2).

    torch's GradScaler divides gradients after they were summed; here they are divided before, since residuals of a compressed exchange outlive
    the scale that their gradients were computed with.
    """

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self.value = 2.0**16 if enabled else 1.0
        self._good_updates = 0

    @property
    def settling(self) -> bool:
        """Whether an overflow may be the scale's fault: then it is halved, and no harm is done."""
        return self._enabled and self.value > 1

    def update(self, finite: bool) -> None:
        """Takes note of an update's gradient, the same on all workers."""
        if not self._enabled:
            return
        self._good_updates = self._good_updates + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self._good_updates == GROW_AFTER:
            self.value, self._good_updates = min(LARGEST, self.value * 2), 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_updates": self._good_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._enabled:
            self.value, self._good_updates = state["value"], state["good_updates"]
