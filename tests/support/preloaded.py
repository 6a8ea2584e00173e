"""One process of a test run that has imported what ranks need: they are forked from it, all tests' alike."""

from __future__ import annotations

import multiprocessing

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "diffusers.models.transformers",
        "diffusers.schedulers.scheduling_flow_match_euler_discrete",
        "diffusers.schedulers.scheduling_unipc_multistep",
        "vdit_fast.accelerate",
    ]
)
