# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .allocate import make_plan as make_plan
from .checkpoint import (
    REPORT_NAME as REPORT_NAME,
    check_dense as check_dense,
    folder_bytes as folder_bytes,
    is_compressed as is_compressed,
    read_layout as read_layout,
    read_report as read_report,
    verify as verify,
)
from .compress import Event as Event
from .compute import fast_dtype as fast_dtype
from .decode import Matrices as Matrices
from .folder import load_dense as load_dense, need_tokenizer as need_tokenizer
from .layers import fold as fold, unfold as unfold
from .layout import Layout as Layout
from .limits import positions_of as positions_of
from .plan import (
    CODEWORD_BITS as CODEWORD_BITS,
    ROW_SCALE_BITS as ROW_SCALE_BITS,
    Dense as Dense,
    Matrix as Matrix,
    Plan as Plan,
    Spec as Spec,
    classify as classify,
    predicted_nmse as predicted_nmse,
    trellis_nmse as trellis_nmse,
)
from .report import (
    MatrixReport as MatrixReport,
    counting_adapter as counting_adapter,
    weighted_mean as weighted_mean,
)
from .source import (
    DenseCheckpoint as DenseCheckpoint,
    open_dense as open_dense,
    resolve as resolve,
    resolve_local as resolve_local,
)
from .target import possible_bpw as possible_bpw
