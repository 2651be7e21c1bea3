# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .progress import Event as Event
from .several_targets import compress_targets as compress_targets, target_names as target_names
