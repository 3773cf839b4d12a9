"""The picture grids and the self-contained HTML page that a run leaves behind."""

from shielded.runs.report.grid import diversity_grid, protection_grid, stack
from shielded.runs.report.page import write_report
from shielded.runs.report.plots import distance_plot, trace_plot
from shielded.runs.report.rows import Diversity, Row

__all__ = [
    "Diversity",
    "Row",
    "distance_plot",
    "diversity_grid",
    "protection_grid",
    "stack",
    "trace_plot",
    "write_report",
]
