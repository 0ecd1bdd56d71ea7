"""LoRA by PEFT on a Llama of given sizes; ``benchmarks.speed.gpu`` sets it beside ours.

A process of its own, because JAX and PyTorch would share the card's memory. It prints
one JSON list; without torch, transformers and peft it prints none and says why.

    python -m benchmarks.speed.peft_lora '{"width": 2048, ...}'
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARM = 3


def build(sizes: dict[str, Any], device: str) -> Any:
    """A Llama with random weights in bfloat16 and a LoRA pair beside every weight."""
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=sizes["length"],
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    if sizes["remat"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rank, targets = sizes["rank"], [*LINEAR, "embed_tokens", "lm_head"]
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    return peft.get_peft_model(model, lora).train()


def measure(sizes: dict[str, Any], steps: int, compiled: bool) -> dict[str, Any]:
    """Median time and peak memory of whole steps: forward, backward, AdamW."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    model = build(sizes, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = torch.optim.AdamW(trained, lr=1e-4, fused=on_gpu)
    call = torch.compile(model) if compiled else model
    shape = (sizes["sequences"], sizes["length"])
    text = torch.randint(0, sizes["vocab"], shape, device=device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    spent = []
    for _ in range(WARM + steps):
        start = time.perf_counter()
        call(input_ids=text, labels=text).loss.backward()
        rule.step()
        rule.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    return {
        "method": "PEFT LoRA, " + ("compiled" if compiled else "eager"),
        "milliseconds": 1e3 * statistics.median(spent[WARM:]),
        "peak_mib": peak,
        "trained_dtype": str(trained[0].dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def main() -> None:
    """Measures eager and compiled steps."""
    sizes = json.loads(sys.argv[1])
    steps = sizes.pop("steps")
    try:
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"no PEFT rows: {error}", file=sys.stderr)
        print("[]")
        return
    rows = [measure(sizes, steps, compiled) for compiled in (False, True)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
