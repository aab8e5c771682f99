"""Preferring one of several answers: likelihoods of the answers after contexts that all go on from one state.

The state is forked, never changed: asking writes nothing.

Shapes: B contexts of one length, C answers, T tokens of the longest answer.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from nested_lm.errors import CheckpointError, NumericsError
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm.reading.generation import CALL_LOGITS, SEGMENT_TOKENS, read_prompt
from nested_lm_lab.evaluation.progress import Progress

_ROWS = 128  # rows of answers read side by side
_MIB = 1 << 20


@torch.no_grad()
def score_choices(
    model: LanguageModel,
    state: StreamState | None,
    contexts: Sequence[Int[np.ndarray, "n"]],
    choices: Sequence[Sequence[int] | Int[np.ndarray, "m"]],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> Float[np.ndarray, "contexts choices"]:
    """Mean nats a token of every answer after every context.

    A context is read once, and each answer goes on from there: in the same call where the model reads branches, else
    from a fork of its state.

    Args:
        state: of one stream; None for one that has read nothing.
        contexts, choices: token ids, at least one each.
        progress: told of the tokens read, `choice_tokens` in all.

    Raises:
        NumericsError: a likelihood is not finite.
    """
    start = model.initial_state(1) if state is None else state
    choices = [np.asarray(choice, dtype=np.int64) for choice in choices]
    asked = 1 + sum(len(choice) - 1 for choice in choices)  # predictions of one context
    packs = model.reads_branches and asked > 1 and asked * model.config.vocab_size <= CALL_LOGITS
    order = sorted(range(len(contexts)), key=lambda index: len(contexts[index]))
    scores = np.empty((len(contexts), len(choices)))
    begin = 0
    while begin < len(order):
        length = len(contexts[order[begin]])
        one_call = packs and length <= SEGMENT_TOKENS
        count = min(batch_size, CALL_LOGITS // (asked * model.config.vocab_size)) if one_call else batch_size
        rows = [index for index in order[begin : begin + count] if len(contexts[index]) == length]
        device = next(model.parameters()).device
        tokens = torch.from_numpy(np.stack([contexts[index] for index in rows])).to(device)
        streams = torch.zeros(len(rows), dtype=torch.long)
        if one_call:
            scores[rows] = _answers_as_branches(model, tokens, start, streams, choices)
        else:
            logits, after = read_prompt(model, tokens, state=start.select(streams))
            scores[rows] = _answers(model, logits.float().log_softmax(dim=-1), after, choices)
        begin += len(rows)
        if progress is not None:
            progress.add(choice_tokens([contexts[index] for index in rows], choices))
    if not np.isfinite(scores).all():
        raise NumericsError(
            f"{int((~np.isfinite(scores)).sum())} of {scores.size} likelihoods are not finite; the checkpoint has "
            "diverged, or what was read drove a memory out of range. Evaluate an earlier one"
        )
    return scores


def choice_tokens(contexts: Sequence[np.ndarray], choices: Sequence[np.ndarray]) -> int:
    """Tokens that `score_choices` reads: contexts, and after each all answers but their last token."""
    return sum(map(len, contexts)) + len(contexts) * sum(len(choice) - 1 for choice in choices)


def _answers_as_branches(
    model: LanguageModel,
    contexts: Int[torch.Tensor, "B n"],
    state: StreamState,
    streams: Int[torch.Tensor, "B"],
    choices: Sequence[np.ndarray],
) -> Float[np.ndarray, "B C"]:
    """Mean nats of each answer, read behind its context in one call. streams: those of the state to go on from."""
    rows, length = contexts.shape
    branches = torch.tensor([length, *(len(choice) - 1 for choice in choices)]).cumsum(dim=0)
    rests = torch.from_numpy(np.concatenate([choice[:-1] for choice in choices])).to(contexts.device)
    tokens = torch.cat([contexts, rests.expand(rows, -1)], dim=1)
    # All answers begin where the context ends, and go on in their branches.
    asked = torch.arange(length - 1, tokens.shape[1])
    places = torch.cartesian_prod(torch.arange(rows), asked).to(contexts.device)
    found = model(tokens, state=state, rows=streams, final=True, branches=branches.expand(rows, -1), places=places)
    likelihood = found.logits[0].float().log_softmax(dim=-1).unflatten(0, (rows, len(asked)))
    nats = np.empty((rows, len(choices)))
    for column, (choice, begin) in enumerate(zip(choices, (branches[:-1] - length + 1).tolist(), strict=True)):
        told = torch.tensor([0, *range(begin, begin + len(choice) - 1)])
        nats[:, column] = -likelihood[:, told, torch.from_numpy(choice)].double().mean(dim=1).cpu().numpy()
    return nats


def _answers(
    model: LanguageModel, first: torch.Tensor, state: StreamState, choices: Sequence[np.ndarray]
) -> Float[np.ndarray, "B C"]:
    """Mean nats of each answer, given the log probabilities (B, V) of its first token and the state there."""
    contexts = first.shape[0]
    found = np.zeros((contexts, len(choices)))
    for column, choice in enumerate(choices):
        found[:, column] = -first[:, int(choice[0])].double().cpu().numpy()
    longer = [column for column, choice in enumerate(choices) if len(choice) > 1]
    step = max(1, _ROWS // contexts)
    for begin in range(0, len(longer), step):
        columns = longer[begin : begin + step]
        longest = max(len(choices[column]) for column in columns) - 1
        inputs = np.zeros((len(columns), longest), dtype=np.int64)
        targets = np.full((len(columns), longest), -1, dtype=np.int64)
        for row, column in enumerate(columns):
            size = len(choices[column]) - 1
            inputs[row, :size], targets[row, :size] = choices[column][:-1], choices[column][1:]
        rows = torch.arange(contexts).repeat_interleave(len(columns))
        given = torch.from_numpy(np.tile(inputs, (contexts, 1))).to(first.device)
        wanted = torch.from_numpy(np.tile(targets, (contexts, 1))).to(first.device)
        logits = model(given, state=state, rows=rows, final=True).logits.float().log_softmax(dim=-1)
        likelihood = logits.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
        nats = -(likelihood * (wanted >= 0)).double().sum(dim=1).cpu().numpy()
        found[:, columns] += nats.reshape(contexts, len(columns))
    return found / np.array([len(choice) for choice in choices])


@torch.no_grad()
def read_stream(
    model: LanguageModel,
    state: StreamState | None,
    documents: Sequence[Int[np.ndarray, "n"]],
    *,
    start: int,
    max_state_mib: int,
    progress: Progress | None = None,
) -> StreamState:
    """Read documents one after the other, each behind a start token, and return the state.

    Raises:
        CheckpointError: the state has outgrown its limit.
    """
    tokens = np.concatenate([np.concatenate([[start], document]) for document in documents])
    device = next(model.parameters()).device
    after = read_prompt(model, torch.from_numpy(tokens)[None].to(device), state=state)[1]
    if after.num_bytes() > max_state_mib * _MIB:
        grows = "" if model.has_constant_state else "This model keeps keys and values of all that it has read. "
        raise CheckpointError(
            f"the state takes {after.num_bytes() / _MIB:,.0f} MiB after {after.position:,} tokens, the limit is "
            f"{max_state_mib:,} MiB. {grows}Read less, or raise the limit (--max-state-mib)"
        )
    if progress is not None:
        progress.add(len(tokens))
    return after
