"""The fifteen benchmarks of the paper and tasks of the user's own: rows, and how an answer is read and judged."""

from rosa.evaluation.tasks.answers import extract_answer, is_correct
from rosa.evaluation.tasks.arithmetic import ARITHMETIC
from rosa.evaluation.tasks.benchmarks import TASKS
from rosa.evaluation.tasks.commonsense import COMMONSENSE
from rosa.evaluation.tasks.loading import find_tasks, load_test_rows
from rosa.evaluation.tasks.task import Task

__all__ = [
    "ARITHMETIC",
    "COMMONSENSE",
    "TASKS",
    "Task",
    "extract_answer",
    "find_tasks",
    "is_correct",
    "load_test_rows",
]
