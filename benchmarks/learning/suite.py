"""All tasks of the suite."""

from benchmarks.learning.clock import CLOCK
from benchmarks.learning.continuous import POINT_TASKS
from benchmarks.learning.protocol import Task
from benchmarks.learning.tasks import TOKEN_TASKS

TASKS: dict[str, Task] = {task.name: task for task in (*TOKEN_TASKS, *POINT_TASKS, CLOCK)}
