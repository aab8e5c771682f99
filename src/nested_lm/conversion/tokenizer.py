"""A Llama's tokenizer.json with the tokens around a document written into it."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from nested_lm.conversion.llama import LlamaConfig
from nested_lm.conversion.source import TOKENIZER, Source
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import CheckpointError, DataError


def convert_tokenizer(source: Source, config: LlamaConfig, target: Path) -> TextTokenizer:
    """Write the tokenizer to `target`, with config.json's start and end token as its post-processor; load it.

    Tokens keep their ids. A tokenizer.json knows special tokens, but not which of them begins and ends a document;
    that stands in config.json, and a template around every text is the format's own place for it.

    Raises:
        CheckpointError: it is missing or damaged, changes texts, has ids beyond the embedding, or config.json names
            no start or end token, or one that is no special token of it.
    """
    path = source.folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; load the tokenizer with transformers (AutoTokenizer) and save it with "
            "save_pretrained, which writes it"
        )
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # `tokenizers` raises bare Exception
        raise CheckpointError(f"{path} is damaged: {error}; copy it again from where it came") from error
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.vocab_size:
        raise CheckpointError(
            f"{path} has {size} tokens, the embedding of the model {config.vocab_size}; use the tokenizer that the "
            "model was trained with"
        )
    if config.boundary is None:
        raise CheckpointError(
            f"config.json in {source.folder} names neither bos_token_id nor eos_token_id; add the ids of the tokens "
            "that start and end a document"
        )
    start, end = (_name(tokenizer, token, path) for token in config.boundary)
    tokenizer.post_processor = TemplateProcessing(
        single=[start, "$A", end], special_tokens=list(dict(zip((start, end), config.boundary, strict=True)).items())
    )
    target.write_text(tokenizer.to_str(), encoding="utf-8")
    try:
        loaded = TextTokenizer.load(target)
    except DataError as error:
        raise CheckpointError(f"{path} cannot be used here: {error}") from error
    assert (loaded.start_of_text, loaded.end_of_text) == config.boundary
    return loaded


def _name(tokenizer: Tokenizer, token: int, path: Path) -> str:
    name = tokenizer.id_to_token(token)
    if name is None:
        raise CheckpointError(
            f"config.json names token {token} as the start or end of a document, which {path} does not have; "
            "correct bos_token_id or eos_token_id, or use the tokenizer that the model was trained with"
        )
    return name
