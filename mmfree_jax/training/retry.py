"""When a save that failed is tried again."""


class Retry:
    """After one step, then after two, four, eight more, until a save succeeds: a disk may stay full for long."""

    def __init__(self) -> None:
        self.pause = 1  # steps before the next attempt
        self.failed_at: int | None = None  # the step at which the failure was seen

    def due(self, failed: bool, step: int) -> bool:
        """Return whether to save after this step, given whether the last save has failed."""
        if not failed:
            self.pause, self.failed_at = 1, None
            return False
        if self.failed_at is None:
            self.failed_at = step
        if step < self.failed_at + self.pause:
            return False
        self.failed_at, self.pause = step, 2 * self.pause
        return True
