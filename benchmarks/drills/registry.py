"""All drills. A new one is one line here, and a row of `docs/reliability.md`."""

from benchmarks.drills import damage, presets, training
from benchmarks.drills.drill import Drill

_ALL = (
    Drill("kills", "no committed step is lost; the run ends bit for bit as one left alone", 200, training.kills),
    Drill("crash_points", "the same, killed before any file operation of a checkpoint", 200, training.crash_points),
    Drill("full_disk", "training goes on, or ends with exit code 2; nothing is lost", 200, training.full_disk),
    Drill("second_starts", "of two starts one trains, the other is refused", 100, training.second_starts),
    Drill("unreadable", "the checkpoint before is used", 40, training.unreadable),
    Drill("flips", "one flipped bit of any stored file is noticed", 20_000, damage.flips),
    Drill("malformed", "nonsense in any stored file is one clear error", 10_000, damage.malformed),
    Drill("presets", "a damaged preset is loaded or refused in 5 s", 10_000, presets.presets),
)
DRILLS = {drill.name: drill for drill in _ALL}
