"""The kernels beside torch's form in float64, on the device: outputs, states and every gradient."""

import time
from itertools import product
from typing import Any

import torch
from torch.nn.functional import normalize

from nested_lm.config.load import load_run
from nested_lm.ops.memory import chunked
from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import GateReadout, MemoryInputs, MemoryState, MemoryWeights
from nested_lm.ops.memory.triton import backend

LIMITS = {"float32": 1e-4, "bfloat16": 0.05}
"""Relative to the largest element; float32 products are three TF32 products each."""

RULES = {
    "Hope": "hope/pilot",
    "Hope, printed": "hope/demo_paper",
    "Titans": "baselines/titans_lmm_pilot",
    "linear": None,
}


def problem(rule: WriteRule, width: int, *, tokens: int, heads: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Leaves of a call: inputs, start, readouts and a state that was written."""
    torch.manual_seed(0)
    memories = len(rule.adapt)
    hidden, outer = (width, 0) if rule.depth == 1 else (width, width)

    def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale + shift).to(device)

    leaves = {name: normalize(normal(2, tokens, heads, width), dim=-1) for name in ("key", "value", "query")}
    leaves |= {"rate": normal(2, tokens, heads), "decay": normal(2, tokens, heads, shift=3.0)}
    if rule.momentum:
        leaves["momentum"] = normal(2, tokens, heads)
    for name, spread, lead in (("start", 1.0, ()), ("state", 0.1, (2,)), ("running", 0.1, (2,))):
        if name != "running" or rule.momentum:
            scale = spread * width**-0.5
            leaves[f"{name} inner"] = normal(*lead, heads, memories, hidden, width, scale=scale)
            leaves[f"{name} outer"] = normal(*lead, heads, memories, width, outer, scale=0.3 * scale)
    leaves |= {f"readout {name}": normal(heads, width, scale=0.3) for name in ("eta", "alpha") if name in rule.adapt}
    return leaves


def results(form: Any, rule: WriteRule, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a form of the memories."""
    x = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    state = MemoryWeights(x["state inner"], x["state outer"])
    running = MemoryWeights(x["running inner"], x["running outer"]) if rule.momentum else None
    output = form.self_modify(
        *(
            MemoryInputs(x["key"], x["value"], x["query"], x["rate"], x["decay"], x.get("momentum")),
            MemoryWeights(x["start inner"], x["start outer"]),
            GateReadout(x.get("readout eta"), x.get("readout alpha")),
            MemoryState(state, state, running),
        ),
        **{"rule": rule, "position": 5, "resets": None},
    )
    found = {
        "reads": output.reads,
        "inner after": output.state.current.inner,
        "outer after": output.state.current.outer,
    }
    found = {name: tensor for name, tensor in found.items() if tensor.numel()}
    torch.manual_seed(1)
    loss = sum((tensor * torch.randn(tensor.shape).to(tensor)).sum() for tensor in found.values())
    wanted = {name: leaf for name, leaf in x.items() if leaf.numel()}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return found | {f"gradient of {name}": grad for name, grad in zip(wanted, gradients, strict=True)}


def compare(
    rule: WriteRule, width: int, number: str, device: torch.device, *, tokens: int, heads: int
) -> dict[str, Any]:
    """Largest relative difference of each result, and the verdict."""
    leaves = problem(rule, width, tokens=tokens, heads=heads, device=device)
    single = {name: leaf.float() for name, leaf in leaves.items()}
    expected = results(chunked, rule, {name: leaf.double() for name, leaf in single.items()})
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=number == "bfloat16"):
        found = results(backend, rule, single)
    errors = {
        name: ((found[name] - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()
        for name, exact in expected.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return {"agrees": errors[worst] < LIMITS[number], "worst": worst, "errors": errors}


def run(report: Any, device: torch.device, until: float, *, tiny: bool) -> None:
    """Compare every rule, width and number type there is time for."""
    widths = (16,) if tiny else (64, 32, 128)
    for width, number, (name, preset) in product(widths, ("float32", "bfloat16"), RULES.items()):
        if time.monotonic() > until:
            report.add("agreement", f"{name}, width {width}, {number}", {"left_out": "no time"})
            continue
        chunk = 16 if tiny else 64
        if preset is None:
            rule = WriteRule.model_validate({"rule": "linear", "chunk": chunk})
        else:
            mixer = load_run(preset).model.mixer
            changes = {"adapt": ("k", "memory")} if tiny and len(mixer.adapt) > 1 else {}
            rule = WriteRule.model_validate(
                {field: getattr(mixer, field) for field in WriteRule.model_fields} | {"chunk": chunk} | changes
            )
        sizes = {"tokens": 20, "heads": 1} if tiny else {"tokens": 200, "heads": 4}
        label = f"{name}, width {width}, {number}"
        report.attempt("agreement", label, lambda r=rule, w=width, n=number, s=sizes: compare(r, w, n, device, **s))
