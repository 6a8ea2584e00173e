"""Which pages of a ring hold which frames: integers on the host, no tensor."""

from __future__ import annotations

__all__ = ["POSITIONS", "Ring"]

POSITIONS = ("absolute", "relative", "cyclic")


class Ring:
    """Frames in the slots of a ring; the first ``sinks`` frames are never evicted.

    Slots fill in order, and a reservation evicts no more than it needs, so the slots in use are always 0 .. held - 1
    and a full ring has no gap.

    Attributes:
        frames: absolute frame numbers held, ascending; the sinks, then the youngest ones.
        slots: the slot of each of them.
        chunk: how many of them, at the end, are the current chunk.
        end: number of the frame that comes next; it never goes back but by ``reset``.
    """

    def __init__(self, capacity: int, sinks: int) -> None:
        self.capacity, self.sinks = capacity, sinks
        self.reset()

    def reset(self) -> None:
        """Forget all frames; numbers begin at 0 again."""
        self.frames: tuple[int, ...] = ()
        self.slots: tuple[int, ...] = ()
        self.chunk = 0
        self.end = 0

    @property
    def first(self) -> int:
        """The oldest frame held that may be evicted; ``end`` where there is none."""
        return next((frame for frame in self.frames if frame >= self.sinks), self.end)

    def after(self, pages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(frames, slots) once ``pages`` more frames are held; nothing changes.

        Raises:
            ValueError: they cannot be held together with the sinks.
        """
        held = len(self.frames)
        kept = sum(frame < self.sinks for frame in self.frames)
        if pages > self.capacity - kept:
            raise ValueError(
                f"{pages} frames do not fit: the capacity is {self.capacity} frames and {kept} of them are sinks, "
                f"which stay; reserve at most {self.capacity - kept}, or make the capacity larger"
            )
        leave = max(0, held + pages - self.capacity)
        freed = self.slots[kept : kept + leave]
        new = (*range(held, min(held + pages, self.capacity)), *freed)
        frames = self.frames[:kept] + self.frames[kept + leave :] + tuple(range(self.end, self.end + pages))
        return frames, self.slots[:kept] + self.slots[kept + leave :] + new

    def advance(self, pages: int) -> None:
        """Hold ``pages`` more frames as the current chunk."""
        self.frames, self.slots = self.after(pages)
        self.chunk = pages
        self.end += pages


def numbered(frames: tuple[int, ...], positions: str, table: int | None) -> tuple[int, ...]:
    """The position of each of the frames on the time axis of a model's table."""
    if positions == "relative":
        return tuple(range(len(frames)))
    if positions == "cyclic":
        assert table is not None
        return tuple(frame % table for frame in frames)
    return frames


def neighbours(slots: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Slots in a row that follow each other as (index of the first, its slot, how many)."""
    groups: list[tuple[int, int, int]] = []
    for index, slot in enumerate(slots):
        if groups and groups[-1][1] + groups[-1][2] == slot:
            first, start, count = groups[-1]
            groups[-1] = first, start, count + 1
        else:
            groups.append((index, slot, 1))
    return groups


def merged(slots: list[int]) -> list[tuple[int, int]]:
    """Slots in any order as ascending (slot, count), neighbours joined."""
    return [(start, count) for _, start, count in neighbours(tuple(sorted(slots)))]
