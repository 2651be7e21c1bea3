# The public names and the modules that define them; __init__.py imports a name when it is used.
from .default_texts import (
    default_text as default_text,
    evaluation_text as evaluation_text,
    evaluation_texts as evaluation_texts,
)
from .read import read_calibration as read_calibration, read_text as read_text
from .vocabulary import positions_of as positions_of
from .windows import calibration_windows as calibration_windows, token_windows as token_windows
