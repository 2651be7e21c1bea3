# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .adapter import (
    attach_adapter as attach_adapter,
    check_adapter as check_adapter,
    read_record as read_record,
)
from .chain import check_recovery as check_recovery, compress_and_distill as compress_and_distill
from .distill import Distilled as Distilled, dry_run_distill as dry_run_distill
from .lora import Adapted as Adapted, dry_run_lora as dry_run_lora
from .merge import Merged as Merged
