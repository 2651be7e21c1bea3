# The public names and the modules that define them; __init__.py imports a name when it is used.
from .adapter import (
    attach_adapter as attach_adapter,
    check_adapter as check_adapter,
    read_record as read_record,
)
from .compress_then_distill import (
    check_recovery as check_recovery,
    compress_and_distill as compress_and_distill,
)
from .distill import DistillResult as DistillResult, dry_run_distill as dry_run_distill
from .lora import LoraResult as LoraResult, dry_run_lora as dry_run_lora
from .merge import MergeResult as MergeResult
