# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .definition import Finding as Finding, Setup as Setup, Step as Step, Study as Study, Table as Table
from .registry import STUDIES as STUDIES, load as load
from .runner import Outcome as Outcome, dry_run as dry_run, run_study as run_study
from .verdicts import Verdict as Verdict
