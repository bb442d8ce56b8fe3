"""Train the small OLMoE language model that ships inside usmoe.

    python scripts/train_shipped_model.py --text novels/train.txt.gz wiki/train.txt.raw.gz \
        --validation novels/validation.txt.gz --run runs/shipped --hours 2

Everything that a run needs to continue is in its folder: the tokenizer, the tokens, the state (model,
optimisers, step, position in the data) and a JSON-lines log. Started again with the same folder, it goes on
where it stopped; Ctrl-C saves first. `--export DIR` writes the trained model in the form that
plain transformers loads.

Schedule: warm-up, a constant plateau, then a decay to zero over the last `--decay` steps, whose shape
1 - sqrt(progress) does most of its work early. The plateau may be prolonged after the fact by a larger
`--steps`, which is what lets a training be done in parts.

Optimisers: Muon (Jordan et al. 2024; update scaled as in Moonlight, arXiv 2502.16982) for the matrices of the
attention and of every expert, AdamW for embeddings, router and norms.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import usmoe
from corpus import batch_at, prepare, read_text
from muon import Muon


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained and how; saved as recipe.json in the run folder."""

    vocab_size: int = 4096
    """Byte-level BPE tokens, two special ones included."""
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    experts: int = 16
    experts_per_token: int = 4
    expert_size: int = 96
    """Width of one SwiGLU expert."""
    context: int = 512
    """Tokens of a training sequence."""
    batch: int = 16
    """Sequences a step."""
    steps: int = 2600
    warmup: int = 100
    """Optimizer steps of linear warm-up."""
    decay: int = 1000
    """Optimizer steps of decay to zero at the end."""
    lr: float = 3e-3
    """Peak, for both optimisers (Muon's update has the root mean square of AdamW's)."""
    weight_decay: float = 0.05
    balance: float = 0.01
    """Coefficient of the load balancing loss, as OLMoE has it."""
    z_loss: float = 1e-4
    """Coefficient of the squared log-partition of the output logits."""
    clip: float = 1.0
    optimizer: str = "muon"
    seed: int = 7


# --------------------------------------------------------------------------------------------- model


def build(recipe: Recipe):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.expert_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.experts_per_token,
        max_position_embeddings=recipe.context,
        router_aux_loss_coef=recipe.balance,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(recipe.seed)
    return OlmoeForCausalLM(config)


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Switch loss over all layers together, as OLMoE has it: E * sum_e (share of pairs) * (mean probability)."""
    probabilities = torch.cat([logits.float() for logits in router_logits]).softmax(-1)
    experts = probabilities.shape[-1]
    chosen = probabilities.topk(top_k, dim=-1, sorted=False).indices
    share = torch.bincount(chosen.reshape(-1), minlength=experts) / len(probabilities)
    return experts * (share * probabilities.mean(0)).sum()


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy and squared log-partition of a linear head, a chunk of tokens at a time.

    The (T, V) logits are never held: each chunk leaves its gradients behind at once, which on a CPU halves the
    time of head and loss.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, z_loss: float, chunk: int = 1024):
        hidden, low = hidden.bfloat16(), weight.bfloat16()
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        nats, squares = torch.zeros(2, device=hidden.device).unbind()
        for part, goal, grad in zip(hidden.split(chunk), target.split(chunk), grad_hidden.split(chunk), strict=True):
            logits = (part @ low.T).float()
            log_partition = logits.logsumexp(-1)
            nats = nats + (log_partition - logits.gather(1, goal[:, None])[:, 0]).sum()
            squares = squares + log_partition.square().sum()
            slope = logits.sub_(log_partition[:, None]).exp_().mul_((1 + 2 * z_loss * log_partition)[:, None])
            slope.scatter_add_(1, goal[:, None], torch.full_like(slope[:, :1], -1.0))
            slope = slope.bfloat16()
            torch.mm(slope, low, out=grad)
            grad_weight += slope.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        tokens = ctx.tokens = len(hidden)
        ctx.mark_non_differentiable(nats := nats / tokens)
        return nats + z_loss * squares / tokens, nats

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_loss / ctx.tokens
        return grad_hidden * scale, grad_weight * scale, None, None, None


def loss_of(model, tokens: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Training loss and mean nats a token, both scalars."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        out = model.model(tokens[:, :-1], output_router_logits=True, use_cache=False)
    hidden, target = out.last_hidden_state.flatten(0, 1), tokens[:, 1:].reshape(-1)
    loss, nats = HeadLoss.apply(hidden, model.lm_head.weight, target, recipe.z_loss)
    return loss + recipe.balance * balance_loss(out.router_logits, recipe.experts_per_token), nats


@torch.no_grad()
def evaluate(model, tokens: np.ndarray, recipe: Recipe, bytes_a_token: float, sequences: int = 96) -> float:
    """Teacher-forced bits per byte on evenly spaced sequences of the validation tokens."""
    model.eval()
    starts = np.linspace(0, len(tokens) - recipe.context - 1, sequences).astype(int)
    rows = torch.from_numpy(np.stack([tokens[s : s + recipe.context + 1].astype(np.int64) for s in starts]))
    device = next(model.parameters()).device
    nats = [loss_of(model, part.to(device), recipe)[1].item() for part in rows.split(16)]
    model.train()
    return float(np.mean(nats)) / math.log(2) / bytes_a_token


# ------------------------------------------------------------------------------------------ training


def learning_rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    left = recipe.steps - step
    if left >= recipe.decay:
        return recipe.lr
    return recipe.lr * (1 - math.sqrt(1 - left / recipe.decay))


def optimisers_of(model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = "experts" in name or "_proj" in name
        (matrices if inner and parameter.ndim >= 2 else others).append(parameter)
    decayed = [p for p in others if p.ndim >= 2]
    plain = [p for p in others if p.ndim < 2]
    if recipe.optimizer == "adamw":
        decayed, matrices = decayed + matrices, []
    adam = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=recipe.weight_decay), dict(params=plain, weight_decay=0.0)],
        lr=recipe.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    return [adam] + ([Muon(matrices, recipe.lr, weight_decay=recipe.weight_decay)] if matrices else [])


def keep_memory() -> None:
    """Let glibc keep freed memory: fresh pages for every activation cost a third of a step on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def keep_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe; a run that goes on may change the length of its schedule, and nothing else."""
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name, value in asdict(recipe).items() if before[name] != value]
        if set(changed) - {"steps", "decay"}:
            raise SystemExit(
                f"{path.parent} was begun with another {', '.join(changed)}. Give the same, or a new --run."
            )
    path.write_text(json.dumps(asdict(recipe), indent=1))


def save(path: Path, state: dict) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def train(recipe: Recipe, args: argparse.Namespace) -> None:
    run: Path = args.run
    run.mkdir(parents=True, exist_ok=True)
    keep_recipe(recipe, run / "recipe.json")
    tokenizer, tokens, validation = prepare(recipe, run, args.text, args.validation)
    bytes_a_token = len(read_text(args.validation).encode()) / len(validation)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(recipe).to(device).train()
    usmoe.patch(model, usmoe.OwnChoice())
    if args.compile:
        for layer in model.model.layers:
            layer.compile()
    optimisers = optimisers_of(model, recipe)
    step = 0
    if (run / "state.pt").exists():
        state = torch.load(run / "state.pt", weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step = state["step"]

    stop = False

    def ask_to_stop(*_) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)

    def checkpoint() -> None:
        save(
            run / "state.pt",
            dict(model=model.state_dict(), optimisers=[o.state_dict() for o in optimisers], step=step),
        )

    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} training tokens, "
        f"{bytes_a_token:.3f} bytes a token, from step {step} to {recipe.steps}",
        file=sys.stderr,
    )
    started = last = time.monotonic()
    mean: float | None = None
    while step < recipe.steps and not stop:
        lr = learning_rate(step, recipe)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
        loss, nats = loss_of(model, batch_at(tokens, recipe, step).to(device), recipe)
        if not torch.isfinite(loss):
            raise SystemExit(
                f"The loss is {loss.item()} at step {step}, sequences {step * recipe.batch} to "
                f"{(step + 1) * recipe.batch - 1} of the order of seed {recipe.seed}; the last good state is "
                f"{run / 'state.pt'}."
            )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)
        step += 1
        mean = nats.item() if mean is None else 0.98 * mean + 0.02 * nats.item()
        if step % 20 == 0:
            now = time.monotonic()
            row = dict(
                step=step,
                bits_per_byte=round(mean / math.log(2) / bytes_a_token, 4),
                lr=round(lr, 6),
                grad_norm=round(norm.item(), 3),
                tokens_per_second=round(20 * recipe.batch * recipe.context / (now - last)),
                elapsed_s=round(now - started),
                remaining_s=round((recipe.steps - step) * (now - last) / 20),
            )
            last = now
            if step % args.every == 0 or step == recipe.steps:
                row["validation_bits_per_byte"] = round(evaluate(model, validation, recipe, bytes_a_token), 4)
                checkpoint()
                last = time.monotonic()
            with (run / "log.jsonl").open("a") as log:
                print(json.dumps(row), file=log)
            print(row, file=sys.stderr)
        if args.hours and time.monotonic() - started > args.hours * 3600:
            break
    checkpoint()
    if args.export:
        usmoe.unpatch(model)
        export(model, tokenizer, args.export)


def export(model, tokenizer, folder: Path) -> None:
    """bfloat16 weights, configuration and tokenizer, as plain transformers reads them."""
    model = model.to("cpu", torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="training text, plain or .gz")
    parser.add_argument("--validation", type=Path, required=True, help="held-out text, plain or .gz")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--hours", type=float, help="stop after so much time; the next call goes on")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the layers"
    )
    parser.add_argument("--every", type=int, default=500, help="steps between validations and checkpoints")
    parser.add_argument("--export", type=Path, help="write the model here at the end")
    for name, field in Recipe.__dataclass_fields__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = parser.parse_args(argv)
    keep_memory()
    train(Recipe(**{name: getattr(args, name) for name in Recipe.__dataclass_fields__}), args)


if __name__ == "__main__":
    main()
