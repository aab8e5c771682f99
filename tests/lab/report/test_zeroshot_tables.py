"""Tables of zero-shot tasks: floors, standard errors, memorising and the papers' rows beside every score."""

from dataclasses import replace

import pytest

from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.report.kinds import other_results
from nested_lm_lab.tasks.zeroshot.metrics import Arm, Code, Floors, TaskData, TaskScores, ZeroShotMetrics
from nested_lm_lab.tasks.zeroshot.settings import Memorize
from nested_lm_lab.tasks.zeroshot.summary import average_accuracy, intervals, paired_gain, standard_errors
from nested_lm_lab.tasks.zeroshot.tasks import AVERAGED, TASKS

BOOTSTRAP = Bootstrap(samples=100)
COUNT = 400
FLOORS = Floors(chance=0.25, constant=0.3, bigram={"acc": 0.28, "acc_norm": 0.28})


def scores(name, share, plain=None):
    """A task whose every metric comes from a share of right answers, or from nats and sizes."""
    metrics = dict.fromkeys(TASKS[name].printed)
    if "bits_per_byte" in metrics:
        values = {"nats": (60.0, 75.0), "words": (10.0, 12.0), "bytes": (50.0, 60.0)}
        found = {"bits_per_byte": 135.0 / 110.0 / 0.6931471805599453}
        found["word_perplexity"] = 2.718281828459045 ** (135.0 / 22.0)
    else:
        right = round(share * COUNT)
        values = {metric: (1.0,) * right + (0.0,) * (COUNT - right) for metric in metrics if metric != "perplexity"}
        found = dict.fromkeys(values, right / COUNT)
        if "perplexity" in metrics:
            values["nats"] = (3.0,) * COUNT
            found["perplexity"] = 2.718281828459045**3.0
    documents = len(next(iter(values.values())))
    return TaskScores(
        task=name,
        printed=TASKS[name].printed,
        documents=documents,
        cut=0,
        metrics=intervals(values, found, BOOTSTRAP),
        standard_errors=standard_errors(values, list(found)),
        gain=None if plain is None else paired_gain(name, plain, values, BOOTSTRAP),
        tokens_read=1000,
        tokens=3000,
        seconds=2.0,
        values=values,
    )


def arm(name, share, names, memorize=None, plain=None):
    entries = tuple(scores(task, share, None if plain is None else plain[task]) for task in names)
    return Arm(
        name=name,
        memorize=memorize,
        tasks=entries,
        average=average_accuracy(entries, BOOTSTRAP),
        tokens_per_s=500.0,
        seconds=2.0 * len(entries),
    )


def metrics(share, *, memorized=None, known=None):
    names = ("wikitext", *AVERAGED)
    arms = [arm("plain", share, names)]
    if memorized is not None:
        plain = {entry.task: entry for entry in arms[0].tasks}
        arms.append(arm("memorize x2", memorized, AVERAGED, Memorize(passes=2), plain))
    data = TaskData(
        task_version="1", task_files="0", source="x", file=None, split="test", documents="0", published=400, licence="x"
    )
    floors = dict.fromkeys(names, FLOORS) | {
        "wikitext": Floors(chance=None, constant=None, bigram={"word_perplexity": 900.0, "bits_per_byte": 2.0})
    }
    return ZeroShotMetrics(
        kind="zeroshot",
        code=Code(version="0", commit=None, harness="0.4.13"),
        data={name: data.model_copy(update={"published": 2 if name == "wikitext" else 400}) for name in names},
        floors=floors,
        bigram_tokens=1000,
        arms=tuple(arms),
    )


@pytest.fixture(scope="module")
def tables(complete):
    """Hope near chance, with an arm that memorises; Transformer++ above every floor, without."""
    runs = [
        replace(
            run,
            results={
                "zeroshot": run.results["passkey"].model_copy(
                    update={"task": "zeroshot", "metrics": one, "settings": {"max_length": 256, "limit": None}}
                )
            },
        )
        for run, one in zip(complete.runs, (metrics(0.25, memorized=0.5), metrics(0.5)), strict=False)
    ]
    found = {}
    for shown in other_results(replace(complete, runs=tuple(runs))):
        rows = {
            (row[0].text, row[0].detail): [(cell.text, cell.detail) for cell in row[1:]] for row in shown.table.rows
        }
        found[shown.title] = (shown.text, rows, shown.table)
    return found


def test_scores_stand_beside_floors_and_standard_errors(tables):
    _, rows, table = tables["Zero-shot"]
    assert table.header == ("task", "chance", "constant answer", "bigram", "Hope", "Transformer++")
    chance, constant, bigram, hope, _ = rows["piqa", "accuracy"]
    assert (chance[0], constant[0], bigram[0]) == ("0.250", "0.300", "0.280")
    assert hope[0] == "0.250 ± 0.022"
    assert rows["wikitext", "bits per byte"][2:4] == [("2.000", ""), rows["wikitext", "bits per byte"][3]]
    assert rows["wikitext", "bits per byte"][3][0] == "1.771"
    assert rows["lambada_openai", "accuracy"][3][0].startswith("0.250")
    mean = rows["mean of the 8 accuracies", "as the papers average"]
    assert [cell[0] for cell in mean] == ["0.250", "0.300", "0.280", "0.250", "0.500"]


def test_near_chance_is_said_of_the_arm_that_is(tables):
    text = tables["Zero-shot"][0]
    assert "Hope: 0 of 8 accuracies above every floor with the whole interval. It is near chance." in text
    assert "Transformer++: 8 of 8 accuracies above every floor" in text
    assert text.count("near chance") == 1
    assert "WikiText: Hope needs 1.771 bits per byte, 0.229 below the bigram's 2.000" in text


def test_lengths_cuts_limits_and_unknown_copies_are_said(tables, complete):
    text = tables["Zero-shot"][0]
    assert "At most 256 tokens of a document are read; perplexities depend on it." in text
    assert not any(word in text for word in ("--limit", "cut at", "Not all", "known copy"))
    found = metrics(0.5)
    plain = found.arms[0]
    entries = tuple(entry.model_copy(update={"cut": 7}) if entry.task == "boolq" else entry for entry in plain.tasks)
    data = found.data | {
        "boolq": found.data["boolq"].model_copy(update={"published": 3270, "known_copy": True}),
        "piqa": found.data["piqa"].model_copy(update={"known_copy": False}),
        "wikitext": found.data["wikitext"].model_copy(update={"published": 62}),
    }
    changed = found.model_copy(update={"arms": (plain.model_copy(update={"tasks": entries}),), "data": data})
    run = complete.runs[0]
    result = run.results["passkey"].model_copy(
        update={"task": "zeroshot", "metrics": changed, "settings": {"max_length": 64, "limit": COUNT}}
    )
    text = other_results(replace(complete, runs=(replace(run, results={"zeroshot": result}),)))[0].text
    assert text.endswith(
        "At most 64 tokens of a document are read; perplexities depend on it. "
        "Documents cut at their beginning: boolq 7 of 400. "
        "--limit took the beginning of each task, not a sample: boolq the first 400 of 3,270. "
        "Not all documents: wikitext 2 of 62. "
        "Not a known copy of the documents: piqa."
    )


def test_memorising_stands_beside_the_plain_score_and_only_where_it_was_measured(tables):
    _, rows, _ = tables["Zero-shot after memorising"]
    hope, transformer = rows["memorize x2: piqa", "accuracy"]
    assert hope[0] == "0.500"
    assert hope[1].startswith("plain 0.250; gain +0.250, +0.2")
    assert transformer == ("-", "")
    assert not any("wikitext" in name for name, _ in rows)  # no question after the text
    assert rows["memorize x2: mean of the 8 accuracies", ""][0][1].endswith("plain 0.250")


def test_the_papers_rows_are_printed_whole_and_are_no_contestants(tables):
    text, rows, table = tables["Zero-shot: the papers' rows"]
    assert "not comparable with ours" in text
    assert table.muted[:3] == (False, False, True)
    printed = rows["Titans (LMM)", "340M, 15B tokens; arXiv 2501.00663, Table 1"]
    assert [cell[0] for cell in printed] == [
        *("26.18", "-", "29.97", "34.98", "64.73", "39.61", "51.85", "55.60", "28.14", "34.52", "59.99", "46.17")
    ]


def test_time_and_speed_are_told(tables):
    _, rows, _ = tables["Zero-shot: time"]
    assert rows["plain", "scoring"][0][0] == "500 tokens/s"
    assert "9,000 tokens read instead of 27,000" in rows["plain", "scoring"][0][1]
    assert rows["memorize x2", "scoring"][1] == ("-", "")
    assert rows["whole evaluation", "wall time"][0][0]
