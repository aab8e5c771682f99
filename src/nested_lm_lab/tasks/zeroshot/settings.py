"""What `nested-lm eval zeroshot` measures, as written on the command line and in result files."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from nested_lm.config.section import Count, NonNegativeFloat, Section
from nested_lm.errors import ConfigError
from nested_lm_lab.evaluation.options import Option
from nested_lm_lab.tasks.zeroshot.tasks import choose_tasks


class Memorize(Section):
    """How a text is memorised.

    passes: times it is read. levels: names of the memories that keep what they wrote; null: all. surprise: a segment
    between two borders is written only where its loss is at least so many nats a token; null: every segment.
    """

    passes: Count = 1
    levels: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    surprise: NonNegativeFloat | None = None

    @property
    def name(self) -> str:
        """Short name for tables."""
        parts = [f"memorize x{self.passes}"]
        parts += [] if self.levels is None else ["+".join(self.levels)]
        parts += [] if self.surprise is None else [f"above {self.surprise:g} nats"]
        return ", ".join(parts)


def parse_memorize(text: str) -> Memorize:
    """Read what the command line says: `passes=2,levels=memory+k,surprise=3.5`, each part optional.

    Raises:
        ConfigError: a part that is not known, or a value that cannot be.
    """
    fields: dict[str, Any] = {}
    for part in text.split(","):
        key, found, value = (word.strip() for word in part.partition("="))
        if not found or key not in Memorize.model_fields or key in fields or not value:
            raise ConfigError(
                f"--memorize {text!r}: {part!r} is not understood; write parts such as passes=2, levels=memory+k and "
                "surprise=3.5 with commas between, each once"
            )
        fields[key] = value
    try:
        if "passes" in fields:
            fields["passes"] = int(fields["passes"])
        if "surprise" in fields:
            fields["surprise"] = float(fields["surprise"])
        if "levels" in fields:
            fields["levels"] = tuple(dict.fromkeys(fields["levels"].split("+")))
        return Memorize(**fields)
    except (ValueError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"--memorize {text!r}: {reason}") from error


_Tasks = Option("all, paper (the papers' columns), or names with commas between.", read=choose_tasks, shown="all")
_Memorize = Option(
    "Also score after reading each text into the memory first; repeat for more variants.",
    read=parse_memorize,
    metavar="passes=N[,levels=A+B][,surprise=X]",
    repeat=True,
)


class ZeroShotSettings(Section):
    """Tasks and how they are read.

    limit: first documents of each task only; null: all. max_length: tokens read of a document; null: the context the
    model was trained with. memorize: further arms beside the plain score. bigram_tokens: training tokens that the
    bigram floor is counted on; null: no such floor.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1), _Tasks] = choose_tasks("all")
    data_dir: Annotated[
        Path | None,
        Option("Folder that `eval zeroshot-data` made; the Hugging Face hub by default.", metavar="DIR"),
    ] = None
    limit: Annotated[Count | None, Option("First documents of each task only.")] = None
    max_length: Annotated[
        Annotated[int, Field(ge=8)] | None,
        Option("Tokens read of a document; the context of the training by default."),
    ] = None
    memorize: Annotated[tuple[Memorize, ...], _Memorize] = ()
    bigram_tokens: Annotated[
        Count | None, Option("Leave out the floor of the training text.", name="--no-bigram", off=True)
    ] = 16_000_000
    batch_rows: Annotated[Count, Option("Texts read side by side.")] = 32
    bootstrap_samples: Annotated[int, Field(ge=100), Option("Resamples of the intervals.")] = 1000
