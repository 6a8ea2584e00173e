"""A transformer split over ranks, through which the frame blocks of a long video pass (DualParal, arXiv 2505.21070)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from vdit_fast.models.blocks import transformer_blocks
from vdit_fast.parallel.at_exit import closed_at_exit
from vdit_fast.parallel.block_queue import BlockQueue, FrameBlock, Snapshot
from vdit_fast.parallel.checkpoint import Checkpoint
from vdit_fast.parallel.identity import described, digest, model_digest, weight_digests
from vdit_fast.parallel.noise import NoisePool
from vdit_fast.parallel.packing import Packing, Plain
from vdit_fast.parallel.refusals import check_call, check_frames, check_settings, remembers, staged_root
from vdit_fast.parallel.run import Run
from vdit_fast.parallel.sampler import BlockSampler
from vdit_fast.parallel.schedule import Item, Schedule, split_layers
from vdit_fast.parallel.stage import Stage
from vdit_fast.parallel.trace import Trace
from vdit_fast.parallel.transport import Alone, Ring, Transport

if TYPE_CHECKING:
    from vdit_fast.handle import Handle

__all__ = ["StagePipeline"]


class StagePipeline:
    """Splits an accelerated transformer's blocks over ranks and draws long videos with it.

    Every rank makes one of its own transformer, with the same weights (in all parameters that are not on "meta" or
    released), configuration, ``layers_per_stage`` and ``packing``, and calls ``generate``; the finished frame blocks
    come out on the first rank.

    Args:
        handle: what ``accelerate`` returned for the transformer. Its planner and cache are in force in every block.
        group: the ranks, NCCL or gloo; None: all of them, or this process alone where torch.distributed is not
            initialised.
        layers_per_stage: numbers of blocks; None: equal up to one.
        packing: how the stream between stages is sent.
        release: give up the weights that this rank does not need. The transformer works in this pipeline only then.
        patience: seconds without a sign of life after which a rank counts as dead, and all others end.
        timeout: most seconds to wait for the other ranks to come, and for one message of a living rank; the time that
            a rank is in the caller's code does not count.
        transport: something else than torch.distributed that connects the ranks.

    Raises:
        RuntimeError: the transformer cannot be split, or not with this configuration.
        ValueError: there are more ranks than blocks, or ``layers_per_stage`` does not fit.
    """

    def __init__(
        self,
        handle: Handle,
        group: dist.ProcessGroup | None = None,
        *,
        layers_per_stage: Sequence[int] | None = None,
        packing: Packing | None = None,
        release: bool = False,
        patience: float = 10.0,
        timeout: float = 600.0,
        transport: Transport | None = None,
    ) -> None:
        root, _ = staged_root(handle)
        module = root.module()
        assert module is not None
        blocks = transformer_blocks(module, root.adapter)
        if transport is None:
            ranks = dist.get_world_size(group) if dist.is_initialized() else 1
            device = next(blocks[0][1].parameters()).device
            transport = Ring(group, device, patience, timeout) if ranks > 1 else Alone()
        self.transport = transport
        try:
            self.layers = split_layers(len(blocks), transport.ranks, layers_per_stage)
            self.stage = Stage(handle, self.layers[transport.rank])
        except BaseException as error:
            transport.fail(error)
            raise
        if release:
            self.stage.release()
        self.packing: Packing = Plain() if packing is None else packing
        self.trace = Trace()
        self.queue: BlockQueue | None = None
        self._run: Run | None = None
        self._drawing = False

    @property
    def rank(self) -> int:
        """Of this process in the pipeline."""
        return self.transport.rank

    @property
    def begun(self) -> bool:
        """Whether this rank has begun a run: ``generate``'s arguments were found right by then."""
        return self._run is not None

    def close(self) -> None:
        """Take everything off the transformer; weights that were released stay so. The other ranks need not wait for
        this one any more: in a run they raise."""
        self.stage.close()
        self.transport.close()

    def __enter__(self) -> StagePipeline:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """All ranks wait for each other, and close; where one leaves by an error, the others raise RankFailed."""
        try:
            if error is not None:
                self.transport.fail(error)
            else:
                self.transport.begin()
                self.transport.finish()
        finally:
            self.close()

    # ------------------------------------------------------------------ what there is to tell
    def facts(self) -> dict[str, Any]:
        """Numbers of the last run besides its times, as ``parallel.trace`` lists them; JSON-ready."""
        run, transport = self._run, self.transport
        if run is None:
            raise RuntimeError("facts: nothing was drawn yet")
        sent, received = transport.sent, transport.received
        return {
            "rank": transport.rank,
            "ranks": transport.ranks,
            "layers": len(self.stage.layers),
            **run.sizes(self.packing),
            "sent": [sent.messages, sent.bytes],
            "received": [received.messages, received.bytes],
        }

    def expected(self) -> dict[str, list[int]]:
        """[messages, bytes] that this rank sends and receives in a whole run by the closed formula: a message per item;
        ``branches · (num_cat + num_per_block) · tokens per frame · channels · itemsize`` bytes to the next stage (up
        to the packing), and a block's own frames in fp32 back to the first rank."""
        if self._run is None:
            raise RuntimeError("expected: nothing was drawn yet")
        return self._run.expected(self.rank, self.transport.ranks, self.packing)

    # ------------------------------------------------------------------ generation
    @closed_at_exit
    def generate(
        self,
        sampler: BlockSampler,
        shape: tuple[int, int, int],
        arguments: dict[str, Any],
        *,
        blocks: int | None,
        num_per_block: int = 8,
        num_cat: int = 8,
        guidance: float = 1.0,
        seed: int = 0,
        checkpoint: Checkpoint | None = None,
        resume: bool = False,
    ) -> Generator[tuple[int, Tensor], None, None]:
        """Draw a long video; every rank calls it, and what the first rank is given counts.

        Memory does not depend on the video's length. Where the iterator is dropped early, for whatever reason, all
        ranks stop as at the video's end; ``with pipeline:`` around the loop tells them of an error in it.

        Args:
            sampler: the schedule of every block.
            shape: (channels, height, width) of a latent frame: the model's channels, and multiples of its patch.
            arguments: further arguments of the transformer's forward by name, the same in all calls. With guidance
                tensors have two rows, the conditional one first.
            blocks: number of frame blocks, None: without end.
            num_per_block: latent frames of a block.
            num_cat: latent frames that a block sees of its neighbours, at most ``num_per_block``; the first block is
                longer by them. 0: none, as a cache needs it.
            guidance: classifier-free guidance scale; 1 switches it off.
            seed: of the noise.
            checkpoint: where states and finished blocks are kept; a state in its folder must be of the same run.
            resume: go on from the checkpoint's newest state, if it has one. Blocks that it has finished come out no
                more: ``checkpoint.block`` has them.

        Yields:
            on the first rank (index, latents fp32 [1, C, F, H, W] on the model's device) of every finished block, in
            order; nothing on the others.

        Raises:
            ValueError: a bad argument, before anything is computed, or the checkpoint of another run.
            RankFailed: another rank has failed.
        """
        if self._drawing:
            raise RuntimeError("generate: this pipeline is drawing a video; finish or close that one first")
        self._drawing = True
        try:
            self.transport.begin()
            self.trace = Trace()
            yield from self._generate(
                sampler, shape, arguments, blocks, num_per_block, num_cat, guidance, seed, checkpoint, resume
            )
            self.transport.finish()
        except GeneratorExit:
            self.transport.finish()
            raise
        except BaseException as error:
            self.transport.fail(error)
            raise
        finally:
            self._drawing = False
            self.stage.rest()
            self.trace.finish()

    def _generate(
        self,
        sampler: BlockSampler,
        shape: tuple[int, int, int],
        arguments: dict[str, Any],
        blocks: int | None,
        num_per_block: int,
        num_cat: int,
        guidance: float,
        seed: int,
        checkpoint: Checkpoint | None,
        resume: bool,
    ) -> Iterator[tuple[int, Tensor]]:
        run: Run | None = None
        state: dict[str, Any] | None = None
        if self.rank == 0:
            branches = 1 if guidance == 1 else 2
            check_call(sampler, shape, arguments, branches)
            schedule = Schedule(len(sampler.timesteps), blocks, num_per_block, num_cat)
            check_frames(self.stage.module, shape, schedule)
            whole = (branches, shape[0], schedule.frames, *shape[1:])
            settings: dict[str, Any] = asdict(schedule) | {"shape": list(whole), "guidance": float(guidance)}
            options, weights = self._options(), weight_digests(self.stage.module)
            settings |= {"seed": seed, "timesteps": sampler.timesteps, "sampler": described(sampler)}
            settings |= {key: item for key, item in options.items() if key != "layers_per_stage"}
            settings |= {f"argument {name}": digest(value) for name, value in arguments.items()} | {"weights": weights}
            check_settings(self.stage.session.config, num_cat, checkpoint is not None, resume)
            if checkpoint is not None:
                state = checkpoint.begin(settings, resume)
                weights = checkpoint.run["weights"]
            first = state["iteration"] if state is not None else 0
            conditions, stream = self.stage.record(sampler.timesteps, arguments, whole)
            told = (tuple(stream.shape), stream.dtype)
            kept = _on_cpu(arguments)
            run = Run(schedule, whole, guidance, first, sampler.timesteps, kept, conditions, told, options, weights)
        run = self.transport.share(run, "the first rank to begin")
        assert run is not None
        self._run = run
        if run.schedule.blocks is None:
            self.trace.bound()
        if self.rank != 0:
            run.check(self.rank, self._options(), weight_digests(self.stage.module))
        self.stage.load(run.conditions, run.timesteps, run.arguments, run.shape, run.schedule.num_cat)
        self.transport.open(self._buffers(run))
        if self.rank != 0:
            self._serve(run)
            return
        noise = NoisePool(shape, num_per_block, num_cat, seed)
        keep = None if checkpoint is None else lambda block: checkpoint.keep(block.index, block.latents)
        self.queue = queue = BlockQueue(run.schedule, sampler, noise, self.stage.device, keep)
        if state is not None:
            queue.load(state)
        yield from self._lead(run, queue, checkpoint)

    def _options(self) -> dict[str, Any]:
        return {
            "layers_per_stage": [len(layers) for layers in self.layers],
            "packing": described(self.packing),
            "model": model_digest(self.stage.module),
            "config": self.stage.session.config.digest(),
        }

    def _lead(self, run: Run, queue: BlockQueue, checkpoint: Checkpoint | None) -> Iterator[tuple[int, Tensor]]:
        """The first rank's loop: the queue, and the first stage."""
        schedule, under_way, sent = run.schedule, deque[Item](), 0

        def save(snapshot: Snapshot) -> None:
            assert checkpoint is not None
            with self.trace.during("save", Item(snapshot.iteration, 0, 0)):
                self._refuse_memory()
                checkpoint.save(snapshot.state_dict())

        try:
            while schedule.iterations is None or queue.iteration < schedule.iterations:
                if checkpoint is not None and queue.iteration > run.first and checkpoint.due(queue.iteration):
                    queue.snapshot(save)
                for item in queue.begin():
                    while not queue.ready(item.block) or (under_way and self.transport.there()):
                        yield from self._finished(self._take(run, queue, under_way.popleft()))
                    out = self._compute(run, queue.inputs(item.block), item)
                    if self.stage.last:
                        yield from self._finished(self._apply(queue, out, item))
                    else:
                        self._send(self.packing.pack, out, item)
                        under_way.append(item)
                        sent += 1
            while under_way:
                yield from self._finished(self._take(run, queue, under_way.popleft()))
        except GeneratorExit:
            if sent != schedule.count(run.first):
                self.transport.stop(sent, self._wire(run))
                while self.transport.receive() is not None:
                    pass
            raise

    def _serve(self, run: Run) -> None:
        """Any other rank's loop."""
        items = run.schedule.items(run.first)
        for count, item in enumerate(items):
            with self.trace.during("receive", item):
                buffer = self.transport.receive()
            if buffer is None:  # the first rank stops early
                last = run.result(item, self.stage.device) if self.stage.last else self._wire(run)
                self.transport.stop(count, last)
                return
            with self.trace.during("unpack", item):
                x = self.packing.unpack(buffer, *run.stream)
            out = self._compute(run, x, item)
            self._send(Plain().pack if self.stage.last else self.packing.pack, out, item)

    def _compute(self, run: Run, x: Tensor, item: Item) -> Tensor:
        """This rank's part of an item; on the last rank the prediction for the block's own frames, after guidance."""
        self.transport.check()
        start = run.schedule.num_cat if item.block else 0
        newest = item.block == run.schedule.queued(item.iteration)[-1]
        with self.trace.during("compute", item):
            out = self.stage.run(x, item, newest, start)
            if self.stage.last:
                out = out.float()
                if run.branches == 2:
                    given, free = out.chunk(2)
                    out = free + run.guidance * (given - free)
                out = out[:, :, start:]
            elif (tuple(out.shape), out.dtype) != run.stream:
                raise RuntimeError(
                    f"the last block of rank {self.rank} returned {out.dtype} {list(out.shape)}, but the first "
                    f"of all gets {run.stream[1]} {list(run.stream[0])}; these must be the same"
                )
        return out

    def _send(self, pack: Callable[[Tensor], Tensor], out: Tensor, item: Item) -> None:
        with self.trace.during("pack", item):
            buffer = pack(out)
        with self.trace.during("send", item):
            self.transport.room()
        self.transport.send(buffer)

    def _take(self, run: Run, queue: BlockQueue, item: Item) -> FrameBlock | None:
        with self.trace.during("result", item):
            buffer = self.transport.receive()
        assert buffer is not None
        return self._apply(queue, buffer.view(run.prediction(item)), item)

    def _apply(self, queue: BlockQueue, prediction: Tensor, item: Item) -> FrameBlock | None:
        with self.trace.during("step", item):
            return queue.apply(item.block, prediction)

    def _finished(self, block: FrameBlock | None) -> Iterator[tuple[int, Tensor]]:
        if block is not None:
            with self.transport.aside():
                yield block.index, block.latents

    def _refuse_memory(self) -> None:
        """Raise where a planner that says otherwise remembers something between steps, which no checkpoint has."""
        memory = self.stage.session.memory
        if any(memory(block) for block in (self.queue.blocks if self.queue is not None else ())):
            raise remembers(self.stage.session.config)

    def _wire(self, run: Run) -> Tensor:
        return self.packing.empty(*run.stream, self.stage.device)

    def _buffers(self, run: Run) -> Callable[[int], Tensor | None]:
        """Makes the buffer of every message that comes, in order."""
        items = run.schedule.items(run.first)

        def empty(index: int) -> Tensor | None:
            item = next(items, None)
            if item is None:
                return None
            return run.result(item, self.stage.device) if self.rank == 0 else self._wire(run)

        return empty


def _on_cpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in arguments.items()}
