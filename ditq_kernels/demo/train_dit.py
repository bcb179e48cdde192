"""Train the embedded model: a class-conditional DiT in diffusers' own format, on Fashion-MNIST, on a CPU.

    python -m ditq_kernels.demo.train_dit --out out/fashion_dit

Classifier-free guidance is trained by dropping the label of whole samples here, and not by the model's own label
dropout: diffusers' DiT embeds the label anew in every block and would drop it in each block independently, so that an
unconditional sample would almost never be seen. Interrupted training continues from the last state in ``--out`` and
gives the weights that it would have given without the interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from ..files import written_whole
from ..integrations.source import LABEL_FILE
from . import bf16, fashion_mnist

MODEL = dict(
    num_attention_heads=4,
    attention_head_dim=64,
    in_channels=1,
    out_channels=1,
    num_layers=6,
    patch_size=4,
    sample_size=28,
    num_embeds_ada_norm=10,
)
SCHEDULE = dict(
    num_train_timesteps=1000,
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    prediction_type="v_prediction",
    clip_sample=False,
)
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.999
WARMUP_STEPS = 200
STATE_EVERY = 250


def build_model(seed: int, heads: int = MODEL["num_attention_heads"]) -> DiTTransformer2DModel:
    """The untrained model, 64 channels wide for each of ``heads``; its modulation and final projections zero
    (adaLN-zero, Peebles and Xie, arXiv 2212.09748).
    """
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**{**MODEL, "num_attention_heads": heads})
    for linear in [block.norm1.linear for block in model.transformer_blocks] + [model.proj_out_1, model.proj_out_2]:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    for block in model.transformer_blocks:
        # 49 tokens: two batched products are faster on a CPU than fused attention and its backward.
        block.attn1.set_processor(AttnProcessor())
    return model.eval()  # eval: no label dropout inside the model (see the module's docstring)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero at ``steps``."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def training_batch(
    step: int, batch: int, seed: int, pictures: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Clean pictures, noise, timesteps and labels of one step; a function of ``seed`` and ``step`` alone, so that
    training can resume.
    """
    epoch_steps = len(pictures) // batch
    epoch, position = divmod(step, epoch_steps)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    rows = order[position * batch : (position + 1) * batch]
    generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
    noise = torch.randn(batch, *pictures.shape[1:], generator=generator)
    # One timestep from each of `batch` equal intervals: the loss varies less from step to step than with independent
    # draws.
    uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    timesteps = (uniform * SCHEDULE["num_train_timesteps"]).long()
    null_label = MODEL["num_embeds_ada_norm"]
    dropped = torch.rand(batch, generator=generator) < LABEL_DROPOUT
    return pictures[rows], noise, timesteps, labels[rows].masked_fill(dropped, null_label)


def save_state(path: Path, **state) -> None:
    with written_whole(path) as unfinished:
        torch.save(state, unfinished)


def save_model(model: DiTTransformer2DModel, ema: EMAModel, scheduler: DDIMScheduler, out: Path) -> None:
    """Write the averaged weights in fp16 with the scheduler's configuration beside them; ``model`` keeps its own
    weights.
    """
    averaged = build_model(0, model.config.num_attention_heads)
    ema.copy_to(averaged.parameters())
    averaged.half().save_pretrained(out)
    scheduler.save_pretrained(out / "scheduler")
    (out / LABEL_FILE).write_text(json.dumps(fashion_mnist.CLASS_NAMES) + "\n")


def train(out: Path, data: Path, steps: int, batch: int, peak_rate: float, seed: int, heads: int) -> None:
    """Train for ``steps`` steps of ``batch`` pictures and write model, scheduler and ``training.json`` to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    pictures, labels = fashion_mnist.load("train", data)
    scheduler = DDIMScheduler(**SCHEDULE)
    model = build_model(seed, heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ema = EMAModel(model.parameters(), decay=EMA_DECAY)
    first, seconds, running = 0, 0.0, None
    state_path = out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        first, seconds, running = state["step"], state["seconds"], state["loss"]
    has_bf16 = not bf16.is_emulated("cpu")
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="training", unit="step", mininterval=5)
    started = time.perf_counter()
    for step in bar:
        x0, noise, timesteps, y = training_batch(step, batch, seed, pictures, labels)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_rate)
        noisy = scheduler.add_noise(x0, noise, timesteps)
        target = scheduler.get_velocity(x0, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16):
            prediction = model(noisy, timestep=timesteps, class_labels=y).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        done = step + 1
        if done % STATE_EVERY == 0 or done == steps:
            elapsed = seconds + time.perf_counter() - started
            save_state(
                state_path,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                ema=ema.state_dict(),
                step=done,
                seconds=elapsed,
                loss=running,
            )
            save_model(model, ema, scheduler, out)
            record = dict(steps=done, of=steps, batch=batch, peak_learning_rate=peak_rate, seed=seed, loss=running)
            record.update(minutes=round(elapsed / 60, 1), threads=torch.get_num_threads(), torch=torch.__version__)
            (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/fashion_dit"),
        help="where model and training state go (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=fashion_mnist.DEFAULT_DIRECTORY,
        help="directory of the data set (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--heads",
        type=int,
        default=MODEL["num_attention_heads"],
        help="of 64 channels each: a model of another size (default: %(default)s)",
    )
    args = parser.parse_args()
    train(args.out, args.data, args.steps, args.batch, args.learning_rate, args.seed, args.heads)


if __name__ == "__main__":
    main()
