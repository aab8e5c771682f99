"""All tasks of the suite."""

from benchmarks.learning.clock import CLOCK
from benchmarks.learning.continuous import POINT_TASKS
from benchmarks.learning.protocol import Task
from benchmarks.learning.recall import RECALL_TASKS
from benchmarks.learning.tasks import TOKEN_TASKS

GROUPS: dict[str, tuple[Task, ...]] = {
    "Formal languages and overwriting": TOKEN_TASKS,
    "Recall": RECALL_TASKS,
    "Points": POINT_TASKS,
    "Clocks": (CLOCK,),
}

TASKS: dict[str, Task] = {task.name: task for group in GROUPS.values() for task in group}
