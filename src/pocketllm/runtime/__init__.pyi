# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .decode import Matrices as Matrices
