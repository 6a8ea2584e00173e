"""Train the demo model: a tiny Wan transformer that draws clips of moving shapes from a prompt.

    python examples/demo_model/train.py --minutes 100 --out build/demo_model

The network predicts the clean clip x0 (not the velocity: with 128 channels it would spend them on carrying the noise
of a 48-value patch; "Back to Basics: Let Denoising Generative Models Denoise", arXiv 2511.13720); the sampler turns
it into the velocity that the flow-matching scheduler expects. Training starts on small canvases, whose objects have
the same size in pixels, and ends on the full one, so that the position table has been seen whole. The schedule runs
on wall-clock time; a run that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from data import sample_clip
from diffusers import WanTransformer3DModel

from vdit_fast.demo.architecture import FRAMES, HEIGHT, SHIFT, TRANSFORMER_CONFIG
from vdit_fast.demo.model import demo_metadata, load_demo_model
from vdit_fast.demo.prompts import embed

# (share of the budget at which it ends, [(batch, frames, side in pixels), ...] drawn evenly)
STAGES = (
    (0.55, ((8, 12, 32), (4, 16, 40))),
    (0.78, ((2, 20, 48), (4, 16, 40))),
    (1.00, ((1, FRAMES, HEIGHT), (2, 20, 48))),
)
ADAM_LR, MUON_LR, WARMUP_STEPS, PROMPT_DROP, EMA_DECAY = 2e-3, 0.02, 100, 0.1, 0.998


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations (Jordan et al., 2024), in fp32.

    ``torch.optim.Muon`` runs them in bf16, which a CPU without bf16 units executes 15 times slower than this.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buf.lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(buf, group["momentum"])
                x = g.mT if g.size(0) > g.size(1) else g
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.mT if g.size(0) > g.size(1) else x
                p.mul_(1 - group["lr"] * 0.01).add_(x, alpha=-group["lr"] * max(1.0, g.size(0) / g.size(1)) ** 0.5)


@torch.no_grad()
def init_local_attention(model: WanTransformer3DModel, strength: float = 1.5, temperature: float = 1.25) -> None:
    """Start the heads as local ones, even heads in time, odd ones in space, by biases that RoPE turns into distance.

    A constant in the cosine half of a rotary pair adds ``cos(theta * distance)`` to the logits. Training is free to
    leave this start; the attention reports in docs/demo_model.md are given before and after training.
    """
    t_pairs = (64 - 2 * (2 * (64 // 6))) // 2  # diffusers splits 64 as 24 (time), 20, 20
    for block in model.blocks:
        for linear in (block.attn1.to_q, block.attn1.to_k):
            bias = linear.bias.view(-1, 32, 2)
            bias.zero_()
            bias[0::2, 0:6, 0] = strength  # time: keys of near frames
            bias[1::2, t_pairs : t_pairs + 6, 0] = strength  # height
            bias[1::2, t_pairs + 10 : t_pairs + 16, 0] = strength  # width: keys of the same place
        block.attn1.norm_q.weight.fill_(temperature)
        block.attn1.norm_k.weight.fill_(temperature)


def batch_of(size: tuple[int, int, int], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    count, frames, side = size
    clips, prompts = zip(*(sample_clip(frames, side, side, rng) for _ in range(count)), strict=True)
    text = torch.stack([embed("" if rng.random() < PROMPT_DROP else p) for p in prompts])
    return torch.stack(clips), text


def x0_loss(model: WanTransformer3DModel, x0: torch.Tensor, text: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of the predicted clean clip, one value per batch item."""
    s = sigma.view(-1, 1, 1, 1, 1)
    noisy = x0 * (1 - s) + torch.randn_like(x0) * s
    pred = model(noisy, sigma * 1000, text, return_dict=False)[0]
    return (pred - x0).square().mean((1, 2, 3, 4)) / (sigma.square() + 0.05)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--minutes", type=float, default=100, help="total training time, over all resumed runs")
    ap.add_argument("--out", type=Path, default=Path("build/demo_model"), help="folder; a run in it is gone on with")
    ap.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--init", type=Path, help="weight file to begin with, instead of random weights")
    args = ap.parse_args()
    checkpoint = args.out / "checkpoint.pt"
    if args.init is not None and checkpoint.exists():
        ap.error(f"--init: {args.out} holds a run already; leave --init out to go on with that, or give another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = WanTransformer3DModel(**TRANSFORMER_CONFIG)
    before = {}  # what the weights have seen already
    if args.init is None:
        init_local_attention(model)
    else:
        model.load_state_dict(load_demo_model(path=args.init).state_dict())
        before = json.loads(demo_metadata(args.init).get("training", "{}"))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks.")]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    muon = Muon(matrices, MUON_LR)
    adam = torch.optim.AdamW(rest, ADAM_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    step, spent, seen = 0, 0.0, 0

    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        ema, step, spent, seen = saved["ema"], saved["step"], saved["spent"], saved["seen"]
        rng.seed(args.seed + step)
        torch.manual_seed(args.seed + step)

    budget, log, running = 60 * args.minutes, (args.out / "log.jsonl").open("a"), []
    last = time.monotonic()
    while spent < budget:
        done = spent / budget
        sizes = next(s for end, s in STAGES if done < end)
        decay = min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, (1 - done) / 0.7)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = MUON_LR * decay, ADAM_LR * decay
        x0, text = batch_of(rng.choice(sizes), rng)
        u = torch.rand(x0.size(0))
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        loss = x0_loss(model, x0, text, sigma).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + x0.size(0)
        with torch.no_grad():
            keep = min(EMA_DECAY, (1 + step) / (10 + step))
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - keep)
        now = time.monotonic()
        spent, last = spent + now - last, now
        running.append(loss.item())
        if step % 50 == 0:
            row = {"step": step, "clips": seen, "seconds": round(spent), "loss": round(sum(running) / len(running), 5)}
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
            running.clear()
        if step % 100 == 0 or spent >= budget:
            state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(), "ema": ema}
            counts = {"step": step, "spent": spent, "seen": seen, "before": before}
            torch.save({**state, **counts}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    print("done; now: python examples/demo_model/evaluate.py", flush=True)


if __name__ == "__main__":
    main()
