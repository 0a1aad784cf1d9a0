"""Plans: a prior as a flat list of operations, and when each can run.

A prior is known here by its writer, which a file of its own registers with :func:`writes`; those of this package are
imported below.
"""

from fastvq.sampling.plan import pixelcnn as pixelcnn
from fastvq.sampling.plan import pixelsnail as pixelsnail
from fastvq.sampling.plan import plain_pixelcnn as plain_pixelcnn
from fastvq.sampling.plan.analysis import schedule
from fastvq.sampling.plan.form import History, Op, Plan, Tap, Term, require_finite
from fastvq.sampling.plan.front import Front
from fastvq.sampling.plan.graph import Graph
from fastvq.sampling.plan.recognise import Part
from fastvq.sampling.plan.writers import compile_plan, has_writer, why_no_plan, writes

__all__ = [
    "Front",
    "Graph",
    "History",
    "Op",
    "Part",
    "Plan",
    "Tap",
    "Term",
    "compile_plan",
    "has_writer",
    "require_finite",
    "schedule",
    "why_no_plan",
    "writes",
]
