"""What `nested-lm eval continual` measures, as given on the command line and as written into result files."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from nested_lm.config.evaluation import EvalConfig
from nested_lm.config.section import Count, Section
from nested_lm.errors import ConfigError
from nested_lm_lab.evaluation.interval import Natural
from nested_lm_lab.evaluation.options import Option, count_or_all, counts_or_all, words
from nested_lm_lab.evaluation.registry import continual_words


def _task_words(text: str) -> tuple[str, ...]:
    found = words(text)
    known = continual_words()
    for word in found:
        if word not in known:
            raise ConfigError(f"--tasks: unknown task {word!r}; choices: {', '.join(known)}")
    return found


class ContinualSettings(Section):
    """Settings of all tasks of continual learning; each records those that it depends on.

    tasks: null takes those that the run and the other settings allow. shots, tests_per_class, pieces_per_document: null
    is all; pieces are the run's own unless set. set_back_to: border of the lesions. reading_documents: longest held-out
    documents in which ticks of reading are studied. mentions: sentences about a fact in an epoch. vocabulary: words of
    an invented language.
    """

    tasks: Annotated[
        tuple[str, ...] | None,
        Option(
            f"{' '.join(continual_words())}, commas between; all that the run and the options allow by default.",
            read=_task_words,
        ),
    ] = None
    oracle: Annotated[Path | None, Option("Run that read the same text mixed, for `regret`.", metavar="RUN")] = None
    class_data: Annotated[Path | None, Option("Folder with clinc150, banking77 and dbpedia14.", metavar="FOLDER")] = (
        None
    )
    class_sets: Annotated[
        tuple[Literal["clinc150", "banking77", "dbpedia14"], ...],
        Option("Which of them, commas between.", read=words, shown="clinc150,banking77,dbpedia14"),
    ] = ("clinc150", "banking77", "dbpedia14")
    class_hash: Annotated[str | None, Option("Accept a copy with this content hash.")] = None
    shots: Annotated[
        tuple[Count | None, ...], Option("Examples of a class, such as 5,20,all.", read=counts_or_all, shown="5")
    ] = (5,)
    random_orders: Annotated[Natural, Option("Random orders of the classes beside their own.")] = 0
    tests_per_class: Annotated[Count | None, Option("Questions of a class, or all.", read=count_or_all, shown="5")] = 5
    entities: Annotated[Count, Option("Entities of the world of changing facts.")] = 20
    attributes: Annotated[int, Field(ge=1, le=6)] = 3
    epochs: Annotated[int, Field(ge=2), Option("How often that world is told.")] = 4
    changed_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    mentions: Count = 2
    vocabulary: Annotated[int, Field(ge=8)] = 24
    lesson_sentences: Annotated[Count, Option("Sentences that teach a language.")] = 64
    test_sentences: Annotated[Count, Option("Sentences to translate.")] = 20
    pieces_per_document: Annotated[
        Count | None,
        Option(
            "Contexts scored of each held-out document, or all; as many as the run's own by default.",
            read=count_or_all,
            name="--pieces",
        ),
    ] = 6
    reading_documents: Count = 8
    set_back_to: Annotated[str, Field(pattern=r"^period-\d+$"), Option("Border that lesions set a level back to.")] = (
        "period-0"
    )
    permutations: Annotated[int, Field(ge=100), Option("Of the permutation tests.")] = 10_000
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    seed: Annotated[Natural, Option("The same seed draws the same questions and permutations.")] = 0
    batch_size: Annotated[Count, Option("Documents or questions read side by side.")] = 8
    max_state_mib: Annotated[Count, Option("Refuse a stream whose state takes more memory.")] = 1024

    def of_run(self, run: EvalConfig) -> "ContinualSettings":
        """These, with what was not set as the run sets it for its matrix, so that both read the same text."""
        if "pieces_per_document" in self.model_fields_set:
            return self
        return self.model_copy(update={"pieces_per_document": run.continual.pieces_per_document})
