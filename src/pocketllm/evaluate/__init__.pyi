# The public names and the modules that define them; __init__.py imports a name when it is used.
from .bench_runs import BenchConfig as BenchConfig, BenchRun as BenchRun, bench as bench
from .generate import Generation as Generation, Sampling as Sampling, generate_batch as generate_batch
from .kl import Divergence as Divergence, standard_error as standard_error, text_divergence as text_divergence
from .local_tasks import local_task_digest as local_task_digest, local_task_names as local_task_names
from .measure import Adapter as Adapter, Model as Model, TaskOptions as TaskOptions
from .own_process import import_all as import_all, peak_bytes as peak_bytes
from .own_texts import check_free as check_free, sample_texts as sample_texts
from .perplexity import Perplexity as Perplexity
from .tasks import (
    PAPER_TASKS as PAPER_TASKS,
    Subject as Subject,
    TaskResult as TaskResult,
    evaluate_tasks as evaluate_tasks,
    task_names as task_names,
)
from .verify import verify_compressed as verify_compressed
