# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .generate import Generation as Generation
from .kl import Divergence as Divergence, standard_error as standard_error, text_divergence as text_divergence
from .local_tasks import local_task_digest as local_task_digest, local_task_names as local_task_names
from .measure import Adapter as Adapter, Model as Model, TaskOptions as TaskOptions
from .perplexity import Perplexity as Perplexity, read_text as read_text, token_windows as token_windows
from .tasks import (
    PAPER_TASKS as PAPER_TASKS,
    Subject as Subject,
    TaskResult as TaskResult,
    evaluate_tasks as evaluate_tasks,
    task_names as task_names,
)
from .texts import evaluation_text as evaluation_text, evaluation_texts as evaluation_texts
from .verify import verify_compressed as verify_compressed
