"""One call from inputs to a published, verified output: job → plan → download → run → publish → verify."""

from streamconv.pipeline.calls import convert, merge, plan
from streamconv.pipeline.contents import check_contents
from streamconv.pipeline.downloads import fetch
from streamconv.pipeline.job import build_job, merge_options, output_folder
from streamconv.pipeline.place import check_out, further_outputs
from streamconv.pipeline.preparation import Prepared, prepare
from streamconv.pipeline.pushing import push, push_output
from streamconv.pipeline.runner import run
from streamconv.pipeline.verification import verify
from streamconv.planning.options import Job

__all__ = [
    "Job",
    "Prepared",
    "build_job",
    "check_contents",
    "check_out",
    "convert",
    "fetch",
    "further_outputs",
    "merge",
    "merge_options",
    "output_folder",
    "plan",
    "prepare",
    "push",
    "push_output",
    "run",
    "verify",
]
