"""Pictures, sheets and curves: what the network finds, where it looks, what it is shown, how training goes.

A function that is given a path writes one file, whole or not at all (InputError where the disk is full). Nothing keeps
a state: figures are matplotlib's objects, without pyplot, without a display.
Colours are those of Okabe and Ito (2008), which colour-blind people tell apart; where green and red mean right and
wrong, the line and a sign say it as well. A sheet of nothing is a small sheet that says so.
"""

from core.visualize.curves import COCO_COLUMNS, COCO_NUMBERS, DETECTION_METRICS, METRICS, RETRIEVAL_METRICS, curves
from core.visualize.dataset import bar_figure, contact_sheet, histogram_figure, scatter_figure
from core.visualize.embedding import embedding_plot
from core.visualize.identification import comparison_sheet, identification_sheet
from core.visualize.instances import (
    PANELS,
    augmentation_preview,
    describe_instances,
    draw_instances,
    instance_panels,
    instance_sheet,
    precision_recall_curves,
)
from core.visualize.page import Card, index_page
from core.visualize.retrieval import RankRow, augmentation_sheet, heat_sheet, mask_sheet, rank_list_sheet
from core.visualize.sheet import GAP, JPEG, MARGIN, PALETTE

__all__ = [
    "Card",
    "COCO_COLUMNS",
    "COCO_NUMBERS",
    "DETECTION_METRICS",
    "GAP",
    "JPEG",
    "MARGIN",
    "METRICS",
    "PALETTE",
    "PANELS",
    "RETRIEVAL_METRICS",
    "RankRow",
    "augmentation_preview",
    "augmentation_sheet",
    "bar_figure",
    "comparison_sheet",
    "contact_sheet",
    "curves",
    "describe_instances",
    "draw_instances",
    "embedding_plot",
    "heat_sheet",
    "histogram_figure",
    "identification_sheet",
    "index_page",
    "instance_panels",
    "instance_sheet",
    "mask_sheet",
    "precision_recall_curves",
    "rank_list_sheet",
    "scatter_figure",
]
