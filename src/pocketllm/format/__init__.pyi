# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .checkpoint import (
    REPORT_NAME as REPORT_NAME,
    check_dense as check_dense,
    folder_bytes as folder_bytes,
    is_compressed as is_compressed,
    read_layout as read_layout,
    read_report as read_report,
    verify as verify,
)
from .layout import Layout as Layout
from .model_card import Figure as Figure
from .output_file import check_target as check_target, write_atomically as write_atomically
from .publish import (
    check_push as check_push,
    push as push,
    write_card as write_card,
)
from .report import (
    MatrixReport as MatrixReport,
    counting_adapter as counting_adapter,
    weighted_mean as weighted_mean,
)
