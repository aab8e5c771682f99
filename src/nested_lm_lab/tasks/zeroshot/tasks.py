"""The zero-shot tasks: which task of the harness, which of its metrics is printed, and what its data are."""

from dataclasses import dataclass
from typing import Literal

from nested_lm.errors import ConfigError

HARNESS_VERSION = "0.4.13"
"""The one release of lm-eval whose task files and metrics are used: scores move between releases."""

VERSION = "1"
"""Of the measurement: raised when the same checkpoint would get another score."""

Metric = Literal["word_perplexity", "bits_per_byte", "perplexity", "acc", "acc_norm"]


@dataclass(frozen=True)
class ZeroShotTask:
    """One task of the harness.

    files: its task file below `lm_eval/tasks`, then what it includes and calls. sha256: of them, by `hash_of_files`.
    dataset, subset, split: on the Hugging Face hub. documents: of that split, as published.
    known_copy: `digest_of_documents` of the copy that this project was measured with.
    printed: metrics of the papers' tables, first the one the task is judged by.
    fields: of a document. other_stems: file names that are understood when a data folder is made.
    """

    name: str
    files: tuple[str, ...]
    sha256: str
    dataset: str
    subset: str | None
    split: Literal["validation", "test"]
    documents: int
    known_copy: str
    printed: tuple[Metric, ...]
    fields: tuple[str, ...]
    licence: str
    other_stems: tuple[str, ...] = ()


_ARC_FIELDS = ("question", "choices", "answerKey")

_TASKS = (
    ZeroShotTask(
        "wikitext",
        ("wikitext/wikitext.yaml", "wikitext/preprocess_wikitext.py"),
        "a4f843bb9554e796ad063ddf0296dddeab78ece379d09eb30c36fe4dc5c06de3",
        "EleutherAI/wikitext_document_level",
        "wikitext-2-raw-v1",
        "test",
        62,
        "f267595c529dc14affc176ca05948014d5b035ee8421c4528bfc778bcd7c2b50",
        ("word_perplexity", "bits_per_byte"),
        ("page",),
        "CC BY-SA 3.0",
        ("wikitext2_test_pages", "wikitext2"),
    ),
    ZeroShotTask(
        "lambada_openai",
        ("lambada/lambada_openai.yaml",),
        "f9b82d578cb6b4150d07fa8720af748cbeed325ee6724b4ebe1135512c1499cd",
        "EleutherAI/lambada_openai",
        "default",
        "test",
        5153,
        "05ae9755847286957976eca1a513750eeb542019e97af8837baa488483398d78",
        ("perplexity", "acc"),
        ("text",),
        "MIT",
        ("lambada",),
    ),
    ZeroShotTask(
        "piqa",
        ("piqa/piqa.yaml",),
        "936bc15be77c87a94e2147c1e4f5531571aa4f94cdf422daff74c060ed7cf46b",
        "baber/piqa",
        None,
        "validation",
        1838,
        "256cd78377a0090efcbc05662c15821c9b60f98a708bf48115d0d9af80c67313",
        ("acc",),
        ("goal", "sol1", "sol2", "label"),
        "AFL-3.0",
    ),
    ZeroShotTask(
        "hellaswag",
        ("hellaswag/hellaswag.yaml", "hellaswag/utils.py"),
        "652027d438d4bc2f23b3525f7e3f255eae0be75cff322d0b7f28bfebf28484c0",
        "Rowan/hellaswag",
        None,
        "validation",
        10042,
        "5ffd26fe94bc16e9443a395e80bcd21193d9fff0746e104c23485dc7378a6a7c",
        ("acc_norm",),
        ("query", "choices", "label"),
        "MIT",
        ("hellaswag_prepped",),
    ),
    ZeroShotTask(
        "winogrande",
        ("winogrande/default.yaml", "winogrande/preprocess_winogrande.py"),
        "abf47611da8131be4ea5450e1189203de902c8c6d00593f45bf59e62f03b1509",
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
        1267,
        "b8e68e02d5a6bfba442cdcefc974833ca56986d02ab807ed05227cd927b3eebb",
        ("acc",),
        ("sentence", "option1", "option2", "answer"),
        "CC BY",
    ),
    ZeroShotTask(
        "arc_easy",
        ("arc/arc_easy.yaml",),
        "34a125d90c07d48ca3ab0c9d3904e13ada169f3acd882c9609cc50c55e405eb9",
        "allenai/ai2_arc",
        "ARC-Easy",
        "test",
        2376,
        "72c9c73164bdd3ae09308d42e1699248dfa4f887c0bfe58cf158afcf092f3d67",
        ("acc",),
        _ARC_FIELDS,
        "CC BY-SA 4.0",
    ),
    ZeroShotTask(
        "arc_challenge",
        ("arc/arc_challenge.yaml", "arc/arc_easy.yaml"),
        "053c856861cea55bebc3608c30ff01e397e64a080b6cd8697c6d481c25a1b101",
        "allenai/ai2_arc",
        "ARC-Challenge",
        "test",
        1172,
        "27b6a48a80b36e987fbd5d7adda3b18279a6d169e49748435998739cde490604",
        ("acc_norm",),
        _ARC_FIELDS,
        "CC BY-SA 4.0",
    ),
    ZeroShotTask(
        "social_iqa",
        ("siqa/siqa.yaml",),
        "567aa1f3370ff3176eb6082ce529c661f131483ff118144df3b5eeaf3631f071",
        "lighteval/siqa",
        None,
        "validation",
        1954,
        "4e39612f1d7596b0a7d27ce0009e2562b22e6ed7edf3684ea3db89ac580fbc14",
        ("acc",),
        ("context", "question", "answerA", "answerB", "answerC", "label"),
        "CC BY 4.0",
        ("siqa",),
    ),
    ZeroShotTask(
        "boolq",
        ("super_glue/boolq/default.yaml",),
        "02f3e28abc7fcc3341a5621310cc7c56a8ab90da78334a658db372e7b3242a67",
        "aps/super_glue",
        "boolq",
        "validation",
        3270,
        "8b4e2455903036e07e5f880f4d41d25597a3c3b5160b1e1ee788bd44acf4d22e",
        ("acc",),
        ("question", "passage", "label"),
        "CC BY-SA 3.0",
    ),
    ZeroShotTask(
        "commonsense_qa",
        ("commonsense_qa/default.yaml",),
        "d29387a27f43defd29bb30182c9ed6e9df5476af6fd763a06ebd2f5fb1b7d546",
        "tau/commonsense_qa",
        None,
        "validation",
        1221,
        "a635c718f415db17bd7b00dc44b2369993444bb43967fd26dab88da1a259cc49",
        ("acc",),
        _ARC_FIELDS,
        "MIT",
        ("csqa",),
    ),
    ZeroShotTask(
        "openbookqa",
        ("openbookqa/openbookqa.yaml",),
        "1185d586c0900d4fdaabb29d57514c3de875830c191b0316b835e1fce24e7a42",
        "allenai/openbookqa",
        "main",
        "test",
        500,
        "d558cc5b6cf7d453dfd6f82ac13fd9fc4c1285ded7956340fd5637669ced4795",
        ("acc_norm",),
        ("question_stem", "choices", "answerKey"),
        "Apache-2.0",
        ("obqa",),
    ),
)

TASKS = {task.name: task for task in _TASKS}

GROUPS = {
    "all": tuple(TASKS),
    "paper": tuple(name for name in TASKS if name not in ("commonsense_qa", "openbookqa")),
}
"""Names that stand for several tasks. paper: the columns of the papers' tables."""

AVERAGED = tuple(name for name in GROUPS["paper"] if name != "wikitext")
"""The tasks whose accuracies make the papers' average."""


def choose_tasks(text: str) -> tuple[str, ...]:
    """Names of the tasks that a list with commas names, in the order of the tables.

    Raises:
        ConfigError: an unknown name, or none.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"--tasks {text!r} names no task; write all, paper or names with commas between")
    wanted: set[str] = set()
    for word in words:
        if word not in GROUPS and word not in TASKS:
            raise ConfigError(f"--tasks: unknown task {word!r}; choices: {', '.join([*GROUPS, *TASKS])}")
        wanted.update(GROUPS.get(word, (word,)))
    return tuple(name for name in TASKS if name in wanted)


def printed_accuracy(task: ZeroShotTask) -> Metric | None:
    """The accuracy that the papers print of a task; None where they print none."""
    return next((metric for metric in task.printed if metric in ("acc", "acc_norm")), None)
