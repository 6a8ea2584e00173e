"""Messages from one rank to the next, each way in a thread of its own, so that ranks compute while they send.

A hop has a process group of its own: with NCCL all its operations go one way and in one order, so that two ranks, which
are each other's next, cannot wait for each other. With gloo and a model on a GPU, messages go through pinned memory.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from vdit_fast.parallel.watch import Watch

__all__ = ["Counts", "Incoming", "Outgoing"]

UNDER_WAY = 2
"""Most messages that were handed over and have not left, or have come and were not taken."""


class Counts:
    """Messages and their bytes."""

    def __init__(self) -> None:
        self.messages = self.bytes = 0

    def add(self, buffer: Tensor) -> None:
        self.messages += 1
        self.bytes += buffer.numel() * buffer.element_size()


class _Device:
    """Moves buffers between the model's device and the one that the backend sends from."""

    def __init__(self, device: torch.device, through_host: bool) -> None:
        self.through_host = through_host and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: Tensor | None = None

    def pinned(self, like: Tensor) -> Tensor:
        """Host memory for a message; one at a time is used."""
        old = self._pinned
        if old is None or old.numel() != like.numel() or old.dtype != like.dtype:
            self._pinned = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        assert self._pinned is not None
        return self._pinned


class Outgoing:
    """Sends buffers to one rank, in order."""

    def __init__(self, group: dist.ProcessGroup, peer: int, watch: Watch, device: torch.device, host: bool) -> None:
        self.counts = Counts()
        self._group, self._peer, self._watch = group, peer, watch
        self._device = _Device(device, host)
        self._waiting: queue.Queue[tuple[Tensor, torch.cuda.Event | None] | None] = queue.Queue()
        self._places = threading.Semaphore(UNDER_WAY)
        self._thread = threading.Thread(target=self._work, name=f"vdit_fast to {peer}", daemon=True)
        self._thread.start()

    def room(self) -> None:
        """Wait until a message may be handed over."""
        self._watch.wait(
            lambda seconds: self._places.acquire(timeout=seconds) or None, self._peer, f"rank {self._peer} to receive"
        )

    def put(self, buffer: Tensor, counted: bool = True) -> None:
        """Hand a message over, after ``room``."""
        if counted:
            self.counts.add(buffer)
        event = None
        if self._device.stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device.stream.device))  # not that of the current device
        self._waiting.put((buffer, event))

    def finish(self) -> None:
        """Wait until everything has left."""
        for _ in range(UNDER_WAY):
            self.room()
        self._waiting.put(None)

    def _work(self) -> None:
        try:
            while (entry := self._waiting.get()) is not None:
                self._send(*entry)
                self._places.release()
        except BaseException as error:
            self._watch.broken(self._peer, error)

    def _send(self, buffer: Tensor, event: torch.cuda.Event | None) -> None:
        stream = self._device.stream
        if stream is None or event is None:
            dist.send(buffer, group=self._group, group_dst=self._peer)
            return
        with torch.cuda.stream(stream):
            stream.wait_event(event)
            if self._device.through_host:
                host = self._device.pinned(buffer)
                host.copy_(buffer, non_blocking=True)
                stream.synchronize()
                dist.send(host, group=self._group, group_dst=self._peer)
            else:
                dist.send(buffer, group=self._group, group_dst=self._peer)
                stream.synchronize()


class Incoming:
    """Receives buffers from one rank, in order.

    Args:
        empty: makes the buffer that message number k comes in; None: there is no such message.
        ended: whether a message that has come says that there are no more.
        bounded: wait while too many messages were not taken. Not where results come back to the first rank, which
            sends before it takes: all ranks would wait in a circle.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        peer: int,
        watch: Watch,
        device: torch.device,
        host: bool,
        empty: Callable[[int], Tensor | None],
        ended: Callable[[int], bool],
        bounded: bool,
    ) -> None:
        self.counts = Counts()
        self._group, self._peer, self._watch = group, peer, watch
        self._device = _Device(device, host)
        self._empty, self._ended = empty, ended
        self._come: queue.Queue[Tensor | None] = queue.Queue()
        self._places = threading.Semaphore(UNDER_WAY) if bounded else None
        self._thread = threading.Thread(target=self._work, name=f"vdit_fast from {peer}", daemon=True)
        self._thread.start()

    def there(self) -> bool:
        """Whether ``get`` would not wait."""
        return not self._come.empty()

    def get(self) -> Tensor | None:
        """The next message, None after the last."""
        got = self._watch.wait(self._next, self._peer, f"a message of rank {self._peer}")
        if self._places is not None:
            self._places.release()
        if got[0] is not None and got[0].is_cuda:
            got[0].record_stream(torch.cuda.current_stream(got[0].device))  # its memory is the receiving stream's
        return got[0]

    def _next(self, seconds: float) -> tuple[Tensor | None] | None:
        try:
            return (self._come.get(timeout=seconds),)
        except queue.Empty:
            return None

    def _work(self) -> None:
        try:
            index = 0
            while True:
                if self._places is not None:
                    self._places.acquire()
                buffer = self._receive(index)
                if buffer is None:
                    break
                if self._ended(index):
                    break
                self.counts.add(buffer)
                self._come.put(buffer)
                index += 1
            self._come.put(None)
        except BaseException as error:
            self._watch.broken(self._peer, error)

    def _receive(self, index: int) -> Tensor | None:
        stream = self._device.stream
        if stream is None:
            buffer = self._empty(index)
            if buffer is not None:
                dist.recv(buffer, group=self._group, group_src=self._peer)
            return buffer
        with torch.cuda.stream(stream):
            buffer = self._empty(index)
            if buffer is None:
                return None
            if self._device.through_host:
                host = self._device.pinned(buffer)
                dist.recv(host, group=self._group, group_src=self._peer)
                buffer.copy_(host, non_blocking=True)
            else:
                dist.recv(buffer, group=self._group, group_src=self._peer)
            stream.synchronize()
        return buffer
