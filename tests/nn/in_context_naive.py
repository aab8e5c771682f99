"""Clock B written out: one sequence at a time, whole copies of the weights, the plain model called on them.

Shares no code with the library's: fast weights are entries of a dictionary that `functional_call` puts into the model.
"""

import re
from itertools import pairwise

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

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


def read_rows(model, settings, ids, **kwargs):
    """Logits (B, T, V), row after row, with the weights of `model`."""
    plain = plain_model(settings, model.state_dict())
    parameters = dict(model.named_parameters())
    return torch.stack([_read(plain, parameters, settings, row, **kwargs) for row in ids])


def _read(model, parameters, settings, ids, *, starts=(), second_order=False):
    """Logits (T, V) of one sequence. starts: where documents start; fast copies are carried over them."""
    writes = {i: lv["in_context"] for i, lv in enumerate(settings["channel"]["levels"]) if lv.get("in_context")}
    period = min(entry["period_tokens"] for entry in writes.values())
    names = level_names(model, settings)
    weights = {level: {name: parameters[name] for name in names[level]} for level in writes}
    waiting = {level: dict.fromkeys(names[level], 0.0) for level in writes}
    running = {level: dict.fromkeys(names[level], 0.0) for level in writes}
    state, border, logits = None, None, []

    def predict(part, begin, state, copies):
        resets = torch.tensor([[begin in starts] + [False] * (len(part) - 1)])
        return functional_call(model, parameters | copies, (part[None],), {"state": state, "resets": resets})

    for begin in range(0, len(ids), period):
        if begin:
            copies = {name: weight for level in writes for name, weight in weights[level].items()}
            if not second_order:
                copies = {name: weight.detach().requires_grad_() for name, weight in copies.items()}
                border = None if border is None else border.detach()
            else:
                copies = {name: weight.view_as(weight) for name, weight in copies.items()}
            targets = ids[begin - period + 1 : begin + 1].clone()
            if begin in starts:
                targets[-1] = -100
            with torch.enable_grad():
                out = predict(ids[begin - period : begin], begin - period, border, copies)
                loss = cross_entropy(out.logits[0], targets, ignore_index=-100, reduction="sum")
                found = torch.autograd.grad(loss, list(copies.values()), create_graph=second_order)
            gradient = dict(zip(copies, found, strict=True))
            due = [level for level in writes if begin % writes[level]["period_tokens"] == 0]
            for level, entry in writes.items():
                for name in names[level]:
                    waiting[level][name] = waiting[level][name] + gradient[name]
                    if level in due:
                        inertia = entry["rule"].get("inertia", 0.0)
                        running[level][name] = inertia * running[level][name] - entry["rate"] * waiting[level][name]
                        weights[level][name] = weights[level][name] + running[level][name]
                        waiting[level][name] = 0.0
            if settings["channel"].get("wiring") == "nested":
                for fast, slow in pairwise(sorted(writes)):
                    if slow in due:
                        weights[fast] = {name: parameters[name] for name in names[fast]}
                        running[fast] = dict.fromkeys(names[fast], 0.0)
        border = state
        out = predict(
            ids[begin : begin + period],
            begin,
            state,
            {name: weight for level in writes for name, weight in weights[level].items()},
        )
        state = out.state
        logits.append(out.logits[0])
    return torch.cat(logits)
