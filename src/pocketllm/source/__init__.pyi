# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .dense_checkpoint import (
    DenseCheckpoint as DenseCheckpoint,
    open_dense as open_dense,
    resolve as resolve,
    resolve_local as resolve_local,
)
from .folder import (
    load_dense as load_dense,
    need_tokenizer as need_tokenizer,
)
from .hub import (
    folder_of as folder_of,
    name_of as name_of,
)
from .model_text import text_for as text_for
