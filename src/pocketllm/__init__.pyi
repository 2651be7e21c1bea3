# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .compression.pipeline import compress as compress, dry_run as dry_run
from .config import (
    PRESETS as PRESETS,
    CodecConfig as CodecConfig,
    CompressConfig as CompressConfig,
    DistillConfig as DistillConfig,
    LoopConfig as LoopConfig,
    LoraTuneConfig as LoraTuneConfig,
    preset as preset,
)
from .errors import PocketError as PocketError
from .evaluate.generate import generate as generate
from .evaluate.measure import measure as measure
from .evaluate.perplexity import perplexity as perplexity
from .format.publish import push as push
from .format.report import Report as Report
from .recover.distill import distill as distill
from .recover.lora import lora as lora
from .recover.merge import merge as merge
from .runtime.export import export as export
from .runtime.load_model import load as load

__version__: str
