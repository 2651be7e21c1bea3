# What is public here and the module that defines it; __init__.py imports a name when it is used.
from .card_figures import perplexity_figure as perplexity_figure, read_figures as read_figures
from .comparison import Compared as Compared, Comparison as Comparison, base_of as base_of, compare as compare
from .comparison_plot import check_picture as check_picture, draw as draw, save_picture as save_picture
from .evaluations import Evaluation as Evaluation, read_evaluations as read_evaluations
from .html_page import (
    Page as Page,
    check_html as check_html,
    default_output as default_output,
    html_report as html_report,
    only_read as only_read,
)
from .marks import Mark as Mark, mark as mark
from .model_facts import (
    MatrixFacts as MatrixFacts,
    ModelFacts as ModelFacts,
    block_of as block_of,
    read_model as read_model,
)
from .svg import drawing as drawing, need_matplotlib as need_matplotlib, png_and_svg as png_and_svg
from .tables import short as short
