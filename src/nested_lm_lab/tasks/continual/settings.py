"""What `nested-lm eval continual` measures, as given on the command line and as written into result files."""

from typing import Annotated, Literal

from pydantic import Field

from nested_lm.config.evaluation import EvalConfig
from nested_lm.config.section import Count, Section
from nested_lm_lab.evaluation.interval import Natural


class ContinualSettings(Section):
    """Settings of all tasks; each records those that it depends on."""

    seed: Natural = 0
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    permutations: Annotated[int, Field(ge=100)] = 10_000
    batch_size: Count = 8
    pieces_per_document: Count | None = 6  # contexts scored of each document; null: all; the run's own unless set
    reading_documents: Count = 8  # longest held-out documents in which ticks of reading are studied
    max_state_mib: Count = 1024
    set_back_to: Annotated[str, Field(pattern=r"^period-\d+$")] = "period-0"  # of the lesions
    class_sets: tuple[Literal["clinc150", "banking77", "dbpedia14"], ...] = ("clinc150", "banking77", "dbpedia14")
    class_hash: str | None = None  # content of a copy that is not in the list of known ones
    shots: tuple[Count | None, ...] = (5,)  # null: all
    random_orders: Natural = 0  # beside the order given
    tests_per_class: Count | None = 5  # null: all
    entities: Count = 20
    attributes: Annotated[int, Field(ge=1, le=6)] = 3
    epochs: Annotated[int, Field(ge=2)] = 4
    changed_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    mentions: Count = 2  # sentences about a fact in an epoch
    vocabulary: Annotated[int, Field(ge=8)] = 24  # words of an invented language
    lesson_sentences: Count = 64
    test_sentences: Count = 20

    def of_run(self, run: EvalConfig) -> "ContinualSettings":
        """These, with what was not set as the run sets it for its matrix, so that both read the same text."""
        if "pieces_per_document" in self.model_fields_set:
            return self
        return self.model_copy(update={"pieces_per_document": run.continual.pieces_per_document})
