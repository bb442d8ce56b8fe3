"""How fast a step of training is: the 20 M shape with experts, its dense twin, and transformers' OLMoE, in one run.

python scripts/measure_training_speed.py > results/training_speed.json

A step is forward, loss, backward and Adam on one batch of random bytes, without dropout. The dense twin has layers of
k * d_ff: the same active operations, so that its time is the floor of what experts can reach. OLMoE is transformers'
model of the shape of our decoder (RoPE, RMSNorm, SwiGLU, softmax over all experts), under each of its own experts
implementations (without batched_mm, which copies an expert for every pair: 40 s a step of 512 tokens where eager takes
0.75), with its balance loss, as ours has. The models take turns, so that a change of the machine's pace meets
all; each figure is that of the median step, and ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from usmoe.cli.train import keep_memory
from usmoe.data.corpus import Corpus
from usmoe.models.config import MODELS, LanguageConfig
from usmoe.models.language import LanguageModel
from usmoe.train.config import TrainConfig
from usmoe.train.objective import Learner

K = 2
BALANCE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9, help="of each model; the first is not counted")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--segment", type=int, default=512, help="tokens of each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    keep_memory()
    tokens = torch.randint(0, 256, (args.batch, args.segment + 1), device=args.device)
    models = {name: make() for name, make in contestants(args.segment).items()}
    steps = {name: stepper(model.to(args.device).train(), args) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.steps):
        for name, step in steps.items():
            started = time.perf_counter()
            step(tokens)
            if number:
                times[name].append(time.perf_counter() - started)
        print(f"{number + 1} of {args.steps}", file=sys.stderr)
    seconds = {name: statistics.median(several) for name, several in times.items()}
    rows = [
        {
            "model": name,
            "parameters": sum(one.numel() for one in models[name].parameters()),
            "seconds_a_step": seconds[name],
            "tokens_a_second": args.batch * args.segment / seconds[name],
        }
        for name in steps
    ]
    best = min((name for name in seconds if name.startswith("OLMoE")), key=seconds.__getitem__)
    ratios = {
        "Transformer-XL, token choice, to its dense twin": seconds["XL dense"] / seconds["XL token choice"],
        "Transformer-XL, USMoE, to its dense twin": seconds["XL dense"] / seconds["XL USMoE"],
        "decoder, token choice, to its dense twin": seconds["decoder dense"] / seconds["decoder token choice"],
        "decoder, USMoE, to its dense twin": seconds["decoder dense"] / seconds["decoder USMoE"],
        f"decoder, token choice, to the best OLMoE ({best})": seconds[best] / seconds["decoder token choice"],
    }
    about = {
        "batch": args.batch,
        "segment": args.segment,
        "dtype": args.dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    json.dump({"about": about, "rows": rows, "speed_ratios": ratios}, sys.stdout, indent=1)


def contestants(segment: int) -> dict[str, Callable[[], torch.nn.Module]]:
    """Name -> what makes the model; all of d 256, 4 layers, 16 experts of 512 of which 2 are used."""
    xl = MODELS["transformer-xl-base"].replace(vocabulary=256, dropout=0.0)
    decoder = MODELS["decoder-base"].replace(vocabulary=256, d_ff=512)
    found: dict[str, Callable[[], torch.nn.Module]] = {}
    for name, config in (("XL", xl), ("decoder", decoder)):
        found[f"{name} dense"] = lambda config=config: ours(config.replace(num_experts=0, d_ff=K * config.d_ff))
        found[f"{name} token choice"] = lambda config=config: ours(config.replace(router=f"token_choice(k={K})"))
        found[f"{name} USMoE"] = lambda config=config: ours(config.replace(router=f"usmoe(k={K})"))
    for implementation in ("eager", "grouped_mm"):
        found[f"OLMoE {implementation}"] = lambda name=implementation: olmoe(decoder, segment, name)
    return found


def ours(config: LanguageConfig) -> Learner:
    balance = BALANCE if config.num_experts else 0.0
    return Learner(LanguageModel(config), TrainConfig(corpus=Corpus(source="random"), model=config, balance=balance))


def olmoe(config: LanguageConfig, segment: int, implementation: str) -> OlmoeForCausalLM:
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=256,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_experts=config.num_experts,
            num_experts_per_tok=K,
            max_position_embeddings=segment,
            router_aux_loss_coef=BALANCE,
            output_router_logits=True,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    model.set_experts_implementation(implementation)
    return model


def stepper(model: torch.nn.Module, args: argparse.Namespace) -> Callable[[Tensor], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: Tensor) -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            if isinstance(model, Learner):
                loss = model(tokens[:, :-1], tokens[:, 1:]).total
            else:
                loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        loss.item()

    return step


if __name__ == "__main__":
    main()
