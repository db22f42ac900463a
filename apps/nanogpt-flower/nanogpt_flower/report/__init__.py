"""Write the report of a run, `report.html`, from the files in the run's directory.

The report is one file without any external address. It needs no other file, no network and no
JavaScript.
"""

from nanogpt_flower.report.comparison_page import name_of, write_comparison
from nanogpt_flower.report.data import ReportError
from nanogpt_flower.report.run_page import write_report

__all__ = ["ReportError", "name_of", "write_comparison", "write_report"]
