# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .bit_allocation import make_plan as make_plan
from .matrices import (
    CODEWORD_BITS as CODEWORD_BITS,
    ROW_SCALE_BITS as ROW_SCALE_BITS,
    Dense as Dense,
    Matrix as Matrix,
    Plan as Plan,
    Spec as Spec,
)
from .selection import classify as classify
from .target import possible_bpw as possible_bpw
