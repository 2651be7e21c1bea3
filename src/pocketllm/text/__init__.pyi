# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .read import (
    calibration_windows as calibration_windows,
    default_text as default_text,
    read_calibration as read_calibration,
)
from .vocabulary import positions_of as positions_of
