"""Jobs: what a job is, and how one is run. No Ray, no Optuna, no MLflow."""

from isoflop.jobs.job import Job, MethodSpec, ResolvedJob
from isoflop.jobs.runner import Outcome, Runner

__all__ = ["Job", "MethodSpec", "Outcome", "ResolvedJob", "Runner"]
