"""Clock B written out: one sequence at a time, whole copies of the weights, the plain model called on them.

Shares no code with the library's: fast weights are entries of a dictionary that `functional_call` puts into the model.
"""

import itertools
import re

import torch
from torch.func import functional_call

from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel


def without_clock(settings):
    """The same model whose levels are not written in context."""
    channel = dict(settings["channel"])
    channel.pop("in_context")
    channel["levels"] = [
        {name: value for name, value in level.items() if name != "in_context"} for level in channel["levels"]
    ]
    return settings | {"channel": channel}


def plain_model(settings, weights):
    """The model without clock B, with the weights of another."""
    model = LanguageModel(ModelConfig.model_validate(without_clock(settings))).double()
    model.load_state_dict(weights)
    return model


def level_names(model, settings):
    """Names of the matrices that have fast copies, by level."""
    roles = model.parameter_roles()
    found = {}
    for index, level in enumerate(settings["channel"]["levels"]):
        if level.get("in_context"):
            found[index] = [
                n for n, role in roles.items() if role.level == index and re.search(r"(inner|in|out)\.weight$", n)
            ]
    return found


def read_one(model, parameters, settings, ids, *, starts=(), second_order=False):
    """Logits (T, V) of one sequence. starts: where documents start, with carried fast copies."""
    writes = {i: lv["in_context"] for i, lv in enumerate(settings["channel"]["levels"]) if lv.get("in_context")}
    period = min(entry["period_tokens"] for entry in writes.values())
    names = level_names(model, settings)
    nested = settings["channel"].get("wiring") == "nested"
    weights = {level: {name: parameters[name] for name in names[level]} for level in writes}
    waiting = {level: dict.fromkeys(names[level], 0.0) for level in writes}
    state, border, logits = None, None, []
    for begin in range(0, len(ids), period):
        if begin:
            previous = ids[begin - period : begin]
            targets = ids[begin - period + 1 : begin + 1].clone()
            if begin in starts:
                targets[-1] = -100
            resets = torch.tensor([[begin - period in starts] + [False] * (period - 1)])
            copies = {
                name: (w.view_as(w) if second_order else w.detach().requires_grad_())
                for level in writes
                for name, w in weights[level].items()
            }
            with torch.enable_grad():
                held = border if second_order or border is None else border.detach()
                out = functional_call(model, parameters | copies, (previous[None],), {"state": held, "resets": resets})
                loss = torch.nn.functional.cross_entropy(out.logits[0], targets, ignore_index=-100, reduction="sum")
                found = torch.autograd.grad(loss, list(copies.values()), create_graph=second_order)
            gradient = dict(zip(copies, found, strict=True))
            due = [level for level in writes if begin % writes[level]["period_tokens"] == 0]
            for level in writes:
                for name in names[level]:
                    waiting[level][name] = waiting[level][name] + gradient[name]
            for level in due:
                for name in names[level]:
                    step = writes[level]["rate"] * waiting[level][name]
                    weights[level][name] = weights[level][name] - step
                    waiting[level][name] = 0.0
            if nested:
                order = sorted(writes)
                for fast, slow in itertools.pairwise(order):
                    if slow in due:
                        weights[fast] = {name: parameters[name] for name in names[fast]}
        border = state
        now = {name: w for level in writes for name, w in weights[level].items()}
        part = ids[begin : begin + period]
        resets = torch.tensor([[begin in starts] + [False] * (len(part) - 1)])
        out = functional_call(model, parameters | now, (part[None],), {"state": state, "resets": resets})
        state = out.state
        logits.append(out.logits[0])
    return torch.cat(logits)
