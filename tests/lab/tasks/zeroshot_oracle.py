"""A straightforward scorer, written apart from the code under test: one text, one forward pass, no state."""

import torch


@torch.no_grad()
def log_likelihood(model, tokenizer, context, continuation):
    """Sum of log-probabilities of the continuation's tokens after start token and context; whether all are first."""
    start = [tokenizer.start_of_text]
    kept = context.rstrip()
    whole = start + tokenizer.encode(context + continuation)
    given = len(start + tokenizer.encode(kept))
    logits = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(dim=-1)
    total, first = 0.0, True
    for position in range(given, len(whole)):
        total += float(logits[position - 1, whole[position]])
        first &= int(logits[position - 1].argmax()) == whole[position]
    return total, first


@torch.no_grad()
def rolling_log_likelihood(model, tokenizer, text, length):
    """Windows of `length` tokens that do not overlap; the last one looks back as far as a window goes."""
    tokens = tokenizer.encode(text)
    total, done = 0.0, 0
    while done < len(tokens):
        count = min(length, len(tokens) - done)
        whole = [tokenizer.start_of_text, *tokens]
        end = done + count + 1
        begin = done if done == 0 else max(end - length - 1, 0)
        window = whole[begin:end]
        logits = model(torch.tensor([window[:-1]])).logits[0].double().log_softmax(dim=-1)
        for position in range(len(window) - count, len(window)):
            total += float(logits[position - 1, window[position]])
        done += count
    return total
