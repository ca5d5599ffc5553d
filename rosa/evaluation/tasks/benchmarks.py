"""The fifteen benchmarks by name, and the names of their two groups."""

from rosa.evaluation.tasks.arithmetic import ARITHMETIC
from rosa.evaluation.tasks.commonsense import COMMONSENSE
from rosa.evaluation.tasks.task import Task

GROUPS: dict[str, tuple[Task, ...]] = {"commonsense": COMMONSENSE, "arithmetic": ARITHMETIC}
TASKS: dict[str, Task] = {task.name: task for group in GROUPS.values() for task in group}
