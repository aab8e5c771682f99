import io

from rich.console import Console

from nested_lm.train.console import TrainConsole


def record(step):
    return {
        "event": "step",
        "step": step,
        "loss": 2.34567,
        "tokens_per_s": 12345.6,
        "memory_mb": 512.4,
        "seconds": 2.0 * step,
    }


def show(*, terminal, steps, every=2):
    out = io.StringIO()
    console = TrainConsole(
        "tiny",
        total_steps=1000,
        done_steps=0,
        every_steps=every,
        console=Console(file=out, force_terminal=terminal, width=120),
    )
    for step in steps:
        console.step(record(step))
    console.note("validation [0.5] bits")
    console.close()
    return out.getvalue()


def test_plain_lines_when_not_a_terminal():
    lines = show(terminal=False, steps=range(1, 6)).splitlines()
    assert lines == [
        "step 2/1000  loss 2.3457  12,346 tokens/s  512 MB  0:33:16 left",
        "step 4/1000  loss 2.3457  12,346 tokens/s  512 MB  0:33:12 left",
        "validation [0.5] bits",
    ]


def test_the_last_step_is_always_shown():
    assert "step 1000/1000" in show(terminal=False, steps=[1000], every=7)


def test_a_terminal_shows_progress_and_figures():
    shown = show(terminal=True, steps=[1, 500])
    for wanted in ("tiny", "500/1000", "loss 2.3457", "12,346 tokens/s", "512 MB", "validation [0.5] bits"):
        assert wanted in shown
