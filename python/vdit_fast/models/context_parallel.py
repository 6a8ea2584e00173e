"""Under diffusers' context parallelism every rank's blocks get some rows: who serves it, and which rows they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vdit_fast.models.row_shard import RowShard, equal_rows

if TYPE_CHECKING:
    from vdit_fast.models.heads import HeadsCall
    from vdit_fast.models.session import Session
    from vdit_fast.parallel.agreement import Agreement

__all__ = ["NO_SEQUENCE", "follow", "unserved"]

NO_SEQUENCE = "context parallelism is enabled"
"""Why a stock processor runs: it exchanges the rows itself."""

FAMILIES = frozenset({"wan", "ltx_video"})
"""Those whose plan in diffusers gives self-attention the video's rows in equal parts, and nothing else."""


def _settings(config: Any) -> Any:
    return getattr(config, "context_parallel_config", config)


def unserved(session: Session, config: Any) -> str:
    """Why this context parallelism runs through stock processors, empty where the package serves it."""
    settings = _settings(config)
    ring, degree = getattr(settings, "ring_degree", None), getattr(settings, "ulysses_degree", None)
    if getattr(settings, "_ulysses_mesh", None) is None or not isinstance(degree, int):
        return NO_SEQUENCE
    if session.family not in FAMILIES:
        return f"{NO_SEQUENCE}, whose plan for this family is not known to cut the video's rows alone"
    if ring not in (None, 1):
        return f"{NO_SEQUENCE} with ring_degree {ring}: keys come in parts, and a plan is one of whole sequences"
    return "" if degree > 1 else NO_SEQUENCE


def follow(session: Session, config: Any) -> None:
    """Exchange rows for heads around attention where a transformer's ``enable_parallelism`` asks for it, and no longer
    where it does not (None)."""
    from vdit_fast.parallel.agreement import Agreement  # beside this package, and built on its calls
    from vdit_fast.parallel.ulysses import Ulysses

    present = session.around_heads.get("sequence")
    if config is None or unserved(session, config):
        if isinstance(getattr(present, "rows", None), _Rows):
            del session.around_heads["sequence"]
            session.begin_records()
        return
    settings = _settings(config)
    group = settings._ulysses_mesh.get_group()
    if present is None:
        agree = Agreement(group, "context parallelism")
        rows = _Rows(bool(getattr(settings, "ulysses_anything", False)), agree)
        session.around_heads["sequence"] = around = Ulysses(group, rows)
        rows.place = around.rank, around.ranks
        session.begin_records()
    elif not isinstance(getattr(present, "rows", None), _Rows):
        raise RuntimeError("enable_parallelism: vdit_fast.parallel.sequence_parallel shares the rows; end that first")


class _Rows:
    """The rows of a call under diffusers' plan: equal parts, or nearly equal ones where any length is allowed."""

    def __init__(self, any_length: bool, agree: Agreement) -> None:
        self.any_length = any_length
        self.agree = agree
        self.place = (0, 1)

    def __call__(self, call: HeadsCall) -> RowShard:
        rank, ranks = self.place
        rows, forward = call.q.shape[1], call.session.forward
        geometry = forward.geometry if forward is not None else None
        if forward is not None and not forward.agreed:
            forward.agreed = True
            batch, _, heads, width = call.q.shape
            tokens = f"{rows} rows on each" if geometry is None else f"a grid of {geometry.grid} tokens"
            given = f"{tokens}, batch {batch}, {heads} heads of {width} channels, {call.q.dtype}"
            self.agree(given, call.q.device, forward.step.generation)
        if geometry is None:
            sizes = (rows,) * ranks
            if self.any_length:
                raise RuntimeError(
                    "context parallelism with ulysses_anything: the transformer's input has no known video grid, so "
                    "nobody knows how many rows the other ranks have; accelerate the whole transformer"
                )
        else:
            sizes = equal_rows(geometry.n_video, ranks)
        if sizes[rank] != rows:
            raise RuntimeError(
                f"context parallelism: rank {rank} has {rows:,} rows where {sizes[rank]:,} of the grid "
                f"{geometry.grid if geometry else None} are expected; this cp_plan cuts other tensors than the video's "
                "rows. Call handle.remove(), or disable the parallelism"
            )
        return RowShard(sizes, rank)
